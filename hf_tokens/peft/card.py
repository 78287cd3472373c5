"""The card of an adapter: what a stranger needs in order to use it, and what is known of how it was made.

It stands in README.md, and `use_it.py` beside it. Both end with a digest of themselves: as long as that is right, a save writes them anew;
what somebody has edited stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..roles.config import MethodConfig
from ..roles.registry import method_info
from .config import PEFT_METHOD, HFTokensConfig, hf_tokens_release
from .history import MeasuredCost, Training

README, SCRIPT = "README.md", "use_it.py"
HEADER = re.compile(r"\s*---\n(.*?)\n---(?:\n|$)(.*)", re.DOTALL)
DIGEST = r"hf-tokens: as long as (sha256:[0-9a-f]{64}) is the digest of what stands above, a save writes this file anew"
MARKS = {README: re.compile(rf"\n<!-- {DIGEST} -->\n*$"), SCRIPT: re.compile(rf"\n# {DIGEST}\n*$")}
# what writes itself into the empty template of huggingface_hub: who made the template, and with which PEFT
BY_ITSELF = re.compile(r"This is the model card of a \S+ \w+ \w+ that has been pushed on the Hub|- PEFT [\w.+@]+$|### Framework versions$")
NOT_DRAFTED = ("library_name", "base_model_relation", "model_name", "metrics", "licence")  # of a draft: what is ours, or a placeholder


# -- what is known ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Base:
    """The model that an adapter is for.

    Attributes:
        name: Its id on the Hub, or a local folder; None where it does not say.
        is_public: Whether that is an id.
        kind: Its class.
        library: The library of that.
        is_pipeline: Whether it is a pipeline of diffusers.
        licence: What its own card says of its licence: `license`, `license_name` and `license_link`.
        task: What it does, in the Hub's words, if its class says so.
    """

    name: str | None
    is_public: bool
    kind: str
    library: str
    is_pipeline: bool = False
    licence: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None


@dataclass(frozen=True)
class Known:
    """All that a card is made of.

    Attributes:
        adapters: The adapters, by the folders that they are saved in; the first one is "" or stands alone.
        base: Their base.
        parameters: How many parameters they have.
        repo: Their id on the Hub, where it is known.
        trained: What a trainer did.
        measured: What `hf_tokens.measure` found.
        draft: The metadata of another library's card, such as the tags of a trainer.
    """

    adapters: Mapping[str, HFTokensConfig]
    base: Base
    parameters: int
    repo: str | None = None
    trained: Training | None = None
    measured: MeasuredCost | None = None
    draft: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodPart:
    """A method of an adapter, as the card tells of it."""

    name: str
    role: str
    does: str
    paper: str
    knobs: list[tuple[str, str, str]]


def method_parts(config: HFTokensConfig) -> list[MethodPart]:
    """The methods of an adapter."""
    return [part_of_peft(spec["config"]) if spec["method"] == PEFT_METHOD else part_of(spec) for spec in config.methods]


def part_of(spec: dict[str, Any]) -> MethodPart:
    """A method of ours."""
    info = method_info(spec["method"], spec.get("version"))
    config: MethodConfig = info.config.from_dict(spec)
    values = [(knob, getattr(config, knob.name)) for knob, _ in config.knobs()]
    rows = [(knob.name, repr(value), knob.metadata["help"]) for knob, value in values if value is not None]
    does = " ".join(info.claim.partition(":")[2].split() or info.claim.split()).rstrip(".")
    return MethodPart(info.name, info.role, f"{does[:1].upper()}{does[1:]}.", " ".join(info.paper.split()), rows)


def part_of_peft(config: dict[str, Any]) -> MethodPart:
    """A method of PEFT's in the stack."""
    kind = config["peft_type"]
    known = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    told = {key: value for key, value in config.items() if key in known and value != known[key].default and not key.startswith("peft_")}
    rows = [(key, repr(value), "") for key, value in sorted(told.items()) if value not in (None, [], {})]
    return MethodPart(kind.lower(), "PEFT", f"PEFT's {kind}, trained and saved in one file with the rest.", "", rows)


def packages_needed(known: Known) -> list[str]:
    """What is to be installed, as pip takes it."""
    needed = [requirement for config in known.adapters.values() for requirement in config.needs()]
    beside = ["diffusers"] if known.base.library == "diffusers" else []
    return [*(requirement.replace("==", ">=") for requirement in dict.fromkeys(needed)), *beside]


# -- the card --------------------------------------------------------------------------------------------------------
def make_card(known: Known) -> ModelCard:
    """The card of an adapter, marked as ours."""
    data = metadata(known)
    text = "\n".join([*body(known), ""])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}\n<!-- {mark(digest_of_card(data.to_dict(), text))} -->\n")


def title(known: Known) -> str:
    """What an adapter is called: its repository, or its methods and base."""
    if known.repo is not None:
        return known.repo.rpartition("/")[2]
    names = " + ".join(part.name for config in known.adapters.values() for part in method_parts(config))
    return f"{names} on {name_shown(known.base)}"


def name_shown(base: Base) -> str:
    """How a base is called, without the folders of anyone's machine."""
    return base.kind if base.name is None else base.name if base.is_public else re.split(r"[/\\]", base.name.rstrip("/\\"))[-1]


def metadata(known: Known) -> ModelCardData:
    """The header of the card, with what another library's draft had beside it."""
    base, draft = known.base, dict(known.draft)
    tags = ["hf-tokens"]
    for part in (part for config in known.adapters.values() for part in method_parts(config)):
        tags += [part.role, part.name] if part.role != "PEFT" else [part.name]
    tags += [base.library]
    if base.is_public:
        draft |= {"base_model": base.name, "base_model_relation": "adapter"}
        tags.append(f"base_model:adapter:{base.name}")
    else:
        draft.pop("base_model", None)
    if base.task is not None:
        draft.setdefault("pipeline_tag", base.task)
    draft = {**base.licence, **draft} if "license" not in draft else draft
    index = draft.pop("model-index", None)
    results = [] if index and index[0].get("results") else list(eval_results(known))
    draft |= {"library_name": "peft", "tags": sorted({*tags, *(draft.pop("tags", None) or ())})}
    if results:
        return ModelCardData(model_name=title(known), eval_results=results, **draft)
    return ModelCardData(**draft, **({"model-index": index} if index and index[0].get("results") else {}))


def eval_results(known: Known) -> Iterator[EvalResult]:
    """The results of the card's `model-index`."""
    task, training, measured = known.base.task or "other", known.trained, known.measured
    if training is not None:
        data = training.evaluated_on
        for name, value in training.evaluation.items():
            kind = name.removeprefix("eval_")
            yield EvalResult(task, data or "unknown", data or "Evaluation set of the trainer", kind, value, metric_name=name)
    if measured is not None:
        for name, value in measured.cost.items():
            yield EvalResult(task, "unknown", f"Inputs of {measured.inputs}", name, value, metric_name=f"{name} of a forward")


def body(known: Known) -> Iterator[str]:
    """The lines of the card below its header."""
    base = known.base
    where = f"[{base.name}](https://huggingface.co/{base.name})" if base.is_public else f"`{name_shown(base)}`"
    yield f"# {title(known)}\n"
    of = f", a `{base.kind}`" if name_shown(base) != base.kind else ""
    size = f" with {known.parameters:,} parameters" if known.parameters else ""
    yield f"An adapter{size} for {where}{of}, made with hf-tokens on PEFT. The base stays as it is.\n"
    yield "## What it does\n"
    for folder, config in known.adapters.items():
        if folder:
            yield f"In the folder `{folder}`:\n"
        for part in method_parts(config):
            yield f"- **{part.name}** ({part.role}): {part.does}{paper(part)}"
        yield ""
    yield from use(known)
    yield "## Knobs\n"
    yield "| method | knob | value | meaning |\n| --- | --- | --- | --- |"
    for folder, config in known.adapters.items():
        for part in method_parts(config):
            for name, value, meaning in part.knobs or [("none", "", "")]:
                cells = (f"{folder}/{part.name}" if folder else part.name, name, value and f"`{value}`", meaning)
                yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""
    yield from made(known)


def paper(part: MethodPart) -> str:
    """Where a method comes from."""
    linked = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", part.paper)
    return f" Paper: {linked}." if linked else ""


def use(known: Known) -> Iterator[str]:
    """How it is loaded."""
    yield "## Use it\n"
    needed = " ".join(f'"{each}"' for each in packages_needed(known))
    yield f"```\npip install {needed}\n```\n"
    yield "```python"
    yield from loading(known, repr(known.repo or "path/to/this/folder"))
    yield "```\n"
    if known.base.is_pipeline:
        yield "`hf_tokens.unload(pipe)` gives the pipeline back as it was, to the bit."
    else:
        yield "`with model.disable_adapter():` is the base model, and `model.unload()` gives it back as it was, to the bit."
        yield "Once `hf_tokens` is imported, `PeftModel.from_pretrained` and transformers' `load_adapter` and `pipeline` take the adapter,"
        yield "too; without that import PEFT answers `KeyError: 'HF_TOKENS'`."
    yield ""


def loading(known: Known, place: str) -> Iterator[str]:
    """The lines that load it, given the expression of where it is."""
    base, folder = known.base, next(iter(known.adapters))
    at = f"{place}, subfolder={folder!r}" if folder and not base.is_pipeline else place
    load = "hf_tokens.load(" if at == place else "PeftModel.from_pretrained(model, "
    yield "import hf_tokens"
    if at == place and base.is_public and not base.is_pipeline:
        yield f"\nmodel = {load}{at})"
        return
    variable = "pipe" if base.is_pipeline else "model"
    known_class = base.library in ("transformers", "diffusers")
    name = repr(base.name if base.is_public else f"path/to/{name_shown(base)}")
    if known_class:
        yield f"from {base.library} import {base.kind}"
    if at != place:
        yield "from peft import PeftModel"
    yield f"\n{variable} = {base.kind}.from_pretrained({name})" if known_class else f"\nmodel = ...  # the base, a {base.kind}"
    yield f"{variable} = {load}{at}, {variable})" if at == place else f"{variable} = {load}{at})"


def made(known: Known) -> Iterator[str]:
    """How it was made."""
    yield "## How it was made\n"
    training, measured = known.trained, known.measured
    if training is not None:
        yield from training.told()
    if measured is not None:
        yield from measured.told()
    yield "### Framework versions\n"
    libraries = {"PEFT": "peft", "Transformers": "transformers", "PyTorch": "torch"}
    libraries |= {"Diffusers": "diffusers"} if known.base.library == "diffusers" else {}
    yield from (f"- {label} {version(name)}" for label, name in libraries.items())
    yield f"- hf-tokens {hf_tokens_release().partition('==')[2]}"
    yield f"- Python {platform.python_version()}"


def make_script(known: Known) -> str:
    """`use_it.py`: the lines that load an adapter, for who finds it beside them; nothing of ours runs it."""
    place = "Path(__file__).parent" if known.repo is None else repr(known.repo)
    needed = " ".join(f"'{each}'" for each in packages_needed(known))
    lines = [f'"""Load this adapter. First: pip install {needed}"""', ""]
    lines += [] if known.repo is not None else ["from pathlib import Path", ""]
    text = "\n".join([*lines, *loading(known, place), ""])
    return f"{text}\n# {mark(digest_of_text(text))}\n"


# -- whose a file is -------------------------------------------------------------------------------------------------
def mark(digest: str) -> str:
    """The last line of a file of ours."""
    return re.sub(r"\(.*?\)", digest, DIGEST, count=1)


def digest_of_text(text: str) -> str:
    """The digest of a text."""
    return "sha256:" + hashlib.sha256(text.strip().encode()).hexdigest()


def digest_of_card(data: Mapping[str, Any], text: str) -> str:
    """The digest of a card, however its header is laid out."""
    return digest_of_text(f"{json.dumps(data, sort_keys=True, default=str)}\n{text.strip()}")


def read_header(content: str) -> tuple[dict[str, Any], str] | None:
    """The metadata of a card and the text below it; None where they cannot be read."""
    import yaml

    found = HEADER.match(content.replace("\r\n", "\n"))
    if found is None:
        return {}, content
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return None
    return (data or {}, found[2]) if isinstance(data or {}, dict) else None


def is_ours(content: str, name: str = README) -> bool:
    """Whether nobody has edited a file since we wrote it."""
    content = content.replace("\r\n", "\n")
    found = MARKS[name].search(content)
    if found is None:
        return False
    above = content[: found.start()]
    if name == SCRIPT:
        return digest_of_text(above) == found[1]
    parts = read_header(above)
    return parts is not None and digest_of_card(*parts) == found[1]


def is_blank(content: str) -> bool:
    """Whether a card is the empty template of huggingface_hub, in which nobody has written a line."""
    parts = read_header(content)
    if parts is None:
        return False
    template = set(map(str.strip, ModelCard.from_template(ModelCardData()).text.splitlines()))
    return all(line.strip() in template or BY_ITSELF.match(line.strip()) for line in parts[1].splitlines())


def draft_of(content: str) -> dict[str, Any]:
    """What another library has written into the header of a card: not what we say better."""
    data, _ = read_header(content) or ({}, "")
    return {key: value for key, value in data.items() if key not in NOT_DRAFTED}
