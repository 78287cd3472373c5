"""Recipes: for a job, the stack of methods that won where it was measured, and what was measured."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hf_tokens

from ..errors import ConfigError, UnsupportedError, did_you_mean, explain
from ..model.anatomy import anatomy
from ..roles.config import MethodConfig
from ..roles.registry import method_info
from .blueprint import blueprints

RECIPES_MEASURED = json.loads(pkgutil.get_data("hf_tokens_adapters", "recipes.json"))  # by job; written by `make cards`
BITS = 4  # of a number of a key or value; fewer lost more than the entries that they made room for
FIRST_BLOCK = 0.65, 0.2  # share of the FLOPs that was left at a threshold of the first block; past it pictures came apart


def long_context(model: nn.Module, keep: float, tokenizer: Any) -> list[MethodConfig]:
    """Entries in few bits, and of these as many as fit; those go that help least to say the context again."""
    few = hf_tokens.KIVIConfig(key_bits=BITS, value_bits=BITS)
    cost = BITS / torch.finfo(model.dtype).bits + 2 / few.group  # each group has a scale and a least value
    return [few] if keep >= cost else [hf_tokens.KVzipConfig(ratio=keep / cost, **words(tokenizer)), few]


def words(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """What asks a model to say its context again, in its own template where it has one."""
    if tokenizer is None:
        return {}
    ids = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    answer = ()
    if tokenizer.chat_template is not None:
        told = [{"role": "user", "content": "\0"}]
        answer = ids(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True).split("\0")[1])
    resume = ids("\n\nRepeat the part of the previous context exactly, starting with")
    return {"repeat": ids("\n\nRepeat the previous context exactly."), "resume": resume, "answer": answer}


def fast_vit(model: nn.Module, keep: float, tokenizer: Any) -> list[MethodConfig]:
    """Three of the blocks merge what is most alike."""
    return [hf_tokens.ATCConfig(keep_rate=keep ** (1 / 3))]


def fast_vlm(model: nn.Module, keep: float, tokenizer: Any) -> list[MethodConfig]:
    """The lowest frequencies of each picture."""
    return [hf_tokens.FourierVLMConfig(keep=keep**0.5)]


def fast_dit(model: nn.Module, keep: float, tokenizer: Any) -> list[MethodConfig]:
    """Steps whose first block says nothing new are not computed."""
    share, threshold = FIRST_BLOCK
    if keep < share:
        rule = f"Below {share:.0%} of the FLOPs no cache gave pictures as good as fewer steps did"
        raise ConfigError(explain(rule, f"keep={keep:g}", f"Take fewer steps, and `keep={share:g}` of these."))
    return [hf_tokens.FirstBlockCacheConfig(threshold=threshold)]


def sentence_embeddings(model: nn.Module, keep: float, tokenizer: Any) -> list[MethodConfig]:
    """Vectors of a document that are alike become one."""
    return [hf_tokens.ColBERTTokenPoolingConfig(pool_factor=max(1, round(1 / keep)))]


LONG = ("kvzip", "kivi, 4 bits", "random", "kvpress: kvzip", "kvpress: snapkv", "kvpress: expected-attention")


@dataclass(frozen=True)
class Job:
    """What is wanted.

    Attributes:
        share: What `keep` is the share of.
        stack: Makes the configs for a model.
        result: The result file that says so.
        rows: Its rows that are shown, by how their series and setting begin; the first is the model without.
        columns: Its columns that are shown.
        in_words: Whether the stack asks the model something in words.
    """

    share: str
    stack: Callable[[nn.Module, float, Any], list[MethodConfig]]
    result: str
    rows: Sequence[tuple[str, str]]
    columns: Sequence[str]
    in_words: bool = False


JOBS = {
    "long-context": Job(
        "the bytes of the KV cache, the newest tokens besides",
        long_context,
        "kv",
        [
            ("full cache", "1024 tokens, before"),
            *((name, f"1024 tokens, before the question, {b}") for b in ("10%", "25%", "50%") for name in LONG),
        ],
        ["documents", "share in 16 bits", "loss more than the full cache's", "right answers"],
        in_words=True,
    ),
    "fast-vit": Job(
        "the patches that leave the last of three blocks",
        fast_vit,
        "vit",
        [("no reduction", ""), ("atc in three blocks", ""), ("tome", "r = "), ("random drop in three", ""), ("smaller picture", "140")],
        ["accuracy", "answers as unreduced", "GFLOPs per picture", "relative seconds"],
    ),
    "fast-vlm": Job(
        "the tokens of a picture",
        fast_vlm,
        "reducers_llava",
        [("no reduction", ""), ("fourier-vlm", ""), ("random drop", ""), ("smaller picture", "")],
        ["answers right", "visual tokens a block", "prefill GFLOPs", "relative seconds"],
    ),
    "fast-dit": Job(
        "the FLOPs of a run",
        fast_dit,
        "dit",
        [("all computed", ""), ("first-block-cache", ""), ("fewer steps", ""), ("random tokens", "")],
        ["PSNR", "GFLOPs", "relative CPU-seconds"],
    ),
    "sentence-embeddings": Job(
        "the vectors of a document in an index for late interaction",
        sentence_embeddings,
        "pooling",
        [("colbert-token-pooling", ""), ("random tokens", ""), ("tokens in order", ""), ("one vector", "")],
        ["index bytes a document", "recall@1", "recall@5"],
    ),
}
UNWON = {
    "small-prompt": "the last tokens of a prompt were better than any choice of scattered ones (`prompts` there). With weights that were "
    "trained for it, `LLMLingua2Config` and `compress_prompt` are there",
    "fast-whisper": "a transcript by Whisper tiny.en took as long as before (`whisper` there): `ToMeConfig(r=188)` spared 27 % of the "
    "encoder's FLOPs and 21 % of its seconds, with 6.7 % of the words wrong for 7.8 %, but most of the time is the decoder's; and the "
    "mean of every two neighbours, which is no method here, spared 43 % with 8.2 %",
}


def recipe(job: str, model: nn.Module, keep: float = 0.5, *, tokenizer: Any = None) -> list[MethodConfig]:
    """The stack that won at a job, for `get_token_model`.

    Args:
        job: One of the jobs below.
        model: The model that it is for.
        keep: Share of what the job is about that stays, in (0, 1].
        tokenizer: Of a language model: "long-context" asks in the words of its template.

    Raises:
        ConfigError: No such job, or a share that nothing won at.
        UnsupportedError: Nothing in the box won at this job, or the model has nothing that the stack acts on.
    """
    if job in UNWON:
        rule = "A recipe is a stack that won where it was measured (benchmarks/results/quality)"
        raise UnsupportedError(explain(rule, f"{job!r}, where {UNWON[job]}", f"Jobs with one: {', '.join(JOBS)}."))
    if job not in JOBS:
        remedy = f"{did_you_mean([job], [*JOBS])}Jobs: {', '.join(JOBS)}."
        raise ConfigError(explain("A recipe is for one of the jobs that are known", repr(job), remedy))
    if not 0 < keep <= 1:
        raise ConfigError(explain("`keep` must be in (0, 1]", repr(keep), f"It is the share of {JOBS[job].share} that stays."))
    configs = JOBS[job].stack(model, keep, tokenizer)
    found = {stream.kind for stream in anatomy(model).streams}
    for config in configs:
        kinds = method_info(config.method).cls.kinds
        if kinds and not found & {*kinds}:
            got = f"{type(model).__name__}, which has {', '.join(sorted(found)) or 'none'}"
            raise UnsupportedError(explain(f"{job!r} is for models with streams of {' or '.join(kinds)}", got, "Choose another job."))
    return configs


def plain_stack(configs: Sequence[MethodConfig]) -> list[dict[str, Any]]:
    """A stack with the knobs that are not as they come, as a recipe's file holds it."""
    return json.loads(json.dumps([{key: value for key, value in config.to_dict().items() if key != "version"} for config in configs]))


def as_yaml(model: str, configs: Sequence[MethodConfig]) -> str:
    """A stack for a model as the file of a recipe, which `hf-tokens apply` and `hf-tokens train` read."""
    import yaml

    return yaml.safe_dump({"model": model, "methods": plain_stack(configs)}, sort_keys=False)


def chosen(job: Job, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a result file that a job shows."""
    shown = lambda row: any(row["series"].startswith(series) and row["setting"].startswith(setting) for series, setting in job.rows)
    columns = ["series", "setting", *job.columns]
    return [{name: row[name] for name in columns if name in row} for row in rows if shown(row)]


def numbers(job: str) -> str:
    """What was measured for a job, as lines."""
    told = RECIPES_MEASURED[job]
    text = lambda value: value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    lines = ["; ".join(f"{text(v)}" if k in ("series", "setting") else f"{k} {text(v)}" for k, v in row.items()) for row in told["rows"]]
    head = [f"{job}: `keep` is the share of {JOBS[job].share}.", f"Measured with `{told['command']}`: {told['setting']}."]
    return "\n".join([*head, *(f"- {line}" for line in lines)])


def catalogue(results: Callable[[str], dict[str, Any]]) -> str:
    """The file of all that was measured, from the result files."""
    told = {name: results(job.result) for name, job in JOBS.items()}
    of = lambda name: {key: told[name][key] for key in ("command", "setting")} | {"rows": chosen(JOBS[name], told[name]["rows"])}
    return json.dumps({name: of(name) for name in JOBS}, indent=1) + "\n"


if recipe.__doc__ is not None:  # `python -OO` leaves none
    recipe.__doc__ = "\n\n".join([recipe.__doc__.rstrip(), *map(numbers, RECIPES_MEASURED)]) + "\n"


def recipe_for(job: str, source: str, keep: float) -> list[MethodConfig]:
    """The stack that won at a job, for a folder or Hub id; the config is all that is read, and the tokenizer where it asks in words."""
    from transformers import AutoTokenizer

    refusals = []
    for _, model in blueprints(source):
        tokenizer = AutoTokenizer.from_pretrained(source) if job in JOBS and JOBS[job].in_words else None
        try:
            return recipe(job, model, keep, tokenizer=tokenizer)
        except UnsupportedError as refused:  # another part of a pipeline may be the one
            refusals.append(refused)
    raise refusals[-1]


def recipe_as_text(job: str, source: str, keep: float) -> str:
    """What was measured as comments, and the stack for a folder or Hub id as YAML."""
    stack = recipe_for(job, source, keep)
    return "".join(f"# {line}\n" for line in numbers(job).split("\n")) + as_yaml(source, stack)
