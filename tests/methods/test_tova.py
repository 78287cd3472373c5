"""TOVA against its paper: section 3.3 of arXiv:2401.06104 (what the last query attends to least goes, in all heads alike)."""

import pytest
import torch
from by_hand import batch, gpt2, places_held, positions, prompt
from evicted import agree, allowed

from hf_tokens import SnapKVConfig, TOVAConfig, get_token_model, measure
from hf_tokens.testing import zoo


def naive(last, keep, newest):
    """Places that a block keeps, given what the last query of each head attends to, (h n)."""
    n = len(last[0])
    scores = [sum(float(head[j]) for head in last) / len(last) for j in range(n)]
    if newest:
        scores[-1] = 2.0
    return sorted(sorted(range(n), key=lambda j: -scores[j])[:keep])


def keep(c):
    def kept(layer, heads, looks, tokens):
        n = len(heads[0])
        return [naive([look[-1] for look in looks], allowed(tokens, n, c), c.keep_newest)] * len(heads)

    return kept


MODELS = [
    pytest.param((17,), {"capacity": 6}, id="a prompt that falls at once"),
    pytest.param((15, 9, 4), {"capacity": 8}, id="padded, above and below the capacity"),
    pytest.param((11, 6, 1), {"capacity": 1}, id="one entry, padded to one token"),
    pytest.param((13, 7), {"budget": 0.4, "keep_newest": True}, id="a share, the newest kept"),
    pytest.param((9, 5), {"budget": 1.0}, id="everything"),
    pytest.param((10, 3), {"capacity": 1, "keep_newest": True}, id="the newest alone"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = TOVAConfig(**knobs)
    agree(c, lengths, keep(c), steps=8)


def test_all_heads_of_a_block_keep_the_same():
    model = get_token_model(zoo.build("llama").model, TOVAConfig(capacity=5)).eval()
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    cache = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True).past_key_values
    assert all(layer.origins.shape == (2, 5) and layer.filled is None for layer in cache.layers)


def test_beside_other_entries_in_each_head_a_token_goes_by_the_heads_that_hold_it():
    ids, mask = batch((16, 11))
    first = SnapKVConfig(capacity=8, window=3, kernel=1)
    model = get_token_model(gpt2(), [first, TOVAConfig(capacity=5)]).eval()
    cost = measure(model, input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
    assert cost.kv_bytes == 2 * 2 * 12 * 5 * 4 * 8  # 2 rows of 12 heads of width 4, in float64
    cache = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).past_key_values
    snap = get_token_model(gpt2(), first).eval()(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).past_key_values
    for row, n in enumerate((16, 11)):
        seen, pads = prompt(gpt2(), ids[row, -n:])[0], 16 - n
        for s, before, after in zip(seen, places_held(snap, row, pads), places_held(cache, row, pads), strict=True):
            got = lambda j, s=s, before=before: [float(s.attention[h, -1, j]) for h, head in enumerate(before) if j in head]
            mean = {j: sum(got(j)) / len(got(j)) for head in before for j in head}
            assert after == [sorted(sorted(head, key=lambda j, mean=mean: -mean[j])[:5]) for head in before]
