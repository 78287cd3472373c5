"""Spans of blocks: tokens stand together from one block to another and come back; one span in another, other methods inside."""

from dataclasses import dataclass

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, lm_head
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import all_close, close

from hf_tokens import MethodConfig, TokenMap, TokenReducer, UnsupportedError, get_token_model, option, register
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig


@dataclass(frozen=True)
class PairsConfig(MethodConfig):
    size: int = option(2, ge=1, zero=1, help="Neighbours that stand together.")


@pytest.fixture(autouse=True)
def pairs():
    @register("test-pairs", PairsConfig)
    class Pairs(TokenReducer):
        """Paper: none, arXiv:0000.00000"""

        site, spans = "before", True

        def assign(self, hidden):
            place = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            return TokenMap.pool(place // self.config.size * self.config.size)

    yield
    del METHODS["test-pairs"]


def join(x, size=2):
    return torch.stack([part.mean(dim=0) for part in x.split(size)])


def apart(x, n, size=2):
    return torch.stack([x[i // size] for i in range(n)])


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more)


def test_tokens_come_back_behind_the_last_block():
    base, (ids, _) = gpt2(), batch((9,))
    model = get_token_model(base, PairsConfig(layers=(1, 2))).eval()
    out = logits(model, ids, output_hidden_states=True)
    run, x = blocks(base), embed(base, ids[0], torch.arange(9))
    states = [x, run[0](x)[0]]
    slots = join(states[-1])
    for i in (1, 2):
        slots = run[i](slots)[0]
        states.append(apart(slots, 9))
    close(out.logits[0], lm_head(base, run[3](states[-1])[0]))
    all_close([state[0] for state in out.hidden_states[:4]], states)
    assert model(ids, use_cache=True).past_key_values.layers[2].length == 5


@pytest.mark.parametrize("inner", [(1, 2), (0, 1), (2, 3), (0, 1, 2, 3)])
def test_one_span_in_another(inner):
    base, (ids, _) = gpt2(), batch((12,))
    model = get_token_model(base, [PairsConfig(layers=(0, 1, 2, 3)), PairsConfig(size=3, layers=inner)]).eval()
    x = join(embed(base, ids[0], torch.arange(12)))
    n = len(x)
    for i, block in enumerate(blocks(base)):
        x = join(x, 3) if i == inner[0] else x
        x = block(x)[0]
        x = apart(x, n, 3) if i == inner[-1] else x
    close(logits(model, ids).logits[0], lm_head(base, apart(x, 12)))


def test_spans_that_cross_are_refused():
    model = get_token_model(gpt2(), [PairsConfig(layers=(0, 1, 2)), PairsConfig(layers=(1, 2, 3))])
    with pytest.raises(UnsupportedError, match="Of two spans of blocks one lies in the other"):
        logits(model, batch((8,))[0])
    with pytest.raises(UnsupportedError, match="Name blocks that follow each other"):
        get_token_model(gpt2(), PairsConfig(layers=(0, 2)))


def test_a_slot_that_vanishes_inside_comes_back_as_it_was():
    base, (ids, _) = gpt2(), batch((8,))
    model = get_token_model(base, [PairsConfig(layers=(0, 1, 2)), ProbeDropConfig(share=0.4, layers=(1,))]).eval()
    run, x = blocks(base), join(embed(base, ids[0], torch.arange(8)))
    x = run[0](x)[0]
    kept = [2, 3]  # the first tokens of these pairs stand where six tenths of the places are
    y = x[kept]
    for i in (1, 2):
        y = run[i](y)[0]
    back = x.clone()
    back[kept] = y
    close(logits(model, ids).logits[0], lm_head(base, run[3](apart(back, 8))[0]))


def test_tokens_inserted_before_a_span_are_there_behind_it():
    base, (ids, _) = gpt2(), batch((7,))
    model = get_token_model(base, [ProbeInsertConfig(tokens=1, layers=(0, 3)), PairsConfig(layers=(1, 2))]).eval()
    first, last = (p.detach() for name, p in model.named_parameters() if name.endswith("bank"))
    run, x = blocks(base), torch.cat([first, embed(base, ids[0], torch.arange(7))])
    x = join(run[0](x)[0])
    for i in (1, 2):
        x = run[i](x)[0]
    x = apart(x, 8)
    x[0] = last[0]  # the bank sits in the last block too, and rewrites its token
    close(logits(model, ids).logits[0], lm_head(base, run[3](x)[0][1:]))


def test_a_change_from_outside_is_refused():
    base, (ids, _) = gpt2(), batch((8,))
    model = get_token_model(base, PairsConfig(layers=(1, 2))).eval()
    handle = base.transformer.h[1].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(UnsupportedError, match="nothing but the blocks may change them"):
        logits(model, ids)
    handle.remove()
    base.transformer.h[2].register_forward_hook(lambda module, args, output: output + 1)
    logits(model, ids)


def test_checkpointed_blocks_give_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        specimen = zoo.build("diffusers/DiTTransformer2DModel")
        model = get_token_model(specimen.model, PairsConfig(layers=(1, 2))).train()
        model.get_base_model().requires_grad_()
        if checkpointed:
            model.get_base_model().enable_gradient_checkpointing()
        torch.manual_seed(0)
        zoo.tensors(model(**specimen.inputs))[0].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        close(grads[1][name], grad, name)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6))
def test_segments_by_hand(rows, n, seed):
    draw = torch.Generator().manual_seed(seed)
    ends, lead = torch.rand(rows, n, generator=draw) < 0.4, torch.rand(rows, generator=draw) < 0.5
    tokens = TokenMap.segments(ends, lead)
    real = ends | (torch.rand(rows, n, generator=draw) < 0.7)
    assert torch.equal(TokenMap.segments(ends, lead, real=real).slot, tokens.slot.masked_fill(~real, -1))
    for row in range(rows):
        slots, reads, members = [["lead"]] if lead[row] else [], [], []
        for i in range(n):
            members.append(i)
            if ends[row, i]:
                slots.append(members)
                members = []
            reads.append(len(slots) - 1)
        lack = tokens.m - len(slots)
        filled = torch.ones(tokens.m, dtype=torch.bool) if tokens.filled is None else tokens.filled[row]
        assert filled.tolist() == [False] * lack + [True] * len(slots)
        assert tokens.reads[row].tolist() == [-1 if r < 0 else r + lack for r in reads]
        for slot, inside in enumerate(slots):
            assert [i for i in range(n) if tokens.slot[row, i] == slot + lack] == (inside if inside != ["lead"] else [])
            assert inside == ["lead"] or tokens.source[row, slot + lack] == inside[-1]
        assert [i for i in range(n) if tokens.slot[row, i] < 0] == members
        fresh = torch.zeros(tokens.m, dtype=torch.bool) if tokens.fresh is None else tokens.fresh[row]
        assert fresh.nonzero()[:, 0].tolist() == ([lack] if lead[row] else [])
