"""What every method does on every family, beyond the contract's: right, refused with a word, or neither.

python benchmarks/families.py                        # every family of Transformers: a line for each fault, then the counts
python benchmarks/families.py --pairs                # every pair of cache compressors in both orders, too
python benchmarks/families.py --family llama         # this one; may be repeated
python benchmarks/families.py --method ftp           # this one; may be repeated
python benchmarks/families.py --part 1/4             # every fourth family
python benchmarks/families.py --out FILE             # a row of JSON for each case, too

A family where the base itself does not hold a law (a padded row that is not that row alone) is not asked to hold it under a surgery.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from contract.pairs import stir, strong, tiny
from tolerances import close
from torch import Tensor, nn

from hf_tokens import HFTokensError, get_token_model, list_methods
from hf_tokens.roles.config import MethodConfig
from hf_tokens.testing import zoo

torch.set_num_threads(1)
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

RESULTS = Path(__file__).parent / "results"
METHODS = {info.name: info for info in list_methods() if info.cls.placed and info.cls.__module__ != "hf_tokens.testing.probe"}
COMPRESSORS = [name for name, info in METHODS.items() if info.role == "CacheCompressor"]
PADS, NEW, PROMPT = 3, 3, 12
Inputs = dict[str, Any]


class Wrong(Exception):
    """A law that does not hold."""


@dataclass
class Case:
    """A family with methods in it."""

    specimen: zoo.Specimen
    configs: tuple[MethodConfig, ...]

    @property
    def base(self) -> nn.Module:
        return self.specimen.model

    @property
    def inputs(self) -> Inputs:
        return self.specimen.inputs

    def attached(self, act: Callable[[nn.Module], Any], *, zero: bool = False) -> Any:
        """What comes of a model with the methods in it, which go out again."""
        torch.manual_seed(0)
        configs = [config.at_zero() if zero else config for config in self.configs]
        model = get_token_model(self.base, configs).eval()
        try:
            return act(model if zero else stir(model))
        finally:
            model.unload()

    def run(self, model: nn.Module, **more: Any) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return zoo.tensors(model(**{**self.inputs, **more}))

    @property
    def text(self) -> bool:
        """Whether ids alone are read, and more of them generated."""
        own = {"input_ids", "attention_mask"}
        return set(self.inputs) <= own and self.base.can_generate() and not self.base.config.is_encoder_decoder

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"][:, :PROMPT]

    def said(self, model: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """The logits of each step of a generation."""
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=None,
        )  # fmt: skip
        return list(out.logits)


def same(name: str, got: list[Tensor], want: list[Tensor]) -> None:
    if [t.shape for t in got] != [t.shape for t in want]:
        raise Wrong(f"{name}: shapes {[tuple(t.shape) for t in got]} for {[tuple(t.shape) for t in want]}")
    for a, b in zip(got, want, strict=True):
        try:
            close(a, b)
        except AssertionError:
            raise Wrong(f"{name}: off by {(a.double() - b.double()).abs().max():.3g}") from None


def holds(law: Callable[[nn.Module], None], base: nn.Module) -> bool:
    """Whether the base itself holds a law."""
    try:
        law(base)
    except Exception:
        return False
    return True


# -- the laws: each returns whether there was something to hold --------------------------------------------------------
def zero_is_the_base(case: Case) -> bool:
    same("zero strength", case.attached(case.run, zero=True), case.run(case.base))
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
    if not case.text:
        return False
    mask, want = torch.ones_like(case.ids), []
    if not holds(lambda base: want.extend(case.said(base, case.ids, mask)), case.base):
        return False
    same("generation at zero strength", case.attached(lambda model: case.said(model, case.ids, mask), zero=True), want)
    return True


def a_padded_row_is_that_row_alone(case: Case) -> bool:
    if not case.text:
        return False
    ids, mask = case.ids.clone(), torch.ones_like(case.ids)
    ids[1], mask[1, :PADS] = torch.cat([torch.zeros_like(ids[1, :PADS]), ids[1, :-PADS]]), 0

    def rows(model: nn.Module) -> None:
        together = case.said(model, ids, mask)
        for i, real in ((0, ids[:1]), (1, ids[1:, PADS:])):
            same(f"row {i}", [step[i : i + 1] for step in together], case.said(model, real, torch.ones_like(real)))

    if not holds(rows, case.base):
        return False
    case.attached(rows)
    return True


def a_batch_is_each_sample_alone(case: Case) -> bool:
    batch = case.specimen.hints["batch"]
    if case.text or not all(isinstance(v, Tensor) and len(v) == batch for v in case.inputs.values() if isinstance(v, Tensor) and v.dim()):
        return False

    def rows(model: nn.Module) -> None:
        together = case.run(model)
        for i in range(batch):
            alone = {k: v[i : i + 1] for k, v in case.inputs.items() if isinstance(v, Tensor) and v.dim()}
            same(f"sample {i}", [t[i : i + 1] if len(t) == batch else t for t in together], case.run(model, **alone))

    if not holds(rows, case.base):
        return False
    case.attached(rows)
    return True


def one_token_rows_run(case: Case) -> bool:
    if not case.text:
        return False
    ids = case.ids[:, :1]

    def rows(model: nn.Module) -> None:
        together = case.said(model, ids, torch.ones_like(ids))
        for i in range(len(ids)):
            same(f"row {i} of one token", [step[i : i + 1] for step in together], case.said(model, ids[i : i + 1], torch.ones(1, 1).long()))

    if not holds(rows, case.base):
        return False
    case.attached(rows)
    return True


def half_precision_runs(case: Case) -> bool:
    half = Case(zoo.build(case.specimen.family, dtype=torch.bfloat16), case.configs)

    def finite(model: nn.Module) -> None:
        if not all(t.isfinite().all() for t in half.run(model)):
            raise Wrong("bfloat16: not finite")

    if not holds(finite, half.base):
        return False
    half.attached(finite)
    return True


LAWS: dict[str, Callable[[Case], bool]] = {
    "zero": zero_is_the_base,
    "forward": forward_is_the_call,
    "generation": generation_at_zero_is_the_base_s,
    "padded": a_padded_row_is_that_row_alone,
    "batch": a_batch_is_each_sample_alone,
    "one token": one_token_rows_run,
    "half": half_precision_runs,
}


# -- one family, all families ------------------------------------------------------------------------------------------
def verdict(law: Callable[[Case], bool], case: Case) -> str:
    """`right`, `-` where there is nothing to hold, `refused: …`, `wrong: …` or `raised: …`."""
    try:
        return "right" if law(case) else "-"
    except HFTokensError as error:
        return f"refused: {line(error)}"
    except Wrong as error:
        return f"wrong: {line(error)}"
    except Exception as error:
        return f"raised: {type(error).__name__}: {line(error)}"


def line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def configs_of(method: str) -> list[MethodConfig]:
    """Configs to try, the one that does the most first: knobs half way from their zeros in all blocks, in the method's own; its example."""
    found = list(strong(METHODS[method].config))
    return [found[3], found[2], tiny(METHODS[method].config)]


def stacks(methods: list[str]) -> Iterator[tuple[str, ...]]:
    """Each method alone, and all pairs of compressors in both orders."""
    yield from ((name,) for name in methods)
    yield from itertools.permutations([name for name in COMPRESSORS if name in methods], 2)


def taken(case: Case) -> bool:
    """The methods go into the model at all."""
    case.attached(lambda model: None)
    return True


def rows_of(family: str, methods: list[str], pairs: bool) -> Iterator[dict[str, Any]]:
    specimen = zoo.build(family)
    specimen.run()
    for stack in stacks(methods):
        if len(stack) > 1 and not pairs:
            continue
        cases = [Case(specimen, configs) for configs in zip(*map(configs_of, stack), strict=True)]
        said = {i: verdict(taken, case) for i, case in enumerate(cases)}
        best = next((i for i, word in said.items() if word == "right"), len(cases) - 1)
        yield {"family": family, "stack": stack, "law": "attach", "verdict": said[best]}
        laws = LAWS if len(stack) == 1 else {name: LAWS[name] for name in ("generation", "padded")}
        for name, law in laws.items() if said[best] == "right" else ():
            yield {"family": family, "stack": stack, "law": name, "verdict": verdict(law, cases[best])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--pairs", action="store_true", help="pairs of compressors, too")
    parser.add_argument("--out", type=Path, help="write a row for each case to this file")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    families = (args.family or [f for f in zoo.families("transformers") if f not in zoo.unbuildable()])[part - 1 :: parts]
    counts: Counter[tuple[str, str]] = Counter()
    out = args.out.open("w") if args.out else open(os.devnull, "w")
    for n, family in enumerate(families):
        start = time.perf_counter()
        try:
            for row in rows_of(family, args.method or list(METHODS), args.pairs):
                kind = row["verdict"].partition(":")[0]
                counts[row["law"], kind] += 1
                out.write(json.dumps(row) + "\n")
                if kind in ("wrong", "raised"):
                    print(f"{family:28} {' + '.join(row['stack']):32} {row['law']:12} {row['verdict']}", flush=True)
        except Exception as error:
            print(f"{family:28} base: {type(error).__name__}: {line(error)}", flush=True)
        out.flush()
        if n % 10 == 0:
            gc.collect()
            print(f"# {n}/{len(families)} {family} {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    for (law, kind), number in sorted(counts.items()):
        print(f"{law:12} {kind:8} {number}")


if __name__ == "__main__":
    main()
