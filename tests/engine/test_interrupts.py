"""Long work that is broken off anywhere leaves the model as it was, or as it is when all is done: never in between."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from lots import lot
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import hf_tokens
from hf_tokens import (
    DynamicTokenPoolingConfig,
    OMPTransplantConfig,
    PrefixKVConfig,
    ProfilingDiTConfig,
    SSDUnlearnConfig,
    get_token_model,
    search_path,
    search_shares,
)
from hf_tokens.engine.block import BlockSurgery
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.snapshots import difference, snapshot

OURS = str(Path(hf_tokens.__file__).parent)
DOORS_ROOM = f"{OURS}/tools"
ROOMS = tuple(f"{OURS}/{room}" for room in ("tools", "engine/model.py", "engine/block.py", "engine/stream.py", "engine/hooks.py", "roles"))


def states(model):
    """All that can be seen of a model: what it is made of, what acts in it, who listens, and what is trained."""
    numbered = lambda value: isinstance(value, dict) and all(isinstance(key, int) for key in value)  # as hooks are, and by identity
    seen = {key: [*value.values()] if numbered(value) else value for key, value in snapshot(model).items()}
    for name, parameter in model.named_parameters():
        seen[f"{name}:trained"] = parameter.requires_grad
    for path, block in ((path, m) for path, m in model.named_modules() if isinstance(m, BlockSurgery)):
        methods = {key: m for stack in block.hf_tokens_methods.values() for key, m in stack.items()}
        seen[f"{path}:acting"] = [method.key for method in block.plan.acting]
        seen[f"{path}:configs"] = [(key, method.config.to_dict()) for key, method in methods.items()]
        seen[f"{path}:listeners"] = len(block.surgery.model.listeners)
    configs = vars(model).get("peft_config", {})
    seen["stack"] = [str(config.methods) for config in configs.values()]
    return seen


class Interrupt:
    """Raises KeyboardInterrupt where a line of ours is about to run that ran so often before, in this thread."""

    def __init__(self, at=None):
        self.at, self.lines, self.raised = at, [], False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def call(self, frame, event, argument):
        return self.line if frame.f_code.co_filename.startswith(ROOMS) else None

    def line(self, frame, event, argument):
        if event == "line" and not self.raised:
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                self.raised = True
                raise KeyboardInterrupt
        return self.line


EVERY, AGAIN = 100, 3  # one in so many lines of the engine is taken, and all of the doors; one in so many of these where it runs last, too


def steps(lines):
    """Where a line of a door runs first, and some where they run last; and some of the engine."""
    first = {line: i for i, line in reversed([*enumerate(lines)])}
    last = {line: i for i, line in enumerate(lines)}
    number = {line: lot(Path(line[0]).name, str(line[1])) for line in first}
    taken = {line for line in first if DOORS_ROOM in line[0] or number[line] % EVERY == 0}
    return sorted({*(first[line] for line in taken), *(last[line] for line in taken if number[line] % AGAIN == 0)})


def text(*methods):
    def make():
        torch.manual_seed(0)
        specimen = zoo.build("llama")
        model = get_token_model(specimen.model, [*methods]).train()
        return begun(model, specimen.inputs)

    return make


def begun(model, inputs):
    """The model behind its first call, at which some things are noted."""
    with warnings.catch_warnings(action="ignore"):  # an edit that is not made yet says so
        model(**inputs)
    return model, inputs


def denoiser():
    specimen = zoo.build("diffusers/DiTTransformer2DModel")
    return begun(get_token_model(specimen.model, ProfilingDiTConfig(threshold=1.0)), specimen.inputs)


def plain():
    specimen = zoo.build("llama")
    return specimen.model, specimen.inputs


def tokenizer(tokens, **special):
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


OWN = tokenizer([f"w{i}" for i in range(90)])
DONOR = tokenizer(["new", *(f"w{i}" for i in range(12))])


def batches(inputs):
    return [inputs, {name: value.flip(0) for name, value in inputs.items()}]


def labelled(inputs):
    return [{**batch, "labels": batch["input_ids"]} for batch in batches(inputs)]


def unlearn(model, inputs):
    hf_tokens.edit(model, {"forget": labelled(inputs)[:1], "retain": labelled(inputs)[1:]})


def transplant(model, inputs):
    hf_tokens.transplant(model, OWN, torch.randn(13, 4, generator=torch.Generator().manual_seed(0)), DONOR, OMPTransplantConfig(k=2))


# door -> the model, and a call of the door
DOORS = {
    "calibrate": (
        text(PrefixKVConfig(), DynamicTokenPoolingConfig()),
        lambda model, inputs: hf_tokens.calibrate(model, batches(inputs)),
    ),
    "calibrate a denoiser": (denoiser, lambda model, inputs: hf_tokens.calibrate(model, batches(inputs))),
    "set_method": (text(PrefixKVConfig()), lambda model, inputs: hf_tokens.set_method(model, PrefixKVConfig(budget=0.25))),
    "edit": (text(SSDUnlearnConfig(alpha=1.0), SSDUnlearnConfig(alpha=2.0)), unlearn),
    "transplant": (plain, transplant),
    "search_path": (plain, lambda model, inputs: search_path(lambda path: sum(path) / 9, 3, simulations=4)),
    "search_shares": (plain, lambda model, inputs: search_shares(sum, (0.5, 0.5), population=2, generations=2)),
}


@pytest.mark.parametrize("door", DOORS)
def test_work_that_is_broken_off_anywhere_leaves_the_model_as_it_was(door):
    make, call = DOORS[door]
    call(*make())  # what is remembered for good is remembered now
    model, inputs = make()
    with Interrupt() as whole:
        call(model, inputs)
    done, broken = states(model), []
    model, inputs = make()
    before = states(model)
    for at in steps(whole.lines):
        with Interrupt(at) as stop:
            try:
                call(model, inputs)
            except KeyboardInterrupt:
                pass
        file, line = whole.lines[at]
        assert stop.raised, f"{file}:{line} was not reached again"
        after = states(model)
        if changed := difference(before, after):
            if not difference(done, after):
                model, inputs = make()  # it was done already
                continue
            broken.append((f"{Path(file).name}:{line}", changed[:3]))
            model, inputs = make()
    assert not broken, "\n".join(map(str, broken))
