"""Landmark attention against its paper: equations 1 to 4 of arXiv:2305.16300, and the retrieval of section 3.2, query by query."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, greedy, llama, lm_head, turned
from largest import Largest
from tolerances import close

from hf_tokens import (
    ConfigError,
    Dims,
    DynamicTokenPoolingConfig,
    LandmarkAttention,
    LandmarkAttentionConfig,
    PrefixKVConfig,
    UnsupportedError,
    get_token_model,
    measure,
)
from hf_tokens.handlers import token_bank as handler
from hf_tokens.testing import CACHE, zoo
from hf_tokens.testing.contract.parameters import stir

IGNORED = -1
SINGLE = {"rtol": 1e-4, "atol": 1e-6}  # a Llama's norms and tables are in single precision


def in_slots(scores, read, block, landmark, i, c, chosen=None):
    """The scores where blocks are read in front of the local ones: of landmarks that are to be chosen by, or of the chosen blocks' tokens.

    Of M blocks in memory the last K stand where they stand and all others where the last of these others does, to be chosen from; those
    that are chosen come one behind the other, the last K again where they may stand at most, one slot further on.
    """
    step, memory = c.block + 1, max(0, block[i] - c.local // c.block)
    last, scores = min(c.retrieve, memory), [list(row) for row in scores]
    for h, row in enumerate(scores):
        for j in range(i + 1):
            b = block[j]
            if b >= memory or chosen is None and (not landmark[j] or b >= memory - last) or chosen is not None and b not in chosen:
                continue
            there = memory - last - 1 if chosen is None else memory - last - 1 + chosen.index(b) + (b >= memory - last)
            row[j] = read(h, j, (there - b) * step)
    return scores


def naive(scores, block, landmark, i, c, shared=1, training=False, read=None):
    """Weights (h j) of query i over the keys up to itself: scores (h j), the block of each token, whether it is a landmark.

    `read` gives the score of a head with a key that is read some places further on, if blocks are read in slots.

    `shared` heads that lie side by side read the keys of one head.
    """
    heads, keys = len(scores), range(i + 1)
    mark = {block[j]: j for j in keys if landmark[j]}  # the landmark of each block that has one
    p = [mark.get(block[j], math.inf) if not landmark[j] else j for j in keys]
    groups = []
    for j in keys:
        if not landmark[j]:
            groups.append(p[j] if p[j] != math.inf else ("no landmark yet", block[j]))
        elif block[j] == block[i]:
            groups.append(IGNORED)
        else:
            groups.append("the query's")
    mine = p[i] if p[i] != math.inf else ("no landmark yet", block[i])
    groups = ["the query's" if group == mine else group for group in groups]

    def softmax(row, there):
        total = {}
        for j in there:
            total[groups[j]] = total.get(groups[j], 0) + math.exp(row[j])
        return {j: math.exp(row[j]) / total[groups[j]] for j in there}

    weights, near = [[0.0] * (i + 1) for _ in range(heads)], scores
    scores = scores if training or read is None else in_slots(near, read, block, landmark, i, c)
    for first in range(0, heads, shared):
        side = range(first, first + shared)
        far = [b for b, j in mark.items() if b != block[i] and block[i] - b > c.local // c.block]
        share = {b: max(softmax(scores[h], keys)[mark[b]] for h in side) for b in far}
        best = sorted(far, key=lambda b: (-round(math.log(share[b]), 3), -b))
        left_out = set() if training else {*best[c.retrieve :]}
        there = [j for j in keys if block[j] not in left_out]
        chosen = sorted(best[: c.retrieve])
        moved = scores if training or read is None else in_slots(near, read, block, landmark, i, c, chosen)
        for h in side:
            s = softmax(moved[h], there)
            for j in there:
                if landmark[j]:
                    continue
                weights[h][j] = s[j] if groups[j] == "the query's" else s[j] * s[mark[block[j]]]
    return torch.tensor(weights, dtype=torch.float64)


def with_marks(rows, mark, ell):
    """Tokens with a landmark behind each block of them, the block of each, and which are landmarks."""
    hidden, block, landmark = [], [], []
    for place, row in enumerate(rows):
        hidden.append(row)
        block.append(place // ell)
        landmark.append(False)
        if place % ell == ell - 1:
            hidden.append(mark)
            block.append(place // ell)
            landmark.append(True)
    return torch.stack(hidden), block, landmark


def by_paper(base, ids, mark, c, training=False):
    """Logits of one row without padding, and how many keys each query of a block read at most."""
    x, block, landmark = with_marks(embed(base, ids, torch.arange(len(ids))), mark, c.block)
    for b in base.transformer.h:
        q, k, v = b.attn.c_attn(b.ln_1(x)).view(len(x), 3, b.attn.num_heads, -1).permute(1, 2, 0, 3)
        out = []
        for i in range(len(x)):
            scores = [[float(q[h, i] @ k[h, j]) / math.sqrt(q.shape[-1]) for j in range(i + 1)] for h in range(len(q))]
            weights = naive(scores, block, landmark, i, c, training=training)
            out.append(torch.einsum("hj,hje->he", weights, v[:, : i + 1]).flatten())
        x = x + b.attn.c_proj(torch.stack(out))
        x = x + b.mlp(b.ln_2(x))
    return lm_head(base, x[[j for j, is_mark in enumerate(landmark) if not is_mark]])


def by_release(base, ids, mark, c, training=False):
    """The same of a Llama, whose landmarks have places of their own, as in the authors' program."""
    ell = c.block
    x, block, landmark = with_marks(base.model.embed_tokens(ids), mark, ell)
    for b in base.model.layers:
        normed = b.input_layernorm(x)
        q, k, v = (f(normed).view(len(x), -1, 4).transpose(0, 1) for f in (b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj))
        shared, out = len(q) // len(k), []
        for i in range(len(x)):
            query = [turned(q[h, i], i) for h in range(len(q))]
            read = lambda h, j, by, query=query, k=k, shared=shared: float(query[h] @ turned(k[h // shared, j], j + by)) / 2
            scores = [[read(h, j, 0) for j in range(i + 1)] for h in range(len(q))]
            weights = naive(scores, block, landmark, i, c, shared, training, read if c.places == "stingy" else None)
            out.append(torch.einsum("hj,hje->he", weights, v[:, : i + 1].repeat_interleave(shared, dim=0)).flatten())
        x = x + b.self_attn.o_proj(torch.stack(out))
        x = x + b.mlp(b.post_attention_layernorm(x))
    return base.lm_head(base.model.norm(x[[j for j, is_mark in enumerate(landmark) if not is_mark]]))


def surgery(c, base=None):
    model = get_token_model(gpt2(2) if base is None else base, c)
    (mark,) = [module.mark for module in model.modules() if isinstance(module, LandmarkAttention) and module.is_first_block]
    torch.nn.init.normal_(mark, std=0.5, generator=torch.Generator().manual_seed(1))
    return model.eval(), mark.detach()[0]


CASES = [
    pytest.param((13,), {"block": 3, "local": 0, "retrieve": 1}, id="one block of memory"),
    pytest.param((14, 9), {"block": 2, "local": 2, "retrieve": 2}, id="local blocks, padded"),
    pytest.param((12, 5, 1), {"block": 4, "local": 0, "retrieve": 9}, id="all blocks, padded to one token"),
    pytest.param((7,), {"block": 1, "local": 0, "retrieve": 2}, id="a landmark behind each token"),
    pytest.param((6, 4), {"block": 7}, id="no block is full"),
    pytest.param((8, 8), {"block": 4, "local": 3, "retrieve": 1}, id="the last block just full"),
]


@pytest.mark.drawn
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("lengths", "knobs"), CASES)
def test_model_is_the_loop(lengths, knobs, side):
    c = LandmarkAttentionConfig(**knobs, places="shared")
    model, mark = surgery(c)
    ids, mask = batch(lengths, side)
    place = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    for training in (True, False):
        got = model.train(training)(ids, attention_mask=mask.long(), position_ids=place, use_cache=False).logits
        for row, real in enumerate(mask):
            close(got[row, real], by_paper(gpt2(2), ids[row, real], mark, c, training), f"row {row}, training {training}")


@torch.no_grad()
@pytest.mark.parametrize(("lengths", "knobs"), CASES)
def test_decoding_is_the_loop(lengths, knobs):
    """A token that is generated reads the chosen blocks only; where it fills a block, a landmark follows it."""
    c = LandmarkAttentionConfig(**knobs, places="shared")
    model, mark = surgery(c)
    ids, mask = batch(lengths)
    tokens, logits, _ = greedy(model, ids, mask, 7)
    for row, n in enumerate(lengths):
        whole = torch.cat([ids[row, -n:], tokens[row, :-1]])
        close(logits[row], by_paper(gpt2(2), whole, mark, c)[n - 1 :])


SLOTTED = [
    pytest.param((22,), {"block": 3, "local": 0, "retrieve": 1}, id="one block of memory"),
    pytest.param((21, 13), {"block": 2, "local": 2, "retrieve": 2}, id="local blocks, padded"),
    pytest.param((17, 5, 1), {"block": 4, "local": 0, "retrieve": 9}, id="all blocks, padded to one token"),
    pytest.param((9,), {"block": 1, "local": 0, "retrieve": 2}, id="a landmark behind each token"),
    pytest.param((16, 16), {"block": 4, "local": 3, "retrieve": 1}, id="the last block just full"),
]


@pytest.mark.drawn
@torch.no_grad()
@pytest.mark.parametrize("places", ["stingy", "own"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("lengths", "knobs"), SLOTTED)
def test_model_with_places_of_the_release_is_the_loop(lengths, knobs, side, places):
    c = LandmarkAttentionConfig(**knobs, places=places)
    model, mark = surgery(c, llama())
    ids, mask = batch(lengths, side)
    for training in (True, False):
        got = model.train(training)(ids, attention_mask=mask.long(), use_cache=False).logits
        for row, real in enumerate(mask):
            want = by_release(llama(), ids[row, real], mark, c, training)
            torch.testing.assert_close(got[row, real], want, **SINGLE)


@pytest.mark.drawn
@torch.no_grad()
@pytest.mark.parametrize("places", ["stingy", "own"])
@pytest.mark.parametrize(("lengths", "knobs"), SLOTTED)
def test_decoding_with_places_of_the_release_is_the_loop(lengths, knobs, places):
    c = LandmarkAttentionConfig(**knobs, places=places)
    model, mark = surgery(c, llama())
    ids, mask = batch(lengths)
    tokens, logits, _ = greedy(model, ids, mask, 7)
    for row, n in enumerate(lengths):
        whole = torch.cat([ids[row, -n:], tokens[row, :-1]])
        torch.testing.assert_close(logits[row], by_release(llama(), whole, mark, c)[n - 1 :], **SINGLE)


def test_heads_that_share_keys_choose_blocks_together():
    """The largest of their shares counts; three queries, and the last one alone as it is decoded."""
    c = LandmarkAttentionConfig(block=2, local=0, retrieve=1, places="shared")
    dims = Dims(width=8, heads=4, kv_heads=2, head_dim=2, layer=0, layers=1, kind="text", causal=True)
    method = LandmarkAttention(c, dims).eval()
    block = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    landmark = [j % 3 == 2 for j in range(10)]
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 4, 10, 10, generator=generator, dtype=torch.float64) * 3
    scores = scores.masked_fill(~torch.ones(10, 10).tril().bool(), -torch.inf)
    places = torch.tensor([[2 * b + (j % 3 if j % 3 < 2 else 1) for j, b in enumerate(block)]])
    for rows in ([7, 8, 9], [9]):
        here = scores[:, :, rows]

        def affinity(index=None, by=None, here=here):
            wide = None if index is None else index.repeat_interleave(2, dim=1)[:, :, None].expand(-1, -1, here.shape[2], -1)
            return here if index is None else here.gather(3, wide)

        index, bias, _ = method.attend(affinity, places[:, rows], places[:, None], torch.tensor(landmark).expand(1, 2, -1))
        weights = (affinity(index) + bias).softmax(dim=-1)
        if index is not None:
            wide = index.repeat_interleave(2, dim=1)[:, :, None].expand_as(weights)
            weights = torch.zeros_like(here).scatter_add(3, wide, weights)
        for q, i in enumerate(rows):
            want = naive(scores[0, :, i, : i + 1].tolist(), block, landmark, i, c, shared=2)
            close(weights[0, :, q, : i + 1], want, f"query {i}")
            assert float(weights[0, :, q, i + 1 :].sum()) == 0


@torch.no_grad()
def test_a_prompt_in_chunks_is_the_prompt():
    c = LandmarkAttentionConfig(block=3, local=3, retrieve=1, places="shared")
    model, _ = surgery(c)
    ids, _ = batch((17,))
    whole = model(ids, use_cache=False).logits
    cache, parts = None, []
    for chunk in ids.split((4, 5, 1, 7), dim=1):
        out = model(chunk, **{CACHE: cache}, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_what_is_cropped_takes_its_landmark_along():
    c = LandmarkAttentionConfig(block=3, local=0, retrieve=1, places="shared")
    model, _ = surgery(c)
    ids, _ = batch((11,))
    cache = model(ids[:, :9], use_cache=True).past_key_values
    cache.crop(-2)
    close(model(ids[:, 7:], **{CACHE: cache}).logits, model(ids, use_cache=False).logits[:, 7:])


@torch.no_grad()
def test_decoding_reads_what_it_retrieves():
    """FLOPs of a token behind a long prompt: with few blocks they hardly grow with it."""
    base = zoo.build("llama").model
    ids = torch.randint(3, 90, (1, 400), generator=torch.Generator().manual_seed(0))

    def token(model):
        cache = model(ids, use_cache=True).past_key_values
        return measure(model, input_ids=ids[:, :1], **{CACHE: cache}).flops

    full = token(base)
    few = token(get_token_model(base, LandmarkAttentionConfig(block=10, local=10, retrieve=2, places="shared")).eval())
    assert few < 0.7 * full


def test_gradients_reach_the_mark_through_the_choice_of_blocks():
    model, _ = surgery(LandmarkAttentionConfig(block=3, places="shared"))
    ids, _ = batch((12,))
    model.train()(ids, labels=ids).loss.backward()
    (mark,) = [p for p in model.parameters() if p.requires_grad]
    assert mark.grad.abs().max() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_queries_in_parts_are_all_at_once(side, monkeypatch):
    c, (ids, mask) = LandmarkAttentionConfig(block=3, local=3, retrieve=1, places="shared"), batch((13, 6), side)
    found = []
    for scores in (1 << 24, 200):  # 200 are two queries of this batch
        monkeypatch.setattr(handler, "SCORES_AT_A_TIME", scores)
        model, _ = surgery(c)
        out = model(ids, attention_mask=mask.long(), use_cache=False).logits
        model.train()
        kept = model(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100), use_cache=False)
        kept.loss.backward()
        found.append((out[mask], kept.logits[mask], *(p.grad for p in model.parameters() if p.requires_grad)))
    for whole, parts in zip(*found, strict=True):
        close(parts, whole)


@torch.no_grad()
def test_no_matrix_of_scores_is_built(monkeypatch):
    found = []
    for scores in (1 << 24, 1 << 10):
        monkeypatch.setattr(handler, "SCORES_AT_A_TIME", scores)
        model, _ = surgery(LandmarkAttentionConfig(block=8, local=8, retrieve=2, places="shared"))
        with Largest() as seen:
            model.get_base_model().transformer(torch.arange(60)[None] % 50, attention_mask=torch.ones(1, 60), use_cache=False)
        found.append(seen.elements)
    heads, tokens = 3, 60 + 60 // 8
    assert found[0] >= heads * tokens**2 > 2 * found[1]


def test_a_row_whose_blocks_have_no_landmark_reads_them_all():
    specimen = zoo.build("mt5")
    pooled = DynamicTokenPoolingConfig(prior=0.5, hidden=16, layers=(0, 1, 2, 3))  # takes the tokens that a landmark would follow
    landmarks = LandmarkAttentionConfig(block=3, local=3, retrieve=1, places="shared", layers=(0, 1, 2, 3))
    torch.manual_seed(1)
    model = stir(get_token_model(specimen.model, [pooled, landmarks])).eval()
    with torch.no_grad():
        together = model(**specimen.inputs).logits
        for i in range(2):
            close(together[i : i + 1], model(**{name: value[i : i + 1] for name, value in specimen.inputs.items()}).logits)


@pytest.mark.parametrize("places", ["stingy", "shared"])
def test_a_query_whose_blocks_have_joined_their_landmarks_reads_these_and_nothing_later(places):
    specimen = zoo.build("llama")
    landmarks = LandmarkAttentionConfig(block=3, local=3, retrieve=1, places=places, layers=(0, 1, 2, 3))
    pooled = DynamicTokenPoolingConfig(prior=0.1, boundaries="fixed", layers=(0, 1, 2, 3))  # a landmark ends a segment, too
    torch.manual_seed(0)
    model = stir(get_token_model(specimen.model, [landmarks, pooled])).eval()
    ids, mask = batch((24, 17, 6))
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask.long()).logits
        for row, real, logits in zip(ids, mask, together, strict=True):
            close(logits[real], model(input_ids=row[real][None]).logits[0])
        other = ids[:1].clone()
        other[0, 19] += 1
        changed = (model(input_ids=other).logits[0] - together[0]).abs().amax(dim=1)
    assert changed[:19].max() < 1e-5 < changed[22:].min()  # the next block reads it


def test_what_looks_at_the_same_attention_is_refused():
    with pytest.raises(UnsupportedError, match="shapes an attention call"):
        get_token_model(gpt2(2), [LandmarkAttentionConfig(block=3, places="shared"), PrefixKVConfig()])
    deaf = zoo.build("falcon")  # its attention calls no interface
    with pytest.raises(UnsupportedError, match="calls the attention interface"):
        get_token_model(deaf.model, LandmarkAttentionConfig(block=3, places="shared"))(**deaf.inputs)
    with pytest.raises(ConfigError, match="retrieve"):
        LandmarkAttentionConfig(retrieve=0)


def test_by_hand_without_landmarks_is_the_model():
    ids, _ = batch((9,))
    base = gpt2(2)
    with torch.no_grad():
        hidden = embed(base, ids[0], torch.arange(9))
        for block in blocks(base):
            hidden, _ = block(hidden)
        close(by_paper(base, ids[0], None, LandmarkAttentionConfig(block=50, places="shared")), lm_head(base, hidden))
