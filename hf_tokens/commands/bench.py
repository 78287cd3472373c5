"""What `hf-tokens bench` does: quality and speed of methods over the values of a knob, on a text or on pictures of the user's."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_tokens

from ..errors import ConfigError, UnsupportedError, explain
from ..tools.measure import Cost
from ..tools.progress import track
from .cost import processor_of
from .material import pieces
from .pareto import Bench, Trial, check_drawing, draw_fronts, marked
from .quickstart import Answers, held_out_loss, twin, wait
from .sources import PICTURE_SUFFIXES, Source, picture_of_file, reader_of, text_of_file, tokenizer_of
from .strengths import stacks_for

AT_ONCE = 8  # pictures
ASKED = 8  # tokens that stand behind a context when decoding is timed


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        length: Tokens of a piece of text.
        most: Pieces of text, or pictures, at most.
        rounds: Rounds of the timing.
        device: Where.
    """

    length: int = 512
    most: int = 16
    rounds: int = 7
    device: str = "cpu"


NamedStacks = Sequence[tuple[str, Sequence[Any]]]  # a name, and the methods


def seconds(calls: Sequence[Callable[[], Any]], rounds: int, what: str) -> list[list[float]]:
    """Seconds of each call in each round. They take turns, so that whatever else goes on hits all alike; the first one warms up."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in track(range(rounds + 1), what):
        for call, times in zip(calls, taken, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn > 0:
                times.append(time.perf_counter() - start)
    return taken


def speed_ratios(taken: list[list[float]]) -> list[float]:
    """How much faster than the first each is: the median of the rounds' ratios."""
    return [statistics.median(first / own for first, own in zip(taken[0], times, strict=True)) for times in taken]


def share(value: float, of: float) -> float:
    return value / of if of else 1.0


def models_of(base: Any, stacks: NamedStacks) -> dict[str, Any]:
    """The base, and a model for each stack over the same weights."""
    return {"base": base, **{setting: hf_tokens.get_token_model(twin(base), [*stack]).eval() for setting, stack in stacks}}


def on_text(source: Source, stacks: NamedStacks, text: str, extent: Extent) -> Bench:
    """The loss of what follows a context that is read once and compressed, and the costs of it."""
    tokenizer, base = tokenizer_of(source), reader_of(source.model, extent.device, "hf-tokens bench")
    chunks = [chunk.to(extent.device) for chunk in pieces([text], tokenizer, extent.length)[: extent.most]]
    if not chunks:
        rule, got = f"A bench reads a text of one piece of {extent.length} tokens at least", f"{len(tokenizer(text)['input_ids'])} tokens"
        raise ConfigError(explain(rule, got, "Pass a longer text, or a shorter `--length`."))
    models = models_of(base, stacks)
    context, asked = chunks[0][None, :-ASKED], chunks[0][None, -ASKED:]
    losses = [held_out_loss(model, chunks) for model in track([*models.values()], "quality")]
    held = {name: hf_tokens.compress_context(model, context) for name, model in models.items()}
    reading = [lambda model=model: hf_tokens.compress_context(model, context) for model in models.values()]
    prompt = speed_ratios(seconds(reading, extent.rounds, "reading"))
    writing = [Answers(model, held[name], asked).write for name, model in models.items()]
    decode = speed_ratios(seconds(writing, extent.rounds, "writing"))
    costs = [hf_tokens.measure(model, input_ids=context) for model in track([*models.values()], "costs")]
    kv = [one.kv_bytes for one in held.values()]
    trials = [
        Trial(name, loss, share(cost.tokens, costs[0].tokens), share(cost.flops, costs[0].flops), share(size, kv[0]), first, speed)
        for name, loss, cost, size, first, speed in zip(models, losses, costs, kv, prompt, decode, strict=True)
    ]
    return marked(Bench(source.model, "loss behind the context", False, ("speed", "kv", "flops"), trials))


def pictures_in(folder: Path, most: int) -> list[Path]:
    """Pictures of a folder, also in folders below it, evenly taken."""
    if not folder.is_dir():
        raise ConfigError(explain("Pictures are in a folder", repr(str(folder)), "There is no such folder: check the path."))
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise ConfigError(explain(f"Pictures end in {', '.join(PICTURE_SUFFIXES)}", f"{folder} without one", "Name another folder."))
    return found[:: -(-len(found) // most)]


def judged(base: Any, outputs: Any, paths: Sequence[Path]) -> tuple[str, Callable[[Any], float]]:
    """What the quality of pictures' outputs is, and how it is taken from a model's: right labels where folders are named by them.

    Raises:
        UnsupportedError: The model neither classifies nor makes one vector of a picture.
    """
    if "logits" in outputs and outputs["logits"].dim() == 2:
        labels = [base.config.label2id.get(path.parent.name) for path in paths]
        if None not in labels:
            return "accuracy", lambda output: float((output["logits"].argmax(dim=-1).cpu() == torch.tensor(labels)).double().mean())
        own = outputs["logits"].argmax(dim=-1)
        return "answers as the base's", lambda output: float((output["logits"].argmax(dim=-1) == own).double().mean())
    if "pooler_output" in outputs and outputs["pooler_output"] is not None:
        cosine = lambda output: torch.cosine_similarity(output["pooler_output"], outputs["pooler_output"], dim=-1)
        return "cosine to the base's vectors", lambda output: float(cosine(output).mean())
    rule = "A bench of pictures needs a model that classifies them, or makes a vector of each"
    raise UnsupportedError(explain(rule, type(base).__name__, "Choose another model."))


def on_pictures(source: Source, stacks: NamedStacks, folder: Path, extent: Extent) -> Bench:
    """Whether pictures are seen as before, or right where folders name them, and the costs of it."""
    base = reader_of(source.model, extent.device, "hf-tokens bench")
    if base.main_input_name != "pixel_values":
        rule = "A bench of pictures needs a model that reads them alone"
        raise UnsupportedError(explain(rule, type(base).__name__, "Pass `--text FILE`, or choose another model."))
    paths = pictures_in(folder, extent.most)
    processor = processor_of(source, transformers.AutoImageProcessor)
    pixels = processor(images=[picture_of_file(path) for path in paths], return_tensors="pt")["pixel_values"].to(extent.device)
    batches, models = pixels.split(AT_ONCE), models_of(base, stacks)
    all_of = lambda model: joined([model(pixel_values=batch) for batch in batches])
    with torch.no_grad():
        name, judge = judged(base, all_of(base), paths)
        qualities = [judge(all_of(model)) for model in track([*models.values()], "quality")]
        reading = [lambda model=model: model(pixel_values=batches[0]) for model in models.values()]
        speed = speed_ratios(seconds(reading, extent.rounds, "reading"))
    costs: list[Cost] = [hf_tokens.measure(model, pixel_values=batches[0]) for model in models.values()]
    trials = [
        Trial(setting, quality, share(cost.tokens, costs[0].tokens), share(cost.flops, costs[0].flops), None, None, own)
        for setting, quality, cost, own in zip(models, qualities, costs, speed, strict=True)
    ]
    return marked(Bench(source.model, name, True, ("speed", "flops"), trials))


def joined(outputs: list[Any]) -> dict[str, torch.Tensor]:
    """The outputs of several batches as those of one."""
    names = [name for name, value in outputs[0].items() if isinstance(value, torch.Tensor)]
    return {name: torch.cat([output[name] for output in outputs]) for name in names}


def run_bench(source: Source, vary: str | None, text: Path | None, images: Path | None, extent: Extent, picture: bool) -> Bench:
    """Go through the values of a knob, on a text or on pictures.

    Raises:
        ConfigError: There are both or neither, no method, or no such knob.
        UnsupportedError: The methods do not fit the model, it does not read such, or nothing can draw the picture.
    """
    if (text is None) == (images is None):
        remedy = "Pass `--text FILE` or `--images FOLDER`."
        raise ConfigError(explain("A bench reads a text or pictures", "neither" if text is None else "both", remedy))
    if source.adapter is not None or not source.methods:
        got = source.adapter or f"{source.model} alone"
        raise ConfigError(explain("A bench puts methods into a base model", got, "Name methods behind it, such as `snapkv`."))
    if picture:
        check_drawing()
    name, stacks = stacks_for(source.methods, vary)
    named = [(f"{name}={value}", stack) for value, stack in stacks]
    if text is not None:
        return on_text(source, named, text_of_file(text), extent)
    return on_pictures(source, named, images, extent)


def bench_as_plain(bench: Bench) -> dict[str, Any]:
    """A bench as JSON holds it."""
    return asdict(bench)


def keep_bench(bench: Bench, output: Path, picture: bool) -> dict[str, str]:
    """Write the numbers, and the picture, into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    files = {"numbers": output / "bench.json", **({"picture": output / "bench.png"} if picture else {})}
    told = {"command": sys.argv, "torch": torch.__version__, "threads": torch.get_num_threads(), **bench_as_plain(bench)}
    files["numbers"].write_text(json.dumps(told, indent=1), encoding="utf-8")
    if picture:
        draw_fronts(bench, files["picture"])
    return {name: str(path) for name, path in files.items()}
