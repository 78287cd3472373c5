"""What every method does on every family, beyond the contract's: right, refused with a word, or neither.

python benchmarks/families.py                        # every family of Transformers: a line for each fault, then the counts
python benchmarks/families.py --pairs 5              # five pairs of cache compressors on each family instead, drawn by its name; 30 are all
python benchmarks/families.py --family llama         # this one; may be repeated
python benchmarks/families.py --method ftp           # this one; may be repeated
python benchmarks/families.py --law padded           # this one; may be repeated
python benchmarks/families.py --part 1/4             # every fourth family
python benchmarks/families.py --out FILE             # a row of JSON for each case, too
python benchmarks/families.py --table FILE FILE      # results/families.md of such files: of a case in two of them the last counts

A family where the base itself does not hold a law (a padded row that is not that row alone) is not asked to hold it under a surgery.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from contract.pairs import LOCAL, MAYBE, stir, strong, tiny
from tolerances import close
from torch import Tensor, nn

from hf_tokens import HFTokensError, get_token_model, list_methods
from hf_tokens.roles.base import Method
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
                return_dict_in_generate=True, suppress_tokens=None if self.text else self.special, **more,
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

    if case.base.does("cached", lambda base: both(base) or True) is None:
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
    "half": half_precision_runs,
}
OF_PAIRS = ("generation", "padded", "one token")


# -- one family, all families ------------------------------------------------------------------------------------------
def verdict(law: Callable[[Case], bool], case: Case) -> str:
    """`right`, `-` where there is nothing to hold, `refused: …`, `rounded: …`, `wrong: …` or `raised: …`."""
    try:
        return "right" if law(case) else "-"
    except HFTokensError as error:
        return f"refused: {line(error)}"
    except Wrong as error:
        return f"{'rounded' if exact(law, case) else 'wrong'}: {line(error)}"
    except Exception as error:
        return f"raised: {type(error).__name__}: {line(error)}"


def exact(law: Callable[[Case], bool], case: Case) -> bool:
    """Whether a law holds in float64, to 1e-10: then a choice or a few bits flipped in float32 at their boundary, and no sum is wrong."""
    double = Case(case.base.double, case.configs)
    try:
        return law is not half_precision_runs and law(double)
    except Exception:
        return False


def line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def configs_of(method: str) -> list[MethodConfig]:
    """Configs to try, the one that does the most first: knobs half way from their zeros in all blocks, in the method's own; its example."""
    found = list(strong(METHODS[method].config))
    return [found[3], found[2], tiny(METHODS[method].config)]


def stacks(family: str, methods: list[str], pairs: int) -> Iterator[tuple[str, ...]]:
    """Each method alone; or so many of the pairs of compressors, in both orders, drawn by the family's name."""
    if not pairs:
        yield from ((name,) for name in methods)
        return
    both = list(itertools.permutations([name for name in COMPRESSORS if name in methods], 2))
    yield from random.Random(family).sample(both, min(pairs, len(both)))


def taken(case: Case) -> bool:
    """The methods go into the model at all."""
    case.attached(lambda model: None)
    return True


def rows_of(family: str, methods: list[str], laws: list[str], pairs: int = 0) -> Iterator[dict[str, Any]]:
    base = Base(family)
    base.specimen.run()
    for stack in stacks(family, methods, pairs):
        case, word = None, ""
        for configs in zip(*map(configs_of, stack), strict=True):
            case = Case(base, configs)
            if (word := verdict(taken, case)) == "right":
                break
        yield {"family": family, "stack": stack, "law": "attach", "verdict": word}
        for law in laws if word == "right" else ():
            yield {"family": family, "stack": stack, "law": law, "verdict": verdict(LAWS[law], case)}


# -- the table ---------------------------------------------------------------------------------------------------------
def made() -> dict[str, Any]:
    """When and with what a file is made: its first line."""
    return {"made": str(date.today()), **{name: version(name) for name in ("torch", "transformers", "peft")}, "arguments": sys.argv[1:]}


def table(files: list[Path]) -> str:
    """The table of the rows in these files; of a case that stands in several of them the last row counts."""
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    heads = list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in head.items() if k != "arguments") for head in lines if "made" in head))
    cases = {(row["family"], *row["stack"], row["law"]): row for row in lines if "family" in row}
    out = ["# What every method does on every family\n", f"Made by `python benchmarks/families.py --table` of files {'; '.join(heads)}.\n"]
    for title, size in (("Methods alone", 1), ("Pairs of cache compressors", 2)):
        rows = [row for row in cases.values() if len(row["stack"]) == size]
        if rows:
            out += [f"## {title}\n", *counted(rows), ""]
    return "\n".join(out)


def counted(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How many of these rows are right, refused, wrong or raised, law by law, and each of the latter two."""
    counts = Counter((row["law"], row["verdict"].partition(":")[0]) for row in rows)
    names = sorted({name for row in rows for name in row["stack"]})
    cases = len({(row["family"], *row["stack"]) for row in rows})
    yield f"{len({row['family'] for row in rows})} families, {cases} cases of these methods, not each on each: {', '.join(names)}.\n"
    yield "| law | right | rounded | refused | wrong | raised |\n|---|---|---|---|---|---|"
    for law in ("attach", *LAWS):
        numbers = [counts[law, kind] for kind in ("right", "rounded", "refused", "wrong", "raised")]
        if any(numbers):
            yield f"| {law} | {' | '.join(map(str, numbers))} |"
    yield ""
    for row in rows:
        if row["verdict"].startswith(("rounded", "wrong", "raised")):
            yield f"- {row['family']}, {' + '.join(row['stack'])}, {row['law']}: {row['verdict']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--law", action="append", choices=list(LAWS))
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="so many pairs of compressors on each family, instead")
    parser.add_argument("--out", type=Path, help="write a row for each case to this file")
    parser.add_argument("--table", type=Path, nargs="+", help="write results/families.md of such files, and run nothing")
    args = parser.parse_args()
    if args.table:
        (RESULTS / "families.md").write_text(table(args.table))
        return
    part, parts = map(int, args.part.split("/"))
    families = (args.family or [f for f in zoo.families("transformers") if f not in zoo.unbuildable()])[part - 1 :: parts]
    laws = args.law or list(OF_PAIRS if args.pairs else LAWS)
    counts: Counter[tuple[str, str]] = Counter()
    out = args.out.open("w") if args.out else open(os.devnull, "w")
    out.write(json.dumps(made()) + "\n")
    for n, family in enumerate(families):
        start = time.perf_counter()
        try:
            for row in rows_of(family, args.method or list(METHODS), laws, args.pairs):
                kind = row["verdict"].partition(":")[0]
                counts[row["law"], kind] += 1
                out.write(json.dumps(row) + "\n")
                if kind in ("rounded", "wrong", "raised"):
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
