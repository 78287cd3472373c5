"""The find_grids of pictures among the tokens of a vision-language model."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from hf_tokens import MethodConfig, TokenReducer, UnsupportedError, get_token_model, option, register
from hf_tokens.model.pictures import Shapes, find_grids
from hf_tokens.testing import zoo

MERGED = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))


def flags(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


# per case: calls of the tower, visual tokens, pictures that the tower said (None: it was not asked before), find_grids in their order
GRIDS = {
    "patches": ([Shapes([(1, 4, 6), (1, 2, 2)], True)], ("xxxxxx.x",), None, [(1, 2, 3), (1, 1, 1)]),
    "a video": ([Shapes([(3, 4, 2)], True)], ("xx.xx.xx",), None, [(3, 2, 1)]),
    "pixels": ([Shapes([(1, 8, 16)] * 2, False)], ("xxxxxxxx", "xxxxxxxx"), None, [(1, 2, 4)] * 2),
    "beams": (
        [Shapes([(1, 4, 6), (1, 2, 2), (1, 2, 4)], True)],
        ("xxxxxxx",) * 2 + ("xx.....",) * 2,
        6,
        [(1, 2, 3), (1, 1, 1)] * 2 + [(1, 1, 2)] * 2,
    ),
    "beams of pixels": ([Shapes([(1, 8, 8)] * 2, False)], ("xxxx.",) * 6, 6, [(1, 2, 2)] * 6),
}


@pytest.mark.parametrize("case", GRIDS)
def test_the_grids_of_a_batch(case):
    heard, rows, said, want = GRIDS[case]
    given = {} if said is None else {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=[None] * said)}}
    assert find_grids(heard, MERGED, given, flags(*rows)) == want


# per case: calls of the tower, visual tokens, what the error says
LOST = {
    "no call": ([], ("xxxx",), "0 calls"),
    "two calls": ([Shapes([(1, 4, 4)], True)] * 2, ("xxxx",), "2 calls"),
    "another shape": ([Shapes([(1, 8, 8)], False)], ("xxxxxx",), "6 tokens for a picture of 8 x 8"),
    "too few tokens": ([Shapes([(1, 4, 4)], True)], ("xxx.",), "3 visual tokens of 1 pictures"),
    "too many tokens": ([Shapes([(1, 4, 4)], True)], ("xxxxx",), "5 visual tokens of 1 pictures"),
}


@pytest.mark.parametrize("case", LOST)
def test_visual_tokens_that_form_no_grids_are_refused(case):
    heard, rows, came = LOST[case]
    with pytest.raises(UnsupportedError, match=f"tokens form a grid, row by row, got {came}"):
        find_grids(heard, MERGED, {}, flags(*rows))


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
