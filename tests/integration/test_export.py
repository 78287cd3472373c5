"""What leaves hf-tokens: each form answers as the model did, read by those who know nothing of it; what cannot leave says why."""

import base64
import copy
import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tolerances import all_close, all_equal, differs
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_tokens import (
    AdaKVConfig,
    ATPromptConfig,
    ConfigError,
    CPTConfig,
    CSPConfig,
    DeepPromptConfig,
    FTPConfig,
    GoldfishLossConfig,
    H2OConfig,
    MethodConfig,
    OMPTransplantConfig,
    PREConfig,
    PyramidKVConfig,
    SnapKVConfig,
    StreamingLLMConfig,
    TOVAConfig,
    UnsupportedError,
    WeightEdit,
    edit,
    export,
    get_token_model,
    list_methods,
    register,
    transplant,
    unload,
)
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import zoo
from hf_tokens.tools.forms import EXPORT_FORMS
from hf_tokens.tools.surgeries import surgery_of

IDS = torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :9] = MASK[2, :30] = 0
PROMPT = {"input_ids": IDS * MASK, "attention_mask": MASK}
GREEDY = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
CONTEXT = (7, 19, 33, 8)
BANKS = {
    "cpt": CPTConfig(ids=CONTEXT),
    "pre": PREConfig(ids=CONTEXT),
    "csp": CSPConfig(ids=CONTEXT),
    "atprompt": ATPromptConfig(placeholder=5, attributes=((11,), (12, 13)), n_att=1, n_ctx=2),
}
CODE = {
    "snapkv": SnapKVConfig(capacity=8, window=4),
    "snapkv, a share": SnapKVConfig(budget=0.3, window=4, pooling="average"),
    "tova": TOVAConfig(capacity=6),
    "h2o": H2OConfig(budget=0.5),
    "streaming-llm": StreamingLLMConfig(capacity=6, sinks=2, shift=False, slack=2),
    "pyramidkv": PyramidKVConfig(capacity=12, window=4, beta=3, layers=(0, 2, 3)),
}


@dataclass(frozen=True)
class ScaleConfig(MethodConfig):
    pass


@pytest.fixture(autouse=True)
def scale():
    @register("test-scale", ScaleConfig)
    class Scale(WeightEdit):
        """Paper: none, arXiv:0000.00000"""

        groups = ("any",)

        def edit(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: w * 0.9 for name, w in weights.items()}

    yield
    del METHODS["test-scale"]


@pytest.fixture(scope="module")
def base():
    return zoo.build("llama").model.eval()


def operated(base, *methods, **more):
    """A model with these methods, none of whose tensors is as it began."""
    model = get_token_model(copy.deepcopy(base), [*methods], **more).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def edited(model):
    with torch.no_grad():
        edit(model, {"any": [{"input_ids": IDS}]})
    return model


@torch.no_grad()
def logits(model, **inputs):
    return model(**(inputs or PROMPT)).logits


def is_plain(model):
    return not [name for name, _ in model.named_modules() if "hf_tokens" in name or "lora" in name]


# -- checkpoint --------------------------------------------------------------------------------------------------------
def test_a_checkpoint_with_edits_answers_to_the_bit_and_the_model_stays_as_it_is(base, tmp_path):
    model = edited(operated(base, ScaleConfig(), GoldfishLossConfig()))
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    export(model, tmp_path / "new" / "plain")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "new" / "plain").eval()
    assert is_plain(again) and differs([before], [logits(base)])
    all_equal([logits(again), logits(model)], [before, before])
    all_equal([*model.state_dict().values()], [*weights.values()])
    assert not list((tmp_path / "new" / "plain").glob(".tmp*"))


def test_a_checkpoint_has_the_lora_and_the_head_of_the_stack(base, tmp_path):
    model = edited(operated(base, ScaleConfig(), LoraConfig(**LORA), modules_to_save=["lm_head"]))
    export(model, tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert is_plain(again)
    all_close([logits(again)], [logits(model)])
    all_equal([again.lm_head.weight], [model.base_model.model.lm_head.modules_to_save["default"].weight])


def test_what_is_named_stays_behind(base, tmp_path):
    model = edited(operated(base, ScaleConfig(), LoraConfig(**LORA), DeepPromptConfig()))
    export(model, tmp_path / "a", without=["peft", "deep-prompt"])
    export(model, tmp_path / "b", without=["test-scale", "deep-prompt"])
    alone = edited(operated(base, ScaleConfig()))
    all_equal([logits(LlamaForCausalLM.from_pretrained(tmp_path / "a"))], [logits(alone)])
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA))
    lora.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    all_close([logits(LlamaForCausalLM.from_pretrained(tmp_path / "b"))], [logits(lora)])


def test_a_plain_model_is_saved_as_it_is_and_weights_that_lay_there_are_not_taken_for_its_own(base, tmp_path):
    base.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*"))) > 1
    export(base, tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    all_equal([logits(LlamaForCausalLM.from_pretrained(tmp_path))], [logits(base)])


def test_another_vocabulary_leaves_with_what_was_edited_behind_it(base, tmp_path):
    words = [f"w{i}" for i in range(90)]
    ours, donors = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(rows)}, unk_token=rows[0])))
        for rows in (words, [*words[5:80], "new", "newer"])
    )
    rows = torch.randn(77, 16, generator=torch.Generator().manual_seed(2))
    plain = transplant(copy.deepcopy(base), ours, rows, donors, OMPTransplantConfig(k=4)).model
    ids = {"input_ids": IDS % 77}
    export(plain, tmp_path / "plain")
    model = get_token_model(plain, ScaleConfig()).eval()
    edit(model, {"any": [ids]})
    export(model, tmp_path / "edited")
    for folder, answer in (("edited", logits(model, **ids)), ("plain", logits(model.unload(), **ids))):
        again = LlamaForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert again.config.vocab_size == 77
        all_equal([logits(again, **ids)], [answer])


def test_a_pipeline_leaves_with_its_edited_denoiser(tmp_path):
    tiny = zoo.build("diffusers/UNet2DConditionModel")
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(vae=vae, unet=tiny.model.eval(), scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe = get_token_model(pipe, "rece")
    prompts = tiny.inputs["encoder_hidden_states"]
    edit(pipe, {"erase": [tiny.inputs], "anchor": [{**tiny.inputs, "encoder_hidden_states": prompts.flip(0)}]})
    with torch.no_grad():
        after = pipe.unet(**tiny.inputs).sample
        export(pipe, tmp_path)
        again = UNet.from_pretrained(tmp_path / "unet").eval()
        assert is_plain(again) and (tmp_path / "model_index.json").is_file()
        all_close([again(**tiny.inputs).sample], [after])  # convolutions of any model that diffusers loads again differ by this
        all_equal([pipe.unet(**tiny.inputs).sample], [after])
        assert differs([unload(pipe).unet(**tiny.inputs).sample], [after])


def test_merge_and_unload_keeps_a_head_that_the_stack_saves_as_a_whole(base):
    model = edited(operated(base, ScaleConfig(), modules_to_save=["lm_head"]))
    before = logits(model)
    all_equal([logits(model.merge_and_unload())], [before])


# -- lora --------------------------------------------------------------------------------------------------------------
def without_ours(model):
    surgery_of(model).act([(block, ()) for block in surgery_of(model).blocks()])
    return logits(model)


def test_the_lora_of_a_stack_is_an_adapter_of_peft_s_that_equals_it_with_our_methods_off(base, tmp_path):
    model = operated(base, FTPConfig(), LoraConfig(**LORA), DeepPromptConfig(), modules_to_save=["lm_head"])
    export(model, tmp_path, form="lora")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name or name.endswith("lm_head.weight") for name in held) and len(held) == 4 * 2 * 2 + 1
    whole = logits(model)
    all_equal([logits(again)], [without_ours(model)])
    assert differs([logits(again)], [whole]) and differs([logits(again)], [logits(base)])


def test_several_of_peft_s_methods_leave_a_folder_each(base, tmp_path):
    first, second = ({**LORA, "r": r, "target_modules": [name]} for r, name in ((2, "q_proj"), (4, "v_proj")))
    model = operated(base, LoraConfig(**first), FTPConfig(), LoraConfig(**second))
    export(model, tmp_path, form="lora")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "0", adapter_name="first")
    again.load_adapter(tmp_path / "1", "second")
    again.base_model.set_adapter(["first", "second"])
    all_equal([logits(again.eval())], [without_ours(model)])


# -- prompt-embeds -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(BANKS))
def test_a_learned_prompt_as_embeddings_answers_to_the_bit(base, name, tmp_path):
    model = operated(base, BANKS[name], GoldfishLossConfig())
    export(model, tmp_path, form="prompt-embeds")
    saved, words = load_file(tmp_path / "prompt_embeds.safetensors"), type(BANKS[name]).__name__
    ids = saved["input_ids"]
    assert saved["prompt_embeds"].shape == (len(ids), 32) and saved["prompt_embeds"].dtype == base.dtype, words
    question = IDS[:1]
    embeds = torch.cat([saved["prompt_embeds"], base.get_input_embeddings()(question[0]).detach()])
    given = logits(base, inputs_embeds=embeds[None])
    whole = torch.cat([ids[None], question], dim=1)
    if name != "csp":  # its words are learned wherever they stand
        all_equal([given], [logits(model, input_ids=whole)])
    export(model, tmp_path, form="prompt-embeds", input_ids=whole)
    embeds = load_file(tmp_path / "prompt_embeds.safetensors")["prompt_embeds"]
    all_equal([logits(base, inputs_embeds=embeds[None])], [logits(model, input_ids=whole)])
    assert differs([logits(base, input_ids=whole)], [logits(model, input_ids=whole)])


def test_a_prompt_passes_as_vllm_s_server_reads_it(base, tmp_path):
    export(operated(base, BANKS["cpt"]), tmp_path, form="prompt-embeds")
    embeds = load_file(tmp_path / "prompt_embeds.safetensors")["prompt_embeds"]
    torch.save(embeds, buffer := io.BytesIO())
    text = base64.b64encode(buffer.getvalue()).decode()
    read = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True, map_location="cpu")
    assert isinstance(read, Tensor) and read.dim() == 2 and read.is_floating_point()
    all_equal([read], [embeds])


# -- custom-generate ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(CODE))
def test_a_compressor_as_code_generates_what_the_method_does(base, name, tmp_path):
    model, folder = operated(base, CODE[name]), tmp_path / CODE[name].method
    export(model, folder, form="custom-generate")
    ours, backend = model.generate(**PROMPT, **GREEDY), base.config._attn_implementation
    theirs = base.generate(**PROMPT, **GREEDY, custom_generate=str(folder), trust_remote_code=True)
    assert torch.equal(ours.sequences, theirs.sequences) and base.config._attn_implementation == backend
    all_close([*ours.logits], [*theirs.logits])
    assert differs([*base.generate(**PROMPT, **GREEDY).logits], [*theirs.logits])
    held = [layer.keys.shape[2] for layer in theirs["past_key_values" if "past_key_values" in theirs else "cache"].layers]
    assert min(held) < IDS.shape[1], held


def test_every_compressor_that_says_so_leaves_as_code(base, tmp_path):
    leaving = [info for info in list_methods("CacheCompressor") if "custom-generate" in info.cls.leaves_as(info.config.example())]
    assert {info.name for info in leaving} >= {"snapkv", "tova", "h2o", "pyramidkv", "random"}
    for info in leaving:
        export(operated(base, info.config.example()), tmp_path / info.name, form="custom-generate")
        compile((tmp_path / info.name / "custom_generate" / "generate.py").read_text(), info.name, "exec")


REFUSED_BY_THE_CODE = {
    "a knob out of bounds": (dict(capacity=0), "`capacity` is bounded by"),
    "less than what is always kept": (dict(capacity=2), "must be at least what is always kept"),
    "a prompt in chunks": (dict(prefill_chunk_size=8), "comes in one pass"),
    "drafts": (dict(prompt_lookup_num_tokens=3), "a cache that can be cropped|takes no token back"),
    "another cache": (dict(cache_implementation="static"), "a cache of its own"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REFUSED_BY_THE_CODE))
def test_the_code_refuses_what_it_cannot_do_and_leaves_the_model_alone(base, name, tmp_path):
    more, words = REFUSED_BY_THE_CODE[name]
    export(operated(base, CODE["snapkv"]), tmp_path / "refusing", form="custom-generate")
    backend, call = base.config._attn_implementation, {"input_ids": IDS[:1], "max_new_tokens": 4, "do_sample": False, **more}
    with pytest.raises(ValueError, match=words):
        base.generate(**call, custom_generate=str(tmp_path / "refusing"), trust_remote_code=True)
    assert base.config._attn_implementation == backend


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "words"), [("mistral", "attend to all"), ("bloom", "another one"), ("t5", "a decoder alone")])
def test_the_code_refuses_models_that_it_would_be_wrong_on(base, family, words, tmp_path):
    export(operated(base, CODE["tova"]), tmp_path / "refusing", form="custom-generate")
    with pytest.raises(ValueError, match=words):
        zoo.build(family).model.generate(IDS[:1] % 50, max_new_tokens=4, custom_generate=str(tmp_path / "refusing"), trust_remote_code=True)


def test_the_code_goes_with_beams_and_a_knob_is_an_argument(base, tmp_path):
    export(operated(base, SnapKVConfig(capacity=30, window=4)), tmp_path / "beams", form="custom-generate")
    call = dict(**PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0, num_beams=3, num_return_sequences=2)
    ours = operated(base, CODE["snapkv"]).generate(**call)
    assert torch.equal(base.generate(**call, capacity=8, custom_generate=str(tmp_path / "beams"), trust_remote_code=True), ours)


# -- people without the package ----------------------------------------------------------------------------------------
STRANGER = """
import sys
sys.modules.update(dict.fromkeys(("hf_tokens", "hf_tokens_adapters", "hf_tokens_kernels")))  # none of them can be imported
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

try:
    import hf_tokens
    raise SystemExit("hf_tokens is there")
except ImportError:
    pass
given = torch.load("given.pt")
base = LlamaForCausalLM.from_pretrained("base").eval()
with torch.no_grad():
    edited = LlamaForCausalLM.from_pretrained("checkpoint").eval()(**given["prompt"]).logits
    code = base.generate(**given["prompt"], **given["greedy"], custom_generate="code", trust_remote_code=True)
    lora = PeftModel.from_pretrained(base, "lora").eval()(**given["prompt"]).logits
torch.save({"checkpoint": edited, "code": code.sequences, "logits": code.logits, "lora": lora}, "told.pt")
"""


def test_a_process_that_cannot_import_hf_tokens_gets_the_same(base, tmp_path):
    torch.save({"prompt": PROMPT, "greedy": GREEDY}, tmp_path / "given.pt")
    scaled, stack = edited(operated(base, ScaleConfig())), operated(base, FTPConfig(), LoraConfig(**LORA))
    compressed = operated(base, CODE["snapkv"])
    base.save_pretrained(tmp_path / "base")
    export(scaled, tmp_path / "checkpoint")
    export(stack, tmp_path / "lora", form="lora")
    export(compressed, tmp_path / "code", form="custom-generate")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call = [sys.executable, "-c", STRANGER]
    done = subprocess.run(call, cwd=tmp_path, env={**clean, "HF_HOME": str(tmp_path / "home")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told, ours = torch.load(tmp_path / "told.pt"), compressed.generate(**PROMPT, **GREEDY)
    all_equal([told["checkpoint"], told["code"]], [logits(scaled), ours.sequences])
    all_close([*told["logits"], told["lora"]], [*ours.logits, without_ours(stack)])


# -- what cannot leave -------------------------------------------------------------------------------------------------
PROMPTS = [CPTConfig(ids=CONTEXT), ATPromptConfig(placeholder=5, n_ctx=2)]
REFUSED = {
    "a router": ([FTPConfig()], {}, "'ftp', of which would be lost which tokens run a block"),
    "a compressor": ([SnapKVConfig()], {}, "'snapkv', of which would be lost which entries of the cache stay.*leaves as 'custom-generate'"),
    "prompts of blocks": ([DeepPromptConfig()], {"form": "prompt-embeds"}, "'deep-prompt', of which would be lost the tokens"),
    "prompts rewritten later": ([ATPromptConfig(depth=3)], {"form": "prompt-embeds"}, "'atprompt', of which would be lost"),
    "a lora beside a prompt": ([PROMPTS[0], LoraConfig(**LORA)], {"form": "prompt-embeds"}, "'peft', of which would be lost its LORA"),
    "two prompts": (PROMPTS, {"form": "prompt-embeds"}, "Pass `input_ids`"),
    "no prompt": ([GoldfishLossConfig()], {"form": "prompt-embeds"}, "is one learned prompt"),
    "no lora": ([FTPConfig()], {"form": "lora"}, "a stack of \\['ftp'\\]"),
    "two compressors": ([SnapKVConfig(), TOVAConfig()], {"form": "custom-generate"}, "one cache compressor"),
    "one that turns keys": ([StreamingLLMConfig()], {"form": "custom-generate"}, "'streaming-llm', of which would be lost"),
    "one that divides": ([AdaKVConfig()], {"form": "custom-generate"}, "'ada-kv', of which would be lost"),
    "an edit that is not made": ([ScaleConfig()], {}, "'test-scale', which changes nothing yet. Make the edit"),
    "no such form": ([FTPConfig()], {"form": "prompt_embeds"}, "Did you mean 'prompt-embeds'"),
    "no such method": ([FTPConfig()], {"without": ["snapkv"]}, "`without` is a list of methods that act, of \\['ftp'\\]"),
    "a name and no list": ([FTPConfig()], {"without": "ftp"}, "`without` is a list"),
    "ids of another form": ([FTPConfig()], {"input_ids": IDS[:1]}, "of the form 'prompt-embeds'"),
    "two rows": ([PROMPTS[0]], {"form": "prompt-embeds", "input_ids": IDS}, "those of one prompt"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_leave_says_what_would_be_lost_before_anything_is_written(base, name, tmp_path):
    methods, more, words = REFUSED[name]
    model = operated(base, *methods)
    with pytest.raises((UnsupportedError, ConfigError), match=words) as raised:
        export(model, tmp_path / "new", **more)
    assert not (tmp_path / "new").exists() and "\n" not in str(raised.value)


def test_a_disabled_adapter_and_a_stranger_s_beside_it_do_not_leave(base, tmp_path):
    model = edited(operated(base, ScaleConfig()))
    with model.disable_adapter(), pytest.raises(UnsupportedError, match="adapters are disabled"):
        export(model, tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks whether a second adapter is meant
        around = get_peft_model(model, LoraConfig(**LORA), adapter_name="around")
    with pytest.raises(UnsupportedError, match="LORA beside the stack"):
        export(around, tmp_path / "new")
    with pytest.raises(UnsupportedError, match="needs a model with a surgery"):
        export(base, tmp_path / "new", form="lora")
    assert not (tmp_path / "new").exists()


def test_every_method_says_what_would_be_lost_of_it():
    for info in list_methods():
        forms = info.cls.leaves_as(info.config.example())
        assert {*forms} <= EXPORT_FORMS.keys()
        assert info.role == "Objective" or info.cls.lost and info.cls.lost != "all that it does", info.name


@pytest.mark.parametrize("there", [False, True])
def test_a_write_that_fails_leaves_what_was_there(base, there, tmp_path, monkeypatch):
    model = edited(operated(base, ScaleConfig()))
    folder = tmp_path / "deep" / "er"
    if there:
        export(base, folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fails(self, folder, **kwargs):
        LlamaForCausalLM.config_class.save_pretrained(self.config, folder)
        raise OSError("the disk is full")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fails)
    with pytest.raises(OSError, match="the disk is full"):
        export(model, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert there or not list(tmp_path.iterdir())
