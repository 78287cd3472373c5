"""PrefixKV against its paper: section 3 of arXiv:2412.03409 (importance, priority sequence, global prefix configuration)."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, greedy, lm_head, positions
from transformers import DynamicCache

from hf_tokens import ConfigError, DeepPromptConfig, FTPConfig, PrefixKVConfig, UnsupportedError, calibrate, get_token_model, load, measure
from hf_tokens.testing import CACHE, zoo


def importance(attention, mask):
    """Attention that every key receives, summed over the queries and averaged over the heads, as shares of the layer: h n n -> n."""
    heads, n = len(attention), len(mask)
    raw = [0.0] * n
    for head in range(heads):
        for query in range(n):
            for key in range(n):
                if mask[query] and mask[key]:
                    raw[key] += float(attention[head][query][key]) / heads
    total = sum(raw)
    return [r / total for r in raw]


def priority(shares, mask):
    """The real keys from the most to the least important; of two equal ones the earlier leads."""
    return sorted((i for i in range(len(shares)) if mask[i]), key=lambda i: (-shares[i], i))


def prefix(shares, order, p):
    """The smallest prefix of the priority sequence that holds at least the share p of the layer."""
    if p >= 1:
        return len(order)
    held = 0.0
    for size, key in enumerate(order, start=1):
        held += shares[key]
        if held >= p - 1e-12:
            return size
    return len(order)


def sizes(layers, mask, ratio, protected=5):
    """Cache size of every layer: the largest p, the same in all layers, whose prefixes, with the protected entries beside each, fit the
    budget ratio * layers * keys.

    Every p at which a size can change is tried; the paper's binary search ends at the same place.
    """
    orders = [priority(shares, mask) for shares in layers]
    keys = sum(mask)
    least = min(keys, 1 + protected)
    budget = max(least * len(layers), math.floor(ratio * len(layers) * keys + 1e-9))
    best = [least] * len(layers)
    thresholds = {1.0}
    for shares, order in zip(layers, orders, strict=True):
        held = 0.0
        for key in order:
            held += shares[key]
            thresholds.add(min(held, 1.0))
    for p in sorted(thresholds):
        found = [min(keys, prefix(shares, order, p) + protected) for shares, order in zip(layers, orders, strict=True)]
        if sum(found) <= budget:
            best = found
    return best


def configuration(samples, ratio, protected=5):
    """The offline estimate: retention ratio of every layer, averaged over samples of (layers, mask)."""
    per_sample = [[size / sum(mask) for size in sizes(layers, mask, ratio, protected)] for layers, mask in samples]
    return [sum(column) / len(column) for column in zip(*per_sample, strict=True)]


def held_back(seen, ratio, protected=5):
    """Entries that a layer may hold once it has seen so many tokens; never none, and all that are protected."""
    return min(seen, max(1, protected, math.floor(ratio * seen + 1e-9)))


def naive(layers, mask, ratios, steps=0, distance=25, start=4, newest=1, anchor="prompt"):
    """Positions held by every layer of one sample after prefill and `steps` decoded tokens, in their order in the sequence.

    layers: shares of importance, one list a layer; ratios: the configuration. The first `start` and the `newest` entries of the prompt
    stay. While decoding, an entry goes whenever the layer outgrows its ratio: the one at a place of the cache that is fixed behind the
    prompt, `distance` in front of its end (the middle where there is no such place), or at that distance from the newest one.
    """
    held = []
    for shares, ratio in zip(layers, ratios, strict=True):
        seen, order = sum(mask), priority(shares, mask)
        real = sorted(order)
        spared = [i for place, i in enumerate(real) if place < start or place >= len(real) - newest]
        cache = sorted([*spared, *(i for i in order if i not in spared)][: held_back(seen, ratio, start + newest)])
        place = len(cache) - distance if len(cache) > distance else len(cache) // 2
        for step in range(steps):
            cache.append(len(mask) + step)
            seen += 1
            while len(cache) > held_back(seen, ratio, start + newest):
                del cache[place if anchor == "prompt" else max(0, len(cache) - 1 - distance)]
        held.append(cache)
    return held


# layers, heads, keys, padding on the left, ratio of the budget, decoded tokens, distance
CASES = [
    pytest.param(3, 2, 12, 0, 0.5, 0, 25, id="the paper's half"),
    pytest.param(4, 3, 17, 0, 0.2, 9, 4, id="odd sizes"),
    pytest.param(2, 1, 1, 0, 0.5, 3, 1, id="one key"),
    pytest.param(3, 2, 9, 0, 1.0, 5, 2, id="nothing to evict"),
    pytest.param(3, 2, 9, 0, 0.01, 5, 2, id="one key a layer"),
    pytest.param(3, 2, 9, 8, 0.5, 4, 1, id="all padded but one"),
    pytest.param(3, 2, 11, 4, 0.4, 6, 3, id="padded"),
    pytest.param(1, 1, 7, 0, 0.5, 0, 25, id="one layer"),
]


def sample(layers, heads, keys, padding, seed=0, sharpness=3.0):
    """Causal attention of one left-padded sample, sharper from layer to layer: importance of every layer, and the mask."""
    draw = torch.Generator().manual_seed(seed)
    mask = [i >= padding for i in range(keys)]
    shares = []
    for layer in range(layers):
        logits = torch.randn(heads, keys, keys, generator=draw, dtype=torch.float64) * sharpness * layer
        seen = torch.ones(keys, keys).tril().bool() & torch.tensor(mask)
        attention = logits.masked_fill(~seen, -1e30).softmax(-1)
        shares.append(importance(attention, mask))
    return shares, mask


@pytest.mark.parametrize(("layers", "heads", "keys", "padding", "ratio", "steps", "distance"), CASES)
def test_naive_keeps_to_the_budget(layers, heads, keys, padding, ratio, steps, distance):
    shares, mask = sample(layers, heads, keys, padding)
    found, real = sizes(shares, mask, ratio), keys - padding
    least = min(real, 6)
    assert all(least <= size <= real for size in found)
    assert sum(found) <= max(layers * least, math.floor(ratio * layers * real + 1e-9))
    ratios = configuration([(shares, mask)], ratio)
    held = naive(shares, mask, ratios, steps, distance)
    for shares_of, cache, size, share in zip(shares, naive(shares, mask, ratios), found, ratios, strict=True):
        spared = {*range(padding, min(keys, padding + 4)), keys - 1}
        assert len(cache) == size and spared <= {*cache}
        assert all(mask[i] for i in cache)
        assert not any(shares_of[i] < shares_of[j] for i in {*cache} - spared for j in range(keys) if mask[j] and j not in cache)
        assert share == pytest.approx(size / real)
    for cache, share in zip(held, ratios, strict=True):
        assert cache == sorted(set(cache))
        assert len(cache) == held_back(real + steps, share)
        assert not steps or cache[-1] == keys + steps - 1


def test_naive_gives_the_even_layer_more_than_the_peaked_one():
    even, peaked = [0.1] * 10, [0.91] + [0.01] * 9
    assert sizes([even, peaked], [True] * 10, 0.5, 0) == [9, 1]


def test_naive_holds_the_same_share_in_every_layer():
    shares, mask = sample(5, 2, 24, 0)
    found = sizes(shares, mask, 0.4, 0)
    held = [sum(sorted(layer, reverse=True)[:size]) for layer, size in zip(shares, found, strict=True)]
    short = [sum(sorted(layer, reverse=True)[: size - 1]) for layer, size in zip(shares, found, strict=True)]
    assert max(short) < min(held) + 1e-12


def test_naive_finds_what_a_binary_search_finds():
    shares, mask = sample(4, 2, 19, 3)
    orders = [priority(layer, mask) for layer in shares]
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        over = sum(prefix(*pair, p) for pair in zip(shares, orders, strict=True)) > math.floor(0.3 * 4 * 16 + 1e-9)
        low, high = (low, p) if over else (p, high)
    assert [prefix(*pair, low) for pair in zip(shares, orders, strict=True)] == sizes(shares, mask, 0.3, 0)


def test_naive_full_budget_is_the_full_cache():
    shares, mask = sample(3, 2, 8, 2)
    assert naive(shares, mask, configuration([(shares, mask)], 1.0), steps=3) == [list(range(2, 11))] * 3


def test_naive_averages_configurations():
    samples = [sample(3, 2, 16, 0, seed) for seed in range(4)]
    ratios = configuration(samples, 0.5, 0)
    assert 0.5 - 3 / 48 <= sum(ratios) / 3 <= 0.5


def test_naive_drops_at_the_distance():
    unprotected = {"start": 0, "newest": 0}
    assert naive([[0.25] * 4], [True] * 4, [0.5], steps=4, distance=1, anchor="newest", **unprotected) == [[0, 4, 6, 7]]
    assert naive([[0.25] * 4], [True] * 4, [0.5], steps=4, distance=1, **unprotected) == [[0, 5, 6, 7]]


def test_naive_keeps_the_first_and_the_newest():
    shares = [0.01, 0.01, 0.3, 0.3, 0.2, 0.1, 0.08]
    assert naive([shares], [True] * 7, [0.5], start=1, newest=1) == [[0, 2, 6]]
    assert naive([shares], [True] * 7, [0.1]) == [[0, 1, 2, 3, 6]]


# -- the method in a model -------------------------------------------------------------------------------------------


@torch.no_grad()
def prompt_by_hand(base, ids):
    """Of one row without padding: importance of every layer, inputs of every block, hidden states behind the last."""
    x, shares, inputs = embed(base, ids, torch.arange(len(ids))), [], []
    for block in blocks(base):
        inputs.append(x)
        x, attention = block(x)
        shares.append(importance(attention, [True] * len(ids)))
    return shares, inputs, x


@torch.no_grad()
def decode_by_hand(base, ids, ratios, steps, **knobs):
    """Greedy tokens and logits of one row that attends, in each block, to what the loop holds, and what it holds at the end."""
    shares, inputs, states = prompt_by_hand(base, ids)
    out, logits = [], []
    for step in range(steps):
        logits.append(lm_head(base, states[-1]))
        out.append(int(logits[-1].argmax()))
        if step == steps - 1:
            break
        x = embed(base, torch.tensor(out[-1]), torch.tensor(len(ids) + step))
        held = naive(shares, [True] * len(ids), ratios, step, **knobs)
        for layer, block in enumerate(blocks(base)):
            inputs[layer] = torch.cat([inputs[layer], x[None]])
            x = block(torch.cat([inputs[layer][held[layer]], x[None]]))[0][-1]
        states = x[None]
    return out, torch.stack(logits), naive(shares, [True] * len(ids), ratios, steps - 1, **knobs)


def held_in(cache, row, first):
    """Places, counted from the row's first real token, of what each layer of a cache holds."""
    flags = [torch.ones_like(la.origins[row], dtype=torch.bool) if la.filled is None else la.filled[row] for la in cache.layers]
    places = [(layer.origins[row] - first)[flag] for layer, flag in zip(cache.layers, flags, strict=True)]
    return [[p for p in place.tolist() if p >= 0] for place in places]


RATIOS = (0.31, 0.55, 1.0, 0.08)
FIRST_VERSION = {"start_size": 0, "protect_size": 0, "anchor": "newest"}
MODELS = [
    pytest.param((12,), {"budget": 0.5}, id="the paper's half"),
    pytest.param((17, 9, 4), {"ratios": RATIOS, "distance": 4}, id="odd sizes, padded"),
    pytest.param((11, 6, 1), {"budget": 0.4, "online": True, "distance": 3}, id="rows keep different numbers"),
    pytest.param((1,), {"budget": 0.5, "distance": 1}, id="one key"),
    pytest.param((9, 5), {"budget": 1.0}, id="nothing to evict"),
    pytest.param((9, 5), {"budget": 0.01, "distance": 2}, id="one key a layer"),
    pytest.param((9, 5), {"budget": 0.01, "online": True, "distance": 2}, id="one key a layer, online"),
    pytest.param((17, 9, 4), {"budget": 0.4, "start_size": 1, "distance": 3}, id="the scripts' single first entry"),
    pytest.param((17, 9, 4), {"budget": 0.4, "start_size": 2, "protect_size": 3, "distance": 9, "online": True}, id="three newest"),
    pytest.param((17, 9, 4), {"ratios": RATIOS, "distance": 4} | FIRST_VERSION, id="version 1"),
    pytest.param((11, 6, 1), {"budget": 0.4, "online": True, "distance": 3} | FIRST_VERSION, id="version 1, online"),
    pytest.param((9, 5), {"budget": 0.01, "distance": 2} | FIRST_VERSION, id="version 1, one key a layer"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    base = gpt2()
    for layer, block in enumerate(base.transformer.h):
        torch.nn.init.normal_(block.attn.c_attn.weight, std=0.3 * (layer + 1))
    model = get_token_model(base, PrefixKVConfig(**knobs)).eval()
    ids, mask = batch(lengths)
    steps, names = 9, {"distance": "distance", "start_size": "start", "protect_size": "newest", "anchor": "anchor"}
    ruled = {names[knob]: value for knob, value in knobs.items() if knob in names}
    got, logits, cache = greedy(model, ids, mask, steps)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)[:, ids.shape[1] :], got)
    for row, length in enumerate(lengths):
        real, first = ids[row, -length:], ids.shape[1] - length
        shares, _, _ = prompt_by_hand(base, real)
        ratios = knobs.get("ratios", (knobs.get("budget"),) * 4)
        protected = knobs.get("start_size", 4) + knobs.get("protect_size", 1)
        if knobs.get("online"):
            ratios = [size / length for size in sizes(shares, [True] * length, knobs["budget"], protected)]
        tokens, told, held = decode_by_hand(base, real, ratios, steps, **ruled)
        assert held_in(cache, row, first) == held
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


def test_calibration_finds_the_configuration_of_the_loop(tmp_path):
    base = gpt2()
    model = get_token_model(base, PrefixKVConfig(budget=0.4))
    batches, samples = [], []
    for seed, lengths in enumerate([(13, 8), (9, 9)]):
        ids, mask = batch(lengths, seed=seed)
        batches.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)})
        samples += [(prompt_by_hand(base, ids[row, -n:])[0], [True] * n) for row, n in enumerate(lengths)]
    found = calibrate(model, batches)["default.0"]["ratios"]
    assert found == pytest.approx(configuration(samples, 0.4), abs=1e-12)
    model.save_pretrained(tmp_path)
    ids, mask = batch((14,))
    again = load(tmp_path, gpt2())
    assert again.peft_config["default"].methods[0]["ratios"] == pytest.approx(found)
    cache = again(ids, use_cache=True).past_key_values
    assert [layer.length for layer in cache.layers] == [held_back(14, ratio) for ratio in found]


def test_calibration_leaves_modes_and_other_adapters_as_they_were():
    base = gpt2().eval()
    model = get_token_model(base, PrefixKVConfig(budget=0.4))
    get_token_model(model, PrefixKVConfig(budget=0.6), adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    modes = [module.training for module in model.modules()]
    assert model.training and not base.training
    assert list(calibrate(model, [{"input_ids": batch((9,))[0]}], "other")) == ["other.0"]
    assert model.peft_config["default"].methods == [PrefixKVConfig(budget=0.4).to_dict()]
    assert [module.training for module in model.modules()] == modes


def test_padding_on_the_right_takes_no_entry():
    model = get_token_model(gpt2(), PrefixKVConfig(budget=0.5)).eval()
    ids, mask = batch((11, 4), "right")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    alone = model(ids[1:, :4], use_cache=True).past_key_values
    assert held_in(cache, 1, 0) == held_in(alone, 0, 0)


def test_memory_is_freed():
    model = get_token_model(gpt2(), PrefixKVConfig(ratios=(0.25, 0.5, 0.75, 1.0))).eval()
    ids, _ = batch((32,))
    cost = measure(model, input_ids=ids, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, input_ids=ids, use_cache=True)
    assert cost.kv_bytes == whole.kv_bytes * 40 // 64


def test_each_row_keeps_its_own_share_when_rows_change_places():
    model = get_token_model(gpt2(), PrefixKVConfig(budget=0.4, online=True, distance=2)).eval()
    ids, mask = batch((11, 6))
    held = []
    for order in ([0, 1], [1, 0]):
        order = torch.tensor(order)
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).past_key_values
            cache.reorder_cache(order)
            seen = mask[order]
            for token in range(3, 10):
                seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.bool)], dim=1)
                places = positions(seen)[:, -1:]
                model(torch.full((2, 1), token), attention_mask=seen, position_ids=places, **{CACHE: cache})
        held.append([held_in(cache, row, 0) for row in order.tolist()])
    assert held[0] == held[1]


@pytest.mark.parametrize("answer", [0, 1])
def test_a_prompt_in_chunks_is_refused_and_a_second_turn_is_not(answer):
    model = get_token_model(gpt2(), PrefixKVConfig(budget=0.5)).eval()
    ids, _ = batch((13,))
    with pytest.raises(UnsupportedError, match="one pass"):
        model.generate(ids, max_new_tokens=1, prefill_chunk_size=6)
    cache = DynamicCache()
    with torch.no_grad():
        for part in (ids[:, :6], ids[:, 6 : 6 + answer], ids[:, 6 + answer :]):
            if part.numel():
                model(part, **{CACHE: cache})
    assert cache.get_seq_length() == 13
    assert [layer.length for layer in cache.layers] == [6] * 4


def test_zero_strength_is_the_base():
    model = get_token_model(gpt2(), PrefixKVConfig(budget=0.3, ratios=RATIOS, online=True).at_zero()).eval()
    ids, mask = batch((9, 4))
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given), gpt2().generate(**given))


@torch.no_grad()
@pytest.mark.parametrize("online", [False, True])
def test_a_full_budget_evicts_nothing_where_tokens_are_inserted(online):
    specimen = zoo.build("llama")
    stack = [DeepPromptConfig(tokens=3), PrefixKVConfig(budget=1.0, online=online)]
    cache = get_token_model(specimen.model, stack)(**specimen.inputs, use_cache=True).past_key_values
    assert [layer.length for layer in cache.layers] == [16 + 3] * 4


def test_ratios_must_fit_the_blocks():
    with pytest.raises(ConfigError, match="one value for each of 2 blocks"):
        get_token_model(gpt2(), PrefixKVConfig(ratios=RATIOS, layers=(0, -1)))


@pytest.mark.parametrize("online", [False, True])
def test_on_top_of_a_router_a_padded_row_is_the_row_alone(online):
    router = FTPConfig(sparsities=(0.2, 0.8, 0.5, 0.3), strict=True)
    model = get_token_model(gpt2(), [router, PrefixKVConfig(budget=0.4, online=online, distance=2)]).eval()
    ids, mask = batch((12, 7))
    got, logits, _ = greedy(model, ids, mask, 6)
    for row, n in enumerate((12, 7)):
        alone, told, _ = greedy(model, ids[row : row + 1, -n:], mask[row : row + 1, -n:], 6)
        assert torch.equal(got[row], alone[0])
        torch.testing.assert_close(logits[row], told[0], rtol=1e-9, atol=1e-9)


def test_a_sliding_window_is_scored_as_far_as_it_reaches():
    specimen = zoo.build("mistral")
    model = get_token_model(specimen.model, PrefixKVConfig(budget=0.05, online=True)).eval()
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = model(ids, use_cache=True).past_key_values
    assert all(1 <= layer.length < 60 for layer in cache.layers)
    assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (2, 64)


@pytest.mark.parametrize(("family", "words"), [("falcon", "attention interface"), ("bloom", "attention backends")])
def test_models_without_scores_are_refused(family, words):
    specimen = zoo.build(family)
    with pytest.raises(UnsupportedError, match=words):
        get_token_model(specimen.model, PrefixKVConfig(budget=0.5))(**specimen.inputs, use_cache=True)
