"""CPT against its paper, section 3 of arXiv:2410.17222 (loss on the context's labels, a ball around each token), and against PEFT's."""

import math

import pytest
import torch
from peft import CPTConfig as PeftCPTConfig
from peft import get_peft_model
from tolerances import close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_tokens import ConfigError, CPTConfig, UnsupportedError, aux_loss, get_token_model, load

WIDTH = 16


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0)).eval()


def gpt2():
    torch.manual_seed(0)
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=40, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=4, **still, pad_token_id=0, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


BUILD = {"llama": llama, "gpt2": gpt2}

# context ids and types, radii of inputs and format, gamma
TWO = ((5, 11, 12, 6, 21, 5, 13, 6, 22), (1, 2, 2, 3, 4, 5, 6, 7, 8))
CASES = {
    "usual": (*TWO, 0.1, 0.05, 0.9),
    "no decay": (*TWO, 0.1, 0.1, 1.0),
    "one example": ((5, 11, 6, 21), (1, 2, 3, 4), 0.2, 0.1, 0.5),
    "labels of two tokens": ((5, 11, 6, 21, 22, 12, 6, 23), (1, 2, 3, 4, 4, 6, 7, 8), 0.1, 0.1, 0.5),
    "no label in the context": ((5, 11, 6), (1, 2, 3), 0.1, 0.1, 0.5),
    "labels alone": ((21, 22), (4, 8), 0.1, 0.1, 0.7),
    "one token": ((5,), (1,), 0.1, 0.3, 1.0),
    "a ball as wide as the space": (*TWO, 1e6, 1e6, 0.9),
    "a ball that is a point": (*TWO, 1e-6, 1e-6, 0.9),
    "without types": ((5, 11, 6), (), 0.1, 0.2, 1.0),
    "a token twice": ((5, 5, 21, 5, 5, 22), (1, 2, 4, 5, 6, 8), 0.1, 0.1, 0.9),
}
QUERY = torch.tensor([[30, 31, 6, 21], [32, 33, 6, 22]])
LABELS = torch.tensor([[-100, -100, -100, 21], [-100, 33, -100, 22]])


def kinds(types, ids):
    return types or [1] * len(ids)


def ball(delta, ids, types, epsilon, format_epsilon):
    """Project each row of delta onto its ball; a label's is a point."""
    out = []
    for row, kind in zip(delta, kinds(types, ids), strict=True):
        radius = {0: 0.0, 2: epsilon}.get(kind % 4, format_epsilon) * math.sqrt(len(row) / 2048)
        length = math.sqrt(float(row @ row))
        out.append(row if length <= radius else row * (radius / length))
    return torch.stack(out)


def naive_loss(logits, targets, types, gamma):
    """The mean over all targets of weight * cross-entropy; logits of one row a token, targets None where there is none."""
    label_types = sorted({kind for kind in types if kind and kind % 4 == 0})
    terms = []
    for place in range(1, len(targets)):
        if targets[place] is None:
            continue
        before = len(label_types) - label_types.index(types[place]) if types[place] is not None else 0
        row = logits[place - 1]
        terms.append(gamma**before * (math.log(sum(math.exp(float(v)) for v in row)) - float(row[targets[place]])))
    return terms


def full_labels(ids, types, labels):
    """Labels of context and query: of the context's tokens, those of labels alone."""
    own = [i if kind % 4 == 0 else -100 for i, kind in zip(ids, kinds(types, ids), strict=True)]
    return torch.cat([torch.tensor(own).expand(len(labels), -1), labels], dim=1)


def bank_of(model):
    return next(module for module in model.modules() if type(module).__name__ == "CPT")


def ours(build, case):
    ids, types, epsilon, format_epsilon, gamma = case
    knobs = {"projection_epsilon": epsilon, "projection_format_epsilon": format_epsilon, "loss_decay_factor": gamma}
    return get_token_model(build(), CPTConfig(ids=ids, types=types, **knobs))


def theirs(build, case):
    ids, types, epsilon, format_epsilon, gamma = case
    config = PeftCPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=list(ids), cpt_mask=[1] * len(ids), cpt_tokens_type_mask=kinds(list(types), ids),
        opt_weighted_loss_type="decay", opt_loss_decay_factor=gamma, opt_projection_epsilon=epsilon,
        opt_projection_format_epsilon=format_epsilon,
    )  # fmt: skip
    return get_peft_model(build(), config)


def whole(ids):
    return torch.cat([torch.tensor(ids).expand(2, -1), QUERY], dim=1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_naive(case):
    ids, types, epsilon, format_epsilon, gamma = case
    base, model = gpt2(), ours(gpt2, case)
    torch.manual_seed(1)
    with torch.no_grad():
        bank_of(model).delta.normal_(std=0.05)
    delta = ball(bank_of(model).delta.detach().double(), ids, types, epsilon, format_epsilon)
    labels = full_labels(ids, types, LABELS)
    out = model(input_ids=whole(ids), labels=labels)
    embeds = base.transformer.wte(whole(ids)).detach()
    embeds[:, : len(ids)] += delta.float()
    logits = base(inputs_embeds=embeds).logits
    close(out.logits, logits)
    terms = []
    for row, given in zip(logits.detach(), labels.tolist(), strict=True):
        targets = [None if label == -100 else label for label in given]
        terms += naive_loss(row, targets, [*kinds(types, ids), *[None] * QUERY.shape[1]], gamma)
    assert math.isclose(float(out.loss.detach()), sum(terms) / len(terms), rel_tol=1e-5)


@pytest.mark.drawn
@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_agrees_with_peft_in_outputs_loss_and_updates(case, build):
    ids, types, *_ = case
    model, peft = ours(build, case).train(), theirs(build, case).train()
    given = {"input_ids": whole(ids), "labels": full_labels(ids, types, LABELS)}
    mask = torch.ones_like(QUERY)
    learned, twin = bank_of(model).delta, peft.prompt_encoder["default"].delta_embedding.weight
    steps = [torch.optim.AdamW([p], lr=0.02, weight_decay=0.1) for p in (learned, twin)]
    for _ in range(4):
        out = model(**given)
        want = peft(input_ids=QUERY, attention_mask=mask, labels=LABELS)
        close(out.logits, want.logits, "logits")
        if kinds(types, ids)[-1] % 4 == 0:  # or PEFT takes the query's labels for another type's
            close(out.loss, want.loss, "loss")
        for step, loss in zip(steps, (out.loss, out.loss.detach() * 0 + want.loss), strict=True):
            step.zero_grad()
            loss.backward()
        if kinds(types, ids)[-1] % 4:
            twin.grad.copy_(learned.grad)
        close(learned.grad, twin.grad, "gradient")
        for step in steps:
            step.step()
        close(learned, twin, "update")
    model.eval(), peft.eval()
    with torch.no_grad():
        close(model(input_ids=whole(ids)).logits, peft(input_ids=QUERY, attention_mask=mask, labels=None).logits, "after training")


def test_labels_of_the_context_that_are_no_label_tokens_count_for_nothing():
    case = CASES["usual"]
    model = ours(llama, case)
    labels = full_labels(case[0], case[1], LABELS)
    every = torch.cat([torch.tensor(case[0]).expand(2, -1), LABELS], dim=1)
    torch.testing.assert_close(model(input_ids=whole(case[0]), labels=labels).loss, model(input_ids=whole(case[0]), labels=every).loss)


def test_without_a_decay_the_loss_is_the_model_s_own_and_nothing_is_computed_twice(monkeypatch):
    case = CASES["no decay"]
    model, base = ours(llama, case), llama()
    given = {"input_ids": whole(case[0]), "labels": full_labels(case[0], case[1], LABELS)}
    assert torch.equal(model(**given).loss, base(**given).loss)
    assert float(aux_loss(model).detach()) == 0


def test_a_padded_batch_is_each_sample_alone_and_other_prompts_are_left_alone():
    case = CASES["usual"]
    model, base = ours(llama, case), llama()
    with torch.no_grad():
        bank_of(model).delta.normal_()
        row = whole(case[0])[:1]
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
        mask = (padded != 0).long()
        close(model(input_ids=padded, attention_mask=mask).logits[:, 3:], model(input_ids=row).logits)
        assert torch.equal(model(input_ids=QUERY).logits, base(input_ids=QUERY).logits)
    more = {"max_new_tokens": 5, "do_sample": False}
    cached, uncached = (model.generate(input_ids=row, use_cache=use, **more) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_a_trainer_minimises_that_loss(tmp_path):
    case = CASES["usual"]
    model = ours(gpt2, case)
    rows = [{"input_ids": i, "labels": label} for i, label in zip(whole(case[0]), full_labels(case[0], case[1], LABELS), strict=True)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.05,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    with torch.no_grad():
        first = model(input_ids=whole(case[0]), labels=full_labels(case[0], case[1], LABELS)).loss
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert math.isclose(logged[0], float(first), rel_tol=1e-3) and logged[-1] < logged[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter", gpt2()).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=whole(case[0])).logits, again(input_ids=whole(case[0])).logits)


def test_refusals():
    with pytest.raises(ConfigError, match="CPTConfig.types must have one value for each of 3 ids, got 2"):
        get_token_model(llama(), CPTConfig(ids=(3, 4, 5), types=(1, 2)))
    model = ours(llama, CASES["usual"])
    with pytest.raises(UnsupportedError, match="reads the tokens of the text, got `inputs_embeds` without `input_ids`"):
        model(inputs_embeds=llama().get_input_embeddings()(QUERY).detach(), labels=LABELS)


def test_the_text_that_an_encoder_decoder_writes_holds_the_context_too():
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config).eval()
    ids, types, *_, gamma = case = CASES["usual"]
    model = ours(lambda: base, case)
    source, labels = QUERY, torch.cat([torch.tensor(ids).expand(2, -1), LABELS], dim=1)
    written = whole(ids)
    start = torch.cat([torch.zeros(2, 1, dtype=torch.long), written[:, :-1]], dim=1)
    out = model(input_ids=source, decoder_input_ids=start, labels=labels)
    terms, logits = [], torch.cat([torch.zeros(2, 1, 40), out.logits.detach()], dim=1)  # the first target is told by the start
    for row, given in zip(logits, labels.tolist(), strict=True):
        kind = [*types, *[None] * QUERY.shape[1]]
        targets = [None if t == -100 or k is not None and k % 4 else t for t, k in zip(given, kind, strict=True)]
        terms += naive_loss(row[1:], [None, *targets], [None, *kind], gamma)
    assert math.isclose(float(out.loss.detach()), sum(terms) / len(terms), rel_tol=1e-5)
