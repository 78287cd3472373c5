"""A context is compressed once and asked many questions: each is a turn of its own, read over what the cache holds, at the right places."""

import copy
import itertools

import pytest
import torch
from held import ASKED, COMPRESSORS, LENGTH, PADS, ask, longer, over_what_is_held, texts
from tolerances import close

from hf_tokens import (
    DrLLMConfig,
    FTPConfig,
    R2RConfig,
    SelectionPConfig,
    UnsupportedError,
    anatomy,
    compress_context,
    get_token_model,
    route_to,
    unload,
)
from hf_tokens.engine.hooks import hooked
from hf_tokens.testing import CACHE, zoo

ROUTERS = {
    "ftp": FTPConfig(sparsity=0.3, strict=True),
    "ftp static": FTPConfig(sparsity=0.3, router="static"),
    "dr-llm": DrLLMConfig(windows=2),
    "selection-p": SelectionPConfig(keep=0.5),
}
METHODS = {**COMPRESSORS, **ROUTERS}
FAMILIES = ["llama", "gemma3_text", "gpt2", "qwen3"]
REFUSED = {("streaming-llm turned", "gpt2"), ("expected-attention", "gpt2")}  # it turns no keys


def who_ran(method, after, count):
    """For each block, which of the last tokens ran it, (b m): by the books of a cache from which nothing was evicted."""
    everyone = torch.ones(2, count, dtype=torch.bool)
    if method in COMPRESSORS:
        return [everyone] * len(after.layers)
    place = torch.arange(after.get_seq_length() - count, after.get_seq_length())
    origins = [None if x.origins is None else torch.where(x.there[:, 0], x.origins, -1) for x in after.layers]
    return [~everyone if x is None else (x[:, None] == place[:, None]).any(dim=-1) for x in origins]


def prepared(method, family="llama", told=True):
    """A model with a method, what its calls are given beside the text, and its cache behind the context."""
    torch.manual_seed(1)
    model = get_token_model(zoo.build(family).model, METHODS[method]).eval()
    blocks = len(anatomy(model).streams[-1])
    more = {"hf_tokens_targets": torch.tensor([[1, 0] + [1] * (blocks - 2)] * 2)} if told and method == "dr-llm" else {}
    context, mask, _ = texts()
    return model, more, ask(model, context, mask, **more).past_key_values


@pytest.mark.parametrize(("method", "family"), [pair for pair in itertools.product(METHODS, FAMILIES) if pair not in REFUSED])
def test_each_question_is_read_over_what_is_held_of_the_context(method, family):
    model, more, held = prepared(method, family)
    base = zoo.build(family).model
    stream, (_, mask, questions) = anatomy(base).streams[-1], texts()
    lengths = [layer.length for layer in held.layers]
    for question in questions:
        whole, cache = longer(mask, question), copy.deepcopy(held)
        answer = ask(model, question, whole, cache, **more)
        ran = who_ran(method, cache, ASKED)
        close(answer.logits, over_what_is_held(base, stream, held, ran, question, whole), f"{family} {method}")
        assert cache.get_seq_length() == LENGTH + ASKED
        assert method in COMPRESSORS or not all(bool(tokens.all()) for tokens in ran)
    assert [layer.length for layer in held.layers] == lengths  # no question reaches the context that others are asked of
    assert any(layer.kv.parts is not None or layer.length < LENGTH for layer in held.layers)
    unload(model)


@pytest.mark.drawn
@pytest.mark.parametrize("answer", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_turn_behind_a_short_answer_is_a_prompt_of_its_own(method, answer):
    model, _, held = prepared(method, told=False)
    context, mask, (question, _) = texts()
    given = {"attention_mask": mask, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        first = model.generate(input_ids=context, max_new_tokens=answer, min_new_tokens=answer, **given)
        turn = torch.cat([first.sequences, question], dim=1)
        given["attention_mask"] = longer(mask, turn[:, LENGTH:])
        second = model.generate(input_ids=turn, max_new_tokens=3, output_logits=True, **{**given, CACHE: first.past_key_values})
    for token in range(answer - 1):  # by hand, one pass after the other
        ask(model, first.sequences[:, LENGTH + token :][:, :1], longer(mask, turn[:, LENGTH : LENGTH + token + 1]), held)
    close(second.logits[0], ask(model, turn[:, held.get_seq_length() :], given["attention_mask"], held).logits[:, -1])


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_cropped_to_its_context_is_as_a_copy_or_the_crop_is_refused(method):
    model, more, held = prepared(method)
    _, mask, questions = texts()
    used, before = copy.deepcopy(held), ask(model, questions[1], longer(mask, questions[1]), copy.deepcopy(held), **more).logits
    ask(model, questions[0], longer(mask, questions[0]), used, **more)
    ask(model, questions[1][:, :1], torch.nn.functional.pad(mask, (0, ASKED + 1), value=1), used, **more)
    entries = [layer.length for layer in used.layers]
    try:
        used.crop(LENGTH - used.get_seq_length())
    except UnsupportedError as error:
        assert "`copy.deepcopy` of the cache" in str(error) and method not in {*ROUTERS, "minicache"}
        assert [layer.length for layer in used.layers] == entries
        return
    close(ask(model, questions[1], longer(mask, questions[1]), used, **more).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_in_chunks_is_refused_before_the_first(method):
    model, _, _ = prepared(method, told=False)
    context, mask, _ = texts()
    given = {"input_ids": context, "attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    whole = model.generate(**given, prefill_chunk_size=LENGTH)
    assert torch.equal(whole, model.generate(**given))
    calls = []
    with hooked([model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(True))]):
        with pytest.raises(UnsupportedError, match=r"in one pass, got \w+ and a prompt in chunks of 7\. Leave out `prefill_chunk_size`"):
            model.generate(**given, prefill_chunk_size=7)
    assert not calls


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_large_model_with_a_compressed_cache_goes_on_where_a_small_one_stopped(compressor):
    """At threshold 0 each token is the large model's, so that it reads one at a time, as by itself."""
    small = get_token_model(zoo.build("llama").model, R2RConfig(threshold=0.0)).eval()
    large = get_token_model(zoo.build("llama", seed=3).model, COMPRESSORS[compressor]).eval()
    ids = texts()[0][:1]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(small.generate(**given, custom_generate=route_to(large)), large.generate(**given))
    some = get_token_model(zoo.build("llama").model, R2RConfig(threshold=0.5)).eval()
    assert some.generate(**given, custom_generate=route_to(large)).shape == (1, LENGTH + 6)


# -- the door --------------------------------------------------------------------------------------------------------


def questions_of(lengths=(5, 3, 2)):
    """Questions of several lengths, padded in front, and their mask."""
    ids = torch.randint(5, 80, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(max(lengths)).flip(0) < torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


def answered(model, given):
    out = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize(("method", "family"), [p for p in itertools.product([None, *METHODS], FAMILIES[:3]) if p not in REFUSED])
def test_many_questions_in_one_batch_are_each_asked_alone(method, family):
    torch.manual_seed(1)
    base = zoo.build(family).model
    model = base if method is None else get_token_model(base, METHODS[method]).eval()
    (context, _, _), (ids, mask) = texts(), questions_of()
    read = compress_context(model, context[:1])
    held = read.kv_bytes
    if family == "gemma3_text":
        with pytest.raises(UnsupportedError, match="questions of several lengths. Ask those of one length together"):
            read.ask(ids, mask)
        ids, mask = questions_of((3, 3, 3))
    whole = answered(model, read.ask(ids, mask))
    for question, real, said in zip(ids, mask.bool(), whole, strict=True):
        close(said, answered(model, read.ask(question[None, real]))[0], f"{family} {method}")
    assert read.kv_bytes == held and len(read.cache.layers[0].keys) == 1
    if method is None:
        whole_text = torch.cat([context[:1], ids[1:2, -3:]], dim=1)
        close(whole[1], answered(base, {"input_ids": whole_text, "attention_mask": torch.ones_like(whole_text)})[0], family)


def test_each_of_several_texts_has_a_question():
    model = get_token_model(zoo.build("llama").model, METHODS["prefixkv"]).eval()
    context, mask, (question, _) = texts()
    both = answered(model, compress_context(model, context, mask).ask(question))
    for row, pads in enumerate((0, PADS)):
        alone = compress_context(model, context[row : row + 1, pads:])
        close(both[row], answered(model, alone.ask(question[row : row + 1]))[0])


def test_what_is_no_context_or_no_question_is_refused():
    model = get_token_model(zoo.build("llama").model, METHODS["prefixkv"]).eval()
    context, mask, (question, _) = texts()
    with pytest.raises(UnsupportedError, match="A context has one real token at least"):
        compress_context(model, context, mask * torch.tensor([[1], [0]]))
    with pytest.raises(UnsupportedError, match="got 2 texts and 1 questions. Compress one text"):
        compress_context(model, context, mask).ask(question[:1])
    with pytest.raises(UnsupportedError, match="padding behind it. Pad in front"):
        compress_context(model, context[:1]).ask(question, torch.tensor([[1, 1, 1, 1, 0]] * 2))


@pytest.mark.parametrize(
    ("family", "got"),
    [
        ("t5", "T5ForConditionalGeneration, which has an encoder"),
        ("jamba", "JambaForCausalLM, which goes on from its states by one token at a time"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM, which keeps its states beside the cache"),
        ("bert-generation", "BertGenerationDecoder, which lets tokens see those behind them"),
        ("cpmant", "CpmAntForCausalLM, which lets tokens see those behind them"),
        ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion, which generates in a way of its own"),
    ],
)
def test_a_model_that_reads_a_question_otherwise_behind_a_context_is_refused(family, got):
    with pytest.raises(UnsupportedError, match=f"needs a decoder-only language model, got {got}"):
        compress_context(zoo.build(family).model, texts()[0])


def test_a_context_that_would_be_read_and_not_kept_is_refused():
    model, (context, _, (question, _)) = get_token_model(zoo.build("mpt").model, "apt").eval(), texts()
    assert not model.config.use_cache
    asked = compress_context(model, context).ask(question)
    told = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    with pytest.raises(UnsupportedError, match="got `use_cache=False`, of the call or of the model's config. Pass `use_cache=True`"):
        model.generate(**asked, **told)
    want = model.generate(torch.cat([context, question], dim=1), **told)
    got = model.generate(**compress_context(model, context).ask(question), use_cache=True, **told)
    close(torch.stack(got.logits), torch.stack(want.logits))
