"""The laws that `families.py` holds a family to, and the base and the surgery that they are held of."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from peft import PeftModel
from tolerances import close
from torch import Tensor, nn
from transformers import set_seed

import hf_tokens
from hf_tokens import compress_context, get_token_model, list_methods
from hf_tokens.roles.base import Method
from hf_tokens.roles.config import MethodConfig
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.configs import strong, tiny_config
from hf_tokens.testing.contract.pairs import LOCAL, MAYBE
from hf_tokens.testing.contract.parameters import stir

torch.set_num_threads(1)
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

METHODS = {info.name: info for info in list_methods() if info.cls.placed and info.cls.__module__ != "hf_tokens.testing.probe"}
COMPRESSORS = [name for name, info in METHODS.items() if info.role == "CacheCompressor"]
PADS, NEW, PROMPT = 3, 3, 12
Inputs = dict[str, Any]


class Wrong(Exception):
    """A law that does not hold."""


@dataclass
class Base:
    """A family's model, and what it does by itself."""

    family: str
    dtype: torch.dtype = torch.float32
    done: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def specimen(self) -> zoo.Specimen:
        return zoo.build(self.family, dtype=self.dtype)

    @cached_property
    def half(self) -> Base:
        return Base(self.family, torch.bfloat16)

    @cached_property
    def double(self) -> Base:
        return Base(self.family, torch.float64)

    def does(self, name: str, act: Callable[[nn.Module], Any]) -> Any:
        """What comes of the base in an act, which is done once; None if it raises."""
        if name not in self.done:
            try:
                self.done[name] = act(self.specimen.model)
            except Exception:
                self.done[name] = None
        return self.done[name]


@dataclass
class Case:
    """A family with methods in it."""

    base: Base
    configs: tuple[MethodConfig, ...]

    @property
    def model(self) -> nn.Module:
        return self.base.specimen.model

    @property
    def inputs(self) -> Inputs:
        return self.base.specimen.inputs

    @property
    def batch(self) -> int:
        return self.base.specimen.hints["batch"]

    @property
    def classes(self) -> list[type[Method]]:
        return [METHODS[config.method].cls for config in self.configs]

    def attached(self, act: Callable[[nn.Module], Any], *, zero: bool = False) -> Any:
        """What comes of a model with the methods in it, which go out again."""
        torch.manual_seed(0)
        configs = [config.at_zero() if zero else config for config in self.configs]
        model = get_token_model(self.model, configs).eval()
        try:
            return act(model if zero else stir(model))
        finally:
            model.unload()

    def run(self, model: nn.Module, **more: Any) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return zoo.tensors(model(**{**self.inputs, **more}))

    @property
    def talks(self) -> bool:
        return self.model.can_generate()

    @property
    def text(self) -> bool:
        """Whether ids alone are read, and more of them generated."""
        own = {"input_ids", "attention_mask"}
        return set(self.inputs) <= own and self.talks and not self.model.config.is_encoder_decoder

    @property
    def special(self) -> list[int]:
        """Ids that are no words: a tiny model would say that a picture comes, and no picture would come."""
        named = [v for k, v in vars(self.model.config).items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)]
        return sorted({*named, *range(80, zoo.VOCAB)})

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"][:, :PROMPT]

    @property
    def prompt(self) -> Inputs:
        """What a generation begins with."""
        if self.text:
            return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        return {name: value for name, value in self.inputs.items() if name not in ("decoder_input_ids", "position_ids")}

    @property
    def in_rows(self) -> bool:
        """Whether each input has a row for each sample."""
        tensors = [value for value in self.inputs.values() if isinstance(value, Tensor) and value.dim()]
        return all(len(value) == self.batch for value in tensors) and not any(isinstance(v, (list, tuple)) for v in self.inputs.values())

    def said(self, model: nn.Module, prompt: Inputs, **more: Any) -> list[Tensor]:
        """The logits of each step of a generation; BLIP's writes into its prompt."""
        torch.manual_seed(0)
        prompt = {name: value.clone() if isinstance(value, Tensor) else value for name, value in prompt.items()}
        with torch.no_grad():
            out = model.generate(
                **prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
                return_dict_in_generate=True, suppress_tokens=None if self.text else self.special, forced_eos_token_id=None, **more,
            )  # fmt: skip
        return list(out.logits)


def row(inputs: Inputs, i: int) -> Inputs:
    """One sample of a batch."""
    return {name: value[i : i + 1] if isinstance(value, Tensor) and value.dim() else value for name, value in inputs.items()}


def texts(ids: Tensor, mask: Tensor | None = None) -> Inputs:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def same(name: str, got: list[Tensor], want: list[Tensor]) -> None:
    if [t.shape for t in got] != [t.shape for t in want]:
        raise Wrong(f"{name}: shapes {[tuple(t.shape) for t in got]} for {[tuple(t.shape) for t in want]}")
    for a, b in zip(got, want, strict=True):
        try:
            close(a, b)
        except AssertionError:
            raise Wrong(f"{name}: off by {(a.double() - b.double()).abs().max():.3g}") from None


def held(name: str, case: Case, law: Callable[[nn.Module], None]) -> bool:
    """Hold a law under the surgery, if the base itself holds it."""
    if case.base.does(name, lambda base: law(base) or True) is None:
        return False
    case.attached(law)
    return True


# -- the laws: each returns whether there was something to hold --------------------------------------------------------
def zero_is_the_base(case: Case) -> bool:
    same("zero strength", case.attached(case.run, zero=True), case.base.does("run", case.run))
    return True


def states_at_zero_are_the_base_s(case: Case) -> bool:
    act = lambda model: case.run(model, output_hidden_states=True)
    if (want := case.base.does("states", act)) is None or len(want) == len(case.base.does("run", case.run)):
        return False
    same("states at zero strength", case.attached(act, zero=True), want)
    return True


def forward_is_the_call(case: Case) -> bool:
    def both(model: nn.Module) -> None:
        called = case.run(model)
        torch.manual_seed(0)
        with torch.no_grad():
            same("forward", zoo.tensors(model.forward(**case.inputs)), called)

    case.attached(both)
    return True


def generation_at_zero_is_the_base_s(case: Case) -> bool:
    act = lambda model: case.said(model, case.prompt)
    if not case.talks or (want := case.base.does("generation", act)) is None:
        return False
    same("generation at zero strength", case.attached(act, zero=True), want)
    return True


def cached_is_uncached(case: Case) -> bool:
    """Of methods that say of a token what they say without those behind it."""
    sees = LOCAL if any(cls.role == "LayerRouter" for cls in case.classes) else LOCAL | MAYBE
    alike = all(cls.role != "CacheCompressor" and cls.caches and set(cls.signals) <= sees for cls in case.classes)
    if not case.talks or not alike:
        return False

    def both(model: nn.Module) -> None:
        same("cached", case.said(model, case.prompt), case.said(model, case.prompt, use_cache=False))

    if case.base.does("cached", lambda base: both(base) or not (case.text and looks_ahead(base, case))) is not True:
        return False
    ahead = case.attached(lambda model: looks_ahead(model, case)) if case.text else not local(case)
    if not ahead:
        case.attached(both)
    return not ahead


def local(case: Case) -> bool:
    """Whether what the methods ask for of a token does not depend on those behind it."""
    return all(set(cls.signals) <= LOCAL for cls in case.classes)


def looks_ahead(model: nn.Module, case: Case) -> bool:
    """Whether a token that comes later changes what is said before it, as a method that looks at hidden states may."""
    short, whole = (case.run(model, **texts(ids))[0] for ids in (case.ids[:, :-1], case.ids))
    try:
        close(short, whole[:, :-1])
    except AssertionError:
        if local(case):
            raise Wrong("a token that came later changed what came before it") from None
        return True
    return False


def a_padded_row_is_that_row_alone(case: Case) -> bool:
    if not case.text:
        return False
    ids, mask = case.ids.clone(), torch.ones_like(case.ids)
    ids[1], mask[1, :PADS] = torch.cat([torch.zeros_like(ids[1, :PADS]), ids[1, :-PADS]]), 0

    def rows(model: nn.Module) -> None:
        together = case.said(model, texts(ids, mask))
        for i, real in ((0, ids[:1]), (1, ids[1:, PADS:])):
            same(f"row {i}", [step[i : i + 1] for step in together], case.said(model, texts(real)))

    return held("padded", case, rows)


def a_batch_is_each_sample_alone(case: Case) -> bool:
    def rows(model: nn.Module) -> None:
        together = case.run(model)
        for i in range(case.batch):
            alone = case.run(model, **row(case.inputs, i))
            same(f"sample {i}", [t[i : i + 1] if len(t) == case.batch else t for t in together], alone)

    return not case.text and case.in_rows and held("batch", case, rows)


def a_generated_batch_is_each_sample_alone(case: Case) -> bool:
    def rows(model: nn.Module) -> None:
        together = case.said(model, case.prompt)
        for i in range(case.batch):
            same(f"sample {i}", [step[i : i + 1] for step in together], case.said(model, row(case.prompt, i)))

    return case.talks and not case.text and case.in_rows and held("said", case, rows)


def one_token_rows_run(case: Case) -> bool:
    if not case.text:
        return False
    ids = case.ids[:, :1]

    def rows(model: nn.Module) -> None:
        together = case.said(model, texts(ids))
        for i in range(len(ids)):
            same(f"row {i} of one token", [step[i : i + 1] for step in together], case.said(model, texts(ids[i : i + 1])))

    return held("one token", case, rows)


def whole_again(base: nn.Module, case: Case) -> bool:
    """That the base itself says with a cache what it says without."""
    same("cached", case.said(base, texts(case.ids), use_cache=True), case.said(base, texts(case.ids), use_cache=False))
    return True


def a_question_is_asked_of_the_whole(case: Case) -> bool:
    """At zero strength, behind a context that was read once."""
    if not case.text:
        return False

    def asked(model: nn.Module) -> list[Tensor]:
        context = compress_context(model, case.ids[:, :-PADS])
        return case.said(model, context.ask(case.ids[:, -PADS:]), use_cache=True)

    if case.base.does("asked", asked) is None or case.base.does("answered cached", lambda base: whole_again(base, case)) is None:
        return False
    want = case.base.does("whole", lambda base: case.said(base, texts(case.ids)))
    same("asked", case.attached(asked, zero=True), want)
    return True


def off_is_off(case: Case) -> bool:
    """Disabled and unloaded, the base is there to the bit, and nothing beside it; frozen, as torch's own attention has a path for that."""
    want, names = case.base.does("frozen", lambda base: case.run(base.requires_grad_(False))), [*case.model.state_dict()]

    def disabled(model: nn.Module) -> None:
        case.run(model)
        with model.disable_adapter():
            exactly("disabled", case.run(model), want)

    case.attached(disabled)
    exactly("unloaded", case.run(case.model), want)
    if (left := hooks_of(case.model)) or [*case.model.state_dict()] != names:
        raise Wrong(f"something is left in the base: {left[:3]}")
    return True


def hooks_of(model: nn.Module) -> list[str]:
    """Hooks of ours."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    held = (vars(module)[kind].values() for module in model.modules() for kind in kinds)
    return [text for hook in itertools.chain(*held) if "hf_tokens" in (text := f"{getattr(hook, '__module__', '')} {hook!r}")]


def saved_is_loaded(case: Case) -> bool:
    """An adapter that was saved does what it did, in another copy of the base."""
    with tempfile.TemporaryDirectory() as folder:

        def saved(model: nn.Module) -> list[Tensor]:
            model.save_pretrained(folder)
            return case.run(model)

        want = case.attached(saved)
        same("loaded", case.run(hf_tokens.load(folder, zoo.build(case.base.family).model).eval()), want)
    return True


def exactly(name: str, got: list[Tensor], want: list[Tensor]) -> None:
    same(name, got, want)
    if any(not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(got, want, strict=True)):
        raise Wrong(f"{name}: not to the bit")


# Of models that write into their embeddings: Transformers has a gradient begin there where the base is frozen, with a LoRA alone too.
WRITES_INTO_LEAF = "a leaf Variable that requires grad"


def checkpointed_is_trained_alike(case: Case) -> bool:
    """The adapter gets the same gradients where blocks are computed again in the backward."""
    if not case.base.done.setdefault("checkpoints", case.model.supports_gradient_checkpointing):
        return False

    def gradients(model: nn.Module, again: bool) -> list[Tensor]:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.gradient_checkpointing_enable({"use_reentrant": False}) if again else base.gradient_checkpointing_disable()
        model.train()
        model.zero_grad()
        set_seed(0)  # Wav2Vec2 and its like draw by numpy what they mask
        loss = sum(t.float().square().mean() for t in zoo.tensors(model(**case.inputs)) if t.is_floating_point() and t.requires_grad)
        if not isinstance(loss, Tensor):
            return []
        loss.backward()
        base.gradient_checkpointing_disable()
        model.eval()
        return [p.grad if p.grad is not None else torch.zeros(()) for p in model.parameters() if p.requires_grad]

    def both(model: nn.Module) -> bool:
        once = [g.clone() for g in gradients(model, False)]
        same("checkpointed", gradients(model, True), once)
        return bool(once)

    buffers = {name: buffer.clone() for name, buffer in case.model.named_buffers()}  # statistics of batches move in training
    try:
        itself = case.base.does("checkpointed", lambda base: both(base.requires_grad_()) or True)
        return itself is not None and case.attached(both)
    except RuntimeError as error:
        if WRITES_INTO_LEAF in str(error):
            return False
        raise
    finally:
        case.model.requires_grad_(False)
        for name, buffer in case.model.named_buffers():
            buffer.copy_(buffers[name])


def beams_are_each_prompt_alone(case: Case) -> bool:
    if not case.text:
        return False
    ids, mask = case.ids.clone(), torch.ones_like(case.ids)
    ids[1], mask[1, :PADS] = torch.cat([torch.zeros_like(ids[1, :PADS]), ids[1, :-PADS]]), 0

    def searched(model: nn.Module, prompt: Inputs) -> list[Tensor]:
        told = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 3, "return_dict_in_generate": True}
        with torch.no_grad():
            out = model.generate(**prompt, **told, output_scores=True, suppress_tokens=None, forced_eos_token_id=None)
        return [out.sequences_scores]

    def rows(model: nn.Module) -> None:
        (together,) = searched(model, texts(ids, mask))
        for i, real in ((0, ids[:1]), (1, ids[1:, PADS:])):
            same(f"beams of row {i}", [together[i : i + 1]], searched(model, texts(real)))

    return held("beams", case, rows)


def half_precision_runs(case: Case) -> bool:
    half = Case(case.base.half, case.configs)

    def finite(model: nn.Module) -> None:
        if not all(t.isfinite().all() for t in half.run(model)):
            raise Wrong("bfloat16: not finite")

    return held("half", half, finite)


LAWS: dict[str, Callable[[Case], bool]] = {
    "zero": zero_is_the_base,
    "states": states_at_zero_are_the_base_s,
    "forward": forward_is_the_call,
    "generation": generation_at_zero_is_the_base_s,
    "cached": cached_is_uncached,
    "padded": a_padded_row_is_that_row_alone,
    "batch": a_batch_is_each_sample_alone,
    "said": a_generated_batch_is_each_sample_alone,
    "one token": one_token_rows_run,
    "asked": a_question_is_asked_of_the_whole,
    "beams": beams_are_each_prompt_alone,
    "off": off_is_off,
    "saved": saved_is_loaded,
    "checkpointed": checkpointed_is_trained_alike,
    "half": half_precision_runs,
}
OF_PAIRS = ("generation", "padded", "one token")


def configs_of(method: str) -> list[MethodConfig]:
    """Configs to try, the one that does the most first: knobs half way from their zeros in all blocks, in the method's own; its example."""
    found = list(strong(METHODS[method].config))
    return [found[3], found[2], tiny_config(METHODS[method].config)]
