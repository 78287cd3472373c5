"""Text in and text out: a scorer in a token classifier, words of a tokenizer, and budgets for the parts of a prompt."""

import copy
import re

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

import hf_tokens
from hf_tokens import ConfigError, LLMLingua2Config, SelectionPConfig, UnsupportedError, compress_prompt, get_token_model
from hf_tokens.engine.block import BlockSurgery
from hf_tokens.model import families
from hf_tokens.testing import zoo
from hf_tokens.tools.texts import forced_spans, read_text, split_words, trim, write_text

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;'!?()<>|_-"
TEXT = "<|im_start|>user\nThe meeting, on 12 May (a Tuesday), began at 9:30.\n\nIt was long;  nobody liked it.<|im_end|>\n"
FORCED = ["<|im_start|>", "<|im_end|>", "\n"]


def wordpiece(length=512):
    """A tokenizer like BERT's that knows single characters."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS)])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **special)


TOKENIZER = wordpiece()


def classifier(seed=0, **more):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(TOKENIZER), **more)
    return BertForTokenClassification(BertConfig(**sizes, initializer_range=0.5)).eval()


def scorer(**knobs):
    return get_token_model(classifier(), LLMLingua2Config(**knobs))


def compress(model, prompt, **more):
    return compress_prompt(model, prompt, **{"tokenizer": TOKENIZER, **more})


def is_cut_from(short, text):
    """Whether its characters but spaces stand in the text, in this order."""
    rest = iter(text)
    return all(character in rest for character in short if character != " ")


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.8])
def test_what_comes_out_is_made_of_the_given_characters(rate):
    short = compress(scorer(rate=rate), TEXT)
    assert is_cut_from(short, TEXT) and 0 < len(short) < len(TEXT)


@pytest.mark.parametrize("text", [TEXT, "  Ünïcode \u4f60\u597d, and\ttabs \n", "x"])
def test_at_rate_one_a_text_comes_back(text):
    assert compress(scorer(rate=1.0), text) == text
    read = read_text(text, TOKENIZER, FORCED)
    assert write_text(read, [True] * len(read.words)) == text


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_forced_texts_stay_wherever_they_stand(rate):
    short = compress(scorer(rate=rate), TEXT, force_tokens=FORCED)
    for word in FORCED:
        assert short.count(word) == TEXT.count(word)


def test_a_forced_word_is_no_part_of_another():
    short = compress(scorer(rate=0.2), [("The other: there the end", 0.2)], force_tokens=["the", "The"])
    assert re.findall(r"\bthe\b", short, re.IGNORECASE) == ["The", "the"] and "there" not in short.split()[:1]


def test_digits_stay_where_they_are_asked_for():
    assert {*re.findall(r"\d+", compress(scorer(rate=0.3, force_reserve_digit=True), TEXT))} == {"12", "9", "30"}


def test_parts_have_budgets_of_their_own():
    instruction, question = "Answer in one word.\n\n", "\n\nWhich day was it?"
    short = compress(scorer(), [(instruction, 1.0), (TEXT, 0.3), (question, 1.0)])
    assert short.startswith(instruction) and short.endswith(question)
    assert short[len(instruction) : -len(question)] == compress(scorer(rate=0.3), TEXT)


def test_a_number_of_tokens_is_a_budget():
    sizes = []
    for most in (10, 20, 40):
        short = compress(scorer(), [("Keep this. ", 1.0), TEXT], max_tokens=most).removeprefix("Keep this. ")
        sizes.append(len(TOKENIZER(short, add_special_tokens=False)["input_ids"]))
        assert sizes[-1] <= most
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


class Characters:
    """Counts each character as a token."""

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[0] * len(text) for text in texts]}


def test_budgets_count_the_tokens_of_another_tokenizer():
    texts = [compress(scorer(), TEXT, max_tokens=30), compress(scorer(), TEXT, max_tokens=30, counted_by=Characters())]
    assert len(texts[1]) <= 30 < len(TEXT) and texts[0] != texts[1]


def test_contexts_go_as_a_whole():
    contexts = [f"Context {word} says that it is {word}.\n\n" for word in ("alpha", "beta", "gamma", "delta")]
    short = compress(scorer(rate=0.5, context_rate=0.5), [("Read.\n", 1.0), *contexts])
    there = [word for word in ("alpha", "beta", "gamma", "delta") if any(c in short for c in (word,))]
    assert short.startswith("Read.\n") and short.count("\n\n") == 2 and len(there) <= 2


def test_long_texts_are_read_in_chunks_that_end_behind_sentences():
    tokenizer, model = wordpiece(64), scorer(rate=0.5)
    sentences = [f"Sentence {i} of some words. " for i in range(12)]
    whole = compress(model, "".join(sentences), tokenizer=tokenizer)
    pairs = ["".join(sentences[i : i + 2]) for i in range(0, 12, 2)]  # each has 46 to 48 tokens
    assert whole.replace(" ", "") == "".join(compress(model, pair, tokenizer=tokenizer) for pair in pairs).replace(" ", "")
    assert whole == compress(model, "".join(sentences), tokenizer=tokenizer, batch_size=1)


def test_a_word_longer_than_a_chunk_is_read_by_its_beginning():
    assert is_cut_from(compress(scorer(rate=0.5), "a b " + "c" * 99 + " d e.", tokenizer=wordpiece(16)), "a b " + "c" * 99 + " d e.")


def test_of_ids_each_is_a_word_and_padding_goes():
    ids, mask = torch.randint(5, 50, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    model = scorer(rate=0.5)
    short = compress_prompt(model, ids, mask)
    (alone,) = compress_prompt(model, ids[1:, :7])
    assert len(short[0]) == 6 and torch.equal(short[1], alone) and is_cut_from(map(chr, alone.tolist()), map(chr, ids[1].tolist()))


def test_a_forward_is_the_classifier_s_and_the_adapter_is_saved(tmp_path):
    model, ids = scorer(rate=0.3), torch.randint(5, 50, (2, 12))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, classifier()(ids).logits)
    model.save_pretrained(tmp_path)
    assert compress(hf_tokens.load(tmp_path, classifier()), TEXT) == compress(model, TEXT)


def test_a_reducer_takes_text_too():
    model = get_token_model(zoo.build("llama").model, SelectionPConfig(keep=0.5, layers=(1,)))
    table = model.get_input_embeddings().num_embeddings
    assert table < len(TOKENIZER)
    model.resize_token_embeddings(len(TOKENIZER))
    short = compress(model, "A short text of words.")
    assert is_cut_from(short, "A short text of words.") and len(short) < 22
    with pytest.raises(UnsupportedError, match="are for a scorer"):
        compress(model, [("A", 1.0), "b"])


# text -> its tokens as a tokenizer gives them that tells no words apart, the forced texts, and the words that are to come out
WORDS = {
    "white space": ("ab cd", ["a", "b", " c", "d"], [], ["ab", "cd"]),
    "punctuation begins a word": ("ab,cd e.", ["ab", ",", "cd", " e", "."], [], ["ab", ",cd", "e", "."]),
    "what only begins with it does not": ("ab's", ["ab", "'s"], [], ["ab's"]),
    "a forced text": ("a<|x|>b", ["a", "<|", "x", "|>", "b"], ["<|x|>"], ["a", "<|x|>", "b"]),
    "one without a token": ("a\n\nb", ["a", "b"], ["\n"], ["a", "\n", "\n", "b"]),
    "white space that a token holds": ("a\nb", ["a", "\nb"], ["\n"], ["a", "\n", "b"]),
    "a letter alone": ("x axe ax x", ["x", " a", "xe", " a", "x", " x"], ["x"], ["x", "axe", "ax", "x"]),
    "the longest": ("abc", ["ab", "c"], ["a", "abc"], ["abc"]),
}


@pytest.mark.parametrize("case", WORDS)
def test_tokens_make_words(case):
    text, tokens, forced, want = WORDS[case]
    spans, at = [], 0
    for token in tokens:
        at = text.index(token, at) + len(token)
        spans.append(trim(text, at - len(token), at))
    words = split_words(text, spans, [0] * len(tokens), forced_spans(text, forced))
    assert [text[word.start : word.end] for word in words] == want
    assert [text[word.start : word.end] for word in words if word.forced >= 0] == [word for word in want if word in forced]
    assert sum(word.tokens for word in words) == len(tokens)


REFUSED = {
    "empty": ("", {}, UnsupportedError, "A prompt has one word at least"),
    "white": (" \n", {}, UnsupportedError, "A prompt has one word at least"),
    "no part": ([], {}, UnsupportedError, "A prompt has one word at least"),
    "no share": ([("a", 0)], {}, ConfigError, r"in \(0, 1\], got 0"),
    "much": ([("a", 1.5)], {}, ConfigError, r"in \(0, 1\], got 1.5"),
    "no number": ([("a", True)], {}, ConfigError, r"in \(0, 1\], got True"),
    "no text": ([7], {}, ConfigError, "a list of texts and of pairs"),
    "a string": ("a b", {"force_tokens": "abc"}, ConfigError, "a list of texts that are not empty"),
    "no token": ("a b", {"max_tokens": 0}, ConfigError, "`max_tokens` is a number of one at least"),
    "no part for it": ([("a", 0.5)], {"max_tokens": 3}, ConfigError, "of the parts without a share of their own, got 1 parts"),
    "nothing": ([("a b c", 0.001)], {}, ConfigError, "keeps one word at least, got none of 3"),
    "no tokenizer": ("a", {"tokenizer": None}, UnsupportedError, "tells the characters of its tokens"),
    "ids": (torch.ones(1, 3, dtype=torch.long), {"force_tokens": ["a"]}, UnsupportedError, "Of ids each is a word"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    prompt, more, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as caught:
        compress(scorer(), prompt, **more)
    assert re.match(r"(?s)^.+, got .+\. .+\.$", str(caught.value))


def test_a_slow_tokenizer_and_another_model_s_are_refused():
    slow, large = copy.copy(TOKENIZER), wordpiece()
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(UnsupportedError, match="tells the characters of its tokens, got Slow"):
        compress(scorer(), TEXT, tokenizer=slow)
    large.add_tokens(["zebra"])
    with pytest.raises(UnsupportedError, match=r"which knows \d+ ids, got the id"):
        compress(scorer(), "zebra and zebra", tokenizer=large)


@pytest.mark.parametrize("prompt", [TEXT, torch.ones(1, 5, dtype=torch.long)], ids=["text", "ids"])
def test_two_scorers_are_refused(prompt):
    model = get_token_model(classifier(), [LLMLingua2Config(), LLMLingua2Config(rate=0.2)])
    with pytest.raises(UnsupportedError, match="One scorer at a time"):
        compress_prompt(model, prompt, tokenizer=TOKENIZER if isinstance(prompt, str) else None)


def test_a_class_that_the_head_has_not_is_refused_and_nothing_changes():
    model = classifier()
    with pytest.raises(ConfigError, match=r"one of the 2 classes of the model's head, got 2\. Name"):
        get_token_model(model, LLMLingua2Config(label=2))
    assert not any(isinstance(module, BlockSurgery) for module in model.modules()) and not hasattr(model, "peft_config")


def test_every_token_classifier_of_transformers_is_known_as_one():
    classes = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()
    assert classes and all(families.CLASSIFIES_EACH.search(name) for name in classes)
