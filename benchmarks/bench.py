"""What the engine costs and what it saves, on SmolLM2-135M: paired runs, ratios only.

python benchmarks/bench.py                 # 512 tokens, the table and results/bench.json
python benchmarks/bench.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hf_tokens
from hf_tokens.commands.quickstart import load_base, packaged_smollm2
from hf_tokens.testing import probe_config
from hf_tokens.testing.probe import ProbeDropConfig

RESULTS = Path(__file__).parent / "results"


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """One forward."""
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


@torch.no_grad()
def ratio(base: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Median of the paired ratios other / base, and half the distance between their quartiles; the order alternates."""
    ratios = []
    for round in range(rounds + 1):
        pair = (base, other) if round % 2 else (other, base)
        times = {id(model): seconds(model, ids) for model in pair}
        if round:
            ratios.append(times[id(other)] / times[id(base)])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = str(packaged_smollm2())
    base = load_base(name, "cpu")
    ids = torch.randint(100, 40000, (1, args.tokens), generator=torch.Generator().manual_seed(0))

    nothing = hf_tokens.get_token_model(load_base(name, "cpu"), [*probe_config(0.0), hf_tokens.DeepPromptConfig(tokens=0)]).eval()
    overhead, overhead_spread = ratio(base, nothing, ids, args.rounds)
    half = hf_tokens.get_token_model(load_base(name, "cpu"), ProbeDropConfig(share=0.5)).eval()
    dropped, dropped_spread = ratio(base, half, ids, args.rounds)
    cost = {key: hf_tokens.measure(m, input_ids=ids, use_cache=False, logits_to_keep=1) for key, m in (("base", base), ("half", half))}
    share = cost["half"].flops / cost["base"].flops
    saved = (1 - dropped) / (1 - share)

    table = Table(title=f"SmolLM2-135M, {args.tokens} tokens, {args.threads} thread(s), {args.rounds} pairs")
    for heading in ("surgery", "time / base", "+-", "FLOPs / base", "tokens / base", "goal"):
        table.add_column(heading, justify="left" if heading == "surgery" else "right")
    table.add_row("nothing, in every block", f"{overhead:.3f}", f"{overhead_spread:.3f}", "1.000", "1.000", "time <= 1.03")
    tokens = cost["half"].tokens / cost["base"].tokens
    goal = f"saves {100 * saved:.0f} % of what the FLOPs say (>= 85 %)"
    table.add_row("half the tokens dropped at the middle", f"{dropped:.3f}", f"{dropped_spread:.3f}", f"{share:.3f}", f"{tokens:.3f}", goal)
    Console(width=140).print(table)
    RESULTS.mkdir(exist_ok=True)
    result = {
        "command": " ".join(sys.argv),
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} thread(s)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "overhead": {"ratio": overhead, "spread": overhead_spread},
        "half dropped": {"ratio": dropped, "spread": dropped_spread, "flops": share, "tokens": tokens, "share of the saving": saved},
    }
    (RESULTS / "bench.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
