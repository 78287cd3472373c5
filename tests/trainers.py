"""Short trainings of tiny models with surgeries, for the tests of Trainers."""

import torch
from transformers import Trainer, TrainingArguments

from hf_tokens import FTPConfig, get_token_model
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeInsertConfig

STACK = [FTPConfig(sparsity=0.3), ProbeInsertConfig(tokens=2)]  # a method with losses and a schedule, and one with neither


def model(methods=STACK, specimen=None, **kwargs):
    specimen = specimen or zoo.build("llama")
    torch.manual_seed(0)
    return get_token_model(specimen.model, methods, **kwargs)


def data(rows=8, length=12):
    ids = torch.randint(5, 80, (rows, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids]


PLAIN = dict(max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0)
QUIET = dict(logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", seed=0)


def trainer(surgery, folder, rows=8, callbacks=(), kind=Trainer, train_dataset=None, **arguments):
    args = TrainingArguments(output_dir=str(folder), **(PLAIN | QUIET | arguments))
    given = train_dataset or data(rows)
    return kind(model=surgery, args=args, train_dataset=given, eval_dataset=data(4), callbacks=list(callbacks))


def trained(surgery):
    return {name: p.detach().clone() for name, p in surgery.named_parameters() if p.requires_grad}


def losses(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


class OwnLoss(Trainer):
    """A trainer that does not read the model's loss, as TRL's do not."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")
        loss = loss / num_items_in_batch
        return (loss, out) if return_outputs else loss
