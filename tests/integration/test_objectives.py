"""Objectives in unmodified trainers: Transformers', TRL's, and those with a loss of their own."""

import copy

import pytest
import torch
from integration.test_training import same_run
from integration.test_trl import ARGUMENTS, PACKING, datasets, sentence, tokenizer, trl  # noqa: F401 (a fixture)
from peft import LoraConfig
from tolerances import close
from trainers import OwnLoss, data, losses, trained, trainer

from hf_tokens import CAFTConfig, GoldfishLossConfig, SimPOConfig, UnsupportedError, aux_loss, get_token_model, set_progress
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeInsertConfig

FISH, SIMPO = GoldfishLossConfig(k=2, context=2), SimPOConfig(beta=2.5, gamma=0.7)
ONE = dict(max_steps=1, learning_rate=0.0)


def model(*methods):
    torch.manual_seed(0)
    return get_token_model(zoo.build("llama").model, [LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), *methods])


def batch(rows=2):
    return {name: torch.stack([row[name] for row in data(rows)]) for name in ("input_ids", "labels", "attention_mask")}


def test_training_drops_tokens_and_evaluation_does_not(tmp_path):
    run = trainer(model(FISH), tmp_path, **ONE, train_dataset=data(2), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    run.train()
    want, plain = model(FISH).train()(**batch()).loss, model(FISH).eval()(**batch(4)).loss
    close(torch.tensor(losses(run)[0]), want.detach(), "training")
    close(torch.tensor(next(row["eval_loss"] for row in run.state.log_history if "eval_loss" in row)), plain.detach(), "evaluation")
    assert abs(model(ProbeInsertConfig(tokens=0)).train()(**batch()).loss.item() - want.item()) > 1e-3


@pytest.mark.parametrize("objective", [FISH, CAFTConfig(heads=2, alpha=0.5)], ids=["replaces", "adds"])
def test_a_trainer_with_a_loss_of_its_own(tmp_path, objective):
    given = dict(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    same_run(trainer(model(objective), tmp_path / "a", **given), trainer(model(objective), tmp_path / "b", kind=OwnLoss, **given))


def texts(n=8):
    return datasets.Dataset.from_dict({"text": [sentence(i, 5 + i % 3) for i in range(n)]})


def sft(surgery, folder, tokenizer, **more):  # noqa: F811
    arguments = trl.SFTConfig(output_dir=str(folder), **{**ARGUMENTS, **ONE, **more})
    return trl.SFTTrainer(model=surgery, args=arguments, train_dataset=texts(), processing_class=tokenizer)


@pytest.mark.parametrize("more", [{}, PACKING, {"gradient_accumulation_steps": 2}], ids=["plain", "packed", "accumulated"])
@pytest.mark.parametrize("objective", [FISH, CAFTConfig(heads=2, alpha=0.5)], ids=["replaces", "adds"])
def test_sft(tokenizer, tmp_path, objective, more):  # noqa: F811
    """Its forward makes no logits, and its loss is not the model's."""
    run = sft(model(objective), tmp_path, tokenizer, **more)
    run.train()
    batches = [b for b, _ in zip(run.get_train_dataloader(), range(more.get("gradient_accumulation_steps", 1)), strict=False)]
    run.model.train()
    set_progress(run.model, 0.0)
    counts = [(b["labels"][:, 1:] != -100).sum() for b in batches]
    each = [run.model.get_base_model()(**b).loss.detach() for b in batches]
    want = sum(loss * count for loss, count in zip(each, counts, strict=True)) / sum(counts)
    assert abs(losses(run)[0] - (sum(plain(run.model, b) * n for b, n in zip(batches, counts, strict=True)) / sum(counts)).item()) > 1e-3
    close(torch.tensor(losses(run)[0]), want, "loss")


def plain(surgery, given):
    with surgery.disable_adapter():
        return surgery.get_base_model()(**given).loss


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning")
@pytest.mark.parametrize("more", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=str)
def test_another_loss_is_not_replaced(tokenizer, tmp_path, more):  # noqa: F811
    with pytest.raises(UnsupportedError, match="replace.*, got .*"):
        sft(model(FISH), tmp_path, tokenizer, **more).train()
    sft(model(CAFTConfig()), tmp_path, tokenizer, **more).train()


def test_label_smoothing_and_a_loss_function_of_the_user(tmp_path):
    with pytest.raises(UnsupportedError, match="GoldfishLoss replaces a loss of the model's next tokens.*and not smooth them, got Trainer"):
        trainer(model(FISH), tmp_path, label_smoothing_factor=0.1).train()
    smooth, bare = (
        trainer(model(*m), tmp_path, **ONE, label_smoothing_factor=0.1) for m in ([CAFTConfig(alpha=0.5)], [ProbeInsertConfig(tokens=0)])
    )
    smooth.train()
    bare.train()
    assert losses(smooth)[0] > losses(bare)[0] + 0.1

    def mean(output, labels, num_items_in_batch=None):
        flat = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch

    given = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2)
    mine = trainer(model(FISH), tmp_path, **given)
    mine.compute_loss_func = mean
    same_run(trainer(model(FISH), tmp_path, **given), mine)


def pairs(n=4):
    prompt, chosen, rejected = ([sentence(i + at, length) for i in range(n)] for at, length in ((0, 3), (9, 4), (20, 5)))
    return datasets.Dataset.from_dict({"prompt": prompt, "chosen": [" " + c for c in chosen], "rejected": [" " + r for r in rejected]})


def cpo(surgery, folder, tokenizer, **more):  # noqa: F811
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    arguments = {**ARGUMENTS, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": SIMPO.beta, "simpo_gamma": SIMPO.gamma, **more}
    return CPOTrainer(model=surgery, args=CPOConfig(output_dir=str(folder), **arguments), train_dataset=pairs(), processing_class=tokenizer)


def laid_out(trainer, given):
    """A batch of TRL's as ours: chosen rows, then rejected ones."""
    together = trainer.concatenated_inputs(given, padding_value=trainer.pad_token_id)
    return {name: together[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore:You are importing from 'trl.experimental'")
def test_simpo_is_trl_s_number(tokenizer, tmp_path):  # noqa: F811
    run = cpo(model(ProbeInsertConfig(tokens=2)), tmp_path, tokenizer)
    given = next(iter(run.get_train_dataloader()))
    theirs, _ = run.get_batch_loss_metrics(run.model, given)
    ours = model(ProbeInsertConfig(tokens=2), SIMPO)
    ours.load_state_dict(run.model.state_dict(), strict=False)
    close(ours(**laid_out(run, given)).loss, theirs, "loss")
    before = trained(run.model)
    run.train()
    assert any(not torch.equal(before[name], value) for name, value in trained(run.model).items())


@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore:You are importing from 'trl.experimental'")
def test_simpo_in_a_trainer_that_has_it_already_is_refused(tokenizer, tmp_path):  # noqa: F811
    with pytest.raises(
        UnsupportedError, match="SimPO replaces a loss .* the trainer must give it `labels`.*, got CPOTrainer that does not"
    ):
        cpo(model(SIMPO), tmp_path, tokenizer).train()


def test_simpo_in_a_plain_trainer_with_trl_s_collator(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    layout = DataCollatorForPreference(pad_token_id=0)

    def collate(rows):
        given = layout(rows)
        given["labels"] = given["input_ids"].masked_fill(given.pop("completion_mask") == 0, -100)
        return given

    ids = torch.randint(5, 80, (4, 11), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [{"prompt_ids": row[:4], "chosen_ids": row[4:8], "rejected_ids": row[7 : 9 + i % 2]} for i, row in enumerate(ids)]
    args = dict(train_dataset=rows, max_steps=3, learning_rate=0.5, remove_unused_columns=False)
    small, large = (
        trainer(model(SIMPO), tmp_path, **args, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size) for size in (1, 4)
    )
    for run in (small, large):
        run.data_collator = collate
    first = model(SIMPO)(**collate(rows)).loss
    same_run(large, small)
    close(torch.tensor(losses(large)[0]), first.detach(), "first loss")
    assert losses(large)[-1] < losses(large)[0]
    small.eval_dataset = rows
    close(torch.tensor(small.evaluate()["eval_loss"]), small.model(**collate(rows)).loss.detach(), "evaluation")


def test_two_losses_in_one_place_are_refused():
    words = "One objective replaces the model's own loss, got .*. Leave one, or switch between adapters"
    with pytest.raises(UnsupportedError, match=words):
        model(FISH, SIMPO)
    surgery = get_token_model(zoo.build("llama").model, FISH)
    surgery = get_token_model(surgery, SIMPO, adapter_name="second")
    surgery.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError, match=words):
        surgery.train()(**batch())
    surgery.set_adapter("second")
    surgery.train()(**batch())


def test_one_that_replaces_and_one_that_adds():
    both, fish = model(CAFTConfig(alpha=0.5), FISH).train(), model(FISH).train()
    set_progress(both, 0.0)
    loss = both(**batch()).loss
    close(loss, fish(**batch()).loss + aux_loss(both), "sum")


def test_a_mixture_of_experts_keeps_its_balance():
    specimen = zoo.build("mixtral")
    lora, given = LoraConfig(r=2, target_modules=["q_proj"]), {**batch(), "output_router_logits": True}
    surgery = get_token_model(copy.deepcopy(specimen.model), [lora, FISH]).train()
    out = surgery(**given)
    alone = surgery(**batch()).loss
    assert out.aux_loss > 0
    close(out.loss, alone + specimen.model.config.router_aux_loss_coef * out.aux_loss, "sum")
    out.loss.backward()


def test_heads_first_and_then_a_lora_around_them():
    """The paper's two stages: its heads are trained alone, and stay as they are while a LoRA is."""
    from peft import get_peft_model

    surgery = get_token_model(zoo.build("llama").model, CAFTConfig(heads=2, alpha=1.0, schedule="constant")).train()
    optimizer = torch.optim.SGD([p for p in surgery.parameters() if p.requires_grad], lr=0.1)
    surgery(**batch()).loss.backward()
    optimizer.step()
    heads = trained(surgery)
    assert heads and all(value.any() for value in heads.values())
    surgery.requires_grad_(False)
    with pytest.warns(UserWarning):
        tuned = get_peft_model(surgery, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="tuning").train()
    assert all("lora_" in name for name in trained(tuned))
    tuned(**batch()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for name, p in tuned.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("caps", [{"final_logit_softcapping": 5.0}, {}], ids=str)
def test_heads_whose_logits_are_capped(caps):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    base = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, **caps))
    surgery = get_token_model(base, CAFTConfig(heads=1, alpha=1.0, beta=1.0, schedule="constant", layer="linear")).train()
    out = surgery(**batch())
    wanted = batch()["labels"][:, 2:].flatten()  # an untrained head says again what the model's own said
    close(aux_loss(surgery), torch.nn.functional.cross_entropy(out.logits[:, :-2].flatten(0, 1), wanted), "capped")
