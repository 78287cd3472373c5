"""What the table of architectures says about them is so without any surgery: it is the yardstick of the contract."""

import pytest
import torch

from hf_tokens import anatomy
from hf_tokens.testing.contract.architectures import ARCHITECTURES, BATCH, PADS, built, fresh
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.testing.tolerances import all_close


@pytest.fixture(params=ARCHITECTURES)
def row(request):
    return ARCHITECTURES[request.param]


def test_streams(row):
    model, _ = built(row.name)
    assert tuple(s.kind + "*" * s.causal for s in anatomy(model).streams) == row.streams


def test_a_fresh_model_is_the_built_one_and_shares_no_tensor(row):
    model, copied = built(row.name)[0], fresh(row.name)
    assert not difference(snapshot(model), snapshot(copied))
    memory = lambda model: {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not memory(model) & memory(copied)


@torch.no_grad()
def test_a_batch_is_each_sample_alone(row):
    model, inputs = built(row.name)
    whole = row.run(model, inputs)
    for i in range(BATCH):
        all_close(row.sample(whole, i), row.run(model, row.alone(inputs, i)), row.name)


@pytest.mark.parametrize(("name", "side"), [(name, side) for name, row in ARCHITECTURES.items() for side in row.pads])
@torch.no_grad()
def test_padding(name, side):
    row, (model, inputs) = ARCHITECTURES[name], built(name)
    whole = row.run(model, row.padded(inputs, side))
    for i in range(BATCH):
        real = row.sample(whole, i, *row.real(inputs, i, side))
        all_close(real, row.run(model, row.alone(inputs, i, PADS * i)), f"{name} {i}")
