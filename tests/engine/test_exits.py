"""A loss of what inner blocks return, and of any method: what it is given, when it is called, and which models and ways are refused."""

import copy

import pytest
import torch
from own import method
from peft import LoraConfig
from tolerances import close
from transformers import Trainer, TrainingArguments

from hf_tokens import (
    CAFTConfig,
    ConfigError,
    LayerRouter,
    LayerSkipConfig,
    Objective,
    TokenReducer,
    UnsupportedError,
    aux_loss,
    get_token_model,
    set_progress,
)
from hf_tokens.testing import probe_config, zoo

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def peeking(seen):
    """The loss of an objective that looks at all exits."""

    def loss(self, labels, exits, head):
        states = [exits(i) for i in range(self.dims.layers)]
        seen.append([states, head(states[-1])])

    return loss


def without_dropout(model):
    for module in model.modules():
        vars(module).update({name: 0.0 for name in ("p", "dropout") if isinstance(vars(module).get(name), float)})
    return model


# family -> whether its head reads what the blocks return, behind one norm and no more
FAMILIES = {
    **dict.fromkeys(
        ("llama", "gpt2", "gemma2", "granite", "cohere", "falcon", "gpt_neox", "qwen3_moe", "opt", "bart", "jamba", "llava"), True
    ),
    **dict.fromkeys(("t5", "minicpm3", "roberta", "xlnet"), False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_is_what_the_head_would_read_behind_a_block_or_refused(family):
    specimen, seen = zoo.build(family), []
    ids = specimen.inputs.get("decoder_input_ids", specimen.inputs["input_ids"])
    with method(Objective, loss=peeking(seen)) as config:
        model = without_dropout(get_token_model(specimen.model, config()).train())
        if not FAMILIES[family]:
            with pytest.raises(
                UnsupportedError, match=rf"behind one norm and no more, got something else in {type(specimen.model).__name__}"
            ):
                model(**specimen.inputs, labels=ids)
            return
        out = model(**specimen.inputs, labels=ids, output_hidden_states=True)
    states, logits = seen[0]
    assert torch.equal(logits, out.logits)
    known = out.get("decoder_hidden_states") or out.hidden_states
    norm = model.base_model._anatomy.streams[-1].final_norm
    for i, state in enumerate(states[:-1]):  # what a model puts out behind the last block is behind its norm
        close(state, known[i + 1] if norm is None else norm(known[i + 1]), f"{family} {i}")


def test_an_exit_holds_the_whole_sequence_where_tokens_have_joined():
    specimen, seen = zoo.build("llama"), []
    with method(Objective, loss=peeking(seen)) as config:
        model = get_token_model(specimen.model, [config(), *probe_config(0.5)]).train()
        out = model(**specimen.inputs, labels=specimen.inputs["input_ids"])
    assert {state.shape[:2] for state in seen[0][0]} == {out.logits.shape[:2]} and torch.equal(seen[0][1], out.logits)


def test_what_the_head_reads_for_one_is_not_what_another_is_told():
    """An objective calls the head on other states: `hidden` stays what the model's own call of it read."""
    specimen = zoo.build("llama")
    given = {**specimen.inputs, "labels": specimen.inputs["input_ids"]}
    torch.manual_seed(0)
    with method(Objective, loss=peeking([])) as config:
        alone = get_token_model(copy.deepcopy(specimen.model), CAFTConfig(heads=1)).train()(**given).loss
        torch.manual_seed(0)
        for stack in ([config(), CAFTConfig(heads=1)], [CAFTConfig(heads=1), config()]):
            torch.manual_seed(0)
            assert torch.equal(get_token_model(copy.deepcopy(specimen.model), stack).train()(**given).loss, alone)


def test_nothing_is_kept_where_nobody_asks():
    specimen, seen = zoo.build("llama"), []
    with method(Objective, loss=peeking(seen)) as config:
        model = get_token_model(specimen.model, config())
        model.eval()(**specimen.inputs, labels=specimen.inputs["input_ids"])
        with torch.no_grad():
            model.train()(**specimen.inputs, labels=specimen.inputs["input_ids"])
        model(**specimen.inputs)
    assert not seen


def test_a_checkpoint_without_a_graph_is_refused():
    specimen = zoo.build("llama")
    with method(Objective, loss=peeking([])) as config:
        model = get_token_model(specimen.model, config()).train()
        inner = specimen.model.model.layers[1].forward
        specimen.model.model.layers[1].forward = lambda *args, **kwargs: torch.no_grad()(inner)(*args, **kwargs)
        with pytest.raises(
            UnsupportedError, match=r"must be non-reentrant, got a reentrant one around model\.layers\.1\. Use non-reentrant"
        ):
            model(**specimen.inputs, labels=specimen.inputs["input_ids"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon"])
def test_checkpoints_give_the_same_gradients(family, reentrant):
    grads = []
    for checkpoints in (False, True):
        specimen = zoo.build(family)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        model = without_dropout(get_token_model(specimen.model, [lora, LayerSkipConfig(dropout=0.6, every=1)]).train())
        if checkpoints:
            specimen.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            specimen.model.enable_input_require_grads()
        torch.manual_seed(3)
        loss = model(**specimen.inputs, labels=specimen.inputs["input_ids"]).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


@pytest.mark.parametrize(
    ("role", "word"), [(TokenReducer, "queries"), (LayerRouter, "target"), (LayerRouter, "mask"), (LayerRouter, "sizes")]
)
def test_a_judge_asks_for_the_words_of_an_objective(role, word):
    body = {"judge": eval(f"lambda self, {word}: None"), role.verb: lambda self, hidden: None}
    with pytest.raises(ConfigError, match=rf"Own\.judge may ask for .*, got \['{word}'\]"), method(role, **body):
        pass


def test_a_method_of_any_role_judges_once_in_training():
    told = []

    def judge(self, labels, logps, head, hidden, positions, progress, updates):
        told.append((self.dims.layer, progress, updates))
        return -2 * logps.mean()

    specimen = zoo.build("llama")
    given = {**specimen.inputs, "labels": specimen.inputs["input_ids"]}
    with method(LayerRouter, route=lambda self, hidden: None, judge=judge) as config:
        model = get_token_model(specimen.model, config(layers=(1, 2)))
        plain = model.eval()(**given).loss
        set_progress(model, 0.5, 7)
        loss = model.train()(**given).loss
    assert told == [(1, 0.5, 7)]
    close(loss, plain + aux_loss(model))
    assert aux_loss(model) > 0


@pytest.mark.parametrize("updates", [-1, 1.5, True])
def test_steps_are_counted_from_0(updates):
    model = get_token_model(zoo.build("llama").model, LayerSkipConfig())
    with pytest.raises(ConfigError, match="counted from 0, got"):
        set_progress(model, 0.5, updates)


def data(rows=16):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (rows, 10), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(folder, told, resume=None, **more):
    """A training of 6 steps, in which `told` gets what each batch is judged with."""

    def judge(self, labels, exits, head, progress, updates):
        told.append((round(progress * 6), updates))
        return head(exits(0)).square().mean() * 1e-3

    fixed = dict(
        max_steps=6, save_steps=3, learning_rate=0.01, use_cpu=True, report_to=[], disable_tqdm=True, seed=0, lr_scheduler_type="constant"
    )
    torch.manual_seed(0)
    with method(LayerRouter, route=lambda self, hidden: None, judge=judge) as config:
        model = get_token_model(zoo.build("llama").model, [LORA, config()])
        args = TrainingArguments(str(folder), **{**fixed, **more})
        Trainer(model=model, args=args, train_dataset=data()).train(resume_from_checkpoint=resume)
    return [p.detach() for p in model.parameters() if p.requires_grad]


def test_a_trainer_tells_of_its_steps_and_goes_on_counting_when_it_is_resumed(tmp_path):
    whole, rest, more = [], [], dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    want = trained(tmp_path, whole, **more)
    assert whole == [(step, step) for step in range(6) for _ in range(2)]
    got = trained(tmp_path, rest, resume=str(tmp_path / "checkpoint-3"), **more)
    assert rest == whole[6:] and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.filterwarnings("ignore:Was asked to gather along dimension 0")
def test_accumulated_batches_are_one_large_batch(tmp_path):
    after = []
    for batch, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = get_token_model(zoo.build("llama").model, [LORA, LayerSkipConfig(dropout=0.0, every=2)])
        fixed = dict(max_steps=3, learning_rate=0.1, optim="sgd", use_cpu=True, report_to=[], disable_tqdm=True, seed=0, save_strategy="no")
        sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        rows = [{**row, "labels": row["labels"].masked_fill(torch.arange(10) < i % 4, -100)} for i, row in enumerate(data())]
        Trainer(model=model, args=TrainingArguments(str(tmp_path), **fixed, **sizes), train_dataset=rows).train()
        after.append([p.detach() for p in model.parameters() if p.requires_grad])
    for large, small in zip(*after, strict=True):
        close(large, small)
