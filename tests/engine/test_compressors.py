"""Two cache compressors in one stack: a pair works, entries in another format counted and carried, or is refused at attach."""

import itertools

import pytest
import torch
from held import COMPRESSORS, PADS, ask, decoded, longer, over_what_is_held, texts
from lots import ALL, lot
from own import method
from tolerances import close
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from hf_tokens import (
    D2OConfig,
    LayerRouter,
    MiKVConfig,
    PrefixKVConfig,
    RazorAttentionConfig,
    UnsupportedError,
    anatomy,
    get_token_model,
    list_methods,
)
from hf_tokens.roles.cache_compressor import CacheCompressor
from hf_tokens.testing import CACHE, zoo
from hf_tokens.tokens.entries import cells_of

NEARLY = MiKVConfig(importance=0.3, bits=8)  # entries in another format that are all but what they were
NAMES = [name for name in COMPRESSORS if name != "squeezeattention sinks"]
PAIRS = list(itertools.product(NAMES, repeat=2))
COMPANIONS = 5  # methods behind each one that it meets; `make contract` takes all
TWO_FORMATS, SHARED = "one cache compressor that stores entries in another format", "store as one take in no others"
TURNED = "turned to other places as others leave take in none"


def refusal(names):
    """The rule by which a pair is refused, by what its methods define; None if it works."""
    known = [({info.name: info.cls for info in list_methods()}[COMPRESSORS[name].method], name) for name in names]
    first, second = (cls for cls, _ in known)
    hold, fold = [cls.hold is not CacheCompressor.hold for cls in (first, second)], [cls.folds(COMPRESSORS[n]) for cls, n in known]
    if all(hold):
        return TWO_FORMATS
    if first.pairs and fold[1] or second.pairs and fold[0]:
        return SHARED
    return TURNED if all(fold) and any("rotation" in cls.words["fold"] for cls in (first, second)) else None


def drawn(pairs):
    """Of the pairs that work, a few of each method's drawn by lot; all that are refused."""
    works = [pair for pair in pairs if refusal(pair) is None]
    kept = {pair for name in NAMES for pair in sorted((p for p in works if p[0] == name), key=lambda p: lot(*p))[:COMPANIONS]}
    return [pair for pair in pairs if ALL or pair in kept or refusal(pair) is not None]


class Quantized(QuantizedLayer):
    """A layer of transformers' quantized cache whose quantizer, another package's, leaves the states as they are."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_quantized_cache_is_refused_in_one_sentence(name):
    cache = Cache(layers=[Quantized() for _ in range(4)])
    model = get_token_model(zoo.build("llama").model, COMPRESSORS[name]).eval()
    with pytest.raises(UnsupportedError, match=r"needs a dynamic cache, got a cache of Quantized\. Leave out `cache_implementation`, or"):
        model.generate(texts()[0], max_new_tokens=2, **{CACHE: cache})


def counts(cache):
    """Entries that each layer, row and head holds."""
    return [layer.there.sum(dim=-1) for layer in cache.layers]


def real_entries(cache, row, pads):
    """How many each layer that has some holds of a row with so many pads in front, by its index."""
    held = {i: layer for i, layer in enumerate(cache.layers) if layer.origins is not None}
    counted = {i: int((layer.there & (cells_of(layer.origins, layer.heads) >= pads))[row].sum()) for i, layer in held.items()}
    return {i: count for i, count in counted.items() if count}


def test_every_compressor_stands_in_the_pairs():
    assert {config.method for config in COMPRESSORS.values()} == {i.name for i in list_methods() if issubclass(i.cls, CacheCompressor)}


@pytest.mark.parametrize("pair", drawn(PAIRS), ids=" and ".join)
def test_a_pair_works_or_is_refused_where_it_is_attached(pair):
    stack, rule = [COMPRESSORS[name] for name in pair], refusal(pair)
    model = zoo.build("llama").model
    if rule is not None:
        with pytest.raises(UnsupportedError, match=rule):
            get_token_model(model, stack)
        return
    model = get_token_model(model, stack).eval()
    together, cache = decoded(model)
    alone, its_cache = decoded(model, slice(1, 2))
    close(together[1:], alone, "the padded row")
    assert [n[1].tolist() for n in counts(cache)] == [n[0].tolist() for n in counts(its_cache)]
    base, context = zoo.build("llama").model, texts()
    stream, (_, mask, (question, _)) = anatomy(base).streams[-1], context
    held = ask(model, context[0], mask).past_key_values
    everyone = [torch.ones(2, question.shape[1], dtype=torch.bool)] * len(held.layers)
    want = over_what_is_held(base, stream, held, everyone, question, longer(mask, question))
    close(ask(model, question, longer(mask, question), held).logits, want, "over what both left")


@pytest.mark.drawn
@pytest.mark.parametrize("first", [False, True], ids=["behind it", "in front of it"])
@pytest.mark.parametrize("name", [name for name in COMPRESSORS if refusal((name, "mikv")) is None])
def test_what_is_held_in_another_format_is_counted_and_carried(name, first):
    """Of as many entries as are there without it, by nearly the same numbers: each is counted, and none is lost."""
    alone, kept = decoded(get_token_model(zoo.build("llama").model, COMPRESSORS[name]).eval())
    stack = [NEARLY, COMPRESSORS[name]] if first else [COMPRESSORS[name], NEARLY]
    beside, held = decoded(get_token_model(zoo.build("llama").model, stack).eval())
    assert all(torch.equal(a, b) for a, b in zip(counts(held), counts(kept), strict=True))
    assert float((beside - alone).norm() / alone.norm()) < 0.02
    assert any(bool(layer.record.entries["beyond"].any()) for layer in held.layers)


def test_what_takes_in_others_stays_in_its_format():
    _, cache = decoded(
        get_token_model(zoo.build("llama").model, [MiKVConfig(importance=0.2, bits=8), D2OConfig(budget=0.5, spare=False)]).eval()
    )
    for layer in cache.layers:
        low = [part for part in layer.kv.parts if part.packed[0][0].dtype == torch.uint8]
        assert torch.equal(torch.stack([part.where for part in low]).any(dim=0), layer.record.entries["beyond"].bool() & layer.there)


def test_a_row_is_scored_alike_whether_another_row_lets_entries_of_a_head_go_or_none_does():
    """In a window of eight the first compressor has something to evict in the shorter row alone."""
    stack = [RazorAttentionConfig(sinks=3, compression=5), PrefixKVConfig(budget=0.3, distance=3)]
    model = get_token_model(zoo.build("cohere2").model, stack).eval()
    together, _ = decoded(model)
    for row in range(2):
        close(together[row : row + 1], decoded(model, slice(row, row + 1))[0], f"row {row}")


def test_what_a_compressor_remembers_is_its_own():
    _, held = decoded(
        get_token_model(zoo.build("llama").model, [D2OConfig(budget=0.8, spare=False), D2OConfig(budget=0.4, spare=False)]).eval()
    )
    for layer in held.layers:
        first, second = (value for (_, name), value in layer.record.items() if name == "threshold")
        assert not torch.equal(first, second)


ACROSS = ["prefixkv online", "squeezeattention", "squeezeattention sinks", "d2o", "kvzip", "minicache"]  # that look at several blocks
SKIPPED = {  # the blocks that each of two rows leaves out
    "the last, by all": ((3,), (3,)),
    "the last, by one": ((), (3,)),
    "all, by one": ((0, 1, 2, 3), ()),
    "the first and third, by all": ((0, 2), (0, 2)),
    "others by each": ((1,), (2, 3)),
}


@pytest.mark.parametrize("skipped", SKIPPED)
@pytest.mark.parametrize("name", [*ACROSS, "h2o and squeezeattention", "kivi and duo-attention", "razorattention and tova"])
def test_what_is_decided_for_several_blocks_is_so_among_those_that_a_row_ran(name, skipped):
    asked = SKIPPED[skipped]

    def route(self, hidden):
        return torch.tensor([float(self.dims.layer not in asked[row]) for row in rows]).to(hidden)

    with method(LayerRouter, route=route) as router:
        model = get_token_model(zoo.build("llama").model, [router(), *(COMPRESSORS[one] for one in name.split(" and "))]).eval()
        rows = (0, 1)
        together, held = decoded(model)
        for row in range(2):
            rows = (row,)
            alone, its = decoded(model, slice(row, row + 1))
            close(together[row : row + 1], alone, f"row {row}")
            assert real_entries(held, row, PADS * row) == real_entries(its, 0, 0)
