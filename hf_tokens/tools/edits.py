"""The function `edit`: run a model on groups of data, give each closed-form edit what it names, and hold what it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.hooks import hooked
from ..engine.model import ModelSurgery
from ..errors import UnsupportedError, explain
from ..handlers.weight_edit import EditedWeights, weight_edits
from ..model.arguments import CROSS
from ..model.parts import OUTSIDE, Place
from ..model.signatures import bound_arguments
from ..roles.weight_edit import WeightEdit
from ..tokens.token_map import in_float32
from .progress import track
from .surgeries import blocks_in, evaluated, models_in, surgeries_of
from .undo import AllOrNothing, Undo

Loss = Callable[[Any, dict[str, Any]], Tensor]
Batch = dict[str, Any] | str
Groups = Mapping[str, Iterable[Batch]]
Run = Callable[[Batch], Any]
Moved = dict[str, dict[str, float]]
ONE_STEP = dict(num_inference_steps=1, guidance_scale=1.0, output_type="latent")  # of a pipeline, without a negative prompt
HIDDEN = -1000.0  # an additive mask hides below: Diffusers adds -10000, Transformers the least number there is


@dataclass(frozen=True)
class EditedWeight:
    """A weight that an edit may change."""

    block: BlockSurgery
    method: WeightEdit
    name: str  # in its block, or in the model outside of the blocks

    @property
    def path(self) -> str:
        return self.name.removeprefix(OUTSIDE) if self.name.startswith(OUTSIDE) else f"{self.block.path}.{self.name}"

    @property
    def place(self) -> Place:
        return self.block.state(EditedWeights).places[self.name][0]

    @property
    def effective(self) -> Tensor:
        """The weight with the changes of the edits that act."""
        return self.block.state(EditedWeights).effective(self.name)


def edit(model: Any, data: Groups, adapter_name: str = "default", loss: Loss | None = None) -> Moved:
    """Find the closed-form edits of an adapter on data, in the order of its stack; those that were found before are found anew.

    Those of a pipeline's two denoisers are found for each, on the same data. After an error or an interrupt all is as it was.

    Args:
        model: A PeftModel or pipeline with a surgery. It runs as it is, without the edits that are to be found.
        data: Batches by the name of their group, such as `{"forget": [...], "retain": [...]}`; a batch is keyword arguments of the
            model's forward (of the denoiser's, for a pipeline). A pipeline takes prompts in words, too, `{"erase": ["a cat"], ...}`: it
            draws one step of each.
        adapter_name: The adapter to edit.
        loss: What the gradients are of, given the model's output and the batch; None takes the loss that the model returns.

    Returns:
        How far each weight moved, |W' - W| / |W|, by the key of the method and the weight's name; of two denoisers, behind theirs.

    Raises:
        UnsupportedError: The adapter has no edit or is not active, or a group of data is missing, empty or unknown.
    """
    surgeries, models = surgeries_of(model), models_in(model)
    weights = {name: edited_weights(models[name], adapter_name) for name in surgeries}
    methods = {name: check_edits(sites, adapter_name, data) for name, sites in weights.items()}
    batches = {name: list(group) if iter(group) is group else group for name, group in data.items()}
    moved = {}
    with AllOrNothing(models.values(), noted_now(methods.values())):
        for name, surgery in surgeries.items():
            found = find_edits(partial(run_batch, model, models[name]), models[name], surgery, weights[name], batches, loss)
            moved |= {f"{name}.{key}" if len(models) > 1 else key: changes for key, changes in found.items()}
    return moved


def run_batch(model: Any, inner: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch, or the pipeline that it is in on a prompt."""
    if isinstance(batch, Mapping):
        return inner(**batch)
    rule = "A batch is keyword arguments of the model's forward, or a prompt in words for a pipeline with one denoiser"
    if not isinstance(batch, str) or model is inner or len(models_in(model)) > 1:
        got = f"{batch!r} for {type(model).__name__}" if isinstance(batch, str) else type(batch).__name__
        raise UnsupportedError(explain(rule, got, "Pass dicts, such as `{'input_ids': ...}`."))
    return model(batch, **ONE_STEP)


def check_edits(weights: list[EditedWeight], adapter_name: str, data: Groups) -> list[WeightEdit]:
    """The edits of an adapter, of which these weights are, in all blocks; refused where there are none, or on other data."""
    if not weights:
        remedy = "Put a method of the role WeightEdit into it."
        raise UnsupportedError(explain("`edit` needs an adapter with a method that edits weights", f"{adapter_name!r} without one", remedy))
    active = weights[0].block.active_adapters
    if adapter_name not in active:
        rule = f"`edit` needs an adapter that acts, one of {active}"
        raise UnsupportedError(explain(rule, repr(adapter_name), "Switch to it with `set_adapter`."))
    stack = list(dict.fromkeys(site.method.key for site in weights))
    check_groups([next(s.method for s in weights if s.method.key == key) for key in stack], data)
    return list({id(site.method): site.method for site in weights}.values())


def noted_now(methods: Iterable[list[WeightEdit]]) -> Undo:
    """What lets edits hold what they hold now."""
    before = [(method, method.noted()) for several in methods for method in several]

    def undo() -> None:
        for method, changes in before:
            method.note(changes)

    return undo


def find_edits(run: Run, model: nn.Module, surgery: ModelSurgery, weights: list[EditedWeight], batches: Groups, loss: Loss | None) -> Moved:
    """Find the edits of one model, and how far its weights move."""
    stack, moved = list(dict.fromkeys(site.method.key for site in weights)), {}
    with evaluated(model):
        for place, key in enumerate(stack):
            sites = [site for site in weights if site.method.key == key]
            with switched_off(surgery, set(stack[place:])):
                changes = find_changes(run, sites, batches, loss)
                moved[key] = {site.path: relative_change(change, site.effective) for site, change in changes.items()}
            for method, block in {id(s.method): (s.method, s.block) for s in sites}.values():
                method.note({site.name: change for site, change in changes.items() if site.block is block})
    return moved


def edited_weights(model: Any, adapter_name: str) -> list[EditedWeight]:
    """Every weight that an edit of an adapter may change, in the order of its stack."""
    methods = ((block, method) for block in blocks_in(model) for method in weight_edits(block, adapter_name))
    sites = (EditedWeight(block, method, name) for block, method in methods for name in method.dims.weights)
    return sorted(sites, key=lambda site: int(site.method.key.rpartition(".")[2]))


def check_groups(methods: list[WeightEdit], data: Groups) -> None:
    """Refuse data that lacks a group that an edit needs, or has one that none knows."""
    needed = {name for method in methods for name in method.groups}
    known = needed | {name for method in methods for name in method.maybe}
    if not needed <= data.keys() <= known:
        maybe = f" and maybe {sorted(known - needed)}" if known - needed else ""
        raise UnsupportedError(explain(f"These edits need data for {sorted(needed)}{maybe}", sorted(data), "Name the groups so."))


@contextlib.contextmanager
def switched_off(surgery: ModelSurgery, keys: set[str]) -> Iterator[None]:
    """The model without these edits for a moment."""
    before = [(block, block.plan.acting) for block in surgery.blocks()]
    surgery.act((block, [method for method in acting if method.key not in keys]) for block, acting in before)
    try:
        yield
    finally:
        surgery.act(before)


def find_changes(run: Run, sites: list[EditedWeight], data: Groups, loss: Loss | None) -> dict[EditedWeight, Tensor]:
    """What one edit changes, by weight."""
    method, signals = sites[0].method, {}
    groups = {name: data[name] for name in (*method.groups, *method.maybe) if name in data}
    if "weights" in method.signals:
        signals["weights"] = {site.path: in_float32(site.effective.detach()) for site in sites}
    for name, record in RECORDERS.items():
        if name in method.signals:
            signals[name] = {group: record(run, sites, batches_of(group, batches), loss) for group, batches in groups.items()}
    with torch.no_grad():
        new = method.edit(**signals)
        changes = {site: new[site.path] - in_float32(site.effective) for site in sites if site.path in new}
    if bad := sorted(site.path for site, change in changes.items() if not change.isfinite().all()):
        rule = f"What {type(method).__name__} makes of a weight is finite"
        raise UnsupportedError(explain(rule, f"infinities or NaN in {bad[0]}", "Give it more data, or a stronger regularisation."))
    return changes


def relative_change(change: Tensor, weight: Tensor) -> float:
    """How large a change is beside its weight."""
    return float(change.norm() / in_float32(weight).norm().clamp(min=torch.finfo(torch.float32).tiny))


def batches_of(group: str, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a group, with a bar where they take long; refused where there is none."""
    count = 0
    for batch in track(batches, f"edit: {group}"):
        count += 1
        yield batch
    if not count:
        raise UnsupportedError(explain("Each group of data has a batch", f"none in {group!r}", "Pass the inputs of the model."))


# -- what an edit may ask for ------------------------------------------------------------------------------------------
@torch.no_grad()
def read_context(run: Run, sites: list[EditedWeight], batches: Iterable[Batch], loss: Loss | None) -> dict[str, Tensor]:
    """What each weight read, name -> (t i): the tokens that the block's mask for the context shows, of all batches."""
    masks: dict[int, Tensor | None] = {}
    rows: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    seen: dict[tuple[int, ...], tuple[Tensor, ...]] = {}  # one copy of what several weights read

    def note_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = bound_arguments(module, args, kwargs).items()
        masks[id(module)] = next((v for k, v in arguments if "mask" in k and CROSS.search(k) and isinstance(v, Tensor)), None)

    def note(site: EditedWeight, module: nn.Module, args: tuple) -> None:
        read, mask = args[0], masks[id(site.block.module)]
        if (id(read), id(mask)) not in seen:
            seen[id(read), id(mask)] = (read, *(() if mask is None else (mask,)), real_rows(read, mask))
        rows[site.path].append(seen[id(read), id(mask)][-1])

    blocks = {id(site.block): site.block.module for site in sites}.values()
    handles = [block.register_forward_pre_hook(note_mask, with_kwargs=True) for block in blocks]
    handles += [site.place[0].register_forward_pre_hook(partial(note, site)) for site in sites]
    with hooked(handles):
        for batch in batches:
            seen.clear()
            run(batch)
    joined = {tuple(map(id, parts)): parts for parts in rows.values()}
    joined = {ids: torch.cat(parts) for ids, parts in joined.items()}
    return {path: joined[tuple(map(id, parts))] for path, parts in rows.items()}


def real_rows(read: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens (b n i) that a mask shows, (t i)."""
    read = in_float32(read.detach()).clone()
    if mask is None or mask.shape[-1] != read.shape[-2]:
        return read.flatten(0, -2)
    shown = mask > HIDDEN if mask.is_floating_point() else mask != 0
    shown = shown.reshape(len(mask), -1, mask.shape[-1]).any(dim=1)
    return read[shown.expand(len(read), -1)]


def fisher_diagonal(run: Run, sites: list[EditedWeight], batches: Iterable[Batch], loss: Loss | None) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information, name -> (o i): mean over the batches of the squared gradient of their loss."""
    weights = [module._parameters[attribute] for module, attribute in (site.place for site in sites)]
    trainable = [weight.requires_grad for weight in weights]
    total, count = [torch.zeros_like(in_float32(weight.detach())) for weight in weights], 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                output = run(batch)
                value = own_loss(output) if loss is None else loss(output, batch)
            for sum_, grad in zip(total, torch.autograd.grad(value, weights, allow_unused=True), strict=True):
                if grad is not None:
                    sum_ += in_float32(grad) ** 2
            count += 1
    finally:
        for weight, flag in zip(weights, trainable, strict=True):
            weight.requires_grad_(flag)
    return {site.path: sum_ / count for site, sum_ in zip(sites, total, strict=True)}


def own_loss(output: Any) -> Tensor:
    """The loss that a model returned; refused where it returned none."""
    value = output.get("loss") if isinstance(output, dict) else None
    if value is None:
        rule = "An edit that looks at gradients needs a loss"
        raise UnsupportedError(explain(rule, f"{type(output).__name__} without one", "Put labels into the batches, or pass `loss`."))
    return value


RECORDERS = {"context": read_context, "fisher": fisher_diagonal}
