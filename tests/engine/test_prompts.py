"""The door that gives a short prompt away: any reducer's tokens, as ids."""

import pytest
import torch
from by_hand import batch, gpt2

from hf_tokens import SelectionPConfig, UnsupportedError, compress_prompt, embed_prompt, get_token_model
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeInsertConfig
from hf_tokens.tools.surgeries import surgery_of


def test_two_reducers_and_inserted_tokens():
    ids, mask = batch((12, 7), "right")
    model = get_token_model(gpt2(), [ProbeInsertConfig(tokens=2), SelectionPConfig(keep=0.5, first=0, layers=(0, 2))])
    short = compress_prompt(model, ids, mask)
    assert [len(row) for row in short] == [1 + 2, 1 + 1]  # half of 11 is 5, half of that 2; half of 6 is 3, half of that 1
    for row, given, real in zip(short, ids, mask, strict=True):
        places = [given[real].tolist().index(i) for i in row.tolist()]
        assert places == sorted(places) and row[-1] == given[real][-1]


def test_at_zero_strength_the_prompt_stays():
    ids, mask = batch((9, 4))
    model = get_token_model(gpt2(), SelectionPConfig(keep=1.0))
    assert [row.tolist() for row in compress_prompt(model, ids, mask)] == [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (4,)])
def test_no_prompt_is_refused(shape):
    model = get_token_model(gpt2(), SelectionPConfig(keep=0.5))
    with pytest.raises(UnsupportedError, match="needs prompts of one token at least"):
        compress_prompt(model, torch.zeros(shape, dtype=torch.long))


def test_it_leaves_the_model_as_it_was():
    ids, _ = batch((9, 9))
    model = get_token_model(gpt2(), SelectionPConfig(keep=0.5, layers=(1,))).train()
    with torch.no_grad():
        want = model(ids).logits
        compress_prompt(model, ids)
        torch.testing.assert_close(model(ids).logits, want)
    surgery = surgery_of(model)
    assert model.training and not surgery.listeners and surgery.streams[0].plan.exit == 4


def test_blocks_behind_the_last_reducer_do_not_run():
    model = get_token_model(gpt2(), SelectionPConfig(keep=0.5, layers=(1,)))
    ran = []
    for block in model.base_model.model.transformer.h:
        block.mlp.register_forward_hook(lambda module, args, output: ran.append(output.shape[1]))
    compress_prompt(model, batch((9, 9))[0])
    assert ran == [9, 9, 1, 1]  # one filler shows what a block puts out
    compress_prompt(model, batch((9, 9))[0])
    assert ran[4:] == [9, 9]


@pytest.mark.parametrize("name", ["t5", "off", "none"])
def test_models_without_a_prompt_to_shorten_are_refused(name):
    base = zoo.build("t5").model if name == "t5" else gpt2()
    model = get_token_model(base, ProbeInsertConfig(tokens=2) if name == "none" else SelectionPConfig())
    ids = batch((6, 6))[0]
    with pytest.raises(UnsupportedError, match="decoder-only language model in which a TokenReducer acts"):
        if name == "off":
            with model.disable_adapter():
                compress_prompt(model, ids)
        compress_prompt(model, ids)


def test_vectors_stand_where_tokens_stood():
    decoder, ids = gpt2(), batch((7, 7))[0]
    vectors = decoder.transformer.wte(ids[:, 2:5]).detach()
    given = embed_prompt(decoder, ids[:, :2], vectors, ids[:, 5:])
    with torch.no_grad():
        torch.testing.assert_close(decoder(**given).logits, decoder(ids).logits)
        want = decoder.generate(ids, max_new_tokens=4, do_sample=False)[:, 7:]
        assert torch.equal(decoder.generate(**given, max_new_tokens=4, do_sample=False), want)


def test_padding_of_any_part_goes_in_front():
    decoder, ids = gpt2(), batch((7, 7))[0]
    vectors, short = decoder.transformer.wte(ids[:, 2:5]).detach(), ids[:, :2].clone()
    vectors[1, 1:] = 0
    short[0, 1] = -1
    given = embed_prompt(decoder, short, vectors, ids[:, 5:])
    assert given["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    rows = [[ids[0, 0], *ids[0, 2:]], [*ids[1, :3], *ids[1, 5:]]]
    for row, kept in enumerate(rows):
        want = decoder.generate(torch.stack(kept)[None], max_new_tokens=4, do_sample=False)[:, len(kept) :]
        assert torch.equal(decoder.generate(**given, max_new_tokens=4, do_sample=False)[row : row + 1], want)
