"""What a run is said to have done is what it did: what acted, what became of each token, what it cost; and the pictures of it."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import hf_tokens
from hf_tokens import (
    DeepPromptConfig,
    KVzipConfig,
    MixtureOfDepthsConfig,
    SelectionPConfig,
    SnapKVConfig,
    ToMeConfig,
    UnsupportedError,
    get_token_model,
    measure,
    plot,
)
from hf_tokens.engine.surgery import Listener
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig
from hf_tokens.tools.surgeries import surgery_of


class Slots(Listener):
    """Where each token lives behind each block."""

    def __init__(self):
        self.behind = {}

    def passed(self, block, run):
        self.behind[block.index] = run.ledger.slot.tolist()


def recorded(family, methods, **more):
    base = zoo.build(family)
    torch.manual_seed(0)
    model = get_token_model(base.model, methods).eval()
    slots = Slots()
    with hf_tokens.record(model) as run, surgery_of(model).listening(slots):
        model(**base.inputs, **more)
    return model, base.inputs, run, slots


@pytest.mark.parametrize(
    ("family", "method"), [("vit", ToMeConfig(r=2)), ("llama", ProbeDropConfig(share=0.5, layers=[1])), ("llama", SelectionPConfig())]
)
def test_what_became_of_each_token_is_what_its_slot_says(family, method):
    _, _, run, slots = recorded(family, method)
    (seen,) = run.passages
    for index in range(seen.blocks):
        behind = slots.behind.get(max((i for i in slots.behind if i <= index), default=-1))
        for row in range(len(seen.real)) if behind is not None else ():
            fate, where = seen.behind(index), behind[row]
            for token, slot in enumerate(where):
                assert bool(fate.gone[row, token]) == (slot < 0)
                assert bool(fate.joined[row, token]) == (slot >= 0 and where.count(slot) > 1)
    assert any(bool((fate.gone | fate.joined).any()) for fate in seen.fates.values())


def test_a_token_that_skips_a_block_did_so_there_alone():
    model, _, _, _ = recorded("llama", MixtureOfDepthsConfig(layers=[1]))
    model.train()
    with hf_tokens.record(model) as run:
        model(**zoo.build("llama").inputs)
    fates = [run.passages[0].behind(index) for index in range(4)]
    share = next(iter(run.acts.values())).share
    assert not fates[0].skipped.any() and not fates[2].skipped.any()
    assert 0 < share < 1 and float((~fates[1].skipped).float().mean()) == pytest.approx(share)


def test_inserted_tokens_are_counted_beside_those_that_entered():
    _, inputs, run, _ = recorded("llama", ProbeInsertConfig(tokens=2, layers=[1]))
    assert [run.passages[0].behind(index).inserted for index in range(4)] == [0, 2, 2, 2]
    assert torch.equal(run.passages[0].ids, inputs["input_ids"])


def test_the_cache_is_counted_by_block_and_head():
    model, inputs, run, _ = recorded("llama", SnapKVConfig(budget=0.5), use_cache=True)
    assert run.kv_bytes == measure(model, **inputs, use_cache=True).kv_bytes
    n = inputs["input_ids"].shape[1]
    assert {run.seen[key] for key in run.entries} == {n} and len(run.entries) == 4
    kept, of = sum(int(held.sum()) for held in run.entries.values()), sum(held.numel() * n for held in run.entries.values())
    assert next(iter(run.acts.values())).share == pytest.approx(kept / of)


def test_what_a_method_evicts_behind_the_pass_is_counted_too():
    model, inputs, run, _ = recorded("llama", KVzipConfig(ratio=0.3), use_cache=True)
    assert run.kv_bytes == sum(run.bytes.values()) == measure(model, **inputs, use_cache=True).kv_bytes


def test_a_summary_stands_beside_the_model_without():
    base = zoo.build("llama")
    want = measure(base.model, **base.inputs, use_cache=True)
    model = get_token_model(base.model, [DeepPromptConfig(tokens=3), SnapKVConfig(budget=0.5)]).eval()
    found = hf_tokens.summary(model, **base.inputs, use_cache=True)
    assert found.base == want and found.cost == measure(model, **base.inputs, use_cache=True)
    assert [(row.name, row.calls) for row in found.rows] == [("deep-prompt", 4), ("snapkv", 4)]
    text, page = str(found), found._repr_html_()
    assert all(f"{value:,}" in text and f"{value:,}" in page for value in (*vars(want).values(), *vars(found.cost).values()))
    assert found.to_dict()["methods"][1] == {"method": "snapkv", "role": "CacheCompressor", "acted": 4, "counts": "cache", "share": 0.5625}


def test_a_generation_is_summed_up_when_it_was_recorded():
    base = zoo.build("llama")
    model = get_token_model(base.model, SnapKVConfig(budget=0.5)).eval()
    with pytest.raises(UnsupportedError, match=r"or of what was recorded, got neither\. Pass the arguments"):
        hf_tokens.summary(model)
    inputs = {name: base.inputs[name] for name in ("input_ids", "attention_mask")}
    with hf_tokens.record(model) as run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    found = hf_tokens.summary(model)
    assert found.cost.tokens == run.tokens and found.base is None and len(run.passages) <= 1 and "-" in str(found)


def test_nothing_stays_behind_a_record_that_raised():
    model, inputs, run, _ = recorded("llama", SnapKVConfig(budget=0.5), use_cache=True)
    wanting = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), hf_tokens.record(model):
        raise KeyboardInterrupt
    assert not surgery_of(model).listeners and wanting == [p.requires_grad for p in model.parameters()]
    assert hf_tokens.summary(model).cost.tokens == run.tokens  # the last that came to its end
    with pytest.raises(UnsupportedError, match="needs a model with a surgery"), hf_tokens.record(zoo.build("llama").model):
        pass


def drawn(figure):
    assert type(figure) is Figure and figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    figure.savefig(written := io.BytesIO(), format="png")
    return len(written.getvalue())


def test_each_picture_is_drawn_in_one_call():
    _, _, run, _ = recorded("vit", ToMeConfig(r=2))
    one, over = plot.tokens(run), plot.picture(run, np.zeros((8, 8, 3)))
    assert drawn(one) and drawn(over) and len(over.axes) == 4 and len(one.axes) == 1
    assert [text.get_text() for legend in one.legends for text in legend.texts] == ["kept", "joined"]
    model, inputs, run, _ = recorded("llama", [SelectionPConfig(), SnapKVConfig(budget=0.5)], use_cache=True)
    words = plot.tokens(run, words=[f"$w{i}" for i in range(16)])
    assert drawn(words) and words.axes[0].get_xticklabels()[3].get_text() == r"\$w3"
    assert drawn(plot.cache(run)) and drawn(plot.costs(hf_tokens.summary(model, **inputs, use_cache=True)))
    line = plot.pareto({"a": [(2.0, 0.9), (1.0, 0.7)], "b": [(1.5, 0.6)]}, cost="bytes", quality="right").axes[0].lines[-1]
    assert line.get_xydata().tolist() == [[1.0, 0.7], [2.0, 0.9]]  # b stands behind both


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run, model: plot.tokens(run, passage=1), r"has 1 passes, with \[2\] samples, got passage=1, row=0"),
        (lambda run, model: plot.tokens(run, row=2), "got passage=0, row=2"),
        (lambda run, model: plot.tokens(hf_tokens.RunRecord()), "needs a method that acts on them, got a run in which none did"),
        (lambda run, model: plot.picture(run, np.zeros((8, 8))), "got a pass of the stream 'text' without"),
        (lambda run, model: plot.cache(run), "needs a run that kept one, got none"),
        (lambda run, model: plot.costs(hf_tokens.summary(model)), "needs those without the adapter, got a summary of a recorded run"),
        (lambda run, model: plot.pareto({}, cost="a", quality="b"), "needs points, got none"),
    ],
)
def test_what_cannot_be_drawn_is_said(call, words):
    model, _, run, _ = recorded("llama", SelectionPConfig(), use_cache=False)
    with pytest.raises(UnsupportedError, match=words):
        call(run, model)
