"""Calls that raise, in every phase of every role; calls from several threads; models that live long."""

import copy
import gc
import random
import threading

import pytest
import torch
from contract.pairs import PAIRS, PLACED, one_of_each_role, with_pictures
from tolerances import all_equal

from hf_tokens import UnsupportedError, get_token_model
from hf_tokens.testing import probe_config, zoo
from hf_tokens.testing.contract.checks.failures import residue
from hf_tokens.testing.contract.pairs import found, planned
from hf_tokens.testing.contract.snapshots import difference, snapshot

ERRORS = (
    *(KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.OutOfMemoryError, KeyError, TypeError, OSError, Warning),
    *(RuntimeError, ValueError, IndexError, AssertionError),
)


class Raising:
    """A hook that raises in one of its calls."""

    def __init__(self, error, at):
        self.error, self.left = error("in the middle of a call"), at

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize("one", with_pictures(), ids=lambda one: f"{one.info.role}-{one.method}-{one.architecture}")
def test_an_error_anywhere_is_its_own_and_the_next_call_is_right(one, amount, count):
    chance, model = random.Random(one.method), one.attach()
    want = one.run(model)
    streams = [stream for stream in found(one.architecture).streams if stream in one.streams()]
    modules = [m for path in streams[-1].paths for m in model.get_base_model().get_submodule(path).modules()]
    modules += list(model.get_base_model().children())
    for _ in range(amount(150, 2)):
        raising = Raising(chance.choice(ERRORS), chance.randrange(4))
        module = chance.choice(modules)
        handle = (module.register_forward_pre_hook if chance.random() < 0.5 else module.register_forward_hook)(raising)
        try:
            one.run(model)
            count["came to no error"] += 1
        except BaseException as error:
            assert error is raising.error, f"{error!r} instead of {raising.error!r} in {type(module).__name__}"
            assert not residue(model)
            count["raised"] += 1
        handle.remove()
        all_equal(one.run(model), want, f"behind {raising.error!r} in {type(module).__name__}")


def test_threads_get_what_is_right_or_are_refused(amount, count):
    specimen = zoo.build("llama")
    specimen.model = get_token_model(specimen.model, probe_config(0.5))
    want, lock, tally, wrong = specimen.run(), threading.Lock(), threading.Lock(), []

    def work(run, what):
        for _ in range(amount(200, 10)):
            try:
                out = run()
            except UnsupportedError:
                out = None
            with tally:
                count["refused" if out is None else what] += 1
            if out is not None and not all(torch.equal(a, b) for a, b in zip(out, want, strict=True)):
                wrong.append(what)

    def in_turn():
        with lock:
            return specimen.run()

    for run, what in ((in_turn, "in turn"), (specimen.run, "at once")):
        threads = [threading.Thread(target=work, args=(run, what)) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    own = [copy.deepcopy(specimen) for _ in range(4)]
    threads = [threading.Thread(target=work, args=(one.run, "each its own")) for one in own]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and count["in turn"] == count["each its own"] == 4 * amount(200, 10)
    all_equal(specimen.run(), want, "behind all threads")


def held_objects():
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("one", one_of_each_role(), ids=lambda one: f"{one.info.role}-{one.method}-{one.architecture}")
def test_cycles_of_attaching_and_taking_out_leave_nothing(one, amount, count):
    base = one.base()
    one.surgery(base, [one.config]).unload()
    before, counts = snapshot(base), []
    for _ in range(amount(500, 3)):
        model = one.surgery(base, [one.config])
        base = model.unload()
        del model
        count["cycles"] += 1
        if count["cycles"] in (2, amount(500, 3)):
            counts.append(held_objects())
    assert not difference(before, snapshot(base))
    assert counts[1] - counts[0] <= 100, f"{counts[1] - counts[0]} objects more"


PAIRS_OF = {method: [pair for pair in PAIRS if pair.method == method] for method in PLACED}
HALF = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@pytest.mark.parametrize("dtype", HALF, ids=HALF.values())
@pytest.mark.parametrize("part", range(8))
def test_every_method_runs_on_a_base_in_half_precision(part, dtype, amount, count):
    for method in PLACED[part :: amount(8, 40)]:
        pair = next(pair for pair in PAIRS_OF[method] if planned(pair) is None)
        model, cast = pair.surgery(pair.base().to(dtype), [pair.config]).eval(), lambda v: v.to(dtype) if is_float(v) else v
        try:
            out = pair.run(model, {name: cast(value) for name, value in pair.inputs.items()})
        except UnsupportedError:
            count["refused"] += 1
            continue
        assert all(tensor.isfinite().all() for tensor in out), method
        count["right"] += 1


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()
