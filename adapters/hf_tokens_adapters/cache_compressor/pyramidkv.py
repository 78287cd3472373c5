"""PyramidKV: SnapKV with more entries for the lower blocks, where attention is spread, and fewer for the upper ones.

Paper:   PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (Cai et al., 2024), arXiv:2406.02069
Needs:   nothing
Maths:   scores as in SnapKV;  of L blocks block l keeps w + c_l, c_l from B + D in the first to B - D in the last in equal steps,
         B = C - w, D = min(B - B // beta, n - w - B);  while n < 2 B every block keeps C
Differs: c_l is rounded towards B, so that all blocks together hold L C: the release's steps are rounded down, which holds 2.8 % more in 32
         blocks at C 512, and 10 % in 30 at C 128. Entries are stored once for each key head, by the mean of its query heads, before the
         pooling. With `layers`, L counts these. A later prompt is compressed again.
Checked: Zefan-Cai/KVCache-Factory@c97f9d70, PyramidKVCluster in all three regimes, sizes of all blocks and scores of what it keeps, heads
         alone and sharing keys: largest difference 0 in scores, 28 of 512 entries in a block's size (its steps are rounded down).

>>> from hf_tokens import PyramidKVConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, PyramidKVConfig(capacity=6, window=2))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 6 * 32 * 4
True
"""

from dataclasses import dataclass

from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, check_capacity, observed, option, protect, register


@dataclass(frozen=True)
class PyramidKVConfig(MethodConfig):
    capacity: int = option(512, ge=1, size=True, help="Entries that a head keeps, on average over the blocks, the window among them.")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    window: int = option(8, ge=1, help="Newest tokens, whose queries look and which stay (paper: alpha).")
    kernel: int = option(7, ge=1, help="Neighbours over which scores are pooled.")
    pooling: str = option("max", choices=("max", "average"), help="How they are pooled.")
    beta: int = option(20, ge=1, help="The last block keeps one in so many of the mean behind the window (paper: beta).")


@register("pyramidkv", PyramidKVConfig)
class PyramidKV(CacheCompressor):
    chunks = False

    @classmethod
    def check(cls, config: PyramidKVConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        check_capacity(config, config.capacity, config.budget, config.window)

    def score(self, scores: object, mask: Tensor, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        c = self.config
        return protect(observed(scores, mask, newer, c.window, c.kernel, c.pooling), positions, newer, budget, newest=c.window)

    def budget(self, length: int, seen: int) -> int:
        c, total = self.config, allowance(length, seen, self.config.capacity, self.config.budget)
        mean = total - c.window
        if mean <= 0 or length < 2 * mean:
            return total
        highest = min(2 * mean - mean // c.beta, length - c.window)
        place, blocks = self.place_among_blocks()
        return total + int((highest - mean) * (blocks - 1 - 2 * place) / max(1, blocks - 1))

    def place_among_blocks(self) -> tuple[int, int]:
        """Which of its blocks this is, and how many these are."""
        dims, chosen = self.dims, self.config.layers
        blocks = sorted(range(dims.layers) if chosen is None else {layer % dims.layers for layer in chosen})
        return blocks.index(dims.layer), len(blocks)
