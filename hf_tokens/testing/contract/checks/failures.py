"""A call that raises, whatever it is and wherever, leaves nothing of itself: the next one answers as if it had never been."""

import dataclasses

import pytest
from torch import Tensor, nn

from hf_tokens.engine.block import BlockSurgery
from hf_tokens.testing.tolerances import all_equal

from ..pairs import found

ERRORS = (KeyboardInterrupt, MemoryError)
REMEMBERED = ("Features", "LookUps")  # what a method keeps from one denoising step, or one chunk of a prompt, to the next
PARTS_OF_IT = ("surgery", "block")  # modules that are part of it


def raising(error, at):
    """A hook that raises in its call number `at`."""
    calls = iter(range(at + 1))

    def hook(*args):
        if next(calls) == at:
            raise error("in the middle of a call")

    return hook


def residue(model):
    """Tensors that the surgery of a model holds, beside parameters and buffers, by where they are."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    todo = [(f"block {m.index} of {m.surgery.stream.name}", m) for m in model.modules() if isinstance(m, BlockSurgery)]
    seen, tensors = set(), {}
    while todo:
        path, value = todo.pop()
        if id(value) in seen or type(value).__name__ in REMEMBERED:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors |= {} if id(value) in own else {path: tuple(value.shape)}
        elif isinstance(value, dict):
            todo += [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif type(value).__module__.startswith("hf_tokens.") and not isinstance(value, type):
            names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else vars(value)
            items = {name: getattr(value, name) for name in names}
            todo += [(f"{path}.{name}", item) for name, item in items.items() if not isinstance(item, nn.Module) or name in PARTS_OF_IT]
    return tensors


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_a_call_that_raises_leaves_nothing_of_itself(one, error):
    model = one.attach()
    want = one.run(model)
    streams = [stream for stream in found(one.architecture).streams if stream in one.streams()]
    path = streams[-1].paths[-2]
    block = model.get_base_model().get_submodule(path)
    for module in (block, list(block.modules())[-1]):  # around the surgery of the block, and inside of it
        for at in (0, 1):
            handle = module.register_forward_pre_hook(raising(error, at))
            try:
                one.run(model)
            except error:
                assert not residue(model)
            handle.remove()
            all_equal(one.run(model), want, f"behind a call that failed in {type(module).__name__}")
