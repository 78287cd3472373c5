"""VisionZip against a slow loop over one picture, written from arXiv:2412.04467 and what its release adds and orders."""

import math

import pytest
import torch
from by_hand import IMAGE, PATCHES, llava, llava_block, prompts

from hf_tokens import ConfigError, PPTConfig, ToMeConfig, UnsupportedError, VisionZipConfig, get_token_model, measure
from hf_tokens.testing import zoo


def naive(states, queries, keys, dominant, contextual):
    """What the projector gets of one picture, given the states (n d), queries and keys (h n e) of the block that is read."""
    n, heads = len(states), range(len(queries))
    dot = lambda a, b: sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    heed = [0.0] * n
    for h in heads:
        powers = [math.exp(dot(queries[h][0], keys[h][j]) / math.sqrt(len(keys[h][j]))) for j in range(n)]
        heed = [total + power / sum(powers) for total, power in zip(heed, powers, strict=True)]
    mean = [sum(keys[h][j] for h in heads) / len(queries) for j in range(n)]
    cosine = lambda i, j: dot(mean[i], mean[j]) / math.sqrt(dot(mean[i], mean[i]) * dot(mean[j], mean[j]))
    kept = sorted(sorted(range(1, n), key=lambda j: (-heed[j], j))[: dominant - 1])
    rest = [j for j in range(1, n) if j not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    joined = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            joined[max(targets, key=lambda t: (cosine(j, t), -t))].append(j)
    mixed = [states[t] + (sum(states[j] for j in joined[t]) / len(joined[t]) if joined[t] else 0) for t in targets]
    return torch.stack([states[0], *(states[j] for j in kept), *mixed])


@torch.no_grad()
def by_hand(model, pixels, dominant, contextual):
    """What the language model gets of one picture, (N+M d)."""
    inside = {}
    tower = model.model.vision_tower
    block = [module for name, module in tower.named_modules() if name.endswith("layers.0")][0]  # of two, that which is read
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: inside.update({name: out[0] if isinstance(out, tuple) else out}))
        for name, module in (("q", block.self_attn.q_proj), ("k", block.self_attn.k_proj), ("x", block))
    ]
    tower(pixels[None])
    for hook in hooks:
        hook.remove()
    q, k = (inside[name].view(PATCHES + 1, 4, -1).transpose(0, 1) for name in "qk")
    return model.model.multi_modal_projector(naive(inside["x"].view(PATCHES + 1, -1), q, k, dominant, contextual))


# images of each row, side of the padding, N, M
MODELS = [
    pytest.param((1,), "left", 4, 2, id="one row"),
    pytest.param((1,), "left", 2, 3, id="targets are a part of the others"),
    pytest.param((1,), "left", 5, 3, id="each of the others but two a target"),
    pytest.param((1,), "left", 1, 1, id="the class token and a mixture"),
    pytest.param((2, 1, 1), "left", 4, 2, id="rows of different numbers"),
    pytest.param((1, 2), "right", 4, 2, id="padded on the right"),
    pytest.param((1, 0, 2), "left", 3, 1, id="a row without an image"),
    pytest.param((1, 1), "left", 6, 3, id="as many as there are"),
]


@pytest.mark.parametrize(("images", "side", "dominant", "contextual"), MODELS)
@torch.no_grad()
def test_model_is_the_loop(images, side, dominant, contextual):
    base, given = llava(), prompts(images, side=side)
    count = dominant + contextual
    pictures = [by_hand(base, pixels, dominant, contextual) for pixels in given["pixel_values"]]
    if count >= PATCHES:
        pictures = [*base.model.get_image_features(pixel_values=given["pixel_values"], return_dict=True).pooler_output]
    text, mask = base.model.language_model, given["attention_mask"].bool()
    model = get_token_model(base, VisionZipConfig(dominant=dominant, contextual=contextual)).eval()
    got = model(**given, position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).logits
    for row, number in enumerate(images):
        ids = given["input_ids"][row][mask[row]]
        x, image = text.embed_tokens(ids), (ids == IMAGE).nonzero()[:, 0].view(-1, PATCHES)
        for its in image[:, :count]:
            x[its] = pictures.pop(0)
        gone = image[:, count:].flatten().tolist()
        places = [i for i in range(len(ids)) if i not in gone]
        x = x[places]
        assert len(image) == number
        with model.disable_adapter():
            for block in text.layers:
                x, _ = llava_block(text, block, x, places)
            torch.testing.assert_close(got[row][mask[row]][places], base.lm_head(text.norm(x)), rtol=1e-9, atol=1e-9)


def test_generation_is_that_of_each_row_alone():
    model, given = get_token_model(llava(), VisionZipConfig(dominant=3, contextual=2)).eval(), prompts((2, 1, 1))
    together, taken, n = model.generate(**given, max_new_tokens=5, do_sample=False), 0, given["input_ids"].shape[1]
    for i, count in enumerate((2, 1, 1)):
        ids = given["input_ids"][i][given["attention_mask"][i].bool()][None]
        pixels, taken = given["pixel_values"][taken : taken + count], taken + count
        more = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        alone = model.generate(input_ids=ids, **more, max_new_tokens=5, do_sample=False)
        assert together[i, n:].tolist() == alone[0, ids.shape[1] :].tolist()


def test_tokens_and_memory_are_saved():
    given, model = prompts((1,), text=(2, 5)), get_token_model(llava(), VisionZipConfig(dominant=2, contextual=1)).eval()
    cost = measure(model, **given, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, **given, use_cache=True)
    assert cost.kv_bytes == whole.kv_bytes * 10 // 16


@pytest.mark.parametrize("other", [ToMeConfig(r=2), PPTConfig(r=2, layers=(0,), tau=0.0)], ids=["join", "vanish"])
def test_patches_that_another_method_changed_are_refused(other):
    model = get_token_model(llava(), [other, VisionZipConfig(dominant=3, contextual=2)]).eval()
    with pytest.raises(UnsupportedError, match="as they are, got a tower in which some joined"):
        model(**prompts((1,)))


def test_it_acts_where_the_projector_reads_and_nowhere_else():
    for knobs in ({"layers": (0,)}, {"stream": "text"}):
        with pytest.raises(ConfigError, match="Leave out both"):
            get_token_model(llava(), VisionZipConfig(**knobs))
    for change in ({"vision_feature_layer": [-2, -1]}, {"vision_feature_select_strategy": "full"}):
        base = llava()
        base.config.update(change)
        with pytest.raises(UnsupportedError, match="one block is known to be read"):
            get_token_model(base, VisionZipConfig())
    with pytest.raises(UnsupportedError, match="one block is known to be read"):
        get_token_model(zoo.build("qwen2_vl").model, VisionZipConfig())
