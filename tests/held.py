"""What cache compressors leave of a context, and the base's own reading of a question over it."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_tokens import (
    AdaKVConfig,
    D2OConfig,
    DuoAttentionConfig,
    ExpectedAttentionConfig,
    H2OConfig,
    KIVIConfig,
    KVzipConfig,
    MiKVConfig,
    MiniCacheConfig,
    PrefixKVConfig,
    PyramidKVConfig,
    RandomConfig,
    RazorAttentionConfig,
    SnapKVConfig,
    SqueezeAttentionConfig,
    StreamingLLMConfig,
    TOVAConfig,
)
from hf_tokens.testing import CACHE
from hf_tokens.tokens.entries import cells_of

COMPRESSORS = {
    "prefixkv": PrefixKVConfig(budget=0.5, distance=3),
    "prefixkv online": PrefixKVConfig(budget=0.5, distance=3, online=True),
    "squeezeattention": SqueezeAttentionConfig(budget=0.5, policy="heavy_hitters"),
    "squeezeattention sinks": SqueezeAttentionConfig(budget=0.5, policy="sinks", sinks=1),
    "razorattention": RazorAttentionConfig(heads=(0, 3), sinks=1, compression=3),
    "d2o": D2OConfig(budget=0.5, spare=False),
    "duo-attention": DuoAttentionConfig(sinks=1, recent=5),
    "kvzip": KVzipConfig(ratio=0.5, chunk=7, sinks=1),
    "minicache": MiniCacheConfig(gamma=0.3),
    "kivi": KIVIConfig(group=2, residual=4, key_bits=4, value_bits=4),
    "mikv": MiKVConfig(importance=0.3, bits=4),
    "snapkv": SnapKVConfig(budget=0.5, window=3, kernel=3),
    "tova": TOVAConfig(budget=0.5),
    "streaming-llm": StreamingLLMConfig(budget=0.5, sinks=2, shift=False),
    "streaming-llm turned": StreamingLLMConfig(budget=0.5, sinks=2),
    "h2o": H2OConfig(budget=0.5),
    "pyramidkv": PyramidKVConfig(budget=0.4, window=2, kernel=3, beta=4),
    "random": RandomConfig(budget=0.5, sinks=1, window=2),
    "expected-attention": ExpectedAttentionConfig(budget=0.5, n_sink=1, n_future_positions=8),
    "ada-kv": AdaKVConfig(budget=0.5, window=3, kernel=3),
}
LENGTH, ASKED, PADS, STEPS = 18, 5, 4, 3


def texts(seed=0):
    """A context of two rows, the second padded in front, and two questions."""
    g = torch.Generator().manual_seed(seed)
    context, *questions = (torch.randint(5, 80, (2, n), generator=g) for n in (LENGTH, ASKED, ASKED))
    mask = torch.ones_like(context)
    mask[1, :PADS] = 0
    return context, mask, questions


@torch.no_grad()
def ask(model, ids, mask, cache=None, **more):
    """What the model says of tokens behind a cache, given the mask of all."""
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=places, **{CACHE: cache}, use_cache=True, **more)


def decoded(model, rows=slice(None)):
    """What a model says of a padded batch, or of some of its rows without their padding, and of some tokens more; and its cache."""
    context, mask, (question, _) = texts()
    context, mask, question = context[rows], mask[rows], question[rows]
    real = mask.bool().any(dim=0)
    context, mask = context[:, real], mask[:, real]
    out = ask(model, context, mask)
    said, cache = [out.logits[:, -1]], out.past_key_values
    for step in range(STEPS):
        mask = longer(mask, question[:, :1])
        said.append(ask(model, question[:, step : step + 1], mask, cache).logits[:, -1])
    return torch.stack(said, dim=1), cache


def longer(mask, ids):
    return torch.cat([mask, torch.ones_like(ids)], dim=1)


@torch.no_grad()
def over_what_is_held(base, stream, before, ran, ids, mask):
    """The base's own reading of a question (b m) over the entries of a cache: each block, row and head sees those that are there, by a mask
    of its own, and the tokens that ran the block, (b m) for each."""
    cache, handles, m = DynamicCache(), [], ids.shape[1]
    start = mask.shape[1] - m

    def skips(i):
        def hook(module, args, output):
            hidden = stream.read(i, output)
            return stream.write(i, output, torch.where(ran[i][..., None], hidden, args[0]))

        return hook

    for i, layer in enumerate(before.layers):
        cache.layers.append(DynamicLayer())
        handles.append(stream.blocks[i].register_forward_hook(skips(i)))
        if layer.origins is None:
            continue  # no token ran it
        cache.layers[i].update(layer.keys, layer.values)
        origins, real = cells_of(layer.origins, layer.heads), torch.nn.functional.pad(mask[:, :start], (0, 1)).bool()
        there = layer.there & real[:, None].expand(-1, layer.heads, -1).gather(2, origins.clamp(max=start))  # b k n
        weight = torch.zeros_like(origins, dtype=torch.float32)
        weight = weight if layer.sizes is None else cells_of(layer.sizes, layer.heads).log()
        query = torch.arange(start, start + m)[:, None]
        seen = there[:, :, None].expand(-1, -1, m, -1)
        own = torch.ones(m, m, dtype=torch.bool).tril() & (ran[i][:, None, None] | torch.eye(m, dtype=torch.bool))
        if layer.window is not None:
            seen = seen & (origins[:, :, None] > query - layer.window)
            own = own & (query.T > query - layer.window)
        old = torch.where(seen, weight[:, :, None], -torch.inf)
        new = torch.where(own, 0.0, -torch.inf).expand(-1, layer.heads, -1, -1)
        bias = torch.cat([old, new], dim=-1).repeat_interleave(stream.heads // layer.heads, dim=1)
        shown = lambda module, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias})
        handles.append(stream.attention(i).register_forward_pre_hook(shown, with_kwargs=True))
    try:
        return ask(base, ids, mask, cache).logits
    finally:
        for handle in handles:
            handle.remove()
