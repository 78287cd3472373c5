"""Caching and merging in a denoiser of 256 tokens that is trained here on photographs: how far from the full model's picture, at what cost.

pip install --no-deps elpv-dataset==1.0.0.post1 && pip install scikit-learn
python benchmarks/quality/dit.py     # results/quality/dit.json and .png, 15 minutes on one core; goes on where it was
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import draw, fit, write
from denoiser import RandomTokensConfig
from diffusers import DDIMScheduler, DiTTransformer2DModel, PyramidAttentionBroadcastConfig
from diffusers import FirstBlockCacheConfig as TheirFirstBlock
from diffusers.hooks import HookRegistry, apply_first_block_cache, apply_pyramid_attention_broadcast
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from kept import Kept
from solar import cells
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_tokens import (
    CATPruningConfig,
    FirstBlockCacheConfig,
    ImportanceTokenMergeConfig,
    MethodConfig,
    ProfilingDiTConfig,
    TeaCacheConfig,
    ToCaConfig,
    ToMeSDConfig,
    get_token_model,
)
from hf_tokens.tools.measure import UNCOUNTED

NAME, COMMAND = "dit", "python benchmarks/quality/dit.py"
SIZE, PATCH, CLASSES, NULL, LIKE = 32, 2, 4, 4, 4  # pixels, pixels of a token, classes and none of them, side of a pooled picture's cell
UPDATES, BATCH = 1400, 16
STEPS, GUIDANCE, EACH, FEW = 20, 2.0, 4, 1  # steps, scale of guidance, pictures of a class, and where time is taken
EQUAL = 99  # decibels from which on a picture is the full model's
INNER = tuple(range(1, 7))  # blocks that ProfilingDiT may reuse
FEWER = (10, 7, 5, 14)


def denoiser() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    size = dict(num_layers=8, num_attention_heads=4, attention_head_dim=24, sample_size=SIZE, patch_size=PATCH)
    return DiTTransformer2DModel(**size, in_channels=1, out_channels=1, num_embeds_ada_norm=CLASSES, norm_num_groups=1)


def schedule() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing")


def trained(stored: Path) -> DiTTransformer2DModel:
    """The denoiser, trained once."""
    model, scheduler = denoiser(), schedule()
    if not stored.exists():
        learnt, _ = cells(SIZE)
        pictures = learnt.pictures * 2 - 1

        def loss() -> Tensor:
            chosen = torch.randint(len(pictures), (BATCH,))
            clean = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, pictures[chosen], pictures[chosen].flip(-1))
            times, noise = torch.randint(1000, (BATCH,)), torch.randn_like(clean)
            told = model(scheduler.add_noise(clean, noise, times), times, learnt.of_four[chosen]).sample
            return (told - scheduler.get_velocity(clean, noise, times)).square().mean()

        print(f"trained in {fit(model.train(), loss, UPDATES):.0f} s", flush=True)
        stored.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), stored)
    model.load_state_dict(torch.load(stored))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample(model: nn.Module, each: int, steps: int = STEPS) -> Tensor:
    """Pictures of every class from the same noise each time, (4 * each 1 size size) in [0, 1]."""
    labels = torch.arange(CLASSES).repeat_interleave(each)
    scheduler, state = schedule(), torch.random.get_rng_state()
    scheduler.set_timesteps(steps)
    x = torch.randn(len(labels), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    condition = torch.cat([labels, torch.full_like(labels, NULL)])
    torch.manual_seed(0)  # for methods that draw
    for t in scheduler.timesteps:
        told, free = model(torch.cat([x, x]), timestep=t.expand(2 * len(x)), class_labels=condition).sample.chunk(2)
        x = scheduler.step(free + GUIDANCE * (told - free), t, x).prev_sample
    torch.random.set_rng_state(state)
    return (x.clamp(-1, 1) + 1) / 2


def psnr(got: Tensor, whole: Tensor) -> float:
    """Mean over pictures, in decibels."""
    return float((-10 * (got - whole).square().flatten(1).mean(1).clamp(min=1e-10).log10()).mean())


def features(pictures: Tensor) -> Tensor:
    """A picture's cells and the sizes of its edges in them, (n f): what the distance to photographs is measured in."""
    pooled = nn.functional.avg_pool2d(pictures, LIKE).flatten(1)
    edges = [pictures.diff(dim=dim).abs() for dim in (-1, -2)]
    return torch.cat([pooled, *(nn.functional.avg_pool2d(edge, LIKE, ceil_mode=True).flatten(1) for edge in edges)], dim=1)


def energy(got: Tensor, photographs: Tensor) -> float:
    """Energy distance of two samples of features, scaled by that of the photographs: 0 where they are of one kind."""
    mean, scale = photographs.mean(0), photographs.std(0).clamp(min=1e-4)
    x, y = (got - mean) / scale, (photographs - mean) / scale
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


def restarted(model: nn.Module) -> nn.Module:
    """A model with a cache of diffusers' own, which is emptied in front of its next run."""
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    _set_cache_context(model, CacheContext("both"))  # of guidance, which are one call
    return model


def spent(call: Callable[[], object]) -> float:
    """Seconds of the processor."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


@dataclass(frozen=True)
class Setting:
    """One row: how a fresh denoiser is made to save, and over how many steps it runs."""

    series: str
    setting: str
    put: Callable[[nn.Module], nn.Module]
    steps: int = STEPS


def ours(config: MethodConfig, model: nn.Module) -> nn.Module:
    return get_token_model(model, config).base_model.model


def their_first_block(threshold: float, model: nn.Module) -> nn.Module:
    """Diffusers' hook."""
    apply_first_block_cache(model, TheirFirstBlock(threshold=threshold))
    return model


def their_broadcast(skip: int, model: nn.Module) -> nn.Module:
    """Diffusers' pyramid attention broadcast, told the step of the call."""
    now = {"timestep": 0}
    model.register_forward_pre_hook(lambda module, args, kwargs: now.update(timestep=int(kwargs["timestep"][0])), with_kwargs=True)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: now["timestep"],
    )
    apply_pyramid_attention_broadcast(model, config)
    return model


def settings() -> list[Setting]:
    """All rows, those that a reader asks for first in front."""
    of = lambda series, setting, config: Setting(series, setting, partial(ours, config))
    rows = [Setting("all computed", f"{STEPS} steps", lambda model: model)]
    rows += [Setting("fewer steps", f"{steps} steps", lambda model: model, steps) for steps in FEWER]
    rows += [of("first-block-cache", f"threshold {t}", FirstBlockCacheConfig(threshold=t)) for t in (0.2, 0.35)]
    rows += [Setting("diffusers' first-block cache", f"threshold {t}", partial(their_first_block, t)) for t in (0.2, 0.35)]
    rows += [of("tomesd", f"ratio {r}", ToMeSDConfig(ratio=r)) for r in (0.25, 0.5)]
    rows += [of("importance-token-merge", "ratio 0.5", ImportanceTokenMergeConfig(ratio=0.5))]
    rows += [of("teacache", f"threshold {t}", TeaCacheConfig(threshold=t)) for t in (0.15, 0.3)]
    rows += [of("toca", f"cycle {c}", ToCaConfig(cycle=c, steps=STEPS)) for c in (2, 3)]
    rows += [of("random tokens", f"cycle {c}, ratio 0.93", RandomTokensConfig(cycle=c, ratio=0.93)) for c in (2, 3)]
    rows += [of("profilingdit", "T 2 to 2, inner blocks", ProfilingDiTConfig(background=INNER, max_interval=2, intervals="steps"))]
    rows += [Setting("diffusers' attention broadcast", "every 2", partial(their_broadcast, 2))]
    rows += [of("cat-pruning", "alpha 0.3", CATPruningConfig(alpha=0.3))]
    rows += [of("first-block-cache", "threshold 0.1", FirstBlockCacheConfig(threshold=0.1))]
    rows += [of("tomesd, MLP too", "ratio 0.5", ToMeSDConfig(ratio=0.5, mlp=True))]
    return rows


def main() -> None:
    """Train once, measure what is not there yet, write the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", type=Path, default=Path("quality-kept"), help="folder of the weights and of the rows that are done")
    given = parser.parse_args()
    torch.set_num_threads(1)
    base, kept = trained(given.kept / f"{NAME}.pt"), Kept(given.kept / f"{NAME}.jsonl")
    photographs = features(cells(SIZE)[1].pictures)
    whole, points = sample(base, EACH), []
    for one in settings():

        def row(one: Setting = one) -> dict[str, float]:
            twin = denoiser().eval().requires_grad_(False)
            twin.load_state_dict(base.state_dict())
            model = one.put(twin)
            fresh = (lambda: restarted(model)) if "diffusers" in one.series else (lambda: model)
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                sample(fresh(), FEW, one.steps)
            first, own = (spent(partial(sample, at, FEW, steps)) for at, steps in ((base, STEPS), (fresh(), one.steps)))
            got = sample(fresh(), EACH, one.steps)
            return {
                "PSNR": psnr(got, whole),
                "energy distance": energy(features(got), photographs),
                "GFLOPs": counter.get_total_flops() / 1e9,
                "relative CPU-seconds": own / first,
            }

        points.append(kept.row(one.series, one.setting, row))
    size, tokens = sum(p.numel() for p in base.parameters()) / 1e6, (SIZE // PATCH) ** 2
    setting = (
        f"DiTTransformer2DModel of {size:.1f} M parameters (8 blocks of width 96, {tokens} tokens), trained for {UPDATES} steps of {BATCH} "
        f"on photographs of solar cells of {SIZE} px; DDIM of {STEPS} steps, guidance {GUIDANCE}, both halves in one call; "
        f"{CLASSES * EACH} pictures beside those of the full model from the same noise (PSNR, 100 where they are equal) and beside "
        f"held-out photographs (energy distance); cost and CPU-seconds, next to a run of the full model, of {CLASSES * FEW} pictures, "
        "one thread, float32"
    )
    write(NAME, points, command=COMMAND, setting=setting, notes=NOTES)
    drawn = [p for p in points if p.values["PSNR"] < EQUAL]
    draw(NAME, drawn, [("GFLOPs", "PSNR"), ("relative CPU-seconds", "PSNR")], better=("low", "high"))


NOTES = (
    "16 pictures, PSNR in decibels to the full model's; the energy distance is too coarse at that number for more than gross faults "
    "(0.28 of the full model, 0.1 to 0.5 is as good). Fewer steps are the bar, since they cost nothing: 44.3 at 0.67 of the "
    "CPU-seconds, 40.3 at 0.50, 35.1 at 0.36, 32.3 at 0.24. Nothing here beats them at equal seconds: first-block cache at 0.2 (43.7 at "
    "0.71, two thirds of the FLOPs) is a step behind, ours and diffusers' own give the same pictures in the same time; diffusers' "
    "attention broadcast has 42.7 at 0.73, ProfilingDiT 41.3 at 0.78, TeaCache 38.8 at 0.51 and 31.5 at 0.31. By FLOPs first-block "
    "cache at 0.2 (43.7 at 68 of 105 GFLOPs) and TeaCache at 0.15 (38.8 at 47) lie on the line of fewer steps (44.3 at 73, 40.3 at 52), "
    "and all else below it: ProfilingDiT 41.3 at 70, random tokens 39.2 at 62 and 36.7 at 49, ToCa 37.6 at 65 and 35.1 at 48, "
    "first-block cache at 0.35 34.6 at 45. Past its knee a threshold ruins what the picture is and "
    "not only its detail: the energy distance "
    "of TeaCache at 0.3 is 5.9 and that of first-block cache at 0.35 is 2.2, at a PSNR where five and seven steps have 0.35 and 0.26. "
    "ToCa's choice is below tokens drawn by chance in both cycles, as among the 64 tokens of a digit. Merging should be used by nobody "
    "at this size: ToMe for Stable Diffusion and importance-based merging lose 12 decibels and more against fewer steps, and 256 tokens "
    "of width 96 are too few to gain a second by it (1.03 to 1.15); importance helps by one decibel at a half. Caching stands to gain "
    "where the schedule is not as smooth as here and where it joins fewer steps, which was not tried; a cache and merging cannot stand "
    "in one block, and tomesd's own code takes only U-Nets. One seed; a denoiser trained for 11 minutes."
)

if __name__ == "__main__":
    main()
