"""One forward: the outside of the model does not change, zero strength is the base, and a batch is each sample alone."""

import re

import pytest
import torch

from hf_tokens.api import get_token_model
from hf_tokens.errors import UnsupportedError
from hf_tokens.testing import zoo
from hf_tokens.testing.tolerances import all_close, all_equal
from hf_tokens.tools.surgeries import surgery_of

from ..architectures import BATCH, PADS
from ..cases import drawn
from ..configs import tiny_config
from ..pairs import base_run, cast, mildest, planned, refused, saves
from ..snapshots import difference, snapshot, unwrapped

WORDS = r"(?s)^.+, got .+\. .+\.$"  # rule, value that came, remedy


def test_supported_or_refused(any_pair):
    row = any_pair.row
    if planned(any_pair) is None and refused(any_pair) is None:
        want, have = (row.run(model, any_pair.inputs) for model in (any_pair.base(), any_pair.attach()))
        short = any_pair.info.cls.site == "output"  # a Pooler that makes the sequence shorter for the caller
        assert [t.shape[:1] if short else t.shape for t in have] == [t.shape[:1] if short else t.shape for t in want]
        assert all(t.isfinite().all() for t in have)
        return
    base = any_pair.base().requires_grad_()
    if planned(any_pair) is None:
        with torch.no_grad():
            row.run(base, any_pair.inputs)  # some models note things at their first call
    before, trainable = snapshot(base), [p.requires_grad for p in base.parameters()]
    try:
        model = get_token_model(base, tiny_config(any_pair.info.config))
    except UnsupportedError as error:
        assert [p.requires_grad for p in base.parameters()] == trainable
        caught = error
    else:
        assert planned(any_pair) is None
        with pytest.raises(UnsupportedError) as info:
            any_pair.run(model)
        with model.disable_adapter(), torch.no_grad():
            all_equal(row.run(model, any_pair.inputs), row.run(any_pair.base(), any_pair.inputs), "disabled")
        caught, base = info.value, model.unload()
    assert re.match(WORDS, str(caught))
    assert not difference(before, snapshot(unwrapped(base)))


def test_it_does_what_its_role_promises(pair):
    assert saves(pair, *mildest(pair)), f"{pair.config} saves nothing on {pair.architecture}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_strength_is_the_base(pair, dtype):
    inputs = cast(pair.inputs, dtype)
    model = pair.attach(config=pair.config.at_zero(), stirred=False).to(dtype)
    want = base_run(pair) if dtype == torch.float32 else pair.run(pair.base().to(dtype), inputs)
    all_close(pair.run(model, inputs), want, "zero strength")


@drawn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_half_precision_takes_it(host, dtype):
    inputs, base = cast(host.inputs, dtype), host.base().to(dtype)
    want = host.run(base, inputs)
    have = host.run(host.surgery(base, [tiny_config(host.info.config)]), inputs)  # its own parameters are in float32
    assert [t.dtype for t in have] == [t.dtype for t in want]
    assert all(t.isfinite().all() for t, other in zip(have, want, strict=True) if other.isfinite().all())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_an_autocast_takes_it(host):
    base, model = host.base(), host.attach()  # made without it, for what they are tried with is remembered
    with torch.autocast("cpu", torch.bfloat16):
        want, have = host.run(base), host.run(model)
    assert [t.dtype for t in have] == [t.dtype for t in want]
    assert all(t.isfinite().all() for t in have)


def test_the_model_s_forward_is_the_model_called(host):
    with torch.no_grad():
        called, forward = host.attach(), surgery_of(host.attach()).base.forward
        all_equal(host.row.run(forward, host.inputs), host.row.run(called, host.inputs), "forward")


def test_a_part_that_is_called_alone_is_that_part_or_refused(host):
    if host.row.timesteps:
        return  # what surrounds a denoiser's blocks is the denoiser
    model, calls = host.attach(), []
    parts = {id(part): part for surgery in surgery_of(model).streams for part in surgery.holders[1:]}

    def note(part, args, kwargs, output):
        calls.append((part, args, kwargs, [tensor.clone() for tensor in zoo.tensors(output)]))

    hooks = [part.register_forward_hook(note, with_kwargs=True) for part in parts.values()]
    with torch.no_grad():
        host.row.run(model, host.inputs, **({"use_cache": False} if host.row.generates else {}))
        for hook in hooks:
            hook.remove()
        for part, args, kwargs, want in {id(call[0]): call for call in reversed(calls)}.values():
            try:
                have = zoo.tensors(part(*args, **kwargs))
            except UnsupportedError as error:
                assert re.match(WORDS, str(error)), str(error)
            else:
                all_equal(have, want, type(part).__name__)


def test_a_batch_is_each_sample_alone(pair):
    model = pair.attach()
    try:
        whole = pair.row.run(model, pair.inputs)
    except UnsupportedError:
        return
    for i in range(BATCH):
        all_close(pair.row.sample(whole, i), pair.row.run(model, pair.row.alone(pair.inputs, i)), f"sample {i}")


@torch.no_grad()
def test_a_padded_batch_is_each_sample_alone(pair, side):
    row, model = pair.row, pair.attach()
    whole = row.run(model, row.padded(pair.inputs, side))
    for i in range(BATCH):
        real = row.sample(whole, i, *row.real(pair.inputs, i, side))
        all_close(real, row.run(model, row.alone(pair.inputs, i, PADS * i)), f"{side} padding, sample {i}")


@torch.no_grad()
def test_a_row_of_padding_alone_harms_none(pair):
    row, inputs = pair.row, {**pair.inputs}
    if not row.pads:
        return
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1] = 0
    try:
        row.run(pair.base(), inputs)
    except ValueError:
        return  # Qwen2-VL cannot place its tokens
    model = pair.attach()
    whole = row.run(model, inputs)
    assert all(tensor.isfinite().all() for tensor in whole)
    all_close(row.sample(whole, 0), row.run(model, row.alone(inputs, 0)), "the other sample")
