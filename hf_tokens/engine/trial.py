"""Whose an error is that came out of a module with other tokens than the model gave: ours to refuse, or somebody else's.

The module is tried again by itself: a copy of it over the same weights, without the hooks and forwards that hang on it, on copies of its
arguments. Where it runs on all tokens and not on those that are left, it cannot take these; any other error is its raiser's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.tap import TAP
from ..errors import HFTokensError, UnsupportedError, explain
from ..kv.adopt import find_cache
from ..model.parts import OWN

CallArguments = tuple[tuple, dict[str, Any]]
HUNG_ON = ("forward", TAP)  # what may stand on an instance beside what its class made


def run_or_refuse(run: Callable[[], Any], module: nn.Module, whole: CallArguments, cut: CallArguments, words: tuple[str, str, str]) -> Any:
    """What a call of a module on cut arguments returns; its errors pass, but for one that says that the module cannot take them.

    Raises:
        UnsupportedError: It cannot; the words are the rule, the module, and the remedy.
    """
    try:
        return run()
    except (HFTokensError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not runs(module, whole) or runs(module, cut):
            raise
        rule, where, remedy = words
        raise UnsupportedError(explain(rule, where, remedy)) from error


@torch.no_grad()
def runs(module: nn.Module, arguments: CallArguments) -> bool:
    """Whether a module by itself runs on these arguments, without a cache."""
    args, kwargs = copied(arguments)
    try:
        type(module).forward(stripped(module), *args, **kwargs)
    except Exception:  # it is a trial of our own
        return False
    return True


def copied(value: Any) -> Any:
    """A value with its tensors copied, and no cache in it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return None if find_cache((value,)) is not None else value


def stripped(module: nn.Module) -> nn.Module:
    """A copy of a module over the same weights: without hooks, compiled calls, and what hangs on its instances or ours."""
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    held = vars(module)
    own = {name: value for name, value in held.items() if name not in vars(twin) and name not in HUNG_ON}
    vars(twin).update({name: type(value)(value) if type(value) in (dict, list, set) else value for name, value in own.items()})
    vars(twin)["_parameters"].update(held["_parameters"])
    vars(twin)["_buffers"].update(copied(dict(held["_buffers"])))
    vars(twin)["_modules"].update(
        {name: None if child is None else stripped(child) for name, child in held["_modules"].items() if name != OWN}
    )
    twin.training = module.training
    return twin
