"""TransPrune against its paper, sections 3.1 and 3.2 of arXiv:2507.20630v2, equations (1) to (6), as its code reads them."""

import math

import pytest
import torch
from by_hand import IMAGE, llava, prompts
from tolerances import close

from hf_tokens import ConfigError, TransPruneConfig, get_token_model, measure
from hf_tokens.testing import CACHE


def transition(inputs, outputs):
    """Equations (1) and (2) for one module: softmax over the tokens of 1 - cosine, times the ratio of the norms."""
    ratios, turns = [], []
    for before, after in zip(inputs, outputs, strict=True):
        size_in = math.sqrt(sum(float(v) ** 2 for v in before))
        size_out = math.sqrt(sum(float(v) ** 2 for v in after))
        dot = sum(float(a) * float(b) for a, b in zip(before, after, strict=True))
        ratios.append(size_out / size_in if size_in else 0.0)
        turns.append(1.0 - dot / (size_in * size_out) if size_in and size_out else 1.0)
    total = sum(math.exp(t) for t in turns)
    return [math.exp(t) / total * m for t, m in zip(turns, ratios, strict=True)]


def instruction_attention(queries, keys, places):
    """Equation (5): queries h l d at `places` among the keys g n d; each sees those up to itself; mean over l and h."""
    heads, groups, n = len(queries), len(keys), len(keys[0])
    received = [0.0] * n
    for h in range(heads):
        shared = keys[h * groups // heads]
        for query, place in zip(queries[h], places, strict=True):
            logits = [float(query @ key) / math.sqrt(len(query)) for key in shared[: place + 1]]
            top = max(logits)
            total = sum(math.exp(z - top) for z in logits)
            for j, logit in enumerate(logits):
                received[j] += math.exp(logit - top) / total
    asked = heads * len(queries[0])
    return [r / asked if asked else 0.0 for r in received]


def kept(whole, left, ratio):
    """How many of `left` image tokens a stage keeps where there were `whole`; it never takes the last one."""
    return min(left, max(1, math.floor(ratio * whole + 1e-9)))


def share(values):
    return [v / (sum(values) + 1e-8) for v in values]


def naive(image, tokens, attention, ffn, guide, accumulate, prune, keep, alpha):
    """Indices of the image tokens alive after every pruning layer, for one sample of so many tokens.

    image: indices of the image tokens; attention[l], ffn[l]: (inputs n d, outputs n d) of the layer's two modules over the whole
    sequence, residuals left out; guide[p]: (places of the instruction, queries h n d, keys g n d); layers are counted from 1.
    """
    alive, history, stages = list(range(tokens)), [0.0] * tokens, {}
    seen = lambda: [i for i in alive if i in image]
    for layer in sorted(set(accumulate) | set(prune)):
        if not seen():
            break
        if layer in accumulate:
            for inputs, outputs in (attention[layer], ffn[layer]):
                gains = transition([inputs[i] for i in alive], [outputs[i] for i in alive])
                for i, gain in zip(alive, gains, strict=True):
                    history[i] += gain  # equations (3) and (4)
        if layer in prune:
            told, queries, keys = guide[layer]
            places = [alive.index(i) for i in told]
            asking, given = ([[head[i] for i in some] for head in states] for states, some in ((queries, told), (keys, alive)))
            asked = instruction_attention(asking, given, places)
            turned, asked = share([history[i] for i in seen()]), share([asked[alive.index(i)] for i in seen()])
            score = {i: alpha * t + (1 - alpha) * a for i, t, a in zip(seen(), turned, asked, strict=True)}  # equation (6)
            count = kept(len(image), len(score), keep[list(prune).index(layer)])
            best = sorted(score, key=lambda i: (-score[i], i))[:count]
            alive = [i for i in alive if i not in image or i in best]
            stages[layer] = sorted(best)
    return stages


# tokens of the sequence, image span, instruction span, valid tokens (the rest is padding on the left), keep per stage, alpha
CASES = [
    pytest.param(16, range(3, 11), range(11, 16), 16, (0.875, 0.625, 0.125), 0.5, id="the release's scripts"),
    pytest.param(17, range(2, 13), range(13, 17), 17, (0.7, 0.5, 0.3), 0.5, id="odd sizes"),
    pytest.param(9, range(1, 8), range(8, 9), 9, (0.5, 0.5, 0.5), 1.0, id="transitions only"),
    pytest.param(9, range(1, 8), range(8, 9), 9, (0.5, 0.5, 0.5), 0.0, id="attention only"),
    pytest.param(6, range(1, 2), range(2, 6), 6, (0.5, 0.5, 0.5), 0.5, id="one image token"),
    pytest.param(5, range(0), range(0, 5), 5, (0.5, 0.5, 0.5), 0.5, id="no image token"),
    pytest.param(7, range(7), range(0), 7, (0.5, 0.5, 0.5), 0.5, id="nothing but image tokens"),
    pytest.param(8, range(1, 6), range(6, 8), 8, (1.0, 1.0, 1.0), 0.5, id="nothing to prune"),
    pytest.param(8, range(1, 6), range(6, 8), 8, (0.0, 0.0, 0.0), 0.5, id="all but one pruned"),
    pytest.param(8, range(7, 8), range(0), 1, (0.5, 0.5, 0.5), 0.5, id="all padded but one"),
]
ACCUMULATE, PRUNE = (7, 8, 9, 10, 11, 12), (7, 9, 12)


def sample(tokens, instruction, width=6, heads=4, groups=2, seed=0):
    """Random module inputs and outputs of one sample, with the queries and keys of the pruning layers."""
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    modules = [{layer: (randn(tokens, width), randn(tokens, width)) for layer in ACCUMULATE} for _ in range(2)]
    guide = {p: (list(instruction), randn(heads, tokens, width), randn(groups, tokens, width)) for p in PRUNE}
    return *modules, guide


@pytest.mark.parametrize(("tokens", "image", "instruction", "valid", "keep", "alpha"), CASES)
def test_naive_keeps_what_its_ratios_say(tokens, image, instruction, valid, keep, alpha):
    stages = naive(image, tokens, *sample(tokens, instruction), ACCUMULATE, PRUNE, keep, alpha)
    before = list(image)
    assert valid >= len(before)
    for layer, ratio in zip(PRUNE, keep, strict=True):
        after = stages.get(layer, [])
        assert set(after) <= set(before)
        assert after == sorted(after)
        assert len(after) == (kept(len(image), len(before), ratio) if before else 0)
        before = after


def test_naive_keeps_the_counts_of_the_scripts():
    left = [576]
    for share_left in TransPruneConfig().keep:
        left.append(kept(576, left[-1], share_left))
    assert left == [576, 504, 360, 72]


def test_naive_prefers_the_turned_and_the_grown():
    same = torch.eye(4, dtype=torch.float64)
    turned = same.roll(1, 0)
    mixed = torch.stack([same[0], turned[1], same[2], same[3]])
    gains = transition(same, mixed)
    assert gains.index(max(gains)) == 1
    grown = torch.stack([same[0], same[1], same[2] * 3, same[3]])
    assert transition(same, grown) == pytest.approx([0.25, 0.25, 0.75, 0.25])
    back = transition(same, torch.stack([-same[0], *mixed[1:]]))
    assert back[0] > back[1] > back[2]  # turned round is more than turned aside
    assert sum(transition(same, turned)) == pytest.approx(1.0)


def test_naive_attention_is_a_mean_of_distributions():
    told, queries, keys = sample(9, range(6, 9))[2][7]
    queries = queries[:, told]
    assert sum(instruction_attention(queries, keys, told)) == pytest.approx(1.0)
    assert instruction_attention(queries * 0, keys, [8, 8, 8]) == pytest.approx([1 / 9] * 9)
    assert instruction_attention(queries[:, :0], keys, []) == [0.0] * 9


def test_naive_carries_the_history_of_survivors_only():
    attention, ffn, guide = sample(10, range(8, 10))
    first = naive(range(1, 8), 10, attention, ffn, guide, ACCUMULATE, PRUNE, (0.5, 1.0, 1.0), 1.0)[7]
    gone = next(i for i in range(1, 8) if i not in first)
    for layer in ACCUMULATE[1:]:
        attention[layer][1][gone] *= 1000
    again = naive(range(1, 8), 10, attention, ffn, guide, ACCUMULATE, PRUNE, (0.5, 0.5, 0.5), 1.0)
    assert again[7] == first
    assert gone not in again[12]


# -- the method in a model -------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, ids, pixels, accumulate, prune, keep, alpha):
    """One row, pruned by the loop as it goes, with the model's own sublayers: logits, image tokens left by stage, all that are left."""
    text = model.model.language_model
    x = text.embed_tokens(ids)
    if len(pixels):
        features = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        x[ids == IMAGE] = torch.cat(list(features)).to(x)
    n = len(ids)
    image = (ids == IMAGE).nonzero()[:, 0].tolist()
    told = [i for i in range(n) if image and i > image[-1]]
    tables = text.rotary_emb(x[None], torch.arange(n)[None])
    alive, outputs, stages = list(range(n)), x.clone(), {}
    attention, ffn, guide = {}, {}, {}
    for layer, block in enumerate(text.layers, start=1):
        index = torch.tensor(alive)
        cos, sin = (table[:, index] for table in tables)
        normed = block.input_layernorm(outputs[index])
        causal = torch.ones(len(alive), len(alive)).tril().bool()[None, None]
        attended = block.self_attn(normed[None], position_embeddings=(cos, sin), attention_mask=causal)[0][0]
        between = outputs[index] + attended
        second = block.post_attention_layernorm(between)
        fed = block.mlp(second)
        outputs[index] = between + fed
        whole = lambda rows, index=index: torch.zeros(n, rows.shape[-1], dtype=rows.dtype).index_copy(0, index, rows)
        attention[layer], ffn[layer] = (whole(normed), whole(attended)), (whole(second), whole(fed))
        turn = lambda v, cos=cos[0], sin=sin[0]: v * cos + torch.cat([-v[..., v.shape[-1] // 2 :], v[..., : v.shape[-1] // 2]], -1) * sin
        queries, keys = (p(normed).view(len(alive), -1, 4).transpose(0, 1) for p in (block.self_attn.q_proj, block.self_attn.k_proj))
        queries, keys = (torch.stack([whole(head) for head in turn(v)]) for v in (queries, keys))
        guide[layer] = told, queries, keys
        if layer in prune:
            ready = [p for p in prune if p <= layer]
            upto = [a for a in accumulate if a <= layer]
            stages = naive(image, n, attention, ffn, guide, upto, ready, keep, alpha)
            alive = [i for i in alive if i not in image or i in stages[layer]]
    return model.lm_head(text.norm(outputs)), stages, alive


KNOBS = {"accumulate": (2, 3, 4, 5), "prune": (2, 3, 5), "keep": (0.7, 0.5, 0.4), "alpha": 0.5}
MODELS = [
    pytest.param((1,), KNOBS, "left", id="one row"),
    pytest.param((2, 1, 1), KNOBS, "left", id="rows keep different numbers"),
    pytest.param((1, 2), KNOBS, "right", id="padded on the right"),
    pytest.param((1, 0, 2), KNOBS, "left", id="a row without an image"),
    pytest.param((2, 1), {**KNOBS, "alpha": 1.0}, "left", id="transitions only"),
    pytest.param((2, 1), {**KNOBS, "alpha": 0.0}, "left", id="attention only"),
    pytest.param((1, 1), {**KNOBS, "keep": (0.0, 0.0, 0.0)}, "left", id="all but one pruned"),
    pytest.param((1, 1), {**KNOBS, "keep": (1.0, 1.0, 1.0)}, "left", id="nothing to prune"),
    pytest.param((1, 2), {**KNOBS, "accumulate": (1, 4), "prune": (3, 6), "keep": (0.5, 0.5)}, "left", id="a gap between the layers"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("images", "knobs", "side"), MODELS)
def test_model_is_the_loop(images, knobs, side, cached):
    model = get_token_model(llava(), TransPruneConfig(**knobs)).eval()
    base, given = model.get_base_model(), prompts(images, side=side)
    mask = given["attention_mask"].bool()
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(**given, position_ids=places, use_cache=cached)
    taken = 0
    for row, count in enumerate(images):
        pixels = given["pixel_values"][taken : taken + count]
        taken += count
        expected, stages, alive = by_hand(base, given["input_ids"][row][mask[row]], pixels, **knobs)
        torch.testing.assert_close(got.logits[row][mask[row]], expected, rtol=1e-9, atol=1e-9)
        if cached and max(knobs["prune"]) < 6:
            layer = got.past_key_values.layers[-1]
            first = int(mask[row].long().argmax())
            flags = mask[row][layer.origins[row]] if layer.filled is None else layer.filled[row] & mask[row][layer.origins[row]]
            assert (layer.origins[row][flags] - first).tolist() == alive


def test_tokens_and_memory_are_saved():
    given = prompts((1,), text=(2, 5))
    model = get_token_model(llava(), TransPruneConfig(accumulate=(2, 3), prune=(2, 4), keep=(0.5, 0.25))).eval()
    cost = measure(model, **given, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, **given, use_cache=True)
    assert whole.tokens - cost.tokens == 2 * 5 + 2 * 7
    assert cost.kv_bytes == whole.kv_bytes * (2 * 16 + 2 * 11 + 2 * 9) // (6 * 16)
    assert cost.flops < whole.flops


def test_generation_is_that_of_each_row_alone():
    model = get_token_model(llava(), TransPruneConfig(**KNOBS)).eval()
    given = prompts((2, 1, 1))
    for beams in (1, 3):
        more = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        together = model.generate(**given, **more)
        taken, n = 0, given["input_ids"].shape[1]
        for row, count in enumerate((2, 1, 1)):
            real = given["attention_mask"][row].bool()
            pixels = given["pixel_values"][taken : taken + count]
            taken += count
            alone = {"input_ids": given["input_ids"][row][real][None], "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long)}
            got = model.generate(**alone, pixel_values=pixels, **more)
            assert together[row, n:].tolist() == got[0, int(real.sum()) :].tolist()


def test_the_first_generated_token_is_that_of_the_prompt():
    model = get_token_model(llava(), TransPruneConfig(**KNOBS)).eval()
    given = prompts((1, 1))
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    first = model(**given, position_ids=places).logits[:, -1].argmax(-1)
    assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False)[:, given["input_ids"].shape[1]], first)


def test_later_turns_need_no_image():
    model = get_token_model(llava(), TransPruneConfig(**KNOBS)).eval()
    words = torch.tensor([[5, 6, 7]])
    given = prompts((1,))
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        for ids in (words[:, :1], words):
            model(input_ids=ids, **{CACHE: cache})
    assert cache.get_seq_length() == given["input_ids"].shape[1] + 4


def test_the_papers_layers_are_scaled_to_the_depth():
    config = TransPruneConfig()
    assert config.accumulates(32) == {7, 8, 9, 10, 11, 12}
    assert config.keeps(32) == {7: 0.875, 9: 0.625, 12: 0.125}
    assert config.keeps(4) == {1: 0.625, 2: 0.125}
    assert TransPruneConfig(rule="abstract", keep=(0.5, 0.5, 0.5)).keeps(4) == {1: 0.25, 2: 0.5}
    with pytest.raises(ConfigError, match="one for each of 3"):
        TransPruneConfig(keep=(0.5, 0.5))
    with pytest.raises(ConfigError, match=r"\[1, 6\]"):
        get_token_model(llava(), TransPruneConfig(prune=(7,), keep=(0.5,)))


def test_zero_strength_is_the_base():
    base, given = llava(), prompts((1, 2))
    with torch.no_grad():
        expected = base(**given).logits
        close(get_token_model(base, TransPruneConfig(**KNOBS).at_zero())(**given).logits, expected)
