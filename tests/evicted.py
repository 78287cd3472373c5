"""What a cache compressor leaves of a tiny GPT-2's cache, beside a loop that says which places each head keeps."""

import torch
from by_hand import batch, decode, gpt2, greedy, places_held

from hf_tokens import get_token_model


def by_paper(base, ids, steps, keep):
    """Greedy tokens, their logits and what is held; `keep(layer, heads, attention, tokens)` gives for each head the places among its
    entries that stay, of a pass whose queries attended so, (h m n), with so many tokens by then."""

    def compress(held, seen, tokens):
        for layer, heads in enumerate(held):
            now = [torch.tensor([e.received - getattr(e, "before", 0.0) for e in head], dtype=torch.float64) for head in heads]
            looks = [now[h][None] for h in range(len(heads))] if seen is None else list(seen[layer].attention)
            for h, stay in enumerate(keep(layer, heads, looks, tokens)):
                heads[h] = [heads[h][place] for place in sorted(stay)]
                for e in heads[h]:
                    e.before = e.received

    return decode(base, ids, steps, compress)


def agree(config, lengths, keep, steps=6):
    """The model's tokens, logits and entries are those of the loop, for each row as for that row alone."""
    ids, mask = batch(lengths)
    got, logits, cache = greedy(get_token_model(gpt2(), config).eval(), ids, mask, steps)
    for row, n in enumerate(lengths):
        tokens, told, held = by_paper(gpt2(), ids[row, -n:], steps, keep)
        assert places_held(cache, row, ids.shape[1] - n) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


def allowed(seen, length, config):
    """Entries that may stay: the capacity, or a share of the tokens seen."""
    return min(length, config.capacity if config.budget is None else max(1, int(config.budget * seen + 1e-9)))
