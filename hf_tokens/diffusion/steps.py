"""Where a denoiser stands in its run: step, context, and what it put out at the step before, for each token."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.handler import handler_of
from ..engine.model import ModelSurgery
from ..engine.results import World
from ..errors import UnsupportedError, explain
from ..model import families
from ..model.classes import class_name
from ..model.pictures import over_tokens
from ..model.pipelines import ALONE
from ..model.signatures import bound_arguments, positional
from ..model.streams import PROMPT
from ..roles.signals import OF_THE_OUTPUT
from .clock import Tick, agree, falling, own_level, tick
from .guidance import REMEDY, guidance_of, nesting, unguided
from .runs import DenoisingRun, NestedRuns, StepOutput
from .unloading import UnloadLora

HOOK = "hf_tokens"
RUN_OVER = "_reset_stateful_cache"  # what a pipeline calls on its models when its run is over
GUIDED = ("cond", "uncond", "pred_cond", "pred_uncond")  # names that pipelines give the two calls of guidance
GUIDANCE_PARTS = (2, 3, 4)  # of a batch that have the same latents under guidance


class DenoisingWorld(World):
    """Which denoising step a call is: from the pipeline's cache context where that has it, else counted by the timestep.

    A step back begins a new run, in the scheduler's table of a pipeline that calls, else by the noise that the timestep means; and so does
    what comes behind a pipeline's end or a call that failed. Calls of one name at one step (guidance by several calls) are contexts of
    their own.
    """

    def __init__(self, model: nn.Module):
        self.hook = None
        self.model = model
        self.names = positional(type(model))
        self.runs = NestedRuns()
        self.standing = False
        self.keeps_output = False  # whether a method names a signal of what the model put out
        self.sample: Tensor | None = None
        self.finest: int | None = None  # tokens of the first stream of this call where that is asked
        self.halved: bool | None = None  # whether this call's sample has two equal halves, once that is asked
        self.untold: tuple[Any, Tensor | None, Tensor] | None = None  # place, sample and prompt of a call whose prompt nobody told of
        self.joined: str | None = None
        if isinstance(model, sys.modules["diffusers"].ModelMixin):
            self.hook = context_hook_class()(self.forget)
            if RUN_OVER not in dir(type(model)):  # a model without caches of diffusers' own is not called at the end otherwise
                vars(model)[RUN_OVER] = self.forget
        self.unloading = UnloadLora(model) if UnloadLora.name in dir(type(model)) else None

    def block_added(self, block: BlockSurgery) -> None:
        """Let `cache_context` find the hook in a block of ours: on the model it would rewrite a forward, which no deepcopy survives."""
        if self.hook is None or self.standing:
            return
        from diffusers.hooks import HookRegistry

        block._diffusers_hook = HookRegistry(block)
        block._diffusers_hook.hooks[HOOK] = self.hook
        block._diffusers_hook._hook_order.append(HOOK)
        self.standing = True
        self.look_again()

    def look_again(self) -> None:
        """Let the model's own registry look for its children again."""
        registry = vars(self.model).get("_diffusers_hook")
        if registry is not None:
            registry.invalidate_child_registries_cache()

    def abandon(self) -> None:
        """The call has raised: what comes behind it begins a run."""
        self.sample = self.untold = None
        self.run.end()

    def detach(self) -> None:
        """Leave nothing on the model."""
        self.look_again()
        vars(self.model).pop(RUN_OVER, None)
        if self.unloading is not None:
            self.unloading.remove()

    def forget(self) -> None:
        """The run of a pipeline is over: the next call begins one."""
        self.runs.enter(nesting())
        self.run.end()
        self.untold = None

    @property
    def run(self) -> DenoisingRun:
        """The run that the last call was of."""
        return self.runs.run

    def before_model(self, model: ModelSurgery, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Context, step, steps, timestep, share of the run and picture of this call."""
        self.keeps_output = any(OF_THE_OUTPUT & method.asks for method in model.methods())
        self.finest = None
        if self.hook is None:
            return {"steps_of_denoiser": self}
        arguments = bound_arguments(self.model, args, kwargs)
        name = next((name for name in families.TIMESTEPS if name in arguments), families.TIMESTEPS[0])
        context, timestep, sample = self.hook.manager._context, arguments.get(name), arguments.get(self.names[0])
        counted, now = context is not None and context.step_index is not None, tick()
        value = 0.0 if timestep is None else falling(class_name(self.model), torch.as_tensor(timestep))
        another, run = self.runs.enter(nesting()) and any(True for _ in model.methods()), self.run
        run.step("default" if context is None else context.name, context.step_index if counted else None, now, value, another)
        self.refuse_single(model)
        self.sample, self.halved = sample if isinstance(sample, Tensor) else None, None
        steps = None if context is None else context.num_inference_steps
        if steps:
            elapsed = run.index / steps
        elif now is not None and not now.falls:
            elapsed = (now.index - run.first) / (len(now.table) - run.first)
        else:
            elapsed = None if timestep is None or not run.origin else 1 - value / run.origin
        return {
            "steps_of_denoiser": self,
            "denoising": (*run.context, self.runs.depth),
            "begins": run.begins,
            "step": run.index,
            "steps": steps,
            "remaining": steps - 1 - run.index if steps else None if now is None else len(now.table) - 1 - now.index,
            "timestep": timestep,
            "time": self.time(timestep, sample, now),
            "elapsed": elapsed,
            "picture": tuple(sample.shape[2:]) if isinstance(sample, Tensor) and sample.dim() in (4, 5) else None,
        }

    def refuse_single(self, model: ModelSurgery) -> None:
        """Refuse steps that go back one after the other where something is kept from step to step: each would begin a run."""
        if self.run.single > 1 and (self.keeps_output or any(handler_of(method).keeps_steps for method in model.methods())):
            rule = "What is kept from step to step needs steps whose noise falls, or that a pipeline's scheduler or a context counts"
            remedy = "Call the denoiser within `CacheMixin.cache_context(denoiser, 'cond', step_index=i, num_inference_steps=n)`."
            raise UnsupportedError(explain(rule, "one after the other with more noise", remedy))

    def time(self, timestep: Any, sample: Any, now: Tick | None = None) -> Tensor | None:
        """The timestep of each sample on a schedule of 1000, 1000 at pure noise, (b); None where its unit is not known."""
        if timestep is None or not isinstance(sample, Tensor):
            return None
        shares = now is not None and now.shares
        levels = own_level(class_name(self.model), torch.as_tensor(timestep, device=sample.device).float(), shares)
        if now is not None and now.level is None and not shares:
            return None
        if now is not None and not shares and (levels is None or not agree(levels, now.level)):
            return torch.full((len(sample),), now.level, device=sample.device)
        if levels is None:
            return None
        return levels.reshape(len(sample), -1).amax(dim=1) if levels.numel() % len(sample) == 0 else levels.amax().expand(len(sample))

    def negative(self, call: dict[str, Any]) -> Tensor | None:
        """Samples of the negative prompt in this call, (b) bool; None where there is no prompt."""
        prompt = call.get(PROMPT)
        if not isinstance(prompt, Tensor):
            return None
        guidance = guidance_of(self.run.context[0])
        self.joined = guidance.joined
        if guidance.parts is None:
            self.check_untold(prompt)
        parts = guidance.parts or ALONE
        if len(prompt) % len(parts):
            rule = f"A batch under guidance has {len(parts)} parts"
            raise UnsupportedError(explain(rule, f"{len(prompt)} prompts", REMEDY))
        return torch.tensor(parts, device=prompt.device).repeat_interleave(len(prompt) // len(parts))

    def check_untold(self, prompt: Tensor) -> None:
        """Refuse a denoiser that is called without a pipeline for one sample with two prompts, or twice in a batch: one may be negative."""
        sample, before = self.sample, self.untold
        twice = before is not None and before[0] == self.run.place and same_values(before[1], sample) and not same_values(before[2], prompt)
        for parts in GUIDANCE_PARTS if sample is not None and len(sample) == len(prompt) else ():
            twice |= len(prompt) % parts == 0 and all(same_values(sample.chunk(parts)[0], other) for other in sample.chunk(parts))
        if twice:
            rule = "Which prompt is the negative one is known of the pipeline that calls, or told by the context of the call"
            raise UnsupportedError(explain(rule, "one sample with two prompts, or twice with one", REMEDY))
        self.untold = None if sample is None else (self.run.place, sample, prompt)

    def after_model(self, output: Any) -> None:
        """A call has ended; keep what it put out, if a method names a signal of it."""
        out, sample = output if isinstance(output, Tensor) else output[0], self.sample
        self.sample = None
        if not self.keeps_output or self.hook is None or not isinstance(out, Tensor) or sample is None or out.dim() != sample.dim():
            return
        channel = 1 if out.dim() > 3 else -1
        if out.shape[channel] > sample.shape[channel]:
            out = out.narrow(channel, 0, sample.shape[channel])
        like = next((key for key, (other, _) in self.run.now.items() if same_values(other, sample)), self.run.context)
        halves = len(sample) == len(out) and halves_alike(sample)
        self.run.keep(sample, StepOutput(out.detach(), sample.shape, halves, like))

    def halves(self) -> bool:
        """Whether the batch of this call is two halves of the same samples."""
        if self.halved is None:
            self.halved = self.sample is not None and halves_alike(self.sample)
        return self.halved

    def downsampling(self, n: int) -> int:
        """How many times as wide and high each of n tokens is as those of the first stream that asked in this call."""
        self.finest = n if self.finest is None else self.finest
        return math.ceil(math.sqrt(self.finest // n))

    def before(self) -> StepOutput | None:
        """What this context put out at the step before; None where it then ran on other samples, as where guidance ends within a run."""
        output = self.run.last.get(self.run.context)
        return output if output is not None and self.sample is not None and output.shape == self.sample.shape else None

    def noise(self, n: int) -> Tensor | None:
        """That for each token, (b n f)."""
        output = self.before()
        return None if output is None else over_tokens(output.output, n)

    def contrast(self, n: int) -> Tensor | None:
        """What the condition changed in it, (b n f): over the halves of a batch, or between the two calls for one sample."""
        last = self.before()
        if last is None:
            return None
        calls = {key: output.output for key, output in self.run.last.items() if output.like == last.like}
        named = {key: out for key, out in calls.items() if key[0] in GUIDED}
        two = list(last.output.chunk(2) if last.halves else (named if len(named) == 2 else calls).values())
        if len(two) != 2 or two[0].shape != two[1].shape:
            return None
        difference = over_tokens(two[0] - two[1], n)
        return torch.cat([difference, difference]) if difference is not None and last.halves else difference

    def guidance(self, n: int) -> Tensor | None:
        """How much that is, (b n)."""
        difference = self.contrast(n)
        return None if difference is None else difference.norm(dim=-1)


def halves_alike(sample: Tensor) -> bool:
    """Whether a batch holds its samples twice, as under guidance."""
    return len(sample) % 2 == 0 and same_values(*sample.chunk(2)) and not unguided()


def same_values(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same values."""
    return x is y or x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)


@functools.cache
def context_hook_class() -> Any:
    """The class of a diffusers hook that only takes part in `cache_context`, and is reset when a pipeline's run is over."""
    from diffusers.hooks import ModelHook
    from diffusers.hooks.hooks import BaseState, StateManager

    class ContextHook(ModelHook):
        _is_stateful = True

        def __init__(self, forget: Callable[[], None]):
            super().__init__()
            self.manager, self.forget = StateManager(BaseState), forget

        def __reduce__(self) -> tuple[Any, ...]:
            return bare_hook, (), vars(self)

        def reset_state(self, module: nn.Module) -> nn.Module:
            self.manager.reset()
            self.forget()
            return module

    return ContextHook


def bare_hook() -> Any:
    """One that has nothing yet: a pickle does not find the class, which is there only where diffusers is."""
    return object.__new__(context_hook_class())
