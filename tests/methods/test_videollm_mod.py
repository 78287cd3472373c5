"""VideoLLM-MoD against its paper: section 3.2 of arXiv:2408.16730 (LayerExpert: the top share of each frame's tokens runs a block)."""

import math

import pytest
import torch
from by_hand import IMAGE, PATCHES, llava, prompts

from hf_tokens import UnsupportedError, VideoLLMMoD, VideoLLMMoDConfig, get_token_model, measure
from hf_tokens.engine.context import ForwardContext
from hf_tokens.testing import CACHE


def spans(visual, frame_tokens=None):
    """The frames: lists of indices of vision tokens that stand side by side, cut into pieces of `frame_tokens` if that is given."""
    runs = []
    for i, flag in enumerate(visual):
        if flag and i and visual[i - 1]:
            runs[-1].append(i)
        elif flag:
            runs.append([i])
    if frame_tokens is None:
        return runs
    return [run[k : k + frame_tokens] for run in runs for k in range(0, len(run), frame_tokens)]


def chosen(mu, visual, keep, frame_tokens=None):
    """Vision tokens that run: of each frame the ceil(keep n) of the highest mu, of equal ones the earlier."""
    runs = set()
    for frame in spans(visual, frame_tokens):
        order = sorted(frame, key=lambda i: (-mu[i], i))
        runs |= set(order[: math.ceil(keep * len(frame) - 1e-9)])
    return runs


def naive(x, visual, layers, keep, frame_tokens=None):
    """One sample through all layers, x (n d): layers[l] = (block, scorer or None); block(hidden m d, positions) gives its update (m d).

    Returns the last hidden states and, for each layer, which tokens ran it.
    """
    hidden, routes = x.clone(), []
    for block, scorer in layers:
        mu, running = [1.0] * len(x), set(range(len(x)))
        if scorer is not None:
            weight, bias = scorer
            mu = [sum(float(w) * float(v) for w, v in zip(weight, row, strict=True)) + bias for row in hidden]
            running = {i for i in range(len(x)) if not visual[i]} | chosen(mu, visual, keep, frame_tokens)
        index = sorted(running)
        update = block(hidden[index], index)
        after = hidden.clone()
        for slot, i in enumerate(index):
            after[i] = hidden[i] + (mu[i] if visual[i] else 1.0) * update[slot]
        hidden = after
        routes.append(index)
    return hidden, routes


def mixer(width=6, seed=0):
    """A causal block without weights to speak of: its update mixes what stands in front."""
    w = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3

    def block(hidden, positions):
        assert positions == sorted(positions)
        return torch.stack([hidden[: i + 1].mean(0) @ w for i in range(len(hidden))])

    return block


# which tokens are visual, share, tokens of a frame
CASES = [
    pytest.param("ttvvvvvttt", 0.2, None, id="one frame"),
    pytest.param("tvvvvvvvtvvvtt", 0.4, None, id="two frames, odd sizes"),
    pytest.param("tvvvvvvvvvt", 0.5, 3, id="frames side by side"),
    pytest.param("vvvvvvv", 0.5, 4, id="vision only, a frame cut short"),
    pytest.param("tttt", 0.2, None, id="no vision token"),
    pytest.param("v", 0.2, None, id="one token"),
    pytest.param("tvvvt", 1.0, None, id="nothing to skip"),
    pytest.param("tvvvt", 0.0, None, id="every vision token skips"),
]


@pytest.mark.parametrize(("kinds", "keep", "frame_tokens"), CASES)
def test_naive_runs_what_its_share_says(kinds, keep, frame_tokens):
    visual = [kind == "v" for kind in kinds]
    x = torch.randn(len(kinds), 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scorer = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1.0
    out, routes = naive(x, visual, [(mixer(), None), (mixer(seed=1), scorer)], keep, frame_tokens)
    assert routes[0] == list(range(len(kinds)))
    sizes = [len(frame) for frame in spans(visual, frame_tokens)]
    assert len(routes[1]) == kinds.count("t") + sum(math.ceil(keep * n - 1e-9) for n in sizes)
    skipped = [i for i in range(len(kinds)) if i not in routes[1]]
    before, _ = naive(x, visual, [(mixer(), None)], keep)
    assert torch.equal(out[skipped], before[skipped])


def test_naive_skipped_tokens_lend_no_key():
    visual = [False, True, True, True, False]
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = mixer(), (torch.tensor([1.0, 0, 0, 0, 0, 0]), 1.0)
    _, (ran,) = naive(x, visual, [layer], 0.3)
    moved = x.clone()
    moved[[i for i in range(5) if i not in ran], 1:] += 5
    first, second = (naive(v, visual, [layer], 0.3)[0] for v in (x, moved))
    assert torch.equal(first[ran], second[ran])


# -- the method in a model -------------------------------------------------------------------------------------------


def routed(seed=0, **knobs):
    """A LLaVA with scorers far enough from their start that tokens differ."""
    model = get_token_model(llava(), VideoLLMMoDConfig(**knobs)).eval()
    draw = torch.Generator().manual_seed(seed + 1)
    for method in (m for m in model.modules() if isinstance(m, VideoLLMMoD)):
        with torch.no_grad():
            method.weight.copy_(torch.randn(method.weight.shape, generator=draw, dtype=torch.float64) * 0.3)
    return model


def scorers(model):
    """Each layer's weight and bias, None where there is none."""
    found = {m.dims.layer: (m.weight[0].detach(), float(m.bias)) for m in model.modules() if isinstance(m, VideoLLMMoD)}
    return [None if model.peft_config["default"].stack()[0].keep == 1 else found.get(i) for i in range(6)]


@torch.no_grad()
def by_hand(model, ids, pixels, keep, frame_tokens=None):
    """One row through the loop, with the model's own blocks: logits and the tokens that ran each block."""
    base = model.get_base_model()
    text = base.model.language_model
    x = text.embed_tokens(ids)
    if len(pixels):
        features = base.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        x[ids == IMAGE] = torch.cat(list(features)).to(x)
    tables = text.rotary_emb(x[None], torch.arange(len(ids))[None])

    def update(block):
        def call(hidden, index):
            turns = tuple(table[:, torch.tensor(index)] for table in tables)
            causal = torch.ones(len(index), len(index)).tril().bool()[None, None]
            normed = block.input_layernorm(hidden)
            between = hidden + block.self_attn(normed[None], position_embeddings=turns, attention_mask=causal)[0][0]
            return between + block.mlp(block.post_attention_layernorm(between)) - hidden

        return call

    layers = [(update(block), scorer) for block, scorer in zip(text.layers, scorers(model), strict=True)]
    hidden, routes = naive(x, (ids == IMAGE).tolist(), layers, keep, frame_tokens)
    return base.lm_head(text.norm(hidden)), routes


MODELS = [
    pytest.param((1,), {"keep": 0.2}, "left", id="one row"),
    pytest.param((2, 1, 1), {"keep": 0.4}, "left", id="rows with different counts"),
    pytest.param((1, 2), {"keep": 0.4, "insert": "all"}, "right", id="padded on the right, every block"),
    pytest.param((1, 0, 2), {"keep": 0.2}, "left", id="a row without an image"),
    pytest.param((2, 1), {"keep": 0.4, "frame_tokens": PATCHES}, "left", id="images side by side are frames"),
    pytest.param((1, 1), {"keep": 0.0}, "left", id="every vision token skips"),
    pytest.param((1, 1), {"keep": 1.0}, "left", id="nothing to skip"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("images", "knobs", "side"), MODELS)
def test_model_is_the_loop(images, knobs, side, cached):
    model, given = routed(**knobs), prompts(images, side=side)
    mask = given["attention_mask"].bool()
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(**given, position_ids=places, use_cache=cached)
    taken = 0
    for row, count in enumerate(images):
        pixels = given["pixel_values"][taken : taken + count]
        taken += count
        expected, routes = by_hand(model, given["input_ids"][row][mask[row]], pixels, knobs["keep"], knobs.get("frame_tokens"))
        torch.testing.assert_close(got.logits[row][mask[row]], expected, rtol=1e-9, atol=1e-9)
        for layer, ran in enumerate(routes if cached else ()):
            held = got.past_key_values.layers[layer]
            real = mask[row][held.origins[row]]
            flags = real if held.filled is None else held.filled[row] & real
            assert (held.origins[row][flags] - int(mask[row].long().argmax())).tolist() == ran


def test_skipped_tokens_are_not_computed_and_leave_no_entry():
    model, given = routed(keep=0.2), prompts((1,), text=(2, 5))
    cost = measure(model, **given, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, **given, use_cache=True)
    assert whole.tokens - cost.tokens == 3 * (PATCHES - 2)
    assert cost.kv_bytes == whole.kv_bytes * (3 * 16 + 3 * 9) // (6 * 16)
    assert cost.flops < whole.flops


def test_generation_is_that_of_each_row_alone():
    model, images = routed(keep=0.4), (2, 1, 0)
    given = prompts(images)
    n = given["input_ids"].shape[1]
    for beams in (1, 3):
        more = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        together, taken = model.generate(**given, **more), 0
        for row, count in enumerate(images[:2]):
            real = given["attention_mask"][row].bool()
            pixels = given["pixel_values"][taken : taken + count]
            taken += count
            alone = {"input_ids": given["input_ids"][row][real][None], "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long)}
            got = model.generate(**alone, pixel_values=pixels, **more)
            assert together[row, n:].tolist() == got[0, int(real.sum()) :].tolist()


def test_cached_generation_is_uncached():
    model, given = routed(keep=0.4), prompts((1, 1))
    told = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given, **told), model.generate(**given, **told, use_cache=False))


def test_frames_that_stream_in_are_the_whole_prompt():
    model, given = routed(keep=0.4), prompts((1,), text=(3, 4))
    ids, pixels = given["input_ids"], given["pixel_values"]
    both = torch.cat([ids, ids], dim=1)
    with torch.no_grad():
        whole = model(input_ids=both, pixel_values=torch.cat([pixels, pixels])).logits
        first = model(input_ids=ids, pixel_values=pixels, use_cache=True)
        second = model(input_ids=ids, pixel_values=pixels, **{CACHE: first.past_key_values})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("frame_tokens", "cut"), [(None, 6), (2, 6)])
def test_a_frame_in_parts_is_refused(frame_tokens, cut):
    model, given = routed(keep=0.4, frame_tokens=frame_tokens), prompts((1,), text=(3, 4))
    text = model.get_base_model().model.language_model
    surgery = model.get_base_model().model.language_model.layers[0].hf_tokens.surgery
    x, visual = text.embed_tokens(given["input_ids"] % 40), given["input_ids"] == IMAGE
    with torch.no_grad():
        surgery.begin(ForwardContext(visual=visual[:, :cut]))
        cache = text(inputs_embeds=x[:, :cut], use_cache=True).past_key_values
        surgery.begin(ForwardContext(visual=visual[:, cut:]))
        with pytest.raises(UnsupportedError, match="A frame must come in one pass"):
            text(inputs_embeds=x[:, cut:], **{CACHE: cache})


def test_gradient_reaches_every_scorer():
    model, given = routed(keep=0.4).train(), prompts((1, 2))
    model(**given, labels=given["input_ids"]).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 6 and all(grad is not None and grad.any() for grad in grads.values())


def test_a_new_scorer_runs_what_it_chooses_at_full_strength():
    model, given = get_token_model(llava(), VideoLLMMoDConfig(keep=0.99)).eval(), prompts((1,))
    with torch.no_grad():
        got = model(**given).logits
        with model.disable_adapter():
            want = model(**given).logits
    assert (got - want).abs().max() < 0.1 * want.abs().max()
