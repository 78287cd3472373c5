"""What methods do in training stands in a Trainer's logs, by name, in evaluation as in training."""

import pytest
import torch
from trainers import OwnLoss, data, losses, model, trainer
from transformers import Trainer

from hf_tokens import CAFTConfig, FTPConfig, GoldfishLossConfig, MixtureOfDepthsConfig
from hf_tokens.testing.probe import ProbeInsertConfig
from hf_tokens.tools.surgeries import surgery_of

STACK = [FTPConfig(sparsity=0.3), CAFTConfig(), ProbeInsertConfig(tokens=2)]


def logged(run, name):
    return [row[name] for row in run.state.log_history if name in row]


def test_a_trainer_logs_what_each_method_did(tmp_path):
    run = trainer(model(STACK), tmp_path)
    run.train()
    assert [len(logged(run, name)) for name in ("ftp/loss", "ftp/routed", "caft/loss", "probe-insert/inserted", "model_loss")] == [4] * 5
    for whole, own, *added in zip(losses(run), logged(run, "model_loss"), logged(run, "ftp/loss"), logged(run, "caft/loss"), strict=True):
        assert whole == pytest.approx(own + sum(added), rel=1e-5)
    assert all(0 < share <= 1 for share in logged(run, "ftp/routed"))


def test_a_share_is_that_of_all_blocks_and_batches_since_the_last_log(tmp_path):
    run = trainer(model(ProbeInsertConfig(tokens=3, layers=[0])), tmp_path, logging_steps=2)
    run.train()
    assert logged(run, "probe-insert/inserted") == [pytest.approx(3 / 12)] * 2


def test_what_is_divided_among_small_batches_is_logged_as_of_the_whole(tmp_path):
    big = trainer(model(), tmp_path / "big", max_steps=2, per_device_train_batch_size=4)
    small = trainer(model(), tmp_path / "small", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for run in (big, small):
        run.train()
    assert logged(small, "model_loss") == pytest.approx(logged(big, "model_loss"), rel=1e-4)


def test_a_trainer_with_a_loss_of_its_own_logs_it_beside_the_sum(tmp_path):
    usual, own = (trainer(model(), tmp_path / kind.__name__, kind=kind) for kind in (Trainer, OwnLoss))
    for run in (usual, own):
        run.train()
    assert logged(own, "model_loss") == pytest.approx(logged(usual, "model_loss"), rel=1e-4) and logged(own, "model_loss") != losses(own)


@pytest.mark.parametrize("trains", [True, False], ids=["while it trains", "alone"])
def test_an_evaluation_says_it_too(tmp_path, trains):
    run = trainer(
        model([FTPConfig(sparsity=0.3), GoldfishLossConfig(k=2)]), tmp_path, eval_strategy="steps" if trains else "no", eval_steps=2
    )
    if trains:
        run.train()
    metrics = run.evaluate()
    (whole, own), routed = (logged(run, f"eval_{name}") for name in ("loss", "model_loss")), logged(run, "eval_ftp/routed")
    assert len(routed) == (3 if trains else 1) and routed[-1] == metrics["eval_ftp/routed"]
    assert not own or own != whole
    assert "log" not in vars(run) and not surgery_of(run.model).listeners  # nothing stays behind it


def test_a_gate_is_logged_by_its_name(tmp_path):
    run = trainer(model(MixtureOfDepthsConfig()), tmp_path, max_steps=1)
    run.train()
    gates = [float(p.detach()) for name, p in run.model.named_parameters() if name.endswith(".b")]
    assert logged(run, "mixture-of-depths/b") == [pytest.approx(sum(gates) / len(gates))]


def test_two_of_one_name_are_told_apart(tmp_path):
    run = trainer(model([ProbeInsertConfig(tokens=1, layers=[0]), ProbeInsertConfig(tokens=2, layers=[1])]), tmp_path, max_steps=1)
    run.train()
    assert logged(run, "probe-insert.default.0/inserted") == [pytest.approx(1 / 12)]
    assert logged(run, "probe-insert.default.1/inserted") == [pytest.approx(2 / 13)]


def test_a_block_that_is_run_again_in_the_backward_pass_is_counted_once(tmp_path):
    shares = []
    for checkpoints in (False, True):
        run = trainer(model(FTPConfig(sparsity=0.3)), tmp_path, max_steps=2, gradient_checkpointing=checkpoints)
        run.train()
        shares.append([logged(run, name) for name in ("ftp/routed", "ftp/loss", "model_loss")])
    assert shares[1] == [pytest.approx(values, rel=1e-5) for values in shares[0]]


def test_a_run_that_raises_leaves_nothing_in_the_trainer(tmp_path):
    run = trainer(model(), tmp_path, train_dataset=[*data(3), {"input_ids": torch.tensor([3])}])
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        run.train()
    run.model.unload()
    assert not {"log", "compute_loss"} & vars(run).keys()
