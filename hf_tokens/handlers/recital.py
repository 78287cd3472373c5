"""A context is recited behind itself, a part at a time: what the model looks up of it then is what its entries are worth.

A method that recites scores nothing in the prompt's own pass. Behind that, the model reads, on a copy of the cache, a few words of the
method and a part of the context again, and the method scores the entries of that part in each block. The highest score of all counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine.context import ForwardContext, Recital
from ..engine.results import ModelCall
from ..engine.run import Site
from ..engine.supply import ask, recited_entries
from ..errors import UnsupportedError, explain
from ..kv.adopt import find_cache
from ..model import families
from ..model.classes import class_name, resumes_not
from ..model.pictures import beside_text
from ..model.signatures import cache_argument, parameters
from ..roles.cache_compressor import CacheCompressor


def not_said_again(method: CacheCompressor, got: str, remedy: str) -> UnsupportedError:
    """The error for a prompt that cannot be recited."""
    rule = f"{type(method).__name__} has the model say its whole prompt again, from what its blocks hold of it"
    return UnsupportedError(explain(rule, got, remedy))


def prompt_and_cache(method: CacheCompressor, call: ModelCall, sites: list[Site], output: Any) -> tuple[Tensor, Any]:
    """The ids of a prompt (b n) and the cache behind it; refused where a pass on that cache would not be a reading of that prompt."""
    if not sites:
        raise not_said_again(method, "a window in each of its blocks", "Choose another compressor.")
    if call.model.base.config.is_encoder_decoder:
        raise not_said_again(method, "an encoder's output in front of it", "Choose another compressor.")
    masks = "multiplies its output by the mask" if families.MASKS_OUTPUT.search(class_name(call.model.base)) else None
    if unable := masks or resumes_not(call.model.base):
        raise not_said_again(method, f"a model that {unable}", "Choose another compressor.")
    arguments = call.context.arguments
    ids, visual, values = arguments.get("input_ids"), call.context.visual, output.values() if isinstance(output, dict) else output
    cache = find_cache(values) or find_cache(arguments.values())
    if ids is None or cache is None:
        raise not_said_again(
            method, "embeddings in place of ids" if ids is None else "a cache that the model does not return", "Pass `input_ids`."
        )
    if beside := beside_text(arguments):
        raise not_said_again(method, f"`{beside[0]}` beside its ids", "Choose another compressor.")
    if torch.is_grad_enabled() and any(vars(m).get("gradient_checkpointing") is True and m.training for m in call.model.base.modules()):
        raise not_said_again(method, "gradient checkpointing, which reads the cache once more", "Train without one of the two.")
    if visual is not None and bool(visual.any()):
        raise not_said_again(method, "pictures among it", "Choose another compressor.")
    return ids, cache


def recite(method: CacheCompressor, call: ModelCall, sites: list[Site], output: Any) -> dict[int, Tensor]:
    """The scores of the entries of each block (b k n), as the passes behind a prompt give them; the cache stays as it is."""
    ids, cache = prompt_and_cache(method, call, sites, output)
    arguments, name = parameters(type(call.model.base)), class_name(call.model.base)
    real = sites[0].run.padding
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    found: dict[int, Tensor] = {}
    for first, words, there in passages(method, ids, real):
        inputs = {"input_ids": words, "attention_mask": torch.cat([real, there], dim=1).long(), "use_cache": True}
        counts = families.NUMBERS_FROM_ZERO.search(name) is None and bool(inputs["attention_mask"].all())
        if not counts and "position_ids" in arguments:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)[:, ids.shape[1] :]
        if "logits_to_keep" in arguments:
            inputs["logits_to_keep"] = 1
        inputs[cache_argument(type(call.model.base).forward)] = copy.deepcopy(
            cache, {id(t): t.detach().clone() for t in of_a_graph(cache, set())}
        )
        recital = Recital(method.key, ids.shape[1], first, first + method.recites)
        with call.model.apart(ForwardContext(arguments=inputs, recital=recital)), torch.no_grad():
            call.model.inner(**inputs)
        for site in sites:
            score = recital.scores[site.block.index][..., : site.layer.length]
            found[site.block.index] = score if first == 0 else torch.maximum(found[site.block.index], score)
    return found


def passages(method: CacheCompressor, ids: Tensor, real: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Where each part begins among a row's real tokens, what is read of it (b p), and which of that is there: rows may end earlier."""
    order = (~real).long().argsort(dim=1, stable=True)
    ids, lengths = ids.gather(1, order), real.sum(dim=1, keepdim=True)
    for first in range(0, int(lengths.max()), method.recites):
        part = ids[:, first : first + method.recites]
        lead = method.lead(ids[:, :first])
        there = torch.arange(first, first + part.shape[1], device=ids.device) < lengths
        yield first, torch.cat([lead, part], dim=1), torch.cat([there[:, :1].expand_as(lead), there], dim=1)


def of_a_graph(value: Any, known: set[int]) -> Iterator[Tensor]:
    """The tensors that an object holds which a gradient would flow through: torch makes no copy of these."""
    if isinstance(value, Tensor):
        yield from [value] if value.grad_fn is not None else []
    elif id(value) not in known:
        known.add(id(value))
        inner = (
            value if isinstance(value, (list, tuple)) else (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
        )
        for each in inner:
            yield from of_a_graph(each, known)


def score_recital(method: CacheCompressor, site: Site) -> None:
    """Score the entries that this pass says again, by the method that has it said; others get none."""
    recital = site.run.context.recital
    if recital.key == method.key:
        score, recited = ask(method, site), recited_entries(site)
        recital.scores[site.block.index] = score.masked_fill(~(recited if recited.dim() == 3 else recited[:, None]), -torch.inf)
