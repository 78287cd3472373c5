"""A tiny GPT-2 and a tiny LLaVA in float64, where their arithmetic stays, and the former by hand: block by block, a sample at a time."""

import math
from dataclasses import dataclass

import torch
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Starcoder2Config,
)

from hf_tokens.testing import CACHE


def gpt2(layers=4, seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "n_positions": 64, "n_embd": 12, "n_layer": layers, "n_head": 3}
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **still, pad_token_id=0, bos_token_id=1, eos_token_id=None)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def blocks(base):
    """Functions hidden (m d) -> (hidden m d, attention h m m), one a block; a token sees itself and those in front of it."""

    def block(b):
        def call(hidden, positions=None):
            m = len(hidden)
            q, k, v = b.attn.c_attn(b.ln_1(hidden)).view(m, 3, b.attn.num_heads, -1).permute(1, 2, 0, 3)
            logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            attention = logits.masked_fill(~torch.ones(m, m).tril().bool(), -torch.inf).softmax(-1)
            hidden = hidden + b.attn.c_proj((attention @ v).transpose(0, 1).reshape(m, -1))
            return hidden + b.mlp(b.ln_2(hidden)), attention

        return call

    return [block(b) for b in base.transformer.h]


def embed(base, ids, positions):
    return base.transformer.wte(ids) + base.transformer.wpe(positions)


def lm_head(base, hidden):
    return base.lm_head(base.transformer.ln_f(hidden))


def batch(lengths, side="left", seed=0):
    """Random ids of rows of these lengths, padded on one side, and their mask."""
    draw = torch.Generator().manual_seed(seed)
    n = max(lengths)
    mask = torch.stack([torch.arange(n) < k if side == "right" else torch.arange(n) >= n - k for k in lengths])
    return torch.randint(3, 50, (len(lengths), n), generator=draw) * mask, mask


def positions(mask):
    return (mask.long().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def greedy(model, ids, mask, steps):
    """Tokens (b steps), their logits (b steps v) in the model's own dtype, and the cache, of greedy decoding with it."""
    mask, place, cache, tokens, logits = mask.clone(), positions(mask), None, [], []
    for _ in range(steps):
        out = model(ids, attention_mask=mask, position_ids=place, **{CACHE: cache}, use_cache=True)
        logits.append(out.logits[:, -1])
        tokens.append(logits[-1].argmax(-1))
        ids, place, cache = tokens[-1][:, None], place[:, -1:] + 1, out.past_key_values
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], dim=1)
    return torch.stack(tokens, 1), torch.stack(logits, 1), cache


# -- a cache of entries, one list a block and head ---------------------------------------------------------------------


@dataclass
class Entry:
    """A key and a value of one head, the place of the token, how many tokens it stands for, and the attention it got."""

    k: torch.Tensor
    v: torch.Tensor
    origin: int
    size: float = 1.0
    received: float = 0.0


@dataclass
class Seen:
    """What one block saw of a prompt: the residual before and behind its attention, queries (h n e), attention (h n n)."""

    entered: torch.Tensor
    attended: torch.Tensor
    queries: torch.Tensor
    attention: torch.Tensor


@torch.no_grad()
def prompt(base, ids):
    """Of one row without padding: what each block saw, its entries by head, and the logits of the last token."""
    n = len(ids)
    x, seen, held = embed(base, ids, torch.arange(n)), [], []
    for b in base.transformer.h:
        entered = x
        q, k, v = b.attn.c_attn(b.ln_1(x)).view(n, 3, b.attn.num_heads, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        attention = logits.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)
        attended = entered + b.attn.c_proj((attention @ v).transpose(0, 1).reshape(n, -1))
        x = attended + b.mlp(b.ln_2(attended))
        seen.append(Seen(entered, attended, q, attention))
        received = attention.sum(dim=1)
        held.append([[Entry(k[h, i], v[h, i], i, 1.0, float(received[h, i])) for i in range(n)] for h in range(len(q))])
    return seen, held, lm_head(base, x[-1])


@torch.no_grad()
def step(base, token, place, held):
    """Logits of one token that sees what each head holds; it joins what they hold."""
    x = embed(base, torch.tensor(token), torch.tensor(place))
    for b, heads in zip(base.transformer.h, held, strict=True):
        q, k, v = b.attn.c_attn(b.ln_1(x)).view(3, b.attn.num_heads, -1)
        out = []
        for h, entries in enumerate(heads):
            entries.append(Entry(k[h], v[h], place))
            logits = torch.stack([q[h] @ e.k / math.sqrt(len(q[h])) + math.log(e.size) for e in entries])
            weights = logits.softmax(-1)
            for e, weight in zip(entries, weights, strict=True):
                e.received += float(weight)
            out.append(sum(weight * e.v for e, weight in zip(entries, weights, strict=True)))
        x = x + b.attn.c_proj(torch.cat(out))
        x = x + b.mlp(b.ln_2(x))
    return lm_head(base, x)


def decode(base, ids, steps, compress):
    """Greedy tokens, their logits and what is held at the end; `compress(held, seen, tokens)` acts behind the prompt and each token."""
    seen, held, last = prompt(base, ids)
    compress(held, seen, len(ids))
    tokens, logits = [], []
    for i in range(steps):
        logits.append(last)
        tokens.append(int(last.argmax()))
        if i < steps - 1:
            last = step(base, tokens[-1], len(ids) + i, held)
            compress(held, None, len(ids) + i + 1)
    return tokens, torch.stack(logits), held


def places_held(cache, row, first):
    """Places, from the row's first real token on, that each block and head of a cache holds."""
    out = []
    for layer in cache.layers:
        heads = layer.heads
        origins = layer.origins if layer.origins.dim() == 3 else layer.origins[:, None].expand(-1, heads, -1)
        filled = torch.ones_like(origins, dtype=torch.bool) if layer.filled is None else layer.filled
        filled = filled if filled.dim() == 3 else filled[:, None].expand(-1, heads, -1)
        found = [(origins[row, h] - first)[filled[row, h]].tolist() for h in range(heads)]
        out.append([[place for place in places if place >= 0] for places in found])
    return out


def llama(layers=2, seed=0):
    """A tiny Llama whose weights are in float64; its norms and its tables of angles stay in single precision."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **special, num_key_value_heads=2)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def turned(x, place):
    """A Llama's key or query (e) turned to a place."""
    half = len(x) // 2
    angle = place * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


IMAGE, PATCHES = 49, 9


def llava(layers=6, seed=0):
    """A tiny LLaVA in float64; the text tower has layer norms and shared keys, and its arithmetic stays in float64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=12, patch_size=4)
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    text = Starcoder2Config(**sizes, **special, num_key_value_heads=2, num_hidden_layers=layers, vocab_size=50, residual_dropout=0.0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES)
    model = LlavaForConditionalGeneration(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts(images, text=(2, 5), seed=0, side="left"):
    """A padded batch with so many images in each row, between text in front and behind: inputs, and where each row's tokens are."""
    draw = torch.Generator().manual_seed(seed)
    words = lambda k: torch.randint(3, 48, (k,), generator=draw).tolist()
    rows = [words(text[0] + i) + [IMAGE] * PATCHES * k + words(text[1] + i) for i, k in enumerate(images)]
    n = max(map(len, rows))
    fill = lambda row, with_: [with_] * (n - len(row)) + row if side == "left" else row + [with_] * (n - len(row))
    ids = torch.tensor([fill(row, 0) for row in rows])
    mask = torch.tensor([fill([1] * len(row), 0) for row in rows])
    pixels = torch.randn(sum(images), 3, 12, 12, generator=draw, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def llava_rows(model, given):
    """Each row of `prompts` alone and without padding: what enters the text tower (n d), which of it is of an image, and where it stood."""
    text, taken = model.model.language_model, 0
    for ids, mask in zip(given["input_ids"], given["attention_mask"].bool(), strict=True):
        ids = ids[mask]
        count = int((ids == IMAGE).sum()) // PATCHES
        x, pixels = text.embed_tokens(ids), given["pixel_values"][taken : taken + count]
        taken += count
        if count:
            x[ids == IMAGE] = torch.cat(list(model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)).to(x)
        yield x, (ids == IMAGE).nonzero()[:, 0].tolist(), mask


def llava_block(text, block, x, places):
    """One block of its text tower on tokens (n d) that stand at `places`: their hidden states, and its attention (h n n)."""
    n, (cos, sin) = len(x), text.rotary_emb(x[None], torch.tensor(places)[None])
    normed = block.input_layernorm(x)
    turn = lambda v: v * cos + torch.cat([-v[..., v.shape[-1] // 2 :], v[..., : v.shape[-1] // 2]], -1) * sin
    parts = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    q, k, v = (project(normed).view(n, -1, 4).transpose(0, 1) for project in parts)
    q, k, v = turn(q), turn(k).repeat_interleave(len(q) // len(k), 0), v.repeat_interleave(len(q) // len(v), 0)
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
    attention = logits.softmax(-1)
    x = x + block.self_attn.o_proj((attention @ v).transpose(0, 1).reshape(n, -1))
    return x + block.mlp(block.post_attention_layernorm(x)), attention
