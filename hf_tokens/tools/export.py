"""The function `export`: what of a surgery can live without hf-tokens, in a form that others read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, UnsupportedError, did_you_mean, explain
from .forms import EXPORT_FORMS
from .leaving import StackPart, parts_of_stack
from .surgeries import blocks_in, models_in, surgeries_of


def export(
    model: Any, folder: str | Path, form: str = "checkpoint", *, without: Collection[str] = (), input_ids: Tensor | None = None
) -> None:
    """Write what acts in a model into a folder, in a form that needs no hf-tokens.

    `"checkpoint"`: edits of weights and vocabularies, LoRAs and heads in a folder that `from_pretrained` reads; objectives leave nothing
    behind. It answers as the model does: to the bit where edits alone act, within rounding where a LoRA is merged. It takes memory for
    the model once more. A model that has a vocabulary from `transplant`, or no surgery at all, is saved as it is; save its tokenizer
    beside it.

    `"lora"`: the LoRA of the stack, or what else of PEFT's stands in it, as an adapter that `PeftModel.from_pretrained` reads. It answers
    as the model does with the other methods off; several go into folders by their place in the stack, `0`, `1`. vLLM serves
    one (`LoRARequest`) beside a prompt of the next form.

    `"prompt-embeds"`: the learned prompt as `prompt_embeds.safetensors`, with the tensors `prompt_embeds` (tokens, hidden) and `input_ids`
    (tokens), as the model looks them up. vLLM takes the whole prompt so, a tensor (tokens, hidden) on the CPU, with the template of a chat
    in it:

    ```python
    prompt = load_file("folder/prompt_embeds.safetensors")["prompt_embeds"]
    table = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings()
    embeds = torch.cat([prompt, table(question_ids).detach()])  # or pass `input_ids` with the question in them
    LLM(base, enable_prompt_embeds=True).generate({"prompt_embeds": embeds})
    ```

    Its server (`vllm serve BASE --enable-prompt-embeds`) takes what `torch.save(embeds, buffer)` writes, in base64, in the body of a
    completion: `extra_body={"prompt_embeds": base64.b64encode(buffer.getvalue()).decode()}`. A prompt with an encoder's vectors in it is
    made by `embed_prompt`, and handed over in the same way.

    `"custom-generate"`: a cache compressor as a repository for `model.generate(..., custom_generate=folder, trust_remote_code=True)`, whose
    code needs Transformers alone. Push it with `huggingface_hub.upload_folder`.

    A prompt that a reducer or a scorer shortened is text or ids, which `compress_prompt` returns, for any other model.

    Args:
        model: A PeftModel or a pipeline with a surgery; of a pipeline with two denoisers the forms `checkpoint` and `lora`.
        folder: Where to; files of the same names are replaced, once all are written.
        form: One of these.
        without: Names of methods that stay behind, `peft` for a LoRA.
        input_ids: Of the form `prompt-embeds`: the whole prompt, (n) or (1 n), in which the learned words stand; by default these alone.

    Raises:
        ConfigError: There is no such form, or `without` names a method that does not act.
        UnsupportedError: A method cannot leave in this form; it says what would be lost. Nothing was written.
    """
    check_form(form, input_ids)
    models = models_in(model)
    if form == "checkpoint" and not blocks_in(model):
        EXPORT_FORMS[form].write(model, Path(folder), {}, without, None)
        return
    surgeries_of(model)
    if EXPORT_FORMS[form].one_model and len(models) > 1:
        raise UnsupportedError(explain(f"{EXPORT_FORMS[form].rule}, of one model", f"{sorted(models)}", "Pass one of them."))
    stacks = {name: parts_of_stack(inner) for name, inner in models.items()}
    for stack in stacks.values():
        check_parts(stack, form, without)
    EXPORT_FORMS[form].write(model, Path(folder), stacks, without, input_ids)


def check_form(form: str, input_ids: Tensor | None) -> None:
    """Refuse a form that is none, and ids that it has no use for."""
    if form not in EXPORT_FORMS:
        raise ConfigError(
            explain(f"A form of export is one of {sorted(EXPORT_FORMS)}", repr(form), f"{did_you_mean([form], EXPORT_FORMS)}Choose one.")
        )
    if input_ids is None:
        return
    if form != "prompt-embeds":
        raise ConfigError(explain("`input_ids` are of the form 'prompt-embeds'", repr(form), "Leave them out."))
    fits = isinstance(input_ids, Tensor) and not input_ids.is_floating_point() and input_ids.numel() == max(input_ids.shape[-1:], default=0)
    if not fits or input_ids.dim() > 2 or not input_ids.numel():
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ConfigError(explain("`input_ids` are those of one prompt, (n) or (1 n)", got, "Export a prompt at a time, without padding."))


def check_parts(stack: list[StackPart], form: str, without: Collection[str]) -> None:
    """Refuse a stack of which something would be lost that is not named, or of which nothing leaves."""
    names, here = sorted({part.name for part in stack}), EXPORT_FORMS[form]
    if isinstance(without, str) or not {*without} <= {*names}:
        rule = f"`without` is a list of methods that act, of {names}"
        raise ConfigError(explain(rule, repr(without), "Name one of them, or leave it out."))
    for part in stack:
        if part.lost and form not in part.leaves and part.name not in without and not here.of_a_part:
            others = f"It leaves as {' or '.join(map(repr, part.leaves))}; pass" if part.leaves else "Pass"
            got = f"{part.name!r}, of which would be lost {part.lost}"
            raise UnsupportedError(explain(here.rule, got, f"{others} `without=[{part.name!r}]` to leave it behind."))
