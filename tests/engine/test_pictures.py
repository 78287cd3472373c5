"""The grids of pictures among the tokens of a vision-language model."""

import contextlib
import inspect
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

import hf_tokens
from hf_tokens import MethodConfig, TokenReducer, UnsupportedError, get_token_model, option, register
from hf_tokens.engine import supply
from hf_tokens.model import families, pictures
from hf_tokens.model.anatomy import anatomy
from hf_tokens.model.layouts import Picture, in_tokens
from hf_tokens.model.pictures import find_pictures, grids_in_text, on_grids, patch_grids, vision_tower
from hf_tokens.peft.placement import sees
from hf_tokens.roles.registry import method_info
from hf_tokens.testing import zoo
from hf_tokens.tools.surgeries import surgery_of

MERGED = SimpleNamespace(model_type="qwen2_vl", vision_config=SimpleNamespace(spatial_merge_size=2))
GRIDDED = {"method": "fourier-vlm", "keep": 0.5}  # its outcome depends on rows and columns
VISUAL = [info.name for info in hf_tokens.list_methods() if sees(info.cls)]
OF_ANY_TOWER = [info.name for info in hf_tokens.list_methods() if sees(info.cls) and not info.cls.tower]


def flags(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


# per case: pictures of the tower's calls in patches, visual tokens, whether the tower was called before, grids in their order
GRIDS = {
    "pictures of two sizes": ([[(1, 4, 6), (1, 2, 2)]], ("xxxxxx.x",), False, [(1, 2, 3), (1, 1, 1)]),
    "rows that end": ([[(1, 4, 4), (1, 8, 2)]], ("xx.xx..", "x.x.x.x"), False, [(1, 2, 2), (1, 4, 1)]),
    "a video": ([[(3, 4, 2)]], ("xx.xx.xx",), False, [(3, 2, 1)]),
    "tiles in one row": ([[(1, 4, 4)] * 3], ("xxxx.xxxx", "....xxxx."), False, [(1, 2, 2)] * 3),
    "a row of text": ([[(1, 4, 4)]], ("xxxx.", "....."), False, [(1, 2, 2)]),
    "beams": (
        [[(1, 4, 6), (1, 2, 2), (1, 2, 4)]],
        ("xxxxxxx",) * 2 + ("xx.....",) * 2,
        True,
        [(1, 2, 3), (1, 1, 1)] * 2 + [(1, 1, 2)] * 2,
    ),
    "beams of tiles": ([[(1, 4, 4)] * 2], ("xxxx.xxxx",) * 3, True, [(1, 2, 2)] * 6),
}


def found(calls, given, visual):
    """The grids of pictures that a tower was called with, in patches."""
    pictures = find_pictures([in_tokens(MERGED, call) for call in calls], given, visual)
    return [grid for picture in pictures for grid in picture.grids]


@pytest.mark.parametrize("case", GRIDS)
def test_the_grids_of_a_batch(case):
    calls, rows, before, want = GRIDS[case]
    given = {"mm_encoder_outputs": {"image": object()}} if before else {}
    assert found(calls, given, flags(*rows)) == want


SMALL_AND_ROWS = Picture(((1, 1, 2), (1, 2, 3)), (5, 9))
# per case: pictures, visual tokens, those with a place in a grid
BESIDE = {
    "ends of rows": ([SMALL_AND_ROWS], ("xxxxxxxxxx.",), ("xxxxx.xxx..",)),
    "two in a row": ([SMALL_AND_ROWS, Picture(((1, 1, 2),), (2,))], ("xxxxxxxxxx.xxx",), ("xxxxx.xxx..xx.",)),
    "in two rows": ([Picture(((1, 1, 2),), (2,)), Picture(((1, 1, 2),), (0,))], (".xxx", "xxx."), (".xx.", ".xx.")),
    "text behind a row": ([SMALL_AND_ROWS], ("xxxxxx.xxxx",), ("xxxxx..xxx.",)),
}


@pytest.mark.parametrize("case", BESIDE)
def test_tokens_beside_a_grid_have_no_place_in_it(case):
    pictures, rows, placed = BESIDE[case]
    assert find_pictures([pictures], {}, flags(*rows)) == pictures
    assert torch.equal(on_grids(flags(*rows), pictures), flags(*placed))


# per case: pictures of the tower's calls, visual tokens, what the error says
LOST = {
    "no call": ([], ("xxxx",), "0 calls"),
    "two calls": ([[(1, 4, 4)]] * 2, ("xxxx",), "2 calls"),
    "too few tokens": ([[(1, 4, 4)]], ("xxx.",), "3 visual tokens for pictures of"),
    "too many tokens": ([[(1, 4, 4)]], ("xxxxx",), "5 visual tokens for pictures of"),
    "a picture in two rows": ([[(1, 4, 4)]], ("xxx", "x.."), "4 visual tokens for pictures of"),
    "a picture that no token stands for": ([[(1, 4, 4)] * 2], ("xxxx",), "4 visual tokens for pictures of"),
    "a row that ends elsewhere": ([[(1, 4, 8)]], ("xx.xx.xx.xx",), "8 visual tokens for pictures of"),
}


@pytest.mark.parametrize("case", LOST)
def test_visual_tokens_that_form_no_grids_are_refused(case):
    calls, rows, came = LOST[case]
    with pytest.raises(UnsupportedError, match=f"tokens form a grid, row by row, got {came}"):
        found(calls, {}, flags(*rows))


def test_beams_are_rows_that_are_alike():
    with pytest.raises(UnsupportedError, match="8 visual tokens for pictures of"):
        found([[(1, 4, 4)]], {"mm_encoder_outputs": {"image": object()}}, flags("xxxx.", ".xxxx"))


def pictures_of(inputs):
    return {name: value for name, value in inputs.items() if re.search("pixel|image|spatial", name)}


ONE_OF_EACH_ROW = """
llava got_ocr2 step3p7 aya_vision cohere2_vision lfm2_vl idefics3 smolvlm ultravbert internvl qianfan_ocr mistral3 lighton_ocr gemma3
t5gemma2 ovis2 kimi_k25 paddleocr_vl hunyuan_vl hy_v4_vl
""".split()


@pytest.mark.parametrize("family", [family for family in zoo.families("transformers") if family in ONE_OF_EACH_ROW])
def test_visual_tokens_lie_row_by_row_over_their_patches(family):
    """Without attention in the tower, each token of a picture is made of the patches that its place in the grid names, and of no other."""
    specimen = zoo.build(family)
    tower, given = vision_tower(anatomy(specimen.model)), pictures_of(specimen.inputs)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if re.search("attn|attention", name):
                parameter.zero_()
    calls = []
    tower.register_forward_hook(lambda module, args, kwargs, output: calls.append(patch_grids(module, args, kwargs)), with_kwargs=True)
    pixels = given["pixel_values"] = given["pixel_values"].requires_grad_()
    encode = next(module.get_image_features for module in specimen.model.modules() if hasattr(module, "get_image_features"))
    out = encode(**{name: value for name, value in given.items() if name in inspect.signature(encode).parameters})
    tokens = out.pooler_output if getattr(out, "pooler_output", None) is not None else out.last_hidden_state
    (grids,) = calls
    side = families.TOKEN_SIDES[specimen.model.config.model_type](specimen.model.config)
    _, height, width = grids[0]
    (picture,) = in_tokens(specimen.model.config, grids[:1])
    first = tokens[0].flatten(0, -2)[: len(picture)]
    first = first[[i for i in range(len(picture)) if i not in picture.beside]]
    assert len(first) == (height // side) * (width // side)
    for i, token in enumerate(first):
        (gradient,) = torch.autograd.grad(token.square().sum(), pixels, retain_graph=True)
        if {"spatial_shapes", "image_grid_thw"} & set(given):  # patch by patch, those of the first picture in front
            patches = gradient[0] if "spatial_shapes" in given else gradient[: height * width]
            found = patches.abs().flatten(1).sum(dim=1).view(height, width)
        else:
            picture = gradient.view(-1, *gradient.shape[-3:])[0].abs().sum(dim=0)
            found = picture.unflatten(1, (width, -1)).unflatten(0, (height, -1)).sum(dim=(1, 3))
        row, column = divmod(i, width // side)
        own = torch.zeros_like(found)
        own[row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
        assert (found * (1 - own)).sum() < 0.01 * found.sum()


def with_picture_tokens(inputs, marker, counts):
    """The text of a specimen with so many visual tokens in each row, padded on the left."""
    ids = inputs["input_ids"]
    there = (ids == marker).any(dim=0)
    at, text = int(there.nonzero()[0]), ids[:, ~there]
    new = torch.zeros(len(ids), text.shape[1] + max(counts)).long()
    for row, words, count in zip(new, text, counts, strict=True):
        row[max(counts) - count :] = torch.cat([words[:at], torch.full((count,), marker), words[at:]])
    kinds = {"mm_token_type_ids": (new == marker).long()} if "mm_token_type_ids" in inputs else {}
    return {"input_ids": new, "attention_mask": (new != 0).long(), **kinds}


TILED = [family for family in zoo.families("transformers") if family in families.LAYING]
SHAPES = [(20, 60), (60, 20), (32, 32)]  # heights and widths in pixels, of tiles of 32


def tiled(model, rows, **given):
    """Texts, padded on the left, of which each has pictures of some of `SHAPES`, or none, between its words."""
    config = model.config
    config.image_grid_pinpoints = [[32, 64], [64, 32], [32, 32]]
    sizes = torch.tensor([SHAPES[i] for row in rows for i in row]).view(-1, 2)
    tiles = [3 if SHAPES[i] != (32, 32) else 2 for row in rows for i in row]
    pixels = torch.zeros(len(tiles), max(tiles, default=1), 3, 32, 32)
    for i, (picture, count) in enumerate(zip(pixels, tiles, strict=True)):
        picture[:count] = torch.randn(
            count, 3, 32, 32, generator=torch.Generator().manual_seed(sum(SHAPES[[j for r in rows for j in r][i]]))
        )
    marker = vars(config).get("image_token_id", vars(config).get("image_token_index"))
    shown = {"pixel_values": pixels, "image_sizes": sizes, **given} if tiles else {}
    with torch.no_grad():
        counts = [len(one) for one in model.get_image_features(**shown).pooler_output] if tiles else []
    texts = [[5, 6, *(token for _ in row for token in (*[marker] * counts.pop(0), 7)), 8, 9] for row in rows]
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **shown}


OWN_SHAPES = {"image_grid_thw", "spatial_shapes", "image_sizes"}


def two_pictures(family):
    """A model, a batch of two pictures, 1 by 2 tokens and 2 by 1 where it takes them, and each of them alone."""
    if family == "pixtral":
        part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        vision, text = PixtralVisionConfig(**part, patch_size=8, image_size=32), LlamaConfig(**part, vocab_size=99)
        strategy = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, **strategy)).eval()
        zoo.liven(model)
        inputs = {"input_ids": torch.tensor([[5, 6, 98, 7, 8, 9]] * 2), "pixel_values": torch.randn(2, 3, 32, 32), "image_sizes": True}
    else:
        specimen = zoo.build(family)
        model, inputs = specimen.model, specimen.inputs
    if family in TILED:
        return model, tiled(model, [[0], [1]]), [tiled(model, [[i]]) for i in range(2)]
    if not OWN_SHAPES & set(inputs):
        return model, inputs, [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(2)]
    config = model.config
    side = families.TOKEN_SIDES[config.model_type](config)
    marker = vars(config).get("image_token_id", vars(config).get("image_token_index"))
    shapes = torch.tensor([[side, 2 * side], [2 * side, side]])
    text = with_picture_tokens(inputs, marker, [len(in_tokens(config, [(1, *shape)])[0]) for shape in shapes.tolist()])
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        patches = torch.randn(2, 2 * side * side, *pixels.shape[1:])
        shown = lambda rows: {
            "pixel_values": patches[rows].flatten(0, 1),
            "image_grid_thw": torch.cat([torch.ones(2, 1).long(), shapes], 1)[rows],
        }
    elif "spatial_shapes" in inputs:
        patches = torch.randn(2, 2 * side * side, pixels.shape[-1])
        shown = lambda rows: {
            "pixel_values": patches[rows],
            "spatial_shapes": shapes[rows],
            "pixel_attention_mask": torch.ones(patches[rows].shape[:2]).long(),
        }
    else:
        padded, sizes = torch.zeros(2, 3, 16 * side, 16 * side), 8 * shapes
        for picture, (height, width) in zip(padded, sizes.tolist(), strict=True):
            picture[:, :height, :width] = torch.randn(3, height, width)
        shown = lambda rows: {
            "pixel_values": padded[rows][..., : int(sizes[rows, 0].max()), : int(sizes[rows, 1].max())],
            "image_sizes": sizes[rows],
        }
    cut = lambda rows: {**{name: value[rows] for name, value in text.items()}, **shown(rows)}
    return model, cut([0, 1]), [cut([0]), cut([1])]


OTHER_UNCACHED = {"paligemma", "qwen2_5_omni_thinker"}  # a prefix seen both ways, and a text that goes on with a picture's token
BOTH_WAYS = {"t5gemma2", "modernvbert", "ultravbert"}  # their text is not causal, which the method needs
NOT_RUN = {"llama4"}  # un-skip when the zoo runs it
NUMBERED = {"hunyuan_vl"}  # where a picture comes in the batch is an axis of its positions
SWEPT = [family for family in zoo.families("transformers") if family in {*families.TOKEN_SIDES} - BOTH_WAYS - NOT_RUN]


def listen_for_grids(grids, monkeypatch):
    """Note the grids of each call."""

    def heard(*given):
        placed, found_grids = grids_in_text(*given)
        grids.append(found_grids)
        return placed, found_grids

    monkeypatch.setattr(supply, "grids_in_text", heard)


@pytest.mark.parametrize("family", ["pixtral", *SWEPT])
def test_each_picture_is_in_a_batch_what_it_is_alone(family, monkeypatch):
    """Landscape beside portrait, where the model takes pictures of their own shapes."""
    grids = []
    listen_for_grids(grids, monkeypatch)
    base, both, alone = two_pictures(family)
    model = get_token_model(base, GRIDDED).eval()
    with torch.no_grad():
        together = model(**both).logits
        for row, given in zip(together, alone, strict=True):
            real = given["attention_mask"][0] > 0
            by_itself = model(**given).logits[0][real]
            if family not in NUMBERED:
                torch.testing.assert_close(row[-len(real) :][real], by_itself, atol=1e-3, rtol=1e-3)
    if family in TILED:
        assert grids[0] == [(1, 4, 4), (1, 2, 8), (1, 4, 4), (1, 8, 2)]
    elif OWN_SHAPES & set(both):
        assert grids[0] == [(1, 1, 2), (1, 2, 1)]
    assert len(grids) == 3 and grids[1] + grids[2] == grids[0]


def write(model, given, **more):
    """Some tokens behind a prompt, and their logits."""
    given = {name: value for name, value in given.items() if name != "labels"}
    out = model.generate(**given, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, **more)
    return torch.stack(out.logits)


@pytest.mark.parametrize("family", ["pixtral", *(family for family in SWEPT if family not in OTHER_UNCACHED)])
def test_without_a_cache_each_pass_has_the_pictures_of_the_first(family):
    base, both, _ = two_pictures(family)
    model = get_token_model(base, GRIDDED).eval()
    with contextlib.suppress(UnsupportedError):  # some have a cache of their own kind
        cached = write(model, both)
        torch.testing.assert_close(write(model, both, use_cache=False), cached, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mistral3", "lfm2_vl"])
def test_pictures_that_were_encoded_before_are_others(family):
    """A call of the tower by the user, with pictures in another order, is not that of the text."""
    base, both, alone = two_pictures(family)
    model = get_token_model(base, GRIDDED).eval()
    wanted = write(model, both)
    encode = next(module.get_image_features for module in base.modules() if hasattr(module, "get_image_features"))
    with torch.no_grad():
        held = [encode(**{n: v for n, v in one.items() if n in inspect.signature(encode).parameters}) for one in reversed(alone)]
    torch.testing.assert_close(write(model, both), wanted)
    assert len(held) == 2


def picture_and_video(order):
    """A text with a picture of 1 by 2 tokens and a video of 2 frames of 2 by 1, in one of two orders."""
    specimen = zoo.build("qwen2_vl")
    config = specimen.model.config
    side = config.vision_config.spatial_merge_size
    tables = {"image": torch.tensor([[1, side, 2 * side]]), "video": torch.tensor([[2, 2 * side, side]])}
    token = {"image": config.image_token_id, "video": config.video_token_id}
    ids, generator = [5], torch.Generator().manual_seed(0)
    for modality in order:
        ids += [token[modality]] * int(tables[modality].prod() // side**2) + [7, 8]
    ids = torch.tensor([ids])
    width, dtype = specimen.inputs["pixel_values"].shape[1], specimen.inputs["pixel_values"].dtype
    shown = {m: torch.randn(int(table.prod()), width, generator=generator).to(dtype) for m, table in tables.items()}
    given = {"pixel_values": shown["image"], "image_grid_thw": tables["image"]}
    given |= {"pixel_values_videos": shown["video"], "video_grid_thw": tables["video"]}
    kinds = (ids == token["image"]).long() + 2 * (ids == token["video"]).long()
    return specimen.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **given}


@pytest.mark.drawn
@pytest.mark.parametrize("order", [("image", "video"), ("video", "image")], ids=lambda order: order[0])
@pytest.mark.parametrize("method", OF_ANY_TOWER)
def test_pictures_and_videos_in_one_call(order, method, monkeypatch):
    grids = []
    listen_for_grids(grids, monkeypatch)
    base, given = picture_and_video(order)
    model = get_token_model(base, method).eval()
    with torch.no_grad():
        first = model(**given).logits[:, -1]
    torch.testing.assert_close(write(model, given)[0], first, atol=1e-4, rtol=1e-4)
    heard = {"instruction", "scores"} & {*method_info(method).cls.signals}
    anew = 1 if heard else 3  # without a cache it hears what is written as an instruction, or as the prompt's end
    uncached, cached = write(model, given, use_cache=False), write(model, given)
    torch.testing.assert_close(uncached[:anew], cached[:anew], atol=1e-3, rtol=1e-3)
    beams = [model.generate(**given, max_new_tokens=2, num_beams=2, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert anew == 1 or torch.equal(*beams)
    shapes = {"image": (1, 1, 2), "video": (2, 2, 1)}
    assert all(found in ([shapes[m] for m in order], [shapes[m] for m in order] * 2) for found in grids)


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_each_tile_of_a_picture_is_a_grid(family):
    """Two tiles in one row, beside a row with one: forward and generate, in a batch and alone."""
    specimen = zoo.build(family)
    marker, pixels = specimen.model.config.image_token_id, specimen.inputs["pixel_values"]
    count = int((specimen.inputs["input_ids"][0] == marker).sum())
    rows = [[5, 6, *[marker] * count, 7, *[marker] * count, 8, 9], [0] * (count + 1) + [5, 6, *[marker] * count, 8, 9]]
    ids, tiles = torch.tensor(rows), torch.zeros(2, 2, *pixels.shape[2:])
    tiles[0], tiles[1, 0] = torch.randn(2, *pixels.shape[2:]), torch.randn(pixels.shape[2:])
    model = get_token_model(specimen.model, GRIDDED).eval()
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": tiles}
    given["pixel_attention_mask"] = torch.ones(2, 2, *pixels.shape[-2:]).long()
    new = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False)
    with torch.no_grad():
        together, said = model(**given).logits, model.generate(**given, **new)
        assert torch.equal(together[:, -1].argmax(dim=-1), said[:, ids.shape[1]])
        for i in range(2):
            alone = {name: value[i : i + 1] for name, value in given.items()}
            torch.testing.assert_close(together[i, -3:], model(**alone).logits[0, -3:], atol=1e-4, rtol=1e-4)
            assert torch.equal(said[i], model.generate(**alone, **new)[0])


def laid_out(base, given, monkeypatch):
    """How the pictures of a call lie."""
    noted = []

    def heard(*called):
        noted.extend(find_pictures(*called))
        return noted

    monkeypatch.setattr(pictures, "find_pictures", heard)
    model = get_token_model(base, GRIDDED).eval()
    model(**given)
    model.unload()
    return noted


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("family", TILED)
def test_a_picture_of_tiles_is_a_small_one_and_rows_with_an_end(family, shape, monkeypatch):
    """The ends of rows are those tokens that are the parameter; each other one is made of the patch at its place, and of no other."""
    base = zoo.build(family).model
    given = tiled(base, [[SHAPES.index(shape)]])
    (picture,) = laid_out(base, given, monkeypatch)
    holder = next(module for module in base.modules() if "image_newline" in dict(module.named_parameters(recurse=False)))
    with torch.no_grad():
        for name, parameter in holder.vision_tower.named_parameters():
            if re.search("attn|attention", name):
                parameter.zero_()
    pixels = given["pixel_values"].requires_grad_()
    (tokens,) = holder.get_image_features(pixels, given["image_sizes"]).pooler_output
    assert tuple((tokens == holder.image_newline).all(dim=1).nonzero()[:, 0].tolist()) == picture.beside
    small, (_, height, width) = picture.grids
    wide = 2 if shape[1] > shape[0] else 1
    places = []
    for i in (i for i in range(len(tokens)) if i not in picture.beside):
        (gradient,) = torch.autograd.grad(tokens[i].square().sum(), pixels, retain_graph=True)
        tile, row, column = gradient[0].abs().sum(dim=1).unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum(dim=(2, 4)).nonzero().T
        tile, row, column = int(tile), int(row), int(column)
        places.append((row, column) if not tile else ((tile - 1) // wide * 4 + row, (tile - 1) % wide * 4 + column))
    assert small == (1, 4, 4) and places[:16] == [divmod(i, 4) for i in range(16)]
    top, left = places[16]
    assert places[16:] == [(top + row, left + column) for row in range(height) for column in range(width)]


def test_rows_of_tiles_that_are_made_smaller_end_where_the_model_ends_them(monkeypatch):
    base = zoo.build("llava_onevision").model
    base.config.vision_aspect_ratio = "anyres_max_1"
    given = tiled(base, [[0], [1, 2]])
    noted = laid_out(base, given, monkeypatch)
    features = base.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output
    ends = [tuple((one == base.model.image_newline).all(dim=1).nonzero()[:, 0].tolist()) for one in features]
    assert [picture.beside for picture in noted] == ends and [len(picture) for picture in noted] == [len(one) for one in features]
    assert len({picture.grids for picture in noted}) == 3


def test_several_pictures_of_a_sample_are_no_tiles(monkeypatch):
    """Told by `batch_num_images`: each is a small one with one token behind it."""
    base = zoo.build("llava_onevision").model
    given = tiled(base, [[0, 1], [2, 2]], batch_num_images=torch.tensor([2, 2]))
    assert laid_out(base, given, monkeypatch) == [Picture(((1, 4, 4),), (16,))] * 4


KEEPS_ONE_OF_EQUALS = {"divprune"}  # the ends of all rows are one token: of which row it stays is rounding


@pytest.mark.drawn
@pytest.mark.parametrize("method", OF_ANY_TOWER)
@pytest.mark.parametrize("family", TILED)
def test_pictures_of_tiles_beside_a_text(family, method):
    """Two pictures in one row, one in the next, none in the last: padded, alone, written with a cache and without."""
    base = zoo.build(family).model
    rows = [[0, 1], [2], []]
    both = tiled(base, rows)
    silent = [value for name, value in vars(base.config).items() if name in families.IMAGE_TOKENS]
    model = get_token_model(base, method).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "hf_tokens" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
        together = model(**both).logits
        for row, pictures_of_row in zip(together, rows, strict=True):
            alone = tiled(base, [pictures_of_row])
            by_itself = model(**alone).logits[0]
            if method not in KEEPS_ONE_OF_EQUALS:
                torch.testing.assert_close(row[-2:], by_itself[-2:], atol=1e-3, rtol=1e-3)
    cached, uncached = (write(model, both, use_cache=use, suppress_tokens=silent) for use in (True, False))
    torch.testing.assert_close(cached[0], together[:, -1], atol=1e-3, rtol=1e-3)
    anew = 1 if {"instruction", "scores"} & {*method_info(method).cls.signals} else 3
    torch.testing.assert_close(uncached[:anew], cached[:anew], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", TILED)
def test_beams_of_pictures_of_tiles(family):
    base = zoo.build(family).model
    both = tiled(base, [[0, 2], [1]])
    silent = [value for name, value in vars(base.config).items() if name in families.IMAGE_TOKENS]
    model = get_token_model(base, GRIDDED).eval()
    new = dict(max_new_tokens=3, num_beams=3, do_sample=False, suppress_tokens=silent)
    cached, uncached = model.generate(**both, **new), model.generate(**both, **new, use_cache=False)
    assert torch.equal(cached, uncached)
    for i, pictures_of_row in enumerate([[0, 2], [1]]):
        alone = model.generate(**tiled(base, [pictures_of_row]), **new)
        assert torch.equal(cached[i, -3:], alone[0, -3:])


FILMED = {"llava_next_video": [(3, 2, 2)], "llava_onevision": [(3, 2, 2)]}


@pytest.mark.parametrize("family", FILMED)
def test_the_frames_of_a_video_are_one_grid(family, monkeypatch):
    """Beside pictures in the same row, in front of them and behind them; each token is made of the patches at its place in its frame."""
    specimen = zoo.build(family)
    base, config = specimen.model, specimen.model.config
    video, token = torch.randn(1, 3, 3, 32, 32), {name[:5]: value for name, value in vars(config).items() if name in families.IMAGE_TOKENS}
    shown = tiled(base, [[0]])
    count = base.get_video_features(video).pooler_output.flatten(0, 1).shape[0]
    picture = [token["image"]] * int((shown["input_ids"] == token["image"]).sum())
    grids = []
    listen_for_grids(grids, monkeypatch)
    model = get_token_model(base, GRIDDED).eval()
    pictured = [(1, 4, 4), (1, 2, 8)]
    for first in ("image", "video"):
        parts = [picture, [token["video"]] * count]
        ids = torch.tensor([[5, *parts[first == "video"], 7, *parts[first == "image"], 8, 9]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": video}
        given |= {name: shown[name] for name in ("pixel_values", "image_sizes")}
        logits, new = model(**given).logits, dict(suppress_tokens=[*token.values()])
        said = write(model, given, **new)
        torch.testing.assert_close(said[0], logits[:, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(write(model, given, **new, use_cache=False), said, atol=1e-3, rtol=1e-3)
        wanted = [*pictured, *FILMED[family]] if first == "image" else [*FILMED[family], *pictured]
        assert grids and all(one == wanted for one in grids)
        grids.clear()


@pytest.mark.parametrize("family", ["blip-2", "instructblip", "idefics2", "aria", "deepseek_ocr2", "unlimited_ocr"])
def test_latents_are_no_grid(family):
    with pytest.raises(UnsupportedError, match="with tokens of pictures among them, known to lie row by row, got"):
        get_token_model(zoo.build(family).model, GRIDDED)


@pytest.mark.parametrize("family", ["florence2", "mllama"])
@pytest.mark.parametrize("name", VISUAL)
def test_a_stream_that_carries_no_pictures_is_refused(family, name):
    """A decoder whose pictures stand in the encoder, and a model that reads them by attention across."""
    with pytest.raises(UnsupportedError, match="with tokens of pictures among them"):
        get_token_model(zoo.build(family).model, name)


@dataclass(frozen=True)
class SpotConfig(MethodConfig):
    off: bool = option(True, zero=True, help="It never does anything.")


@pytest.mark.parametrize("family", ["florence2", "t5gemma2", "idefics2", "llava"])
def test_visual_tokens_are_those_of_the_stream_that_takes_them(family):
    heard = []

    @register("test-spot", SpotConfig)
    class Spot(TokenReducer):
        def assign(self, visual):
            heard.append(visual)

    specimen = zoo.build(family)
    model = get_token_model(specimen.model, SpotConfig(layers=(1,))).eval()
    model(**specimen.inputs)
    config = specimen.model.config
    marker = vars(config).get("image_token_id", vars(config).get("image_token_index"))
    assert len(heard) == 1 and heard[0].any() and torch.equal(heard[0], specimen.inputs["input_ids"] == marker)


@pytest.mark.parametrize("name", VISUAL)
def test_a_text_without_pictures_runs_as_in_the_base(name):
    specimen = zoo.build("llava")
    marker = specimen.model.config.image_token_id
    model = get_token_model(specimen.model, name).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "hf_tokens" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    given = specimen.inputs
    words = {"input_ids": given["input_ids"].clamp(max=80), "attention_mask": given["attention_mask"]}
    new = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        logits, said = model(**words).logits, model.generate(**words, **new).logits
        with model.disable_adapter():
            assert torch.equal(logits, model(**words).logits)
            for ours, base in zip(said, model.generate(**words, **new).logits, strict=True):
                torch.testing.assert_close(ours, base, atol=1e-5, rtol=1e-5)
            alone = model(input_ids=words["input_ids"][1:]).logits[0]
            assert not torch.allclose(logits, model(**given).logits)
        mixed = {
            **given,
            "input_ids": torch.cat([given["input_ids"][:1], words["input_ids"][1:]]),
            "pixel_values": given["pixel_values"][:1],
        }
        assert (mixed["input_ids"][0] == marker).any()
        torch.testing.assert_close(model(**mixed).logits[1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VISUAL)
def test_a_batch_of_text_trains_nothing_and_stops_no_training(name):
    specimen = zoo.build("llava")
    model = get_token_model(specimen.model, name).train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    words = specimen.inputs["input_ids"].clamp(max=80)
    loss = model(input_ids=words, labels=words).loss
    with model.disable_adapter():
        assert torch.equal(loss, model(input_ids=words, labels=words).loss)
    assert loss.requires_grad == bool(learning)
    if learning:
        loss.backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in learning)


@pytest.mark.parametrize("name", OF_ANY_TOWER)
def test_embeddings_that_do_not_show_the_visual_tokens_are_refused(name):
    specimen = zoo.build("qwen2_vl")
    model = get_token_model(specimen.model, name).eval()
    embedded = specimen.model.get_input_embeddings()(specimen.inputs["input_ids"])
    with pytest.raises(UnsupportedError, match="acts on visual tokens, got an input without any image or video token. Give the model"):
        model(inputs_embeds=embedded, attention_mask=specimen.inputs["attention_mask"])


@pytest.mark.parametrize("name", OF_ANY_TOWER)
def test_a_prompt_in_chunks_is_refused_where_they_may_cut_a_picture(name):
    """Text alone may come in chunks, if the method takes those. Pictures that were encoded before a refusal are not of the next call."""
    specimen = zoo.build("qwen2_vl", dtype=torch.float64)
    model = get_token_model(specimen.model, name).eval()
    inputs = {key: value for key, value in specimen.inputs.items() if key != "labels"}
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, suppress_tokens=[*range(80, 99)])
    with pytest.raises(UnsupportedError, match=r"or at the pictures in it, must get it in one pass, got \w+ and a prompt in chunks of 5"):
        model.generate(**inputs, **options, prefill_chunk_size=5)
    said = model.generate(**inputs, **options, prefill_chunk_size=99)
    assert torch.equal(said, model.generate(**inputs, **options))
    words = {"input_ids": torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))}
    if all(method.chunks for method in surgery_of(model).methods()):
        assert torch.equal(model.generate(**words, **options, prefill_chunk_size=5), model.generate(**words, **options))


@pytest.mark.parametrize("name", OF_ANY_TOWER)
def test_a_part_of_a_model_called_by_itself_is_refused_as_that(name):
    """With pictures, and with text behind a cache: who calls the body tells nobody which of its tokens are visual."""
    specimen = zoo.build("qwen2_vl")
    model = get_token_model(specimen.model, name).eval()
    pictured = {key: value for key, value in specimen.inputs.items() if key != "labels"}
    behind = {"input_ids": torch.full((2, 3), 7), zoo.CACHE: model(**pictured, use_cache=True).past_key_values}
    for given in (pictured, behind):
        with pytest.raises(UnsupportedError, match="the whole model is called with, got a call of a part of it that holds model.language"):
            specimen.model.model(**given)
        with model.disable_adapter():
            specimen.model.model(**pictured)


PARALLEL = [family for family in ("glm5_next", "hy_v4_vl", "qwen4_exp") if family in zoo.families("transformers")]


@pytest.mark.parametrize("family", PARALLEL)
@pytest.mark.parametrize("name", OF_ANY_TOWER)
def test_pictures_in_parallel_residual_streams_are_read_as_they_lie_or_refused(family, name):
    specimen = zoo.build(family)
    with contextlib.suppress(UnsupportedError):
        model = get_token_model(specimen.model, name).eval()
        assert model(**specimen.inputs).logits.isfinite().all()


@dataclass(frozen=True)
class WhereConfig(MethodConfig):
    off: bool = option(True, zero=True, help="It never does anything.")


def test_a_reducer_hears_the_grid_of_a_tower():
    """Height and width of the picture in tokens, whichever way the pixels are given, and again for a picture of another shape."""
    heard = []

    @register("test-where", WhereConfig)
    class Where(TokenReducer):
        def assign(self, grid):
            heard.append(grid)

    specimen = zoo.build("dinov2")
    model = get_token_model(specimen.model, WhereConfig(layers=(1,))).eval()
    pixels = specimen.inputs["pixel_values"]
    model(pixel_values=pixels)
    model(pixels)
    model(pixel_values=pixels[..., : pixels.shape[-1] // 2])
    side = pixels.shape[-1] // model.config.patch_size
    assert heard == [(side, side), (side, side), (side, side // 2)]
