"""Folders of adapters, damaged by chance: each is loaded and right, or one of our errors, soon and without much memory."""

import json
import random
import resource
import shutil
import struct
import time

import pytest
import torch
from damage import ADAPTERS, FIRST, MORE, ODD, change, leaves, planted
from peft import LoraConfig, PeftConfig, PeftModel

import hf_tokens
from hf_tokens import DeepPromptConfig, HFTokensError, get_token_model
from hf_tokens.testing.contract.architectures import built, fresh
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.testing.probe import ProbeInsertConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS, MEGABYTES = 5, 500  # that a folder may take
PARTS = 10  # of all folders, for the workers
MADE = {
    **{name: ("llama", make) for name, make in ADAPTERS.items()},
    "of a vision model": ("vit", lambda: get_token_model(fresh("vit"), [ProbeInsertConfig(), DeepPromptConfig(tokens=2)])),
    "of three methods": ("llama", lambda: get_token_model(fresh("llama"), ["ftp", "prefixkv", LoraConfig(r=2, target_modules=["v_proj"])])),
}
DOORS = {
    "hf_tokens.load": lambda folder, base: hf_tokens.load(folder, base),
    "PEFT": lambda folder, base: PeftModel.from_pretrained(base, str(folder)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folders = {}
    for name, (_, make) in MADE.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("sound") / "adapter"
        make().save_pretrained(folders[name])
    return folders


# -- damage, each given the folder and a source of chance --------------------------------------------------------------
def plant(folder, chance):
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(planted(data, chance.choice(list(leaves(data))), chance.choice(ODD))), errors="surrogatepass")


def leave_out(folder, chance):
    data = json.loads((folder / CONFIG).read_text())
    path = chance.choice([path for path in leaves(data) if path])
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    (folder / CONFIG).write_text(json.dumps(data))


def scribble(name, most, header=False):
    def damage(folder, chance):
        raw = bytearray((folder / name).read_bytes())
        end = 8 + struct.unpack("<Q", raw[:8])[0] if header else len(raw)
        for _ in range(chance.randint(1, most)):
            raw[chance.randrange(end)] = chance.randrange(256)
        (folder / name).write_bytes(raw)

    return damage


def flip(folder, chance):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    (folder / WEIGHTS).write_bytes(raw)


def cut_off(name):
    def damage(folder, chance):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: chance.randrange(len(raw))])

    return damage


def repeat(folder, chance):
    """A text that repeats itself: deep, wide, or in the encoding of another system."""
    text = (folder / CONFIG).read_text()
    odd = (
        "[" * 10**5,
        text.replace("{", '{"a":' * 500 + "1" + "}" * 500 + ",", 1),
        text + " " * 2**21,
        text.encode("utf-16"),
        b"\xff" + text.encode(),
    )
    made = chance.choice(odd)
    (folder / CONFIG).write_bytes(made if isinstance(made, bytes) else made.encode())


def change_tensors(folder, chance):
    try:
        change(folder, folder, chance.choice([*FIRST.values(), *MORE.values()]))
    except IndexError:  # there are none
        change(folder, folder, chance.choice(list(MORE.values())))


def enlarge(folder, chance):
    """A number of the config that asks for more than there is."""
    data = json.loads((folder / CONFIG).read_text())
    paths = [path for path in leaves(data) if path and path[0] == "methods" and len(path) > 2]
    if paths:
        data = planted(data, chance.choice(paths), chance.choice([10**5, 10**9, 10**18]))
    (folder / CONFIG).write_text(json.dumps(data))


DAMAGES = (
    *(plant, plant, leave_out, enlarge, repeat, change_tensors, change_tensors, flip, flip),
    *(scribble(CONFIG, 3), scribble(CONFIG, 30), scribble(WEIGHTS, 3, header=True), scribble(WEIGHTS, 3)),
    *(cut_off(CONFIG), cut_off(WEIGHTS), lambda folder, _: (folder / WEIGHTS).unlink(), lambda folder, _: (folder / CONFIG).unlink()),
)


def before_us(folder):
    """Whether PEFT sees no adapter of ours in a folder: what it says then is its own."""
    try:
        return PeftConfig._get_peft_type(str(folder)) != "HF_TOKENS"
    except Exception:
        return True


def right(model, base, before, inputs):
    """Whether an adapter that was loaded answers in numbers, and leaves the base as it was."""
    with torch.no_grad():
        finite = all(tensor.isfinite().all() for tensor in model.eval()(**inputs).values() if isinstance(tensor, torch.Tensor))
    model.unload()
    return finite and not difference(before, snapshot(base))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_folder_is_right_or_one_error_and_the_model_is_as_it_was(sound, tmp_path, amount, count, part):
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(part, amount(5000, 60), PARTS):
        chance = random.Random(case)
        name, damage = chance.choice(list(MADE)), chance.choice(DAMAGES)
        folder = shutil.copytree(sound[name], tmp_path / "adapter", dirs_exist_ok=True)
        damage(folder, chance)
        for door, load in DOORS.items():
            base, inputs = fresh(MADE[name][0]), built(MADE[name][0])[1]
            before, start, what = snapshot(base), time.process_time(), f"case {case}, {name} through {door}"
            try:
                model = load(folder, base)
            except HFTokensError:
                count["refused"] += 1
            except Exception as error:
                assert door == "PEFT" and before_us(folder), f"{what}: {error!r}"
                count["refused by PEFT before us"] += 1
            else:
                assert right(model, base, before, inputs), what
                count["right"] += 1
            assert not difference(before, snapshot(base)), what
            assert time.process_time() - start < SECONDS, what
        shutil.rmtree(folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) / 1024 < MEGABYTES
