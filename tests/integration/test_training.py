"""Training with the unmodified Trainer: losses, accumulation, checkpoints, schedules, precision, two processes."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.pairs import METHODS
from peft import LoraConfig
from tolerances import all_equal, close
from trainers import STACK, OwnLoss, data, losses, model, trained, trainer
from transformers import Trainer, TrainerCallback

import hf_tokens
from hf_tokens import CAFTConfig, FTPConfig, VQTConfig, aux_loss, get_token_model, set_progress
from hf_tokens.testing import probe_config, zoo
from hf_tokens.testing.contract.configs import tiny_config
from hf_tokens.tools.surgeries import surgery_of


def test_the_methods_losses_are_in_the_loss(tmp_path):
    surgery = model().train()
    batch = {name: torch.stack([row[name] for row in data(2)]) for name in ("input_ids", "labels", "attention_mask")}
    torch.manual_seed(0)
    out = surgery(**batch)
    extra = aux_loss(surgery)
    bare = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert extra.item() > 0
    close(out.loss, bare + extra, "loss")
    surgery.eval()
    with torch.no_grad():
        out = surgery(**batch)
    close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()), "evaluation")


def test_accumulated_small_batches_are_one_big_batch(tmp_path):
    big = trainer(model(), tmp_path / "big", max_steps=2, per_device_train_batch_size=4)
    small = trainer(model(), tmp_path / "small", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    before = trained(big.model)
    big.train()
    small.train()
    ours, theirs = trained(big.model), trained(small.model)
    assert any(not torch.equal(before[name], value) for name, value in ours.items())
    for name, value in ours.items():
        close(theirs[name], value, name)
    close(torch.tensor(losses(small)), torch.tensor(losses(big)), "logged losses")


def test_a_trainer_with_a_loss_of_its_own_has_the_methods_losses_too(tmp_path):
    given = dict(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    usual, own = trainer(model(), tmp_path / "usual", **given), trainer(model(), tmp_path / "own", kind=OwnLoss, **given)
    for run in (usual, own, own):
        run.train()
        assert "compute_loss" not in vars(run)
    usual.train()
    close(torch.tensor(losses(own)), torch.tensor(losses(usual)), "logged losses")
    for name, value in trained(usual.model).items():
        close(trained(own.model)[name], value, name)


class MeanLoss(Trainer):
    """A trainer whose loss is a mean over its batch, which it divides by the steps of accumulation itself or lets be divided."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = out.logits.square().mean()
        loss = loss / self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else loss
        return (loss, out) if return_outputs else loss


class PeekingLoss(OwnLoss):
    """A trainer that looks at the model once more behind the forward of its loss, as TRL's SFTTrainer does for its metrics."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad():
            model(**inputs)
        return loss


def same_run(one, other):
    one.train()
    other.train()
    close(torch.tensor(losses(other)), torch.tensor(losses(one)), "logged losses")
    for name, value in trained(one.model).items():
        close(trained(other.model)[name], value, name)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_trainer_says_who_divides_its_loss(tmp_path, scaled):
    kind = type("Kind", (MeanLoss,), {"loss_is_scaled_for_ga": scaled})
    big = trainer(model(), tmp_path / "big", kind=kind, max_steps=2, per_device_train_batch_size=4)
    small = trainer(model(), tmp_path / "small", kind=kind, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    same_run(big, small)


def test_a_forward_without_gradients_takes_no_loss_away(tmp_path):
    same_run(trainer(model(), tmp_path / "own", kind=OwnLoss), trainer(model(), tmp_path / "peeking", kind=PeekingLoss))


def test_a_classifier_s_batches_weigh_what_they_hold(tmp_path):
    runs = []
    for batch, steps in ((4, 1), (1, 4)):
        specimen = zoo.build("vit")
        pixels = torch.randn(8, *specimen.inputs["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(3))
        surgery = model(VQTConfig(tokens=2, lasso=1.0), specimen=specimen)
        for name, value in trained(surgery).items():
            surgery.get_parameter(name).data.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
        args = dict(max_steps=2, learning_rate=0.001, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        given = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]
        runs.append(trainer(surgery, tmp_path / str(batch), train_dataset=given, **args))
    same_run(*runs)


def test_a_copy_taken_in_the_middle_is_a_model_of_its_own():
    surgery = model().train()
    batch = {name: torch.stack([row[name] for row in data(2)]) for name in ("input_ids", "labels", "attention_mask")}
    surgery(**batch)
    before = aux_loss(surgery)
    other = copy.deepcopy(surgery)
    assert aux_loss(surgery) == before > 0 and aux_loss(other) == 0
    close(other(**batch).loss, surgery(**batch).loss, "loss")
    aux_loss(other).backward()
    assert all(p.grad is None for p in surgery.parameters()) and any(p.grad is not None for p in other.parameters())


class Breaks(Trainer):
    """A user stops it behind the model's call, and again between two batches."""

    at: str = ""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.at == "loss":
            raise KeyboardInterrupt
        return loss

    def training_step(self, *args, **kwargs):
        if self.at == "step" and self.state.global_step == 1:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def answer(surgery):
    torch.manual_seed(0)
    out = surgery.train()(**{name: torch.stack([row[name] for row in data(2)]) for name in ("input_ids", "labels", "attention_mask")})
    return [out.loss, out.logits]


@pytest.mark.parametrize("at", ["loss", "step"])
def test_a_training_that_is_broken_off_leaves_the_model_and_the_next_training_right(tmp_path, at):
    surgery = model()
    run = trainer(surgery, tmp_path / "broken", kind=Breaks)
    run.at = at
    with pytest.raises(KeyboardInterrupt):
        run.train()
    surgery.zero_grad()
    fresh = model()
    fresh.load_state_dict(surgery.state_dict())
    set_progress(fresh, surgery_of(surgery).progress)
    all_equal(answer(surgery), answer(fresh), "a call behind it")
    same_run(trainer(fresh, tmp_path / "fresh"), trainer(surgery, tmp_path / "again"))


class Killed(TrainerCallback):
    """The process ends behind a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


DROPPING = LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.2)
WITH_STATE = ["ftp", "dr-llm", "token-prepending", "moe-plus-plus", "apt", "caft"]


@pytest.mark.parametrize("method", WITH_STATE)
def test_a_training_that_was_killed_goes_on_to_the_bit(tmp_path, method):
    stack = lambda: model([tiny_config(METHODS[method].config), DROPPING])
    saving = dict(save_strategy="steps", save_steps=1, lr_scheduler_type="linear", optim="adamw_torch", remove_unused_columns=False)
    whole = trainer(stack(), tmp_path / "whole", **saving)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(stack(), tmp_path / "killed", callbacks=[Killed()], **saving).train()
    begun = stack()
    with torch.no_grad():
        for parameter in (p for p in begun.parameters() if p.requires_grad):
            parameter.add_(1)
    again = trainer(begun, tmp_path / "killed", **saving)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    all_equal([*again.model.state_dict().values()], [*whole.model.state_dict().values()], "resumed")
    found = hf_tokens.load(tmp_path / "killed" / "checkpoint-4", zoo.build("llama").model)
    all_equal([*found.state_dict().values()], [*whole.model.state_dict().values()], "loaded")


def test_checkpoints_resume_to_the_bit(tmp_path):
    whole = trainer(model(), tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"}
    assert not (checkpoint / "model.safetensors").exists()
    again = trainer(model(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    first, second = trained(whole.model), trained(again.model)
    all_equal(list(second.values()), list(first.values()), "resumed")
    assert losses(again)[-2:] == losses(whole)[-2:]


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_substep_end(self, args, state, control, **kwargs):
        self.note(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        self.note(kwargs["model"])

    def note(self, surgery):
        self.seen.append(surgery_of(surgery).progress)


def test_schedules_follow_the_steps(tmp_path):
    watch, surgery = Watch(), model()
    run = trainer(surgery, tmp_path, callbacks=[watch], per_device_train_batch_size=1, gradient_accumulation_steps=2)
    run.train()
    assert watch.seen == [step / 4 for step in range(4) for _ in range(2)]
    assert surgery_of(surgery).progress == 1.0
    set_progress(surgery, 0.5)
    assert surgery_of(surgery).progress == 0.5


def test_gradient_checkpointing_trains_the_same(tmp_path):
    plain, saved = trainer(model(), tmp_path / "a"), trainer(model(), tmp_path / "b", gradient_checkpointing=True)
    plain.train()
    saved.train()
    for name, value in trained(plain.model).items():
        close(trained(saved.model)[name], value, name)


def test_bf16(tmp_path):
    surgery = model()
    run = trainer(surgery, tmp_path, bf16=True)
    run.train()
    assert all(p.dtype == torch.float32 for p in trained(surgery).values())
    assert all(p.isfinite().all() for p in trained(surgery).values()) and all(value < 100 for value in losses(run))


def test_a_bf16_base_trains_float32_adapters():
    specimen = zoo.build("llama", dtype=torch.bfloat16)
    surgery = get_token_model(specimen.model, STACK).train()
    out = surgery(**specimen.inputs, labels=specimen.inputs["input_ids"])
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in surgery.parameters() if p.requires_grad)


def test_the_best_model_comes_back(tmp_path):
    surgery = model()
    run = trainer(surgery, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    want = get_token_model(zoo.build("llama").model, STACK)
    want.load_adapter(best, "best")
    ours, theirs = trained(surgery), {k.replace(".best.", ".default."): v for k, v in want.named_parameters() if ".best." in k}
    all_equal([ours[name] for name in sorted(ours)], [theirs[name] for name in sorted(theirs)], "best")


def test_modules_to_save_train_too(tmp_path):
    surgery = model(modules_to_save=["lm_head"])
    names = [name for name in trained(surgery) if "lm_head" in name]
    assert names
    before = trained(surgery)
    trainer(surgery, tmp_path).train()
    assert not torch.equal(trained(surgery)[names[0]], before[names[0]])
    surgery.save_pretrained(tmp_path / "saved")
    base = surgery.unload()
    assert torch.equal(base.lm_head.weight, zoo.build("llama").model.lm_head.weight)


TWO = Path(__file__).parent / "two_processes.py"
# blocks share what the first one holds; an objective reads behind the blocks
SHARDED = [FTPConfig(sparsity=0.3), CAFTConfig(heads=2, schedule="constant")]


def batches():
    """The halves of a batch."""
    rows = data(4)
    return [{name: torch.stack([row[name] for row in half]) for name in ("input_ids", "labels")} for half in (rows[:2], rows[2:])]


def step_twice(surgery, halves):
    """Two steps by the mean of the losses of these batches."""
    optimizer = torch.optim.SGD([p for p in surgery.parameters() if p.requires_grad], lr=0.1)
    surgery.train()
    for _ in range(2):
        for half in halves:
            torch.manual_seed(0)
            (surgery(**half).loss / len(halves)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made of their trainings."""
    folder, root = tmp_path_factory.mktemp("two"), Path(__file__).parents[2]
    paths = [root, root / "adapters", root / "kernels" / "torch-ext", root / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TWO), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "two.pt")


def test_two_processes_train_as_one(two, tmp_path):
    one = trainer(model(), tmp_path / "one", max_steps=2, per_device_train_batch_size=4)
    one.train()
    assert two["ranks"] == 2
    for name, value in trained(one.model).items():
        close(two["parameters"][name], value, name)


def test_parameters_of_which_each_process_holds_a_part_train_as_whole_ones(two):
    """FSDP2 gathers a block's parameters while the block runs; methods read some where it does not."""
    before, one = trained(model(SHARDED)), model(SHARDED)
    step_twice(one, batches())
    for name, value in trained(one).items():
        assert not torch.equal(value, before[name]), name
        close(two["sharded"][name], value, name)


def test_many_checkpointed_forwards_before_one_backward():
    """Whole blocks are run again in the backward pass, each with the books of its own forward; nothing is held longer than its graph."""
    gradients = []
    for checkpointing in (False, True):
        specimen = zoo.build("diffusers/FluxTransformer2DModel")
        torch.manual_seed(0)
        model = get_token_model(specimen.model, probe_config(0.5)).train()
        if checkpointing:
            specimen.model.enable_gradient_checkpointing()
        total = 0.0
        for i in range(11):
            out = specimen.model(**{**specimen.inputs, "hidden_states": specimen.inputs["hidden_states"] + 0.01 * i})
            total = total + out.sample.square().mean()
        total.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "hf_tokens" in name])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    del total, out
    gc.collect()
    specimen.model(**specimen.inputs)
    counts = [count for surgery in surgery_of(model).streams for count in surgery.replays.counts.values()]
    assert counts and set(counts) == {1}
