"""Whether a change of the engine changes a bit: records digests of what every pair of the contract puts out, and compares another commit.

python benchmarks/digests.py record FILE                  # every pair that FILE does not hold yet, with the config that showed the most
python benchmarks/digests.py compare FILE                 # the same with the configs of FILE; a table, and exit code 1 if a bit changed
python benchmarks/digests.py compare FILE --part 1/4      # every fourth pair
python benchmarks/digests.py compare FILE --match llama   # pairs with that in their name

It runs the tree that PYTHONPATH names, its `tests/` among it, else its own. Digests hold for one machine and one set of libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from contract.pairs import PAIRS
from torch import Tensor, nn

import hf_tokens
from hf_tokens import UnsupportedError, aux_loss
from hf_tokens.testing.contract.pairs import ContractPair, generate, mildest, planned, refused
from hf_tokens.testing.contract.parameters import adapter_parameters, lora

torch.set_num_threads(1)
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

LIBRARIES = ("torch", "transformers", "peft", "diffusers")
CACHES = ("cache", "past_key_values")  # how models call their cache, the newest name first
Row = dict[str, Any]
Make = Callable[..., nn.Module]


def digest(tensor: Tensor | None) -> str | None:
    """Dtype, shape and the sha256 of the bytes."""
    if tensor is None:
        return None
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))} {hashlib.sha256(data).hexdigest()}"


def seen(function: Callable[[], list[Tensor] | dict[str, Tensor | None]]) -> Any:
    """The digests of what a function gives, or the error that it raises: one pair that breaks must not hide the others."""
    torch.manual_seed(0)
    try:
        given = function()
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error)}
    return {name: digest(t) for name, t in given.items()} if isinstance(given, dict) else [digest(t) for t in given]


# What is looked at: each look gets the pair, its row of the record, and a maker of the model, with the arguments of `ContractPair.attach`.


def outputs(pair: ContractPair, row: Row, make: Make) -> Any:
    """What the model puts out, in its own precision and in bfloat16."""
    cast = lambda value: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
    half = {name: cast(value) for name, value in pair.inputs.items()}
    return {"float32": seen(lambda: pair.run(make())), "bfloat16": seen(lambda: pair.run(make().bfloat16(), half))}


@torch.no_grad()
def padded(pair: ContractPair, row: Row, make: Make) -> Any:
    """The outputs of a batch with padding."""
    return {side: seen(lambda side=side: pair.row.run(make(), pair.row.padded(pair.inputs, side))) for side in pair.row.pads}


def generation(pair: ContractPair, row: Row, make: Make) -> Any:
    """Four greedy tokens and their logits: with a cache and without, in beams with padding, and over two turns."""
    if not pair.row.generates:
        return None
    found = {
        "cached": seen(lambda: generate(make(), pair.inputs, 4)),
        "uncached": seen(lambda: generate(make(), pair.inputs, 4, use_cache=False)),
    }
    if "left" in pair.row.pads:
        found["beams"] = seen(lambda: generate(make(), pair.row.padded(pair.inputs, "left"), 4, num_beams=3))
    if "decoder_input_ids" not in pair.inputs:
        found["turns"] = seen(lambda: second_turn(pair, make()))
    return found


def second_turn(pair: ContractPair, model: nn.Module) -> list[Tensor]:
    """A generation that goes on with the cache of another one, three tokens later."""
    with torch.no_grad():
        first = model.generate(**pair.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    said = first.sequences
    ids = torch.cat([said, (said[:, -3:] * 7 + 3) % 75 + 5], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in pair.inputs:
        kinds = pair.inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))
    names = inspect.signature(pair.base().forward).parameters
    return generate(model, inputs, 4, **{next(name for name in CACHES if name in names): first.past_key_values})


def loss(pair: ContractPair, row: Row, make: Make) -> Any:
    """The loss of a training step."""
    has_text = "input_ids" in pair.inputs or "decoder_input_ids" in pair.inputs
    has_loss = has_text and "labels" in inspect.signature(pair.base().forward).parameters
    return seen(lambda: [pair.loss(make(train=True))]) if pair.row.timesteps or has_loss else None


def gradients(pair: ContractPair, row: Row, make: Make) -> Any:
    """The gradient of every adapter parameter, and under checkpointing."""
    found = {"plain": seen(lambda: adapter_gradients(pair, row, make(train=True)))}
    if pair.row.library == "diffusers" or pair.base().supports_gradient_checkpointing:
        found["checkpointed"] = seen(lambda: adapter_gradients(pair, row, checkpointing(pair, make(train=True))))
    return found


def stack(pair: ContractPair, row: Row, make: Make) -> Any:
    """The outputs, and the gradients, with another method and a LoRA beside it."""
    stacked = lambda **more: pair.stack(lora(pair.streams()[0]), **arguments(pair, row), **more)
    return {
        "outputs": seen(lambda: pair.run(stacked())),
        "gradients": seen(lambda: adapter_gradients(pair, row, stacked(train=True))),
    }


LOOKS = {look.__name__: look for look in (outputs, padded, generation, loss, gradients, stack)}


def adapter_gradients(pair: ContractPair, row: Row, model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients from a loss that no output can hide from; an objective has its own."""
    if pair.info.role == "Objective":
        total = pair.loss(model)
    else:
        call = pair.row.calls(pair.inputs)[-1]
        call = {**call, "hf_tokens_targets": TARGETS[row["targets"]](call)} if row["targets"] else call
        generator = torch.Generator().manual_seed(2)
        wanted = [t for t in pair.row.read(model(**call)) if t.requires_grad]
        total = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in wanted) + aux_loss(model)
    if total.requires_grad:
        total.backward()
    return {name: p.grad for name, p in adapter_parameters(model).items()}


def checkpointing(pair: ContractPair, model: nn.Module) -> nn.Module:
    """The model with gradient checkpointing on."""
    base = model.get_base_model()
    if pair.row.library == "diffusers":
        base.enable_gradient_checkpointing()
    else:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return model


TARGETS = {  # what a method that learns from labels alone is told
    "tokens": lambda call: call["input_ids"] % 2,
    "samples": lambda call: torch.arange(len(call["input_ids"])) % 2,
}


def targets(pair: ContractPair) -> str | None:
    if pair.info.role == "ModelRouter":
        return "tokens"
    return "samples" if "targets" in pair.info.cls.words.get("conclude", ()) else None


def arguments(pair: ContractPair, row: Row) -> dict[str, Any]:
    """What `ContractPair.attach` must be told to make the recorded model again."""
    return {"config": pair.info.config.from_dict(row["config"]), "size": row["size"]}


def refusal(pair: ContractPair) -> Row | None:
    """Who refuses a pair and in which words; None if no one does."""
    for who, ask in {"plan": planned, "model": refused}.items():
        if text := ask(pair):
            return {"by": who, "raised": UnsupportedError.__name__, "text": text}
    return None


def name_of(pair: ContractPair) -> str:
    return f"{pair.method}-{pair.architecture}"


def examine(pair: ContractPair, known: Row | None = None) -> Row:
    """One row of the record; with the config of a known one where there is one."""
    row: Row = {"pair": name_of(pair), "role": pair.info.role}
    try:
        row["refusal"] = refusal(pair)
    except Exception as error:  # one pair that breaks must not hide the others
        row["refusal"] = {"by": "model", "raised": type(error).__name__, "text": str(error)}
    if row["refusal"] or known and known["refusal"]:
        return row
    if known is None:
        config, size = mildest(pair)
        row |= {"config": config.to_dict(), "size": size, "targets": targets(pair)}
    else:
        row |= {name: known[name] for name in ("config", "size", "targets")}
    make = lambda **more: pair.attach(**arguments(pair, row), **more)
    return json.loads(json.dumps(row | {name: look(pair, row, make) for name, look in LOOKS.items()}))


def machine() -> Row:
    """What the bits depend on beside the code."""
    return {
        **{library: version(library) for library in LIBRARIES},
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def read(path: Path) -> tuple[Row, dict[str, Row]]:
    """The machine of a record, and its rows by pair."""
    head, *rows = map(json.loads, path.read_text().splitlines())
    return head["machine"], {row["pair"]: row for row in rows}


def chosen(part: str, match: str) -> list[ContractPair]:
    i, n = map(int, part.split("/"))
    return [pair for pair in PAIRS if match in name_of(pair)][i - 1 :: n]


def progress(done: int, pairs: list[ContractPair], start: float, row: Row, says: str) -> None:
    spent = time.time() - start
    left = spent / done * (len(pairs) - done)
    print(f"{done}/{len(pairs)}  {spent:.0f} s, {left:.0f} s left  {row['pair']}: {says}", flush=True)


def record(path: Path, pairs: list[ContractPair]) -> int:
    if not path.exists():
        path.write_text(json.dumps({"machine": machine()}) + "\n")
    then, rows = read(path)
    if then != machine():
        raise SystemExit(f"A record is of one machine and its libraries: {path} is of {then}, got {machine()}. Record to another file.")
    pairs, start = [pair for pair in pairs if name_of(pair) not in rows], time.time()
    with path.open("a") as file:
        for done, pair in enumerate(pairs, 1):
            row = examine(pair)
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress(done, pairs, start, row, "refused" if row["refusal"] else f"taken{errors(row)}")
    rows = read(path)[1].values()
    print(f"{len(rows)} pairs: {sum(not r['refusal'] for r in rows)} taken, {sum(bool(r['refusal']) for r in rows)} refused")
    return 0


def errors(found: Any) -> str:
    """The classes of the errors in a row, to be printed behind it."""
    raised = [f"{name}: {value['raised']}" for name, value in leaves(found).items() if isinstance(value, dict)]
    return ", ".join(["", *raised])


def leaves(found: Any, path: str = "") -> dict[str, Any]:
    """Everything in a look or row that is compared by itself: digests, and errors with their texts."""
    if isinstance(found, dict) and "raised" not in found:
        return {at: leaf for name, value in found.items() for at, leaf in leaves(value, f"{path} {name}").items()}
    if isinstance(found, list):
        return {at: leaf for i, value in enumerate(found) for at, leaf in leaves(value, f"{path} {i}").items()}
    return {path.strip(): found}


def changes(old: Any, new: Any) -> tuple[list[str], list[str]]:
    """Places where a bit or the class of an error changed, and places where only the words of an error did."""
    before, after = leaves(old), leaves(new)
    kind = lambda leaf: leaf["raised"] if isinstance(leaf, dict) else leaf
    bits = [place for place in {**before, **after} if kind(before.get(place, "absent")) != kind(after.get(place, "absent"))]
    return bits, [place for place in before if place not in bits and before[place] != after[place]]


def compare(path: Path, pairs: list[ContractPair]) -> int:
    then, rows = read(path)
    for name, value in machine().items():
        if value != then[name]:
            print(f"{name} is {value}, was {then[name]}: bits may differ for that alone")
    gone = rows.keys() - {name_of(pair) for pair in PAIRS}
    new = {name_of(pair) for pair in pairs} - rows.keys()
    print("not in this tree:", *sorted(gone), "\nnot in the record:", *sorted(new))
    pairs, start = [pair for pair in pairs if name_of(pair) in rows], time.time()
    cells: dict[tuple[str, str], Counter] = defaultdict(Counter)
    bits: list[str] = []
    words: dict[str, list[str]] = defaultdict(list)  # texts before and now -> where
    for done, pair in enumerate(pairs, 1):
        old = rows[name_of(pair)]
        new, wrong = examine(pair, old), 0
        cells[old["role"], "taken"]["all"] += not old["refusal"]
        for look in ("refusal", *LOOKS):
            other, reworded = changes(old.get(look), new.get(look))
            cell = cells[old["role"], "refused" if look == "refusal" else look]
            cell["all"] += sum(leaf is not None for leaf in leaves(old.get(look)).values())
            cell["other"] += len(other)
            bits += [f"{old['pair']}: {look} {place}" for place in other]
            for place in reworded:
                words[f"was  {text(old, look, place)}\n  is   {text(new, look, place)}"].append(f"{old['pair']}: {look} {place}".strip())
            wrong += len(other)
        progress(done, pairs, start, old, f"{wrong} differ" if wrong else "equal")
    texts = [f"  {texts}\n  in {len(places)} places, the first {places[0]}" for texts, places in words.items()]
    print(f"\nOther bits: {len(bits)}", *bits, f"\nOther words: {len(words)}", *texts, "", table(cells), sep="\n")
    return bool(bits)


def text(row: Row, look: str, place: str) -> str:
    return leaves(row[look])[place]["text"]


def table(cells: dict[tuple[str, str], Counter]) -> str:
    """By role, how many pairs there are, and how many digests of each look; those that differ behind a minus."""
    columns = ("taken", "refused", *LOOKS)
    lines = [["role", *columns], ["---"] * (len(columns) + 1)]
    for role in sorted({role for role, _ in cells}):
        counts = [cells[role, column] for column in columns]
        lines.append([role, *(f"{c['all']}" + (f" - {c['other']}" if c["other"] else "") for c in counts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--part", default="1/1", help="the i-th of n parts of the pairs")
    parser.add_argument("--match", default="", help="a piece of the names of pairs")
    given = parser.parse_args()
    print(f"hf_tokens in {Path(hf_tokens.__file__).parent}")
    return {"record": record, "compare": compare}[given.do](given.file, chosen(given.part, given.match))


if __name__ == "__main__":
    sys.exit(main())
