"""Training-free acceleration of a denoiser that was trained here: digits under guidance, against fewer steps and chance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from common import Point, digits, draw, fit, seconds_in_turns, write
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_tokens import (
    CATPruningConfig,
    FeatureCache,
    ImportanceTokenMergeConfig,
    MethodConfig,
    ProfilingDiTConfig,
    ToCaConfig,
    calibrate,
    get_token_model,
    option,
    register,
)
from hf_tokens.tools.measure import UNCOUNTED, TokenCounts

NAME = "denoiser"
COMMAND = "python benchmarks/quality/denoiser.py"
UPDATES, BATCH, CLASSES, NULL = 1500, 32, 10, 10
STEPS, GUIDANCE, EACH, FEW = 20, 2.0, 10, 2  # denoising steps, scale of guidance, pictures of each digit, and where only time is taken
PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class RandomTokensConfig(MethodConfig):
    cycle: int = option(3, ge=1, help="Every how many steps all is computed.")
    ratio: float = option(0.7, ge=0, le=1, zero=0.0, help="Share of the tokens that is reused.")


@register("random-tokens", RandomTokensConfig)
class RandomTokens(FeatureCache):
    """The baseline of chance: tokens drawn anew for each sublayer and step."""

    def reuse(self, hidden: Tensor, step: int) -> Tensor | None:
        if step % self.config.cycle == 0:
            return None
        n = hidden.shape[1]
        return torch.rand(hidden.shape[:2]).argsort(dim=1)[:, : n - int(self.config.ratio * n)]


def denoiser() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    size = dict(num_layers=6, num_attention_heads=4, attention_head_dim=12, sample_size=8, patch_size=1)
    return DiTTransformer2DModel(**size, in_channels=1, out_channels=1, num_embeds_ada_norm=CLASSES, norm_num_groups=1)


def schedule() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, timestep_spacing="trailing")


def trained() -> tuple[DiTTransformer2DModel, float]:
    """The denoiser, and the seconds that its training took."""
    model, scheduler = denoiser().train(), schedule()  # it drops a tenth of the labels by itself
    pictures, labels, *_ = digits()

    def loss() -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,))
        times, noise = torch.randint(1000, (BATCH,)), torch.randn(BATCH, 1, 8, 8)
        noisy = scheduler.add_noise(pictures[chosen], noise, times)
        return (model(noisy, times, labels[chosen]).sample - noise).square().mean()

    return model, fit(model, loss, UPDATES)


def classifier() -> tuple[nn.Module, float]:
    """A small convolutional network, and its accuracy on digits that it has not seen."""
    pictures, labels, unseen, wanted = digits()
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(64 * 16, CLASSES))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(400):
        chosen = torch.randint(len(pictures), (64,))
        loss = nn.functional.cross_entropy(net(pictures[chosen] + 0.1 * torch.randn(64, 1, 8, 8)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        return net, float((net(unseen).argmax(1) == wanted).float().mean())


@torch.no_grad()
def sample(model: nn.Module, each: int, steps: int = STEPS, calls: list | None = None) -> Tensor:
    """Pictures of every digit from the same noise each time, (10 * each 1 8 8); the calls of the model go to a list, if one is given."""
    labels = torch.arange(CLASSES).repeat_interleave(each)
    scheduler, state = schedule(), torch.random.get_rng_state()
    scheduler.set_timesteps(steps)
    x = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(7))
    condition = torch.cat([labels, torch.full_like(labels, NULL)])
    torch.manual_seed(0)  # for methods that draw
    for t in scheduler.timesteps:
        call = {"hidden_states": torch.cat([x, x]), "timestep": t.expand(2 * len(x)), "class_labels": condition}
        if calls is not None:
            calls.append(call)
        told, free = model(**call).sample.chunk(2)
        x = scheduler.step(free + GUIDANCE * (told - free), t, x).prev_sample
    torch.random.set_rng_state(state)
    return x


def tokens_of(counts: dict) -> float:
    """Tokens that the sublayers computed, in tokens of a block: the mean of attention and MLP."""
    blocks = {key for key in counts if isinstance(key, int)}
    return sum(counts.get((i, part), counts[i]) for i in blocks for part in PARTS) / len(PARTS)


def cost(model: nn.Module, run: Callable[[], object]) -> tuple[float, float]:
    """GFLOPs and thousands of tokens of one run."""
    surgery = model.transformer_blocks[0].hf_tokens.surgery
    listener = TokenCounts(surgery)
    with surgery.model.listening(listener), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        run()
    return counter.get_total_flops() / 1e9, tokens_of(listener.counts) / 1e3


SETTINGS: list[tuple[str, str, MethodConfig]] = [
    *(("toca", f"cycle {c}, ratio {r}", ToCaConfig(cycle=c, ratio=r)) for c, r in ((2, 0.7), (3, 0.7), (4, 0.93))),
    *(("cat-pruning", f"alpha {a}", CATPruningConfig(alpha=a)) for a in (0.6, 0.3, 0.1)),
    *(
        ("profilingdit", f"T {high} to {low}, calibrated", ProfilingDiTConfig(max_interval=high, min_interval=low, intervals="steps"))
        for high, low in ((2, 2), (4, 2), (12, 2))
    ),
    ("profilingdit", "T 4 to 2, outer blocks kept", ProfilingDiTConfig(max_interval=4, min_interval=2, intervals="steps")),
    *(
        ("importance-token-merge", f"ratio {r}{', MLP too' if mlp else ''}", ImportanceTokenMergeConfig(ratio=r, mlp=mlp))
        for r, mlp in ((0.25, False), (0.5, False), (0.75, False), (0.5, True))
    ),
    *(
        ("merging without importance", f"ratio {r}{', MLP too' if mlp else ''}", ImportanceTokenMergeConfig(ratio=r, mlp=mlp, spread=4.0))
        for r, mlp in ((0.25, False), (0.5, False), (0.75, False), (0.5, True))
    ),
    *(("random tokens", f"cycle {c}, ratio {r}", RandomTokensConfig(cycle=c, ratio=r)) for c, r in ((2, 0.7), (3, 0.7), (4, 0.93))),
]
FEWER = (14, 10, 7, 5, 3)


@contextmanager
def accelerated(model: nn.Module, config: MethodConfig, setting: str, calls: list):
    """The denoiser with a method in it; one that measures knobs has measured them on a run of its own."""
    surgery = get_token_model(model, config)
    if "calibrated" in setting:
        calibrate(surgery, calls)
    inner = surgery.base_model.model
    try:
        yield inner
    finally:
        surgery.unload()


def main() -> None:
    torch.set_num_threads(1)
    model, seconds = trained()
    judge, accuracy = classifier()
    wanted, calls = torch.arange(CLASSES).repeat_interleave(EACH), []
    sample(model, FEW, calls=calls)
    agreement = lambda x: float((judge(x).argmax(1) == wanted).float().mean())
    whole = sample(model, EACH)
    distance = lambda x: float((x - whole).square().mean().sqrt())

    rows: list[tuple[str, str, dict[str, float], Callable[[], object]]] = []
    with accelerated(model, ToCaConfig(ratio=0.0), "", calls) as plain:
        base = cost(plain, lambda: sample(plain, FEW))
    share = lambda steps: {"GFLOPs": base[0] * steps / STEPS, "thousand tokens": base[1] * steps / STEPS}
    rows += [("all computed", f"{STEPS} steps", share(STEPS), lambda: sample(model, FEW))]
    pictures = {("all computed", f"{STEPS} steps"): whole}
    for steps in FEWER:
        rows += [("fewer steps", f"{steps} steps", share(steps), lambda steps=steps: sample(model, FEW, steps))]
        pictures["fewer steps", f"{steps} steps"] = sample(model, EACH, steps)
    twins = []
    for series, setting, config in SETTINGS:
        twin = denoiser().eval().requires_grad_(False)
        twin.load_state_dict(model.state_dict())
        twins.append(accelerated(twin, config, setting, calls))
        inner = twins[-1].__enter__()
        flops, tokens = cost(inner, lambda inner=inner: sample(inner, FEW))
        pictures[series, setting] = sample(inner, EACH)
        rows += [(series, setting, {"GFLOPs": flops, "thousand tokens": tokens}, lambda inner=inner: sample(inner, FEW))]
        print(f"{series}, {setting}: {agreement(pictures[series, setting]):.3f}", flush=True)
    taken = seconds_in_turns([run for *_, run in rows], rounds=3)
    points = []
    for (series, setting, values, _), spent in zip(rows, taken, strict=True):
        x = pictures[series, setting]
        quality = {"class agreement": agreement(x), "distance to all computed": distance(x)}
        points.append(Point(series, setting, {"seconds": spent, **values, **quality}))
    setting = (
        f"DiTTransformer2DModel of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters (6 blocks, 64 tokens), trained for "
        f"{UPDATES} steps on scikit-learn's digits ({seconds:.0f} s); DDIM, guidance {GUIDANCE}, both halves in one call; "
        f"{CLASSES * EACH} pictures judged by a convolutional network of {accuracy:.3f} accuracy on held-out digits; cost and seconds "
        f"(median of 3, in turns, one CPU thread) of a run of {CLASSES * FEW} pictures"
    )
    write(NAME, points, command=COMMAND, setting=setting, notes=NOTES)
    draw(NAME, points, [("GFLOPs", "distance to all computed"), ("seconds", "distance to all computed")])
    for point in points:
        print(point.series, "|", point.setting, "|", {k: round(v, 3) for k, v in point.values.items()})


NOTES = (
    "For their FLOPs ToCa and CAT Pruning stay nearer to the pictures of all steps than fewer steps do: 0.047 at 14.9 "
    "GFLOPs, 0.073 at 12.4 and 0.129 at 7.6 (ToCa), 0.084 at 12.3 (CAT Pruning, alpha 0.3), where the line between numbers of "
    "steps lies at 0.089, 0.115, 0.175 and 0.117; CAT Pruning at alpha 0.6 is nearest of all, 0.038, and at 0.1 behind the line. "
    "Tokens drawn at random are close to those that ToCa's scores choose, and behind them each time: 0.059 at as many FLOPs, "
    "0.077 and 0.134 at a few more. ProfilingDiT is ahead of fewer steps at T 2 (0.056 at 16.3 GFLOPs), level with them at "
    "T 4, with calibrated labels as with the outer blocks kept, and behind them at its default of T 12 to 2. Importance "
    "does not show in merging: ahead by little in two of four settings, level in one, behind in one. Merging itself is the worst trade "
    "here, and with the MLP it loses the digits. Class agreement is saturated by all but merging, three steps included: the distance is "
    "what to read. In seconds hardly anything beats fewer steps: at this size a call costs more than its arithmetic, and "
    "matching tokens more than it saves. What pays on a large denoiser has to be measured on one."
)

if __name__ == "__main__":
    main()
