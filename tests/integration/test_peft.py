"""PEFT's ground: its type, and the doors of transformers, diffusers and accelerate that lead there."""

import contextlib
import copy
import subprocess
import sys
from pathlib import Path

import gates
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, mapping
from tolerances import all_equal

import hf_tokens
from hf_tokens import ConfigError, DeepPromptConfig, FTPConfig, HFTokensConfig, HFTokensModel, UnsupportedError, get_token_model
from hf_tokens.engine.block import BlockSurgery
from hf_tokens.roles.in_peft import PlainType
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.architectures import ARCHITECTURES
from hf_tokens.testing.contract.parameters import stir
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig, probe_config


def test_the_type_is_a_member_like_any_other():
    kind = PeftType("HF_TOKENS")
    assert kind is PeftType.HF_TOKENS is PeftType["HF_TOKENS"] and kind == "HF_TOKENS" and kind in list(PeftType)
    assert copy.deepcopy(kind) is kind
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] is HFTokensConfig and mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] is HFTokensModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] == "hf_tokens_"


def test_a_plain_string_would_do_as_the_type():
    kind = PlainType("HF_TOKENS")
    assert kind == "HF_TOKENS" and kind.value == kind.name == "HF_TOKENS" and {kind: 1}["HF_TOKENS"] == 1


# -- transformers' own door ------------------------------------------------------------------------------------------


def test_the_gate_is_where_the_skips_say():
    model, lora = zoo.build("llama").model, LoraConfig(r=2, target_modules=["q_proj"])
    (closed,) = gates.add_adapter.args
    with pytest.raises(ValueError, match=gates.MIN_PEFT_VERSION) if closed else contextlib.nullcontext():
        model.add_adapter(lora)


@gates.add_adapter
def test_transformers_adds_switches_and_saves(tmp_path):
    specimen = zoo.build("llama")
    model = specimen.model.eval()
    model.save_pretrained(tmp_path / "base")  # it writes into the config
    off, before = specimen.run(), snapshot(model)
    model.add_adapter(HFTokensConfig(methods=[ProbeInsertConfig(), ProbeDropConfig()]), adapter_name="surgery")
    stir(model)
    model.eval()
    on = specimen.run()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    model.disable_adapters()
    all_equal(specimen.run(), off, "disabled")
    model.enable_adapters()
    all_equal(specimen.run(), on, "enabled")
    hf_tokens.unload(model)
    assert not difference(before, snapshot(model))
    all_equal(specimen.run(), off, "unloaded")

    fresh = zoo.build("llama")
    fresh.model.load_adapter(str(tmp_path), adapter_name="again")
    all_equal(fresh.run(), on, "loaded")
    fresh.model.delete_adapter("again")
    all_equal(fresh.run(), off, "deleted")


def test_transformers_loads(tmp_path):
    specimen = zoo.build("llama")
    off, before = specimen.run(), snapshot(specimen.model)
    surgery = stir(get_token_model(copy.deepcopy(specimen.model), [ProbeInsertConfig(), ProbeDropConfig()])).eval()
    surgery.save_pretrained(tmp_path)
    specimen.model.load_adapter(str(tmp_path), adapter_name="surgery")
    with torch.no_grad():
        all_equal(specimen.run(), [surgery(**specimen.inputs).logits], "loaded")
    hf_tokens.unload(specimen.model)
    assert set(difference(before, snapshot(specimen.model))) <= {":_weight_conversions"}  # transformers' own note of what it loads
    all_equal(specimen.run(), off, "unloaded")


@gates.add_adapter
def test_transformers_door_leaves_no_lora_of_the_stack_behind():
    specimen = zoo.build("llama")
    model, trained = specimen.model, [p.requires_grad for p in specimen.model.parameters()]
    off, before = specimen.run(), snapshot(model)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model.add_adapter(HFTokensConfig(methods=["probe-insert", lora], modules_to_save=["lm_head"]), adapter_name="surgery")
    stir(model)
    assert hf_tokens.unload(model) is model
    assert not difference(before, snapshot(model)) and trained == [p.requires_grad for p in model.parameters()]
    all_equal(specimen.run(), off, "unloaded")


@gates.add_adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_transformers_door_keeps_a_lora_beside_the_surgery():
    specimen = zoo.build("llama")
    model, lora = specimen.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(lora, adapter_name="tuning")
    model.eval()
    on = specimen.run()
    model.add_adapter(HFTokensConfig(methods=["probe-insert"]), adapter_name="surgery")
    model.set_adapter(["tuning", "surgery"])
    hf_tokens.unload(model)
    all_equal(specimen.run(), on, "unloaded")
    assert set(model.peft_config) == {"tuning"} and model._hf_peft_config_loaded
    model.set_adapter("tuning")
    model.delete_adapter("tuning")


# -- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "DiTTransformer2DModel"])
def test_get_peft_model_on_denoisers(name, tmp_path):
    row = ARCHITECTURES[name]
    model, inputs = row.build()
    with torch.no_grad():
        off = row.run(model, inputs)
        surgery = stir(get_peft_model(model, HFTokensConfig(methods=probe_config(0.5))).eval())
        on = row.run(surgery, inputs)
        surgery.save_pretrained(tmp_path)
        all_equal(row.run(surgery.unload(), inputs), off, "unloaded")
        again = PeftModel.from_pretrained(row.build()[0], tmp_path).eval()
        all_equal(row.run(again, inputs), on, "loaded")


def test_a_unet_adds_an_adapter():
    row = ARCHITECTURES["UNet2DConditionModel"]
    unet, inputs = row.build()
    with torch.no_grad():
        off = row.run(unet, inputs)
        unet.add_adapter(HFTokensConfig(methods=[ProbeInsertConfig()]), adapter_name="surgery")
        stir(unet)
        unet.eval()
        on = row.run(unet, inputs)
        unet.disable_adapters()
        all_equal(row.run(unet, inputs), off, "disabled")
        unet.enable_adapters()
        all_equal(row.run(unet, inputs), on, "enabled")
        hf_tokens.unload(unet)
        all_equal(row.run(unet, inputs), off, "unloaded")


def test_the_step_comes_from_the_cache_context():
    row = ARCHITECTURES["FluxTransformer2DModel"]
    model, inputs = row.build()
    heard = []
    with model.cache_context("cond"):  # the registry has looked for its children before
        model(**inputs)
    surgery = get_token_model(model, ProbeDropConfig())
    block = next(module for module in surgery.modules() if isinstance(module, BlockSurgery))
    block.module.register_forward_hook(lambda *_: heard.append(block.surgery.call.context))
    with torch.no_grad():
        for step in range(2):
            for name in ("cond", "uncond"):
                with model.cache_context(name, step_index=step, num_inference_steps=2):
                    surgery(**inputs)
    said = [(one.denoising[0], one.step, one.steps) for one in heard]
    assert said == [("cond", 0, 2), ("uncond", 0, 2), ("cond", 1, 2), ("uncond", 1, 2)]
    base = surgery.unload()
    with torch.no_grad(), base.cache_context("cond"):
        base(**inputs)


def test_a_pipeline_is_a_door(tmp_path):
    from diffusers import DDIMScheduler, DiTPipeline

    row = ARCHITECTURES["DiTTransformer2DModel"]

    def pipeline():
        return DiTPipeline(transformer=row.build()[0], vae=None, scheduler=DDIMScheduler())

    inputs = row.build()[1]
    with torch.no_grad():
        pipe = pipeline()
        off = row.run(pipe.transformer, inputs)
        assert get_token_model(pipe, probe_config(0.5)) is pipe
        stir(pipe.transformer).eval()
        on = row.run(pipe.transformer, inputs)
        hf_tokens.save_adapter(pipe, tmp_path)
        again = hf_tokens.load(tmp_path, pipeline())
        all_equal(row.run(again.transformer.eval(), inputs), on, "loaded")
        assert hf_tokens.unload(pipe) is pipe
        all_equal(row.run(pipe.transformer, inputs), off, "unloaded")


# -- memory and devices ----------------------------------------------------------------------------------------------


def test_loading_with_low_memory_is_the_same(tmp_path):
    specimen = zoo.build("llama")
    surgery = stir(get_token_model(copy.deepcopy(specimen.model), DeepPromptConfig(tokens=3)).eval())
    surgery.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(specimen.model, tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(p.is_meta for p in again.parameters())
    with torch.no_grad():
        all_equal([again(**specimen.inputs).logits], [surgery(**specimen.inputs).logits])


def test_a_base_on_the_meta_device():
    from transformers import LlamaForCausalLM

    config = zoo.build("llama").model.config
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    surgery = get_peft_model(base, HFTokensConfig(methods=["deep-prompt"]), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in surgery.parameters())


def test_a_base_whose_weights_are_offloaded(tmp_path):
    from accelerate import cpu_offload

    specimen = zoo.build("llama")
    surgery = stir(get_token_model(copy.deepcopy(specimen.model), [DeepPromptConfig(tokens=3), ProbeDropConfig()]).eval())
    surgery.save_pretrained(tmp_path)
    base = cpu_offload(specimen.model, execution_device=torch.device("cpu"))
    late = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        all_equal([late(**specimen.inputs).logits], [surgery(**specimen.inputs).logits])


def test_a_model_saved_whole_and_a_state_dict(tmp_path):
    specimen = zoo.build("llama")
    surgery = stir(get_token_model(specimen.model, probe_config(0.5)).eval())
    torch.save(surgery, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        all_equal([again(**specimen.inputs).logits], [surgery(**specimen.inputs).logits])


def test_a_model_saved_whole_runs_where_nothing_was_attached(tmp_path):
    specimen = zoo.build("llama")
    surgery = stir(get_token_model(specimen.model, FTPConfig(sparsity=0.4)).eval())
    with torch.no_grad():
        torch.save((surgery, specimen.inputs, surgery(**specimen.inputs).logits), tmp_path / "model.pt")
    script = (
        "import sys, torch; torch.set_grad_enabled(False); model, inputs, want = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(**inputs).logits, want)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_adapter_config_reads_back_and_says_its_type(tmp_path):
    get_token_model(zoo.build("llama").model, "probe-drop").save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, HFTokensConfig) and config.methods == [{"method": "probe-drop", "version": 1}]
    assert config.base == {"text": [4, 32, "model.layers"]} and config.target_modules is None


def test_a_lora_among_the_methods_is_one_file(tmp_path):
    specimen = zoo.build("llama")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    surgery = stir(get_token_model(copy.deepcopy(specimen.model), ["deep-prompt", lora]).eval())
    surgery.save_pretrained(tmp_path)
    again = hf_tokens.load(tmp_path, copy.deepcopy(specimen.model)).eval()
    with torch.no_grad():
        all_equal([again(**specimen.inputs).logits], [surgery(**specimen.inputs).logits])
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        surgery.merge_and_unload()


def test_tokens_trained_in_the_stack_come_out():
    specimen = zoo.build("llama")
    off, before = specimen.run(), snapshot(specimen.model)
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    surgery = stir(get_token_model(specimen.model, ["probe-insert", lora]))
    assert surgery.unload() is specimen.model
    assert not difference(before, snapshot(specimen.model))
    all_equal(specimen.run(), off, "unloaded")


def test_a_failure_behind_a_lora_rolls_back():
    model = zoo.build("llama").model
    before, trained = snapshot(model), [p.requires_grad for p in model.parameters()]
    good, bad = LoraConfig(r=2, target_modules=["q_proj"]), LoraConfig(target_modules=["nonesuch"])
    with pytest.raises(ValueError, match="No modules were targeted"):
        get_token_model(model, ["deep-prompt", good, bad], modules_to_save=["lm_head"])
    assert not difference(before, snapshot(model)) and trained == [p.requires_grad for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("deleted", ["first", "second"])
def test_adapters_in_different_blocks_are_switched_and_deleted(deleted):
    specimen = zoo.build("llama")
    before = snapshot(specimen.model)
    surgery = get_token_model(specimen.model, ProbeDropConfig(layers=(0,)), adapter_name="first").eval()
    surgery.add_adapter("second", HFTokensConfig(methods=ProbeInsertConfig(layers=(3,))))
    run = lambda: [surgery(**specimen.inputs).logits]
    with torch.no_grad():
        want = {"first": run()}
        surgery.set_adapter("second")
        want["second"] = run()
        surgery.set_adapter(deleted)
        surgery.delete_adapter(deleted)
        (left,) = {"first", "second"} - {deleted}
        assert surgery.active_adapters == [left]
        all_equal(run(), want[left], "left")
    surgery.delete_adapter(left)
    assert not difference(before, snapshot(surgery.unload()))


# -- beside a LoRA in a PeftModel ------------------------------------------------------------------------------------

SECOND = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time", "ignore:Already found a `peft_config` attribute"
)


def a_lora(name, **more):
    model = get_peft_model(zoo.build("llama").model, LoraConfig(r=2, target_modules=["q_proj"], **more), adapter_name=name)
    return stir(model).eval()


@SECOND
def test_two_adapters_of_one_name_are_refused():
    model = a_lora("default")
    before = snapshot(model)
    words = "Every adapter in a model has a name of its own, got 'default' for HF_TOKENS beside 'default' for LORA. Pass another"
    with pytest.raises(ConfigError, match=words):
        get_token_model(model, "probe-insert")
    with pytest.raises(UnsupportedError):
        get_token_model(model, "vqt", adapter_name="surgery")
    assert not difference(before, snapshot(model)) and set(model.peft_config) == {"default"}
    plain = zoo.build("llama").model
    get_token_model(plain, ["deep-prompt"])
    with pytest.raises(ConfigError, match="'default' for HF_TOKENS beside 'default' for HF_TOKENS"):
        get_token_model(plain, "probe-insert")


@SECOND
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["a surgery", "a surgery that trains the head too"])
def test_the_head_that_a_lora_trained_stays_in_use(more):
    inputs = zoo.build("llama").inputs
    run = lambda model: [model(**inputs).logits]
    with torch.no_grad():
        inner = a_lora("tuning", modules_to_save=["lm_head"])
        inner.base_model.model.lm_head.modules_to_save["tuning"].weight.mul_(2)
        want, before = run(inner), snapshot(inner)
        trained = [p.requires_grad for p in inner.parameters()]
        surgery = get_token_model(inner, ProbeInsertConfig(tokens=0), adapter_name="surgery", **more).eval()
        if not more:
            all_equal(run(surgery), want, "at zero strength")
            with surgery.disable_adapter():
                all_equal(run(surgery), want, "disabled")
        all_equal(run(surgery.unload()), want, "unloaded")
    assert not difference(before, snapshot(inner)) and trained == [p.requires_grad for p in inner.parameters()]


def test_hooks_of_accelerate_around_a_surgery_outlive_it():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    specimen = zoo.build("llama")
    base = specimen.model
    modules = (base, base.model.layers[2])
    want = base(**specimen.inputs).logits
    surgery = get_token_model(base, ProbeDropConfig())
    for module in modules:
        add_hook_to_module(module, ModelHook())
    dropped = surgery(**specimen.inputs).logits
    assert not torch.equal(dropped, want)
    surgery.unload()
    for module in modules:
        assert vars(module)["_old_forward"].__func__ is type(module).forward, "nothing of ours is left under the hook"
    assert torch.equal(base(**specimen.inputs).logits, want)
    for module in modules:
        remove_hook_from_module(module)
    assert torch.equal(base(**specimen.inputs).logits, want)


def test_the_patch_that_peft_is_asked_for_still_fits():
    page = (Path(hf_tokens.__file__).parents[1] / "docs" / "upstream-peft.md").read_text()
    lines = page.partition("```diff\n")[2].partition("```")[0].splitlines()
    hunks = "\n".join(line[1:] for line in lines if line.startswith((" ", "-", "@@")) and not line.startswith("---")).split("@ -")[1:]
    assert len(hunks) == 2
    assert all(hunk.partition("\n")[2].strip("\n") in Path(mapping.__file__).read_text() for hunk in hunks)
