"""Which model families hf-tokens reads: builds a tiny model of each, runs it, opens its anatomy and checks the anatomy against the calls.

python benchmarks/sweep.py                  # every family that results/sweep.jsonl does not hold yet, then the table results/sweep.md
python benchmarks/sweep.py --fresh          # every family
python benchmarks/sweep.py --family llama   # one, printed
python benchmarks/sweep.py --sample 40      # every n-th, so that 40 are run
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import logging
import signal
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from hf_tokens import get_token_model
from hf_tokens.model.anatomy import anatomy
from hf_tokens.model.streams import Anatomy, Stream
from hf_tokens.testing import probe_config, zoo

RESULTS = Path(__file__).parent / "results"
SECONDS = 60


# the checks: each gives "ok", "-" where there is nothing to check, or what is wrong


def check_calls(specimen: zoo.Specimen, stream: Stream) -> str:
    """The blocks are called in their order, with the hidden states where the anatomy says, and give them back in the same shape."""
    order: list[int] = []
    wrong: list[str] = []

    def watch(i: int):
        def hook(module, args, kwargs, output):
            order.append(i)
            hidden, index = _bound(stream, i, args, kwargs), stream.hidden_index(i)
            if not isinstance(hidden, torch.Tensor):
                wrong.append(f"{index.name} of block {i} is {type(hidden).__name__}")
            elif not _fits(stream, hidden):
                wrong.append(f"{index.name} of block {i} is {tuple(hidden.shape)}, not {stream.layout} with d = {stream.width}")
            else:
                out = stream.read(i, output)
                if not isinstance(out, torch.Tensor) or out.shape != hidden.shape:
                    wrong.append(f"block {i} returns {tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__}")

        return hook

    _run_with(specimen, [block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(stream.blocks)])
    if wrong:
        return wrong[0]
    missing = sorted(set(range(len(stream))) - set(order))
    if len(missing) == len(stream):
        return "never called"
    if any(stream.mixers[i] != "cross" for i in missing):
        return f"blocks {missing} never called"
    first = list(dict.fromkeys(order))
    return "ok" if first == sorted(first) else f"called in the order {first}"


def check_alive(specimen: zoo.Specimen, stream: Stream) -> str:
    """Noise on what the middle block gives moves the model's output."""
    i = len(stream) // 2
    before = specimen.run()

    def disturb(module, args, output):
        hidden = stream.read(i, output)
        return stream.write(i, output, hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden))

    after = _run_with(specimen, [stream.blocks[i].register_forward_hook(disturb, prepend=True)])
    moved = any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return "ok" if moved else f"block {i} does not reach the output"


def check_causal(specimen: zoo.Specimen, stream: Stream) -> str:
    """A change of the second token reaches the first one unless the stream is causal."""
    i = next((i for i, mixer in enumerate(stream.mixers) if mixer == "attention"), None)
    if i is None or "(" in stream.layout:
        return "-"
    seen: list[torch.Tensor] = []

    def look(module, args, kwargs, output):
        hidden = _bound(stream, i, args, kwargs)
        axes = stream.layout.split()
        if seen or hidden.shape[hidden.ndim - len(axes) + axes.index("n" if "n" in axes else "w")] < 2:
            return
        moved = hidden.clone()
        first, second = _token(stream, 0), _token(stream, 1)
        moved[second] += torch.randn_like(moved[second])
        index = stream.hidden_index(i)
        given = {**kwargs, index.name: moved} if index.name in kwargs else kwargs
        args = args if index.name in kwargs else (*args[: index.position], moved, *args[index.position + 1 :])
        state = torch.get_rng_state()
        args, given = _uncached(args), {name: value for name, value in zip(given, _uncached(given.values()), strict=True)}
        again = module.forward(*args, **given)
        torch.set_rng_state(state)
        seen.append((stream.read(i, again) - stream.read(i, output))[first].abs().max())

    _run_with(specimen, [stream.blocks[i].register_forward_hook(look, with_kwargs=True)])
    if not seen:
        return "-"
    leaks = bool(seen[0] > 1e-6)
    return "ok" if leaks != stream.causal else f"said to be {'causal' if stream.causal else 'bidirectional'}, is not"


def check_mlp(specimen: zoo.Specimen, stream: Stream) -> str:
    """The norm before the MLP reads the residual stream after the attention, and the MLP reads that norm."""
    i = len(stream) // 2
    norm, mlp, attention, block = stream.mlp_norm(i), stream.mlp(i), stream.attention(i), stream.blocks[i]
    if norm is None:
        return "-"
    events: list[tuple[str, list[int], list[int]]] = []

    def record(label: str):
        def hook(module, args, kwargs, output):
            given = [t.data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            events.append((label, given, [t.data_ptr() for t in zoo.tensors(output)]))
            kept.append((args, kwargs, output))  # a freed buffer would lend its address to another tensor

        return hook

    kept: list[Any] = []
    entry: list[int] = []
    handles = [block.register_forward_pre_hook(lambda m, a, k: entry.append(_bound(stream, i, a, k).data_ptr()), with_kwargs=True)]
    watched = [("norm", norm), ("mlp", mlp)] + ([("attention", attention)] if attention is not None else [])
    handles += [module.register_forward_hook(record(label), with_kwargs=True) for label, module in watched]
    _run_with(specimen, handles)
    labels = [label for label, _, _ in events]
    if labels.count("norm") == 0 or "mlp" not in labels:
        return "norm or mlp is not called"
    norm_event, mlp_event = events[labels.index("norm")], events[labels.index("mlp")]
    if labels.index("norm") > labels.index("mlp"):
        return "the norm comes after the MLP"
    if norm_event[1][0] in entry:
        return "the norm reads the block's input"
    residual_inside = attention is not None and "residual" in inspect.signature(type(attention).forward).parameters
    if "attention" in labels and not residual_inside and norm_event[1][0] in events[labels.index("attention")][2]:
        return "the norm reads the attention's output"
    return "ok" if norm_event[2][0] in mlp_event[1] else "ok (changed in between)"


def check_identity(specimen: zoo.Specimen, body: Anatomy) -> str:
    """Surgery at zero strength leaves the output as it is, and taking it out leaves the model as it was."""
    return _surgery(specimen, 0.0)


def check_drop(specimen: zoo.Specimen, body: Anatomy) -> str:
    """Dropping tokens at a middle block and restoring them at the exit keeps every shape and changes the values."""
    return _surgery(specimen, 0.5)


def _surgery(specimen: zoo.Specimen, strength: float) -> str:
    before = _seeded(specimen)
    model = get_token_model(specimen.model, probe_config(strength))
    specimen.model.eval()
    try:
        during = _seeded(specimen)
    finally:
        model.unload()
    after = _seeded(specimen)
    if not _equal(before, after):
        return "the base model is not back to the bit"
    if [t.shape for t in before] != [t.shape for t in during]:
        return "a shape changed"
    if strength == 0:
        return (
            "ok"
            if all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(before, during, strict=True))
            else "zero strength is not the base"
        )
    if not all(t.isfinite().all() for t in during):
        return "the output is not finite"
    return "no effect" if _equal(before, during) else "ok"


def _seeded(specimen: zoo.Specimen) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return specimen.run()


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


STREAM_CHECKS = {"calls": check_calls, "alive": check_alive, "causal": check_causal, "mlp": check_mlp}
MODEL_CHECKS = {"identity": check_identity, "drop": check_drop}


def _fits(stream: Stream, hidden: torch.Tensor) -> bool:
    if stream.layout.endswith("(c d)"):
        return hidden.ndim == 3 and hidden.shape[-1] % stream.width == 0
    axes = stream.layout.replace("(b t)", "b").split()
    packed_in_one_row = stream.layout == "n d" and hidden.ndim == 3 and hidden.shape[-1] == stream.width
    return packed_in_one_row or hidden.ndim == len(axes) and hidden.shape[axes.index("d")] == stream.width


def _token(stream: Stream, at: int) -> tuple:
    """The index of a token in the hidden states."""
    axes = stream.layout.split()
    at_each = tuple(at if axis in ("n", "w") else slice(None) for axis in axes)
    return (..., at, slice(None)) if stream.layout == "n d" else at_each


def _uncached(values: Any) -> tuple:
    return tuple(None if isinstance(value, Cache) else value for value in values)


def _bound(stream: Stream, i: int, args: tuple, kwargs: dict) -> Any:
    index = stream.hidden_index(i)
    if index.name in kwargs:
        return kwargs[index.name]
    return args[index.position] if index.position < len(args) else None


def _run_with(specimen: zoo.Specimen, handles: list[Any]) -> list[torch.Tensor]:
    try:
        torch.manual_seed(0)
        return specimen.run()
    finally:
        for handle in handles:
            handle.remove()


# one family, all families


def sweep(family: str) -> dict[str, Any]:
    """The row of one family. `has_blocks` is None where no model could be built."""
    row: dict[str, Any] = {"family": family, "has_blocks": None, "streams": [], "why": ""}
    if family in zoo.unbuildable():
        why = zoo.unbuildable()[family]
        return {**row, "why": why, "has_blocks": False if why == zoo.NO_CLASS else None}
    start = time.perf_counter()
    stage = "build"
    try:
        specimen = zoo.build(family)
        row["class"] = type(specimen.model).__name__
        stage = "anatomy"
        body = _anatomy(specimen, row)
        stage = "run"
        torch.manual_seed(0)
        out = specimen.run()
        row["run"] = "ok" if out and all(t.isfinite().all() for t in out) else "the output is not finite" if out else "no floating output"
        if body is not None:
            for stream in body.streams:
                stage = f"check of {stream.name}"
                found = {name: _tried(check, specimen, stream) for name, check in STREAM_CHECKS.items()}
                row["streams"].append({**_facts(stream), **found})
            row |= {name: _tried(check, specimen, body) for name, check in MODEL_CHECKS.items()}
    except Exception as error:
        row["why"] = f"{stage}: {_line(error)}"
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _anatomy(specimen: zoo.Specimen, row: dict[str, Any]) -> Anatomy | None:
    try:
        body = anatomy(specimen.model)
    except ValueError as error:
        row["has_blocks"] = False
        row["why"] = str(error).partition(":")[0]
        return None
    row["has_blocks"] = True
    return body


def _tried(check: Any, *args: Any) -> str:
    try:
        return check(*args)
    except Exception as error:
        return f"raised {_line(error)}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _facts(s: Stream) -> dict[str, Any]:
    block = type(s.blocks[0]).__name__
    return {"name": s.name, "kind": s.kind, "blocks": len(s), "class": block, "width": s.width, "heads": s.heads, "is_causal": s.causal}


def works(row: dict[str, Any]) -> bool:
    """Whether every stream that the run reaches was read rightly, and at least one was reached."""
    calls = [s["calls"] for s in row["streams"] if s["calls"] != "never called"]
    return bool(calls) and row.get("run") == "ok" and all(call == "ok" for call in calls)


def table(rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda row: row["family"])
    parts = [row for row in rows if zoo.is_part(row["family"])]
    whole = [row for row in rows if not zoo.is_part(row["family"])]
    lines = [
        "# Families",
        "",
        f"Made by `python benchmarks/sweep.py --fresh` on {date.today()}, with {made_with()}.",
        "",
        f"Whole models: {_count(whole)}",
        "",
        f"Parts of them that have a config of their own, such as a text tower: {_count(parts)}",
        "",
        "A stream is listed as `name: blocks x class`, with what a check found unless it is ok. "
        "`never called`: the inputs of the zoo do not reach it.",
        "",
        "| family | model | streams | run | identity | drop | why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [row.get(key, "-") for key in ("run", *MODEL_CHECKS)]
        cells = [row["family"], row.get("class", "-"), _streams(row), *found, row["why"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") or "-" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def made_with() -> str:
    """The libraries whose families these are."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "diffusers"))


def _count(rows: list[dict[str, Any]]) -> str:
    blocks = [row for row in rows if row["has_blocks"]]
    unknown = [row for row in rows if row["has_blocks"] is None]
    good = [row for row in blocks if works(row)]
    ran = [row for row in blocks if row.get("run") == "ok"]
    safe = [row for row in ran if row.get("identity") == "ok"]
    cut = [row for row in safe if row.get("drop") == "ok"]
    wanted = len(blocks) + len(unknown)
    lacking = sum("not installed" in row["why"] for row in unknown)
    return (
        f"{len(rows)} families; {len(blocks)} with Transformer blocks, {len(rows) - wanted} without, "
        f"{len(unknown)} not built ({lacking} for want of an optional library). "
        f"Of the {wanted} with blocks or not built, {len(ran)} run ({_percent(len(ran), wanted)}) "
        f"and {len(good)} are read rightly ({_percent(len(good), wanted)}). Of the {len(ran)} that run, "
        f"{len(safe)} pass the identity surgery "
        f"({_percent(len(safe), len(ran))}) and {len(cut)} both surgeries ({_percent(len(cut), len(ran))})."
    )


def _streams(row: dict[str, Any]) -> str:
    shown: dict[str, int] = {}
    for s in row["streams"]:
        found = "; ".join(f"{name}: {s[name]}" for name in STREAM_CHECKS if not s[name].startswith(("ok", "-")))
        text = f"{s['name'].partition('.')[0]}: {s['blocks']} x {s['class']}" + (f" ({found})" if found else "")
        shown[text] = shown.get(text, 0) + 1
    return ", ".join(text if n == 1 else f"{n} times {text}" for text, n in shown.items())


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _too_slow(signum, frame):
    raise TimeoutError(f"more than {SECONDS} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this family; may be repeated; prints instead of writing")
    parser.add_argument("--library", choices=("transformers", "diffusers"))
    parser.add_argument("--sample", type=int, help="only N families, evenly spread; prints instead of writing")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_slow)
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / "sweep.jsonl"
    families = args.family or zoo.families(args.library)
    if args.sample:
        families = families[:: max(1, len(families) // args.sample)]
    writing = not (args.family or args.sample)
    done: dict[str, dict] = {}
    if writing and kept.exists() and not args.fresh:
        done = {row["family"]: row for row in map(json.loads, kept.read_text().splitlines())}
    rows = []
    with open(kept if writing else "/dev/null", "a" if done else "w") as file:
        for n, family in enumerate(families):
            if family in done:
                continue
            signal.alarm(SECONDS)
            row = sweep(family)
            signal.alarm(0)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            if not writing:
                print(json.dumps(row, indent=1))
            if n % 20 == 0:
                gc.collect()
    rows = [*done.values(), *rows]
    text = table(rows)
    if writing:
        (RESULTS / "sweep.md").write_text(text)
    print("\n".join(line for line in text.splitlines() if "families;" in line))


if __name__ == "__main__":
    main()
