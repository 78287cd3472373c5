"""A DiT on digits, trained for a minute, under feature caching and token merging at the papers' ratios, against all computed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

import hf_tokens

from .paired import Row, ratios

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quality"))

from common import digits, fit

SIDE, WIDTH, HEADS, UPDATES, BATCH = 16, 384, 6, 60, 6  # 256 tokens, the width of DiT-S
PICTURES, STEPS, ROUNDS = 2, 12, 6
ELSEWHERE = "toca, as for PixArt: cycle 3, R = 0.7"  # the paper's ratio for another architecture, which asks for nothing here
METHODS = {
    "toca, as for DiT: cycle 4, R = 0.93": hf_tokens.ToCaConfig(cycle=4, ratio=0.93),
    ELSEWHERE: hf_tokens.ToCaConfig(cycle=3, ratio=0.7),
    "importance-token-merge, half, MLP too": hf_tokens.ImportanceTokenMergeConfig(ratio=0.5, mlp=True),
    "importance-token-merge, three quarters, MLP too": hf_tokens.ImportanceTokenMergeConfig(ratio=0.75, mlp=True),
}


def trained() -> DiTTransformer2DModel:
    """The denoiser, trained a little: its activations are a denoiser's, its pictures are not good yet."""
    torch.manual_seed(0)
    size = dict(num_layers=6, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, sample_size=SIDE, patch_size=1)
    model = DiTTransformer2DModel(**size, in_channels=1, out_channels=1, num_embeds_ada_norm=10, norm_num_groups=1).train()
    pictures, labels, *_ = digits(SIDE)

    def loss() -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,))
        times, noise = torch.randint(1000, (BATCH,)), torch.randn(BATCH, 1, SIDE, SIDE)
        noisy = schedule().add_noise(pictures[chosen], noise, times)
        return (model(noisy, times, labels[chosen]).sample - noise).square().mean()

    fit(model, loss, UPDATES)
    return model


def schedule() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, timestep_spacing="trailing")


def sample(model: torch.nn.Module) -> Tensor:
    """A run of the denoiser from the same noise."""
    scheduler, noise = schedule(), torch.randn(PICTURES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(STEPS)
    for time in scheduler.timesteps:
        said = model(noise, timestep=time.expand(PICTURES), class_labels=torch.arange(PICTURES)).sample
        noise = scheduler.step(said, time, noise).prev_sample
    return noise


def rows() -> Iterator[Row]:
    """Seconds of a run, its FLOPs, and how far its pictures lie from those of all computed."""
    from torch.utils.flop_counter import FlopCounterMode

    from hf_tokens.tools.measure import UNCOUNTED

    base = trained()

    def counted(model: torch.nn.Module) -> tuple[int, Tensor]:
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            made = sample(model)
        return counter.get_total_flops(), made

    with torch.no_grad():
        flops, whole = counted(base)
        setting = f"a DiT of width {WIDTH}, {SIDE * SIDE} tokens, {STEPS} steps"
        for name, config in METHODS.items():  # one beside the base at a time, as a user has it: what others hold would slow both
            model = hf_tokens.get_token_model(copy.deepcopy(base), config).eval()
            ratio = ratios([lambda model=model: sample(model) for model in (base, model)], ROUNDS)[0]
            mine, made = counted(model)
            apart = ((made - whole).square().mean() / whole.square().mean()).sqrt().item()
            goal = None if name == ELSEWHERE else 1 / 1.5
            yield Row(name, setting, *ratio, goal, {"FLOPs": mine / flops, "distance": apart})
