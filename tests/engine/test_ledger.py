"""The ledger of a pass: every per-token argument and mask, cut to the tokens that are left, against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import close

from hf_tokens import TokenMap, UnsupportedError
from hf_tokens.model.arguments import realign
from hf_tokens.testing.contract.architectures import BATCH
from hf_tokens.tokens.entries import Stored
from hf_tokens.tokens.ledger import TokenLedger, hide

N, E = 6, 4
KEPT = torch.tensor([[0, 2, 5], [1, 2, 4]])
UNIFORM = torch.tensor([[0, 2, 5], [0, 2, 5]])


def ledger(index=KEPT, causal=True, **more):
    return TokenLedger.open(torch.zeros(BATCH, N, E), 0, causal, **more).move(TokenMap.keep(N, index))


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("position_ids", (BATCH, N), 1),
        ("position_ids", (1, N), 1),
        ("cos", (1, N, E), 1),
        ("cos", (BATCH, N, E), 1),
        ("rotary", (BATCH, N, N), 1),
        ("freqs", (BATCH, 3, N, E), 2),
        ("position_ids", (3, BATCH, N), 2),
        ("mrope", (3, 1, N, E), 2),
        ("visual_mask", (BATCH, N), 1),
    ],
)
def test_per_token_arguments_are_cut(name, shape, axis):
    value = torch.arange(torch.Size(shape).numel()).view(shape).float()
    out = realign(ledger(), name, value, None)
    batch_axis = 1 if shape[0] == 3 else 0
    for b in range(BATCH):
        row = value.select(batch_axis, min(b, value.shape[batch_axis] - 1))
        assert torch.equal(out.select(batch_axis, b), row.index_select(axis - 1, KEPT[b]))


@pytest.mark.parametrize("shape", [(N, E), (N,)])
def test_a_table_that_all_samples_share(shape):
    value = torch.randn(shape)
    assert torch.equal(realign(ledger(UNIFORM), "rope", value, None), value[UNIFORM[0]])
    with pytest.raises(UnsupportedError, match=r"A table that all samples share \(rope\) needs the same tokens in each sample"):
        realign(ledger(), "rope", value, None)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("encoder_hidden_states", (BATCH, N, E)), ("temb", (BATCH, N)), ("timestep", (N,)), ("scale", (3, 3)), ("encoder_mask", (BATCH, N))],
)
def test_what_belongs_to_others_is_left_alone(name, shape):
    value = torch.randn(shape)
    assert realign(ledger(), name, value, None) is value


def test_containers_and_plain_values():
    value, mine = torch.randn(1, N, E), ledger()
    out = realign(mine, "position_embeddings", (value, [value], {"sin": value}, None, 3), None)
    assert out[0].shape == (BATCH, 3, E) and out[1][0] is out[0] and out[2]["sin"] is out[0] and out[3:] == (None, 3)


def test_joint_tables_keep_the_context_in_front():
    value = torch.randn(1, 2 + N, E)
    out = realign(ledger(context=2), "image_rotary_emb", value, None)
    assert torch.equal(out[1], value[0, [0, 1, 3, 4, 6]])


@pytest.mark.parametrize(("behind", "left"), [(False, [0, 1, 3, 4, 6]), (True, [1, 2, 4, 6, 7])], ids=["in front", "behind"])
def test_joint_masks_and_tables_know_where_the_context_stands(behind, left):
    mine, row = ledger(context=2, behind=behind), torch.arange(N + 2.0)
    assert realign(mine, "rotary", row[None, :, None].expand(1, -1, E), None)[1, :, 0].tolist() == left
    assert realign(mine, "attention_mask", row.expand(BATCH, -1), None)[1].tolist() == left
    assert realign(mine, "attention_mask", row.expand(BATCH, 1, 1, -1), None)[1, 0, 0].tolist() == left
    both = realign(mine, "attention_mask", row.expand(BATCH, 1, N + 2, -1) + 10 * row[:, None], None)[1, 0]
    assert both.tolist() == [[10.0 * i + j for j in left] for i in left]


def test_a_mask_without_a_batch_is_cut_where_all_samples_keep_the_same():
    mask = torch.ones(N, N).tril()
    assert torch.equal(realign(ledger(UNIFORM), "causal_mask", mask, None), mask[[0, 2, 5]][:, [0, 2, 5]])
    with pytest.raises(UnsupportedError, match=r"all samples share \(causal_mask\) needs the same tokens"):
        realign(ledger(), "causal_mask", mask, None)


def test_a_mask_that_is_true_where_it_hides_hides_filler():
    filled = torch.tensor([[True, False, True], [True, True, True]])
    mine = TokenLedger(**{**vars(ledger()), "filled": filled})
    hidden = torch.tensor([[True] + [False] * 5, [False] * 6])
    assert realign(mine, "is_index_masked", hidden, None).tolist() == [[True, True, False], [False, False, False]]


def test_segments_follow_the_tokens():
    packed = TokenLedger.open(torch.zeros(1, N, E), 0, False).move(TokenMap.keep(N, torch.tensor([[0, 2, 5]])))
    assert realign(packed, "cu_seqlens", torch.tensor([0, 3, 6], dtype=torch.int32), None).tolist() == [0, 2, 3]


def test_a_number_of_tokens_in_front_follows_them():
    assert [realign(ledger(UNIFORM), "query_length", count, None) for count in range(N + 1)] == [0, 1, 1, 2, 2, 2, 3]
    assert realign(ledger(), "query_length", 3, None) == 2
    with pytest.raises(UnsupportedError, match=r"\(query_length\) needs the same tokens in each sample"):
        realign(ledger(), "query_length", 1, None)


def random_books(seed, causal):
    """TokenLedger behind a random chain of maps."""
    g = torch.Generator().manual_seed(seed)
    mine = TokenLedger.open(torch.zeros(BATCH, N, E), 0, causal)
    for _ in range(3):
        kind = int(torch.randint(3, (), generator=g))
        if kind == 0:
            tokens = TokenMap.insert(mine.m, torch.randint(mine.m + 1, (BATCH,), generator=g), 2, BATCH)
        elif kind == 1:
            tokens = TokenMap.select(torch.rand(BATCH, mine.m, generator=g) < 0.7)
        else:
            tokens = TokenMap.pool(torch.randint(mine.m, (BATCH, mine.m), generator=g))
        mine = mine.move(tokens)
    return mine


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_what_restore_gives_back_stands_where_it_was(seed):
    mine = random_books(seed, True)
    place = torch.arange(N).expand(BATCH, N)[..., None].float()
    whole = torch.full((BATCH, N, 1), -1.0)
    tokens = torch.arange(mine.m).expand(BATCH, mine.m)[..., None].float()
    out = mine.restore(tokens, whole)[..., 0]
    for b in range(BATCH):
        for i in range(N):
            assert out[b, i] == (mine.slot[b, i] if mine.slot[b, i] >= 0 else -1)
    cut = mine.cut(place, torch.full((BATCH, mine.m, 1), -2.0))[..., 0]
    fresh = mine.flags(mine.fresh, False)
    assert torch.equal(cut[~fresh], mine.rows[~fresh].float()) and bool((cut[fresh] == -2).all())


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_sizes_count_the_tokens_that_joined(seed):
    mine = random_books(seed, True)
    sizes, real = mine.all_sizes(), mine.flags(mine.filled, True)
    for b in range(BATCH):
        for j in range(mine.m):
            members = int((mine.slot[b] == j).sum())
            if real[b, j] and not mine.flags(mine.fresh, False)[b, j]:
                assert sizes[b, j] >= members >= 0


def causal_mask(padding, dtype):
    seen = torch.ones(N, N, dtype=torch.bool).tril() & padding[:, None, None]
    return seen if dtype is bool else torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def seen_by_hand(mine, padding):
    """Who sees whom: the places decide for tokens that were there, the order in the row for those that were not."""
    out = torch.zeros(BATCH, mine.m, mine.m, dtype=torch.bool)
    fresh, there = mine.flags(mine.fresh, False), mine.flags(mine.filled, True)
    for b in range(BATCH):
        for q in range(mine.m):
            for k in range(mine.m):
                before = mine.rows[b, k] <= mine.rows[b, q]
                if fresh[b, q] or fresh[b, k]:
                    before = before and k <= q
                out[b, q, k] = before and bool(padding[b, mine.rows[b, k]]) and bool(there[b, k])
    return out


@given(st.integers(0, 10**6), st.sampled_from([bool, float]))
@settings(max_examples=40, deadline=None)
def test_causal_masks(seed, dtype):
    mine, padding = random_books(seed, True), torch.ones(BATCH, N, dtype=torch.bool)
    padding[1, :2] = False
    out = realign(mine, "attention_mask", causal_mask(padding, dtype), None)[:, 0]
    seen, wanted = out if dtype is bool else out > -1, seen_by_hand(mine, padding)
    anyone = wanted.any(dim=-1)  # a query that sees nothing is read by no one
    assert torch.equal(seen[anyone], wanted[anyone])


def test_two_dimensional_masks_follow_the_tokens():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert realign(ledger(), "attention_mask", mask, None).tolist() == [[1, 1, 1], [0, 1, 1]]


def test_stored_keys_come_first():
    mine = TokenLedger.open(torch.zeros(BATCH, 2, E), 6, True)
    mine = mine.move(TokenMap.keep(2, torch.tensor([[0, 1], [0, 1]])))
    stored = Stored(torch.tensor([[0, 3], [2, 5]]), torch.tensor([[True, True], [True, False]]))
    whole = torch.ones(BATCH, 1, 2, 8, dtype=torch.bool)
    whole[..., 0, 7] = False
    out = realign(mine, "attention_mask", whole, stored)
    assert out[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert out[1, 0].tolist() == [[True, False, True, False], [True, False, True, True]]
    close(mine.implied_mask(torch.zeros(BATCH, 2, E), stored)[:, 0].float(), out[:, 0].float(), "implied")


def test_stored_keys_per_head():
    mine = TokenLedger.open(torch.zeros(BATCH, 1, E), 4, True)
    stored = Stored(torch.tensor([[[0, 1], [2, 3]]] * BATCH), torch.tensor([[[True, False], [True, True]]] * BATCH))
    whole = torch.ones(BATCH, 1, 1, 5, dtype=torch.bool)
    whole[1, ..., 2] = False
    out = realign(mine, "attention_mask", whole, stored)
    assert out[0, :, 0].tolist() == [[True, False, True], [True, True, True]]
    assert out[1, :, 0].tolist() == [[True, False, True], [False, True, True]]


def test_hide_keeps_a_lost_query_defined():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    visible = torch.tensor([[[[False, False], [True, False]]]])
    assert hide(mask, visible).tolist() == [[[[True, True], [True, False]]]]


def test_proportional_attention_adds_the_log_of_the_size():
    mine = TokenLedger.open(torch.zeros(1, 4, E), 0, False).move(TokenMap.pool(torch.tensor([[0, 0, 0, 1]])))
    mine = TokenLedger(**{**vars(mine), "proportional": True})
    wanted = torch.tensor([3.0, 1.0]).log()
    assert torch.allclose(mine.implied_mask(torch.zeros(1, 2, E), None)[0, 0, 0], wanted)
    mask = realign(mine, "attention_mask", torch.ones(1, 1, 4, 4, dtype=torch.bool), None)
    assert torch.allclose(mask[0, 0, 0], wanted)
