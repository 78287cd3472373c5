"""DivPrune against a slow loop over one row, written from arXiv:2503.02175 and where its release begins."""

import math

import pytest
import torch
from by_hand import llava, llava_block, llava_rows, prompts
from hf_tokens_adapters.token_reducer.divprune import DivPrune

from hf_tokens import Dims, DivPruneConfig, get_token_model, measure


def distance(x, y):
    dot = lambda a, b: sum(float(i) * float(j) for i, j in zip(a, b, strict=True))
    return 1 - dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def kept(tokens, ratio):
    """Indices of the tokens that stay, in their order: the loneliest first, then each time the one farthest from those chosen."""
    n = len(tokens)
    apart = [[distance(x, y) for y in tokens] for x in tokens]
    count, everyone = min(n, max(1, round(ratio * n))), range(n)
    nearest = lambda j, others: min((apart[i][j] for i in others if i != j), default=math.inf)
    chosen = [max(everyone, key=lambda j: (nearest(j, everyone), -j))]
    while len(chosen) < count:
        chosen.append(max((j for j in everyone if j not in chosen), key=lambda j: (nearest(j, chosen), -j)))
    return sorted(chosen)


# per case: text in front, image tokens, text behind, padding in front, share that stays
CASES = {
    "the scripts' share": (3, 64, 5, 0, 0.098),
    "half": (2, 15, 4, 0, 0.5),
    "padding": (2, 15, 4, 6, 0.3),
    "one image token": (1, 1, 2, 0, 0.098),
    "two image tokens": (1, 2, 2, 0, 0.5),
    "fewer than one": (1, 4, 2, 0, 0.098),
    "nothing but the image": (0, 9, 0, 0, 0.4),
    "no image": (4, 0, 0, 3, 0.5),
    "nearly all": (2, 9, 1, 0, 0.95),
}


def row(case, dtype=torch.float64):
    front, n, behind, padding, ratio = CASES[case]
    draw = torch.Generator().manual_seed(n)
    spans = [(padding, False, False), (front, True, False), (n, True, True), (behind, True, False)]
    mask, image = (torch.tensor([flags[at] for flags in spans for _ in range(flags[0])]) for at in (1, 2))
    hidden = torch.randn(len(mask), 6, generator=draw, dtype=dtype).masked_fill(~mask[:, None], torch.nan)
    return hidden, image, mask, ratio


def ask(hidden, image, mask, ratio):
    return DivPrune(DivPruneConfig(ratio=ratio), Dims(6, 2, 2, 3, 0, 4, "text", True)).assign(hidden=hidden, visual=image, mask=mask)


@pytest.mark.parametrize("case", CASES)
def test_matches_the_loop(case):
    hidden, image, mask, ratio = row(case)
    found = ask(hidden[None], image[None], mask[None], ratio)
    places = image.nonzero()[:, 0].tolist()
    if not places:
        assert found is None
        return
    stays = {places[i] for i in kept(hidden[image], ratio)}
    want = [i for i in mask.nonzero()[:, 0].tolist() if not image[i] or i in stays]
    assert found.source[0].tolist() == want and found.filled is None


def test_rows_of_a_batch_choose_for_themselves():
    rows = [row(case) for case in ("half", "nothing but the image", "no image", "one image token")]
    n = max(len(hidden) for hidden, *_ in rows)
    fill = lambda x, value: torch.cat([torch.full((n - len(x), *x.shape[1:]), value, dtype=x.dtype), x])
    hidden, image, mask = (
        torch.stack([fill(r[0], torch.nan) for r in rows]),
        *(torch.stack([fill(r[i], False) for r in rows]) for i in (1, 2)),
    )
    found = ask(hidden, image, mask, 0.5)
    filled = torch.ones_like(found.source, dtype=torch.bool) if found.filled is None else found.filled
    for i, (alone, its_image, its_mask, _) in enumerate(rows):
        places, want = its_image.nonzero()[:, 0].tolist(), its_mask.nonzero()[:, 0].tolist()
        stays = {places[j] for j in kept(alone[its_image], 0.5)} if places else set()
        want = [place + n - len(alone) for place in want if not its_image[place] or place in stays]
        assert found.source[i][filled[i]].tolist() == want


def test_equal_tokens_are_not_chosen_twice():
    hidden = torch.randn(1, 3, 6, dtype=torch.float64).repeat_interleave(3, dim=1)
    mask = torch.ones(1, 9, dtype=torch.bool)
    assert ask(hidden, mask, mask, 0.34).source[0].div(3, rounding_mode="floor").sort().values.tolist() == [0, 1, 2]
    found = ask(hidden, mask, mask, 0.6).source[0].tolist()
    assert len(set(found)) == len(found) == 5


# images of each row, side of the padding
MODELS = [((1,), "left"), ((2, 1, 1), "left"), ((1, 2), "right"), ((1, 0, 2), "left")]


@pytest.mark.parametrize(("images", "side"), MODELS)
@torch.no_grad()
def test_the_language_model_gets_the_chosen_tokens_in_their_places(images, side):
    base, given = llava(), prompts(images, side=side)
    rows = [(x.detach(), image, mask) for x, image, mask in llava_rows(base, given)]
    model = get_token_model(base, DivPruneConfig(ratio=0.3)).eval()
    got = model(**given, position_ids=(given["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits
    text = base.model.language_model
    for logits, (x, image, mask) in zip(got, rows, strict=True):
        stays = {image[i] for i in kept(x[image], 0.3)} if image else set()
        places = [i for i in range(len(x)) if i not in image or i in stays]
        x = x[places]
        with model.disable_adapter():
            for block in text.layers:
                x, _ = llava_block(text, block, x, places)
            torch.testing.assert_close(logits[mask][places], base.lm_head(text.norm(x)), rtol=1e-9, atol=1e-9)


def test_generation_is_that_of_each_row_alone():
    model, given = get_token_model(llava(), DivPruneConfig(ratio=0.3)).eval(), prompts((2, 1, 1))
    together, taken, n = model.generate(**given, max_new_tokens=5, do_sample=False), 0, given["input_ids"].shape[1]
    for i, count in enumerate((2, 1, 1)):
        ids = given["input_ids"][i][given["attention_mask"][i].bool()][None]
        pixels, taken = given["pixel_values"][taken : taken + count], taken + count
        more = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        alone = model.generate(input_ids=ids, **more, max_new_tokens=5, do_sample=False)
        assert together[i, n:].tolist() == alone[0, ids.shape[1] :].tolist()


def test_tokens_and_memory_are_saved():
    given, model = prompts((1,), text=(2, 5)), get_token_model(llava(), DivPruneConfig(ratio=1 / 3)).eval()
    cost = measure(model, **given, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, **given, use_cache=True)
    assert cost.kv_bytes == whole.kv_bytes * 10 // 16
