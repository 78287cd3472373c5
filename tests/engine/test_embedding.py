"""A bank at the embeddings: which tokens it finds, and that what a model looks up holds its tokens, whoever asks and however."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from by_hand import batch, gpt2, greedy
from peft import LoraConfig, get_peft_model
from tolerances import close
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from hf_tokens import (
    ATPromptConfig,
    ConfigError,
    CPTConfig,
    CSPConfig,
    MethodConfig,
    PREConfig,
    TokenBank,
    UnsupportedError,
    anatomy,
    get_token_model,
    list_methods,
    match_ids,
    match_sequence,
    option,
    register,
)
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import CACHE, zoo


@dataclass(frozen=True)
class WordsConfig(MethodConfig):
    ids: tuple[int, ...] = option((), ge=0, zero=(), help="Words.")


@pytest.fixture
def words():
    """A deep bank: it replaces a sequence of ids, and in the second block its first token again."""

    class Words(TokenBank):
        site, moves_tokens, deep = "embedding", False, True
        kinds = ("text",)

        def __init__(self, config, dims):
            super().__init__(config, dims)
            self.rows = nn.Parameter(torch.randn(len(config.ids) if dims.is_first_block else 1, dims.width) * 0.3)

        @classmethod
        def default_layers(cls, config, layers):
            return (0, 1)

        def find(self, ids):
            return match_sequence(ids, self.config.ids)

        def tokens(self):
            return self.rows

    Words.__doc__ = "Words."
    register("toy-words", WordsConfig)(Words)
    yield WordsConfig
    del METHODS["toy-words"]


def naive_sequence(ids, sequence):
    out = []
    for row in ids.tolist():
        places, i, k = [-1] * len(row), 0, len(sequence)
        while k and i + k <= len(row):
            if row[i : i + k] == list(sequence):
                places[i : i + k] = range(k)
                i += k
            else:
                i += 1
        out.append(places)
    return torch.tensor(out)


def test_match_ids():
    ids = torch.tensor([[5, 9, 2, 9], [7, 7, 1, 5]])
    assert match_ids(ids, (9, 5, 7)).tolist() == [[1, 0, -1, 0], [2, 2, -1, 1]]
    assert match_ids(ids, ()).tolist() == [[-1] * 4] * 2
    assert match_ids(torch.tensor(9), (9,)).item() == 0
    assert match_ids(ids.int(), (0, 99)).tolist() == [[-1] * 4] * 2


@pytest.mark.parametrize("sequence", [(1,), (1, 2), (1, 1), (2, 1, 1), (1, 2, 3, 1, 2, 3, 1, 2), ()])
def test_match_sequence_is_a_search_from_the_left(sequence):
    ids = torch.randint(1, 3, (40, 7), generator=torch.Generator().manual_seed(0))
    got, want = match_sequence(ids, sequence), naive_sequence(ids, sequence)
    runs = torch.tensor([list(sequence) == [sequence[0]] * len(sequence) and len(sequence) > 1] if sequence else [False])
    if runs.item():  # of a longer run, the first place alone counts
        got, want = got[:, :2], want[:, :2]
    assert torch.equal(got, want)


def test_the_table_of_each_stream():
    tables = lambda family: {s.name: s.table for s in anatomy(zoo.build(family).model).streams}
    assert tables("llama") == {"text": "model.embed_tokens"}
    assert tables("t5") == {"encoder": "encoder.embed_tokens", "decoder": "decoder.embed_tokens"}
    assert tables("clip") == {"text": "text_model.embeddings.token_embedding", "vision": None}
    assert tables("llava")["vision"] is None and tables("llava")["text"].endswith("embed_tokens")
    assert tables("bert") == {"text": "bert.embeddings.word_embeddings"}
    found = tables("idefics2")  # a resampler stands beside the text
    assert found["text.1"] is None and found["text.2"] is not None
    assert list(tables("canine").values()) == [None] * 3


def bank_of(model, kind="CSP"):
    return next(module for module in model.modules() if type(module).__name__ == kind)


def moved(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "hf_tokens_methods" in name:
                p += torch.randn_like(p)
    return model


IDS = torch.tensor([[5, 9, 12, 9], [7, 8, 3, 12]])


def by_table(base, vectors, ids=(9, 12)):
    """The base with the vectors written into its table of embeddings, and into nothing else."""
    twin = copy.deepcopy(base)
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())  # it was tied
    with torch.no_grad():
        twin.transformer.wte.weight[list(ids)] = vectors
    return twin


def test_it_is_the_base_with_other_rows_in_its_table_and_the_tied_head_stays():
    base = gpt2(2)
    assert base.lm_head.weight is base.transformer.wte.weight
    model = moved(get_token_model(copy.deepcopy(base), CSPConfig(ids=(9, 12))))
    twin = by_table(base, bank_of(model).vectors.detach())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
        given = {"inputs_embeds": model.get_input_embeddings()(IDS)}
        assert torch.equal(model(**given).logits, twin(input_ids=IDS).logits)
        outside = {"inputs_embeds": base.get_input_embeddings()(IDS)}  # nobody knows their ids
        assert torch.equal(model(**outside).logits, base(input_ids=IDS).logits)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    ids, mask = batch([6, 3])
    for ours, theirs in zip(greedy(model, ids, mask, 6)[:2], greedy(twin, ids, mask, 6)[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_generate_from_embeddings_and_from_ids():
    base = gpt2(2)
    model = moved(get_token_model(copy.deepcopy(base), CSPConfig(ids=tuple(range(3, 50)))))  # what it generates is among them
    twin = by_table(base, bank_of(model).vectors.detach(), range(3, 50))
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = twin.generate(input_ids=IDS, **more)[:, 4:]
    assert torch.equal(model.generate(input_ids=IDS, **more)[:, 4:], want)
    embeds = model.get_input_embeddings()(IDS).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(IDS), **more), want)
    static = model.generate(input_ids=IDS, cache_implementation="static", disable_compile=True, **more)
    assert torch.equal(static[:, 4:], want)


def test_two_banks_on_one_id_the_later_one_counts():
    model = moved(get_token_model(gpt2(2), [CSPConfig(ids=(9,)), CSPConfig(ids=(9, 12))]))
    later = [m for m in model.modules() if type(m).__name__ == "CSP"][1]
    twin = by_table(gpt2(2), later.vectors.detach())
    assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)


def test_both_streams_of_an_encoder_decoder_have_rows_of_their_own():
    specimen = zoo.build("t5")
    model = get_token_model(specimen.model, CSPConfig(ids=(7, 9)))
    names = [name for name, _ in model.named_parameters() if "vectors" in name]
    assert [name.split(".")[2] for name in names] == ["encoder", "decoder"]
    one = get_token_model(zoo.build("t5").model, CSPConfig(ids=(7, 9), stream="encoder"))
    assert len([name for name, _ in one.named_parameters() if "vectors" in name]) == 1


def test_one_table_for_two_streams_is_that_of_the_first():
    torch.manual_seed(0)
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))
    }
    base = BartForConditionalGeneration(BartConfig(vocab_size=30, d_model=8, max_position_embeddings=32, **sizes)).eval()
    base.model.decoder.embed_tokens = base.model.encoder.embed_tokens
    assert [s.table for s in anatomy(base).streams] == ["model.encoder.embed_tokens", None]


def test_a_scaled_table_gives_scaled_rows():
    specimen = zoo.build("gemma3")
    table = specimen.model.get_input_embeddings()
    model = get_token_model(specimen.model, CSPConfig(ids=(7, 9)))
    assert torch.equal(bank_of(model).vectors, table.forward(torch.tensor([7, 9])))
    assert not torch.allclose(bank_of(model).vectors, table.weight[[7, 9]])


def test_checkpointed_from_its_inputs_on_it_has_the_same_gradient():
    wanted = moved(get_token_model(gpt2(2), CSPConfig(ids=(9, 12), attr_dropout=0.0)).train())
    wanted(input_ids=IDS, labels=IDS).loss.backward()
    model = moved(get_token_model(gpt2(2), CSPConfig(ids=(9, 12), attr_dropout=0.0)).train())
    model.get_base_model().gradient_checkpointing_enable()
    model.get_base_model().enable_input_require_grads()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    close(bank_of(model).vectors.grad, bank_of(wanted).vectors.grad)


SECOND = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")  # so it is


@SECOND
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("inside", [True, False], ids=["in the adapter", "around it"])
def test_a_lora_on_the_table(inside):
    tuning = LoraConfig(r=2, target_modules=["wte"])
    base = gpt2(2)
    model = (
        get_token_model(base, [CSPConfig(ids=(9, 12)), tuning])
        if inside
        else get_peft_model(get_token_model(base, CSPConfig(ids=(9, 12))), tuning, "other")
    )
    with torch.no_grad():
        close(model(input_ids=IDS).logits, gpt2(2)(input_ids=IDS).logits)  # a LoRA at its start changes nothing
        bank_of(model).vectors += 1
        twin = by_table(gpt2(2), bank_of(model).vectors)
        close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)


def test_a_table_that_is_trained_as_a_whole():
    model = get_token_model(gpt2(2), CSPConfig(ids=(9, 12), attr_dropout=0.0), modules_to_save=["wte"])
    with torch.no_grad():
        bank_of(model).vectors += 1
    twin = by_table(gpt2(2), bank_of(model).vectors.detach())
    close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert bank_of(model).vectors.grad.any()
    base = model.unload()
    assert torch.equal(base(input_ids=IDS).logits, gpt2(2)(input_ids=IDS).logits)
    assert not base.transformer.wte._forward_hooks


@SECOND
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_an_adapter_that_reads_the_table_by_itself_is_refused():
    tuning = LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices={"wte": [3]}, fan_in_fan_out=True)
    model = get_peft_model(get_token_model(gpt2(2), CSPConfig(ids=(9, 12))), tuning, "other")
    with pytest.raises(UnsupportedError, match="CSP replaces what transformer.wte looks up, got embeddings that came past it"):
        model(input_ids=IDS)


def test_a_copy_of_the_table_alone_does_not_copy_the_model():
    model = get_token_model(gpt2(2), CSPConfig(ids=(9, 12)))
    table = model.get_base_model().transformer.wte
    (hook,), (copied,) = table._forward_hooks.values(), copy.deepcopy(table)._forward_hooks.values()
    assert copied.owner is hook.owner
    twin = moved(copy.deepcopy(model))
    (hook,) = twin.get_base_model().transformer.wte._forward_hooks.values()
    assert bank_of(twin) in list(hook.owner.modules())
    assert torch.equal(model(input_ids=IDS).logits, gpt2(2)(input_ids=IDS).logits)


def test_a_verb_may_ask_only_for_what_is_known_there():
    class Nosy(TokenBank):
        site, moves_tokens = "embedding", False

        def tokens(self, mask):
            return None

    with pytest.raises(ConfigError, match=r"Nosy.tokens at the embeddings may ask for .* got \['mask'\]"):
        register("toy-nosy", WordsConfig)(Nosy)
    METHODS.pop("toy-nosy", None)


# -- deep banks --------------------------------------------------------------------------------------------------------


def deep_by_hand(base, model, ids):
    """The model with a deep bank, by hooks of this test on the blocks."""
    first, second = (m for m in model.modules() if type(m).__name__ == "Words")
    rows = naive_sequence(ids, first.config.ids)
    twin = copy.deepcopy(base)

    def put(rows_of, values):
        def hook(module, args):
            hidden = args[0].clone()
            for b, row in enumerate(rows.tolist()):
                for t, r in enumerate(row):
                    if 0 <= r < len(values):
                        hidden[b, t] = values[r] + (0 if rows_of == 1 else base.transformer.wpe.weight[t])
            return hidden, *args[1:]

        return hook

    twin.transformer.h[0].register_forward_pre_hook(put(0, first.rows.detach()))
    twin.transformer.h[1].register_forward_pre_hook(put(1, second.rows.detach()))
    return twin(input_ids=ids).logits


def test_a_deep_bank_rewrites_its_first_tokens(words):
    base = gpt2(3)
    model = get_token_model(copy.deepcopy(base), words(ids=(9, 12, 7)))
    ids = torch.tensor([[3, 9, 12, 7, 20], [9, 12, 7, 9, 12], [3, 3, 9, 12, 3]])
    close(model(input_ids=ids).logits, deep_by_hand(base, model, ids))


def test_its_tokens_stay_its_own_behind_inserted_ones_and_in_checkpoints(words):
    from hf_tokens.testing.probe import ProbeInsertConfig

    ids = torch.tensor([[9, 12, 7, 20], [3, 9, 12, 7]])
    plain = moved(get_token_model(gpt2(3), words(ids=(9, 12, 7))))
    zero = moved(get_token_model(gpt2(3), [words(ids=(9, 12, 7)), ProbeInsertConfig(tokens=0, layers=(0,))]))
    assert torch.equal(plain(input_ids=ids).logits, zero(input_ids=ids).logits)
    hear = []
    model = moved(get_token_model(gpt2(3), [ProbeInsertConfig(tokens=1, layers=(0,)), words(ids=(9, 12, 7))]))
    model.get_base_model().transformer.h[1].attn.register_forward_pre_hook(
        lambda _, args, kw: hear.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    model(input_ids=ids)
    second = [m for m in model.modules() if type(m).__name__ == "Words"][1]
    normed = model.get_base_model().transformer.h[1].ln_1(second.rows[0])
    same = [(row - normed).abs().amax(-1) < 1e-9 for row in hear[0]]
    assert [s.tolist() for s in same] == [[False, True, False, False, False], [False, False, True, False, False]]
    grads = []
    for checkpointing in (False, True):
        model = moved(get_token_model(gpt2(3), words(ids=(9, 12, 7))).train())
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
            model.get_base_model().enable_input_require_grads()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([m.rows.grad for m in model.modules() if type(m).__name__ == "Words"])
    for plain, again in zip(*grads, strict=True):
        close(plain, again)


def test_words_cut_apart_by_chunks_are_refused(words):
    model = get_token_model(gpt2(2), words(ids=(9, 12, 7)))
    ids = torch.tensor([[3, 9, 12, 7, 20, 21, 9, 12]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        head = model(input_ids=ids[:, :5], use_cache=True)
        tail = model(input_ids=ids[:, 5:], **{CACHE: head.past_key_values})
        close(torch.cat([head.logits, tail.logits], 1), whole)
        head = model(input_ids=ids[:, :3], use_cache=True)
        with pytest.raises(UnsupportedError, match="The words that Words looks for must come in one pass, got a prompt in chunks that cut"):
            model(input_ids=ids[:, 3:], **{CACHE: head.past_key_values})
        model(input_ids=ids[:, 3:])  # another prompt


def test_a_deep_bank_must_find_its_tokens_in_the_blocks(words):
    specimen = zoo.build("git")  # its pictures stand in front of the text
    model = get_token_model(specimen.model, words(ids=(9,)))
    specimen.inputs["input_ids"][:, 3] = 9
    with pytest.raises(UnsupportedError, match="A bank that rewrites its tokens needs the tokens of"):
        model(**specimen.inputs)


@torch.no_grad()
def test_a_tower_that_is_called_by_itself_looks_up_the_same(words):
    specimen = zoo.build("clip")
    specimen.inputs["input_ids"][:, 2:5] = torch.tensor([9, 12, 7])
    model = moved(get_token_model(specimen.model, words(ids=(9, 12, 7))))
    text = {name: specimen.inputs[name] for name in ("input_ids", "attention_mask") if name in specimen.inputs}
    whole, base = model(**specimen.inputs).text_embeds, zoo.build("clip").model
    features = model.get_text_features(**text)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    close(features / features.norm(dim=-1, keepdim=True), whole)
    plain = base.get_text_features(**text)
    assert not torch.allclose(plain if isinstance(plain, torch.Tensor) else plain.pooler_output, features)


WORDS = (7, 19, 33)
BANKS = (
    CPTConfig(ids=WORDS),
    CSPConfig(ids=WORDS),
    PREConfig(ids=WORDS),
    ATPromptConfig(attributes=(WORDS,), placeholder=41, n_att=1, n_ctx=1),
)


@pytest.mark.parametrize("config", BANKS, ids=lambda config: type(config).__name__)
def test_a_batch_to_learn_from_without_the_words_is_said_once_with_them(config):
    model = get_token_model(zoo.build("llama").model, config)
    ids = next(info for info in list_methods() if info.name == config.method).cls.prompt_ids(config)
    there = torch.tensor([[5, 6, *ids, 8], [9] * (3 + len(ids))])
    lost = there.masked_fill(torch.isin(there, torch.tensor(ids)), 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(input_ids=lost)
        model.train()(input_ids=there)
        with torch.no_grad():
            model(input_ids=lost)
    with pytest.warns(
        UserWarning, match=rf"no row of this batch holds the token ids \[.*19.*\], so {type(config).__name__[:-6]} learns nothing"
    ):
        model(input_ids=lost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=lost)
