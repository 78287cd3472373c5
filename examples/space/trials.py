"""What the page runs: one answer with methods beside the base's, what became of the tokens, and what both cost."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import hf_tokens
from hf_tokens import plot
from hf_tokens.errors import ConfigError, UnsupportedError, explain

LONGEST = 2048  # tokens of a text
ROUNDS = 5  # in which a picture is timed
COLOURS = 3  # principal components of the patches, which are shown as red, green and blue
COLOURED = "Patches of one colour mean the same to the model: the colours are the three directions in which the base's patches differ most."


@dataclass(frozen=True)
class Cost:
    """What is shown of one model.

    Attributes:
        tokens, flops: Of the prompt or the picture, over all blocks.
        kv_bytes: Of the cache behind the prompt; 0 without one.
        seconds: Until the first token of an answer, or for a picture.
        later: Seconds for each further token; 0 where there is none.
    """

    tokens: int
    flops: int
    kv_bytes: int
    seconds: float
    later: float = 0.0


@dataclass(frozen=True)
class Trial:
    """What one run of the page found.

    Attributes:
        texts: What the base answered, and what the model with methods did.
        images: The same as pictures, where the model sees and names nothing.
        base, cost: What both cost.
        figures: What became of the tokens, and of the cache.
        notes: Sentences below.
    """

    texts: tuple[str, str]
    base: Cost
    cost: Cost
    figures: list[Figure]
    notes: list[str]
    images: tuple[Image.Image, ...] = field(default=())


def stack_of(choice: str, knobs: dict[str, Any], model: Any, tokenizer: Any = None) -> list[Any]:
    """The configs of `recipe:JOB` or of a method's name."""
    kind, _, name = choice.rpartition(":")
    if kind:
        return hf_tokens.recipe(name, model, tokenizer=tokenizer, **knobs)
    return [hf_tokens.method_info(name).config(**knobs)]


def twin(base: Any) -> Any:
    """A model of its own over the same weights, so that nobody else's run sees what is done to it."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def operated(base: Any, configs: Sequence[Any]) -> tuple[Any, list[str]]:
    """The model with methods, and what is to be said of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is not trained starts the same in each run
        model = hf_tokens.get_token_model(twin(base), list(configs)).eval()
    fresh = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    untrained = f"It brings {fresh:,} numbers that nobody has trained here: what it answers is where training would begin."
    return model, [untrained] if fresh else []


def cost_of(counted: Any, *seconds: float) -> Cost:
    """What was counted, and what was timed."""
    return Cost(counted.tokens, counted.flops, counted.kv_bytes, *seconds)


def changes(run: hf_tokens.RunRecord) -> bool:
    """Whether any token of the first pass left, stands with others, or skipped a block."""
    fates = (fate for passage in run.passages[:1] for fate in passage.fates.values())
    return any(bool(flags.any()) for fate in fates for flags in (fate.gone, fate.joined, fate.skipped))


# -- text --------------------------------------------------------------------------------------------------------------


def ids_of(tokenizer: Any, text: str) -> Tensor:
    """A prompt, as the model's template puts it, (1 n).

    Raises:
        ConfigError: There is no text, or too much of it.
    """
    if not text.strip():
        raise ConfigError(explain("An answer needs a text", "an empty one", "Write one."))
    if tokenizer.chat_template is not None:
        told = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    if ids.shape[1] > LONGEST:
        raise ConfigError(explain(f"A text has {LONGEST:,} tokens at most on this page", f"{ids.shape[1]:,}", "Shorten it."))
    return ids


class Clock(BaseStreamer):
    """Notes when a model hands out the prompt, and then each token that it writes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> tuple[float, float]:
        """Until the first token, and the median of the further ones; 0 where there is none."""
        first, *later = (after - before for before, after in itertools.pairwise(self.times))
        return first, statistics.median(later) if later else 0.0


def written(model: Any, tokenizer: Any, ids: Tensor, length: int) -> tuple[str, tuple[float, float]]:
    """An answer of so many tokens at most, and its seconds."""
    clock, given = Clock(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    told = model.generate(**given, max_new_tokens=length, do_sample=False, streamer=clock)[0, ids.shape[1] :]
    return tokenizer.decode(told, skip_special_tokens=True).strip(), clock.seconds()


def drawn(run: hf_tokens.RunRecord, words: Sequence[str]) -> Iterator[Figure]:
    """What became of the tokens, and of the cache, where anything did."""
    if changes(run):
        yield plot.tokens(run, words=words)
    if run.entries:
        yield plot.cache(run)


@torch.no_grad()
def read_text(base: Any, tokenizer: Any, text: str, choice: str, knobs: dict[str, Any], length: int) -> Trial:
    """Let both models answer a text.

    Raises:
        HFTokensError: The text is none, a knob is out of its bounds, or method and model do not go together.
    """
    ids = ids_of(tokenizer, text)
    model, notes = operated(base, stack_of(choice, knobs, base, tokenizer))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    with hf_tokens.record(model, flops=False) as run:
        model(**inputs)
    whole, left = (hf_tokens.measure(one, **inputs) for one in (base, model))
    before, seconds_before = written(base, tokenizer, ids, length)
    after, seconds = written(model, tokenizer, ids, length)
    return Trial(
        texts=(before, after),
        base=cost_of(whole, *seconds_before),
        cost=cost_of(left, *seconds),
        figures=[*drawn(run, tokenizer.convert_ids_to_tokens(ids[0]))],
        notes=[f"The prompt has {ids.shape[1]:,} tokens.", *notes],
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def seconds_in_turns(models: Sequence[Any], inputs: dict[str, Any]) -> list[float]:
    """The median seconds of each; they take turns, so that whatever else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(**inputs)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def names(model: Any, logits: Tensor) -> str:
    """The three likeliest classes, a line each."""
    top = logits[0].softmax(dim=-1).topk(min(3, logits.shape[1]))
    lines = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return "\n".join(f"{share:.1%}  {model.config.id2label[index].split(',')[0]}" for share, index in lines)


def colours_of(patches: Tensor) -> Callable[[Tensor], Tensor]:
    """What shows patches (n d) as colours (n 3): the directions in which these here differ most."""
    mean = patches.mean(dim=0)
    directions = torch.linalg.svd(patches - mean, full_matrices=False).Vh[:COLOURS].mT
    low, high = ((patches - mean) @ directions).quantile(torch.tensor([0.02, 0.98]), dim=0)
    return lambda some: (((some - mean) @ directions - low) / (high - low)).clamp(0, 1)


def in_colours(run: hf_tokens.RunRecord, states: Sequence[Tensor]) -> tuple[Image.Image, ...]:
    """Last hidden states (1 n d) as pictures, of one scale of colours, which is the first one's."""
    rows, height, width = plot.patches(run.passages[0], 0)
    paint = colours_of(states[0][0, rows])
    grids = [(paint(state[0, rows]).view(height, width, -1) * 255).byte().numpy() for state in states]
    return tuple(Image.fromarray(grid).resize((16 * width, 16 * height), Image.Resampling.NEAREST) for grid in grids)


def as_seen(processor: Any, pixels: Tensor) -> Any:
    """The picture that the model is given, (h w 3) in [0, 1]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


@torch.no_grad()
def read_picture(base: Any, processor: Any, image: Image.Image | None, choice: str, knobs: dict[str, Any]) -> Trial:
    """Let both models look at a picture.

    Raises:
        HFTokensError: There is no picture, a knob is out of its bounds, or method and model do not go together.
    """
    if image is None:
        raise ConfigError(explain("This tab needs a picture", "none", "Upload one, or take one of the examples."))
    inputs = {"pixel_values": processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]}
    model, notes = operated(base, stack_of(choice, knobs, base))
    with hf_tokens.record(model, flops=False) as run:
        after = model(**inputs)
    if not run.passages:
        rule = "The page shows what becomes of a picture's tokens"
        raise UnsupportedError(explain(rule, f"{choice!r}, which acts on none", "Choose a method that does."))
    whole, left = (hf_tokens.measure(one, **inputs) for one in (base, model))
    before = base(**inputs)
    seconds = seconds_in_turns([base, model], inputs)
    if "logits" in before:
        texts, images = (names(base, before.logits), names(base, after.logits)), ()
    else:
        alike = torch.cosine_similarity(before.pooler_output, after.pooler_output)[0]
        texts = ("", f"{alike:.1%} alike: the cosine between its vector of the whole picture and the base's.")
        notes = [COLOURED, *notes]
        images = in_colours(run, [before.last_hidden_state, after.last_hidden_state])
    return Trial(
        texts=texts,
        images=images,
        base=cost_of(whole, seconds[0]),
        cost=cost_of(left, seconds[1]),
        figures=[plot.picture(run, as_seen(processor, inputs["pixel_values"][0]))],
        notes=notes,
    )
