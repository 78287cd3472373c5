"""KVzip against its release: the scores of a recital, one threshold over all blocks and heads, and nothing evicted later."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import transformers
from by_hand import batch, gpt2, greedy, places_held, prompt, step

from hf_tokens import DeepPromptConfig, KVzipConfig, MiKVConfig, UnsupportedError, compress_context, get_token_model, measure
from hf_tokens.model import families
from hf_tokens.testing import zoo

SINK = math.inf


def naive(queries, keys, context, part, sinks, newest):
    """What one head's entries of a part are worth: of a pass behind `context` tokens, queries (p e), keys of all (n+p e)."""
    scores = {}
    for i, query in enumerate(queries):
        seen = sorted({*range(min(sinks, context)), *part, *range(context, context + i + 1)})
        products = {j: float(query @ keys[j]) / math.sqrt(len(query)) for j in seen}
        top = max(products.values())
        total = sum(math.exp(p - top) for p in products.values())
        for j in part:
            scores[j] = max(scores.get(j, 0.0), math.exp(products[j] - top) / total)
    return {j: SINK if j < sinks or j >= context - newest else score for j, score in scores.items()}


def kept(scores, ratio, uniform=False):
    """Of the scores by (block, head, place), the ratio that stays, and one of each head; of two alike the first one."""
    if uniform:
        heads = {entry[:2] for entry in scores}
        return {*itertools.chain(*(kept({e: s for e, s in scores.items() if e[:2] == head}, ratio) for head in heads))}
    order = sorted(scores, key=lambda entry: (-scores[entry], entry))
    best = {entry[:2]: entry for entry in reversed(order)}
    return {*order[: math.floor(ratio * len(order) + 1e-9)], *best.values()}


def by_release(base, ids, steps, c):
    """Greedy tokens, their logits and the places held at the end, of one row."""
    n, scores = len(ids), {}
    for first in range(0, n, c.chunk):
        before = ids[max(0, first - c.suffix) : first].tolist()
        lead = [*c.resume, *before, *c.answer] if first else [*c.repeat, *c.answer]
        said = torch.cat([ids, torch.tensor(lead, dtype=ids.dtype), ids[first : first + c.chunk]])
        seen, held, _ = prompt(base, said)
        for layer, (block, heads) in enumerate(zip(seen, held, strict=True)):
            for h, entries in enumerate(heads):
                part = range(first, min(n, first + c.chunk))
                found = naive(block.queries[h, n:], [entry.k for entry in entries], n, part, c.sinks, c.newest)
                scores |= {(layer, h, j): score for j, score in found.items()}
    stays = kept(scores, c.ratio, c.level == "pair-uniform")
    _, held, last = prompt(base, ids)
    held = [[[e for e in entries if (b, h, e.origin) in stays] for h, entries in enumerate(heads)] for b, heads in enumerate(held)]
    tokens, logits = [], []
    for i in range(steps):
        logits.append(last)
        tokens.append(int(last.argmax()))
        if i < steps - 1:
            last = step(base, tokens[-1], n + i, held)
    return tokens, torch.stack(logits), [[[e.origin for e in entries] for entries in heads] for heads in held]


WORDS = {"repeat": (5, 6, 7), "resume": (8, 9), "suffix": 2, "answer": (11,)}
MODELS = [
    pytest.param((12,), {"ratio": 0.5}, id="one part, no words"),
    pytest.param((17, 9, 4), {"ratio": 0.4, "chunk": 5, "sinks": 1, **WORDS}, id="parts and words, padded"),
    pytest.param((11, 6), {"ratio": 0.3, "chunk": 4, "sinks": 2, "suffix": 9}, id="a suffix longer than a part"),
    pytest.param((13, 7), {"ratio": 0.6, "chunk": 3, "suffix": 0, "sinks": 3}, id="no suffix"),
    pytest.param((13, 7), {"ratio": 0.5, "sinks": 1, "newest": 2, "level": "pair-uniform", **WORDS}, id="each head alike, the newest too"),
    pytest.param((9, 5), {"ratio": 1.0, **WORDS}, id="nothing to evict"),
    pytest.param((6, 1), {"ratio": 0.7, "sinks": 1}, id="one token"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs, side):
    c = KVzipConfig(**knobs)
    model = get_token_model(gpt2(), c).eval()
    if side == "right" and len(lengths) > 1:
        ids, mask = batch(lengths, "right")
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for row, n in enumerate(lengths):
            held = [[[place for place in places if place < n] for places in heads] for heads in places_held(cache, row, 0)]
            assert held == by_release(gpt2(), ids[row, :n], 1, c)[2]
        return
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 5)
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given)[:, ids.shape[1] :], got)
    for row, n in enumerate(lengths):
        tokens, told, held = by_release(gpt2(), ids[row, -n:], 5, c)
        assert places_held(cache, row, ids.shape[1] - n) == held
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


def test_bytes_fall_by_the_ratio_and_the_prompt_is_read_about_twice():
    specimen = zoo.build("llama")
    whole = measure(specimen.model, **specimen.inputs, use_cache=True)
    cost = measure(get_token_model(specimen.model, KVzipConfig(ratio=0.25, sinks=1)), **specimen.inputs, use_cache=True)
    assert cost.kv_bytes == whole.kv_bytes // 4
    assert 1.9 * whole.flops < cost.flops < 2.6 * whole.flops


def test_a_later_turn_is_not_compressed():
    model = get_token_model(gpt2(), KVzipConfig(ratio=0.5)).eval()
    ids, _ = batch((20,))
    context = compress_context(model, ids[:, :12])
    asked = model.generate(**context.ask(ids[:, 12:]), max_new_tokens=1, return_dict_in_generate=True).past_key_values
    held, later = places_held(context.cache, 0, 0), places_held(asked, 0, 0)
    assert [[[p for p in places if p < 12] for places in heads] for heads in later] == held
    assert all(places[-8:] == [*range(12, 20)] for heads in later for places in heads)


def test_an_exception_in_a_recital_leaves_nothing_behind():
    model = get_token_model(gpt2(), KVzipConfig(ratio=0.5)).eval()
    ids, _ = batch((12,))
    want, calls = model.generate(ids, max_new_tokens=4, do_sample=False), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = model.get_base_model().transformer.h[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)


@pytest.mark.parametrize(
    "stack", [[DeepPromptConfig(tokens=3), KVzipConfig(ratio=0.5)], [KVzipConfig(ratio=0.5), MiKVConfig(importance=0.5)]]
)
def test_in_a_stack_a_padded_row_is_the_row_alone(stack):
    model = get_token_model(zoo.build("llama").model, stack).eval()
    ids, mask = batch((14, 8))
    both = model(ids, attention_mask=mask, use_cache=True).past_key_values
    alone = model(ids[1:, 6:], use_cache=True).past_key_values
    assert places_held(both, 1, 6) == places_held(alone, 0, 0)


def test_what_cannot_be_said_again_is_refused():
    model = get_token_model(zoo.build("llama").model, KVzipConfig()).eval()
    ids, _ = batch((12,))
    with pytest.raises(UnsupportedError, match="got embeddings in place of ids. Pass `input_ids`"):
        model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True)
    with pytest.raises(UnsupportedError, match="got a call of a part of LlamaForCausalLM. Call the model itself"):
        model.get_base_model().model(input_ids=ids, use_cache=True)
    windows = zoo.build("mistral")
    with pytest.raises(UnsupportedError, match="got a window in each of its blocks"):
        get_token_model(windows.model, KVzipConfig())(**windows.inputs, use_cache=True)


@pytest.mark.parametrize("family", ["t5", "bart", "musicgen"])
def test_a_prompt_that_only_the_encoder_reads_is_refused(family):
    specimen = zoo.build(family)
    with pytest.raises(UnsupportedError, match="got an encoder's output in front of it"):
        get_token_model(specimen.model, KVzipConfig())(**specimen.inputs)


@pytest.mark.filterwarnings("ignore:hf-tokens")
def test_a_model_that_numbers_its_tokens_from_zero_is_told_where_a_recital_stands():
    model, (ids, mask) = get_token_model(zoo.build("bamba").model, KVzipConfig(ratio=0.5, sinks=1)).eval(), batch((14, 9))
    given = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    both = torch.stack(model.generate(ids, attention_mask=mask, **given).logits)
    alone = [torch.stack(model.generate(ids[row : row + 1, pads:], **given).logits) for row, pads in ((0, 0), (1, 5))]
    torch.testing.assert_close(both, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:hf-tokens")
@pytest.mark.parametrize(
    ("family", "got"),
    [
        ("jamba", "a model that goes on from its states by one token at a time"),
        ("kosmos-2", "`pixel_values` beside its ids"),
        ("audioflamingo3", "`input_features` beside its ids"),
    ],
)
def test_what_would_be_read_without_what_stands_in_front_is_refused(family, got):
    specimen = zoo.build(family)
    get_token_model(specimen.model, KVzipConfig(ratio=0.5))
    with pytest.raises(UnsupportedError, match=got):
        specimen.run(use_cache=True)


def test_a_cache_that_a_checkpoint_would_read_again_is_refused():
    specimen = zoo.build("diffusion_gemma")  # its decoder reads what its encoder has cached, in training too
    model = get_token_model(specimen.model, KVzipConfig(ratio=0.5)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(UnsupportedError, match="got gradient checkpointing, which reads the cache once more"):
        model(**specimen.inputs)


def test_a_model_that_multiplies_its_output_by_the_mask_is_refused():
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    masking = [file.stem.removeprefix("modeling_") for file in files if "embeddings * attention_mask.unsqueeze(-1)  #" in file.read_text()]
    assert masking
    assert all(families.MASKS_OUTPUT.search(type(zoo.build(family).model).__name__) for family in masking)
    specimen = zoo.build("colqwen2")
    get_token_model(specimen.model, KVzipConfig(ratio=0.5))
    with pytest.raises(UnsupportedError, match="got a model that multiplies its output by the mask"):
        specimen.run()
