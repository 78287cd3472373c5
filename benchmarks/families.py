"""What every method does on every family, beyond the contract's: right, refused with a word, or neither.

python benchmarks/families.py                        # every family of Transformers: a line for each fault, then the counts
python benchmarks/families.py --pairs 5              # five pairs of cache compressors on each family instead, drawn by its name; 30 are all
python benchmarks/families.py --family llama         # this one; may be repeated
python benchmarks/families.py --method ftp           # this one; may be repeated
python benchmarks/families.py --law padded           # this one; may be repeated
python benchmarks/families.py --part 1/4             # every fourth family
python benchmarks/families.py --out FILE             # a row of JSON for each case, too
python benchmarks/families.py --table FILE FILE      # the results of such files: of a case in two of them the last counts

A family where the base itself does not hold a law (a padded row that is not that row alone) is not asked to hold it under a surgery.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from family_laws import COMPRESSORS, LAWS, METHODS, OF_PAIRS, Base, Case, Wrong, configs_of, half_precision_runs

from hf_tokens import HFTokensError
from hf_tokens.testing import zoo

RESULTS = Path(__file__).parent / "results"


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
    taken = lambda row: cases[(row["family"], *row["stack"], "attach")]["verdict"] == "right"
    cases = {case: row for case, row in cases.items() if row["law"] == "attach" or taken(row)}  # it may be refused since
    out = ["# What every method does on every family\n", f"Made by `python benchmarks/families.py --table` of files {'; '.join(heads)}.\n"]
    for title, size in (("Methods alone", 1), ("Pairs of cache compressors", 2)):
        rows = [row for row in cases.values() if len(row["stack"]) == size]
        if rows:
            out += [f"## {title}\n", *counted(rows), ""]
    return "\n".join(out)


def compatibility(files: list[Path]) -> str:
    """Into which families each method goes, in JSON."""
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    rows = {(row["family"], *row["stack"]): row["verdict"] for row in lines if row.get("law") == "attach"}
    alone = {case: verdict for case, verdict in rows.items() if len(case) == 2}
    methods = {name: sorted(f for f, of in alone if of == name and alone[f, of] == "right") for name in sorted({of for _, of in alone})}
    says = f"Tried on a tiny model of each family with transformers {lines[0]['transformers']}. A family that is not named refuses it."
    return json.dumps({"says": says, "families": sorted({f for f, _ in alone}), "methods": methods}, indent=0)


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
    parser.add_argument("--table", type=Path, nargs="+", help="write the results of such files, and run nothing")
    args = parser.parse_args()
    if args.table:
        (RESULTS / "families.md").write_text(table(args.table))
        (RESULTS / "compatibility.json").write_text(compatibility(args.table) + "\n")
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
