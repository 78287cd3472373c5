"""KVzip: entries stay that the model looks up when it is told to repeat its context, whatever will be asked of it later.

Paper:   KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (Kim et al., NeurIPS 2025), arXiv:2505.23416
Needs:   nothing
Maths:   for a part C of the context, behind all of it: A = softmax(q k^T / sqrt(e)) over [the first entries; C; the pass itself, causal];
         S[j] = max over the pass's queries, and over the heads that read a key head;  the highest r N of S in all blocks and heads stay
Differs: the words in front of a part are ids of the model's own tokenizer, and none by default; the release's are English, in a template.
         The first `sinks` tokens stand for its system prompt, and count within the ratio. Exactly r N entries stay, one of each head
         at least, where it keeps one fewer, and none that equals the last. Blocks with a window keep what that holds. Later turns are
         read behind what is kept, and not compressed.
Checked: snu-mllab/KVzip@5d847297, KVScore._get_score on random queries and keys, its mask in float64: largest difference 4e-16;
         _threshold keeps the same entries but the last one.

>>> from hf_tokens import KVzipConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> model = get_token_model(base.model, KVzipConfig(ratio=0.5))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes <= 4 * 2 * 2 * 16 * 32 * 4 // 2
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, option, register


@dataclass(frozen=True)
class KVzipConfig(MethodConfig):
    ratio: float = option(0.3, gt=0, le=1, zero=1.0, help="Share of all entries that stay (release: ratio).")
    level: str = option("pair", choices=("pair", "pair-uniform"), help="What the ratio is of: all heads together, or each of them.")
    chunk: int = option(2000, ge=1, help="Tokens of the context that are said again in one pass.")
    sinks: int = option(
        4, ge=0, help="First tokens of the context, which stay and are looked at in each pass (release: the system prompt)."
    )
    newest: int = option(0, ge=0, help="Newest tokens of the context that stay as well; the release has none.")
    repeat: tuple[int, ...] = option((), ge=0, help="Ids in front of the first part, that ask for the context again.")
    resume: tuple[int, ...] = option((), ge=0, help="Ids in front of the others, that ask for a part by its beginning.")
    suffix: int = option(8, ge=0, help="Tokens of the part before that stand behind those.")
    answer: tuple[int, ...] = option((), ge=0, help="Ids in front of what is said: where a template's answer begins.")


@register("kvzip", KVzipConfig)
class KVzip(CacheCompressor):
    chunks = False
    allots = True
    recites = property(lambda self: self.config.chunk)

    def lead(self, before: Tensor) -> Tensor:
        c, told = self.config, lambda ids: before.new_tensor(ids).expand(len(before), -1)
        if not before.shape[1]:
            return told((*c.repeat, *c.answer))
        return torch.cat([told(c.resume), before[:, before.shape[1] - min(c.suffix, before.shape[1]) :], told(c.answer)], dim=1)

    def score(self, scores: object, positions: Tensor, recited: Tensor, reciting: Tensor) -> Tensor:
        first = (positions >= 0) & (positions < self.config.sinks)
        last = positions.masked_fill(reciting, -1).amax(dim=-1, keepdim=True)
        stays = first | (positions > last - self.config.newest) & ~reciting
        seen = scores.columns(reduce="max", among=first | recited | reciting)  # b h n
        best = seen.unflatten(1, (self.dims.kv_heads, -1)).amax(dim=2)
        return best.masked_fill(stays if stays.dim() == 3 else stays[:, None], torch.inf)

    def budget(self, length: int, seen: int) -> int:
        return length

    def allot(self, scores: dict[int, Tensor], notes: dict[int, Tensor]) -> dict[int, Tensor]:
        if self.config.level == "pair-uniform":
            count = lambda score: (self.config.ratio * (score > -torch.inf).sum(dim=2) + 1e-9).long()
            return {layer: count(score).clamp(min=1) for layer, score in scores.items()}
        every = torch.cat([score.flatten(1) for score in scores.values()], dim=1)
        stay = (self.config.ratio * (every > -torch.inf).sum(dim=1, keepdim=True) + 1e-9).long()
        order = every.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = (order < stay.clamp(min=1)).split([score[0].numel() for score in scores.values()], dim=1)
        return {layer: part.view_as(scores[layer]).sum(dim=2) for layer, part in zip(scores, kept, strict=True)}
