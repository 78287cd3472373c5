"""What we touch of other libraries that they did not promise to keep: each with the reason, and named by the test that fails when it moves.

An attribute of an object is looked for in its class, or where the library's own code says its name. What single models call their parts is
data, and tested with the models.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import hf_tokens_adapters
import hf_tokens_kernels
import pytest

import hf_tokens


@dataclass(frozen=True)
class Private:
    """A name that is not ours.

    Attributes:
        owner: The module, class or function that has it, or whose code says it.
        name: The name in it.
        why: What we need it for.
        parameters: All that it takes, where we override it or stand in its place.
        takes: What it must take of that which we give it.
        through: The word by which our code comes to it, if that is not its name.
    """

    owner: str
    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    takes: tuple[str, ...] = ()
    through: str = ""


TUNER, LAYER = "peft.tuners.tuners_utils.BaseTuner", "peft.tuners.tuners_utils.BaseTunerLayer"
WRAPPER = "peft.utils.AuxiliaryTrainingWrapper"
CACHES, MASKS, TRAINER = "transformers.cache_utils", "transformers.masking_utils", "transformers.trainer.Trainer"
HOOKS, SCALES = "diffusers.hooks.hooks", "diffusers.utils.peft_utils"
OVERRIDDEN = "PEFT calls it on our tuner, which does it for blocks"
ENUM = "PEFT's enum of types is closed: HF_TOKENS is put in as Enum itself would do it"
MASK = "a model whose code names it says by that whether its stream is causal"
LAYER_OF_CACHE = "our cache layer stands in the place of theirs"
PUSH = "transformers.utils.hub.PushToHubMixin.push_to_hub"
LOSS = "says what the Trainer divides the loss by, and so what ours must be divided by"
TAPPED = "a tapped backend is registered beside the one it stands for"
HIDDEN = "which argument and which result of a block are its hidden states"
ALONE = "says whether a sublayer computes each token by itself, so that the others need not be computed"
LLAVAS, LAYING = "transformers.models", "it lays out what the vision tower has returned, and on zeros shows where the ends of rows are"
LLAVA_MODELS = tuple(
    f"{of}.modeling_{of}.{name}"
    for of, name in (("llava_next", "LlavaNext"), ("llava_next_video", "LlavaNextVideo"), ("llava_onevision", "LlavaOnevision"))
)
A_LORA = "diffusers calls it on every layer of PEFT's, ours among them"

PEFT = (
    Private("peft.PeftModel.save_pretrained", "output_state_dict", "a local: the tensors of the file that it writes before our config"),
    Private("peft.PeftConfig", "from_json_file", "reads a config, ours within bounds", ("path_json_file", "kwargs")),
    Private("peft.PeftConfig", "from_peft_type", "makes a config of what it read", ("kwargs",)),
    Private("peft.PeftModel", "from_pretrained", "what has no tensors is refused before PEFT puts it into a model"),
    Private("peft.PeftModel", "load_adapter", "the same"),
    Private("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", "says whether our type is registered"),
    Private("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING", "the tuner of a LoRA that stands in a stack"),
    Private(TUNER, "forward", "a tuner with one of its own does more in a stack than its layers can"),
    Private("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING", "our prefix, where the enum cannot be extended"),
    Private("peft.utils", "register_peft_method", "makes our type known", takes=("name", "config_cls", "model_cls")),
    Private("peft.PeftType", "_member_map_", ENUM),
    Private("peft.PeftType", "_member_names_", ENUM),
    Private("peft.PeftType", "_value2member_map_", ENUM),
    Private("peft.PeftType.LORA", "_name_", ENUM),
    Private("peft.PeftType.LORA", "_value_", ENUM),
    Private("peft.PeftType.LORA", "_sort_order_", ENUM),
    Private(TUNER, "prefix", "by it PEFT finds the parameters of an adapter"),
    Private(TUNER, "tuner_layer_cls", "by it PEFT finds our layers"),
    Private(TUNER, "target_module_mapping", "PEFT looks for default targets in it; we have none"),
    Private(TUNER, "_prepare_adapter_config", OVERRIDDEN, ("peft_config", "model_config")),
    Private(TUNER, "_check_tied_modules", "it is asked where modules are saved whole, and nowhere else", ("model", "peft_config")),
    Private(
        TUNER,
        "_create_and_replace",
        "nothing is replaced: a child is hung on the block",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"),
    ),
    Private(TUNER, "_unload_and_optionally_merge", OVERRIDDEN, ("merge", "progressbar", "safe_merge", "adapter_names")),
    Private(TUNER, "_enable_adapter_layers", OVERRIDDEN, ("enabled",)),
    Private(
        TUNER,
        "_get_adapter_state_dict",
        "an adapter is saved with the LoRAs of its stack, and without those beside it",
        ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
    ),
    Private(
        TUNER,
        "_remap_adapter_state_dict_for_load",
        "what is to be loaded is an adapter's own, or it is refused",
        ("model", "config", "adapter_name", "state_dict"),
    ),
    Private(TUNER, "_remove_adapter_name_from_key", "the adapter's name stands in the middle of our keys", ("key", "adapter_name")),
    Private(
        TUNER,
        "inject_adapter",
        "an injection that fails is rolled back",
        ("model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"),
    ),
    Private(TUNER, "set_adapter", OVERRIDDEN, ("adapter_name", "inference_mode")),
    Private(TUNER, "delete_adapter", OVERRIDDEN, ("adapter_name",)),
    Private("peft.utils", "_set_adapter", "switches the modules that are saved whole", takes=("model", "adapter_name", "inference_mode")),
    Private(LAYER, "adapter_layer_names", "by it PEFT finds our adapters in a layer"),
    Private(LAYER, "other_param_names", "we have none"),
    Private(LAYER, "merged_adapters", "PEFT reads it of every layer"),
    Private(LAYER, "_disable_adapters", "says whether a layer is off"),
    Private(LAYER, "_active_adapter", "says which adapters are on"),
    Private(LAYER, "get_base_layer", "the base's module under a LoRA"),
    Private(LAYER, "set_adapter", "a block notes which of its methods act", ("adapter_names", "inference_mode")),
    Private(LAYER, "enable_adapters", "a block notes which of its methods act", ("enabled",)),
    Private(LAYER, "delete_adapter", "a block notes which of its methods act", ("adapter_name",)),
    Private(LAYER, "_get_available_adapters", "says whose adapters a LoRA's layer holds: ours or a neighbour's", ()),
    Private(LAYER, "_move_adapter_to_device_of_base_layer", "the base of our layer is its block", ("adapter_name", "device")),
    Private(WRAPPER, "_get_available_adapters", "says whose adapters a module that is saved whole holds", ()),
    Private(WRAPPER, "delete_adapter", "takes ours out of one that a neighbour shares", ("adapter_name", "new_active_adapters")),
    Private(WRAPPER, "adapter_state_dict_load_map", "how PEFT names what is saved whole, before our tuner sees it", ("adapter_name",)),
    Private(WRAPPER, "enable_adapters", "switched with our layers", takes=("enabled",)),
    Private(WRAPPER, "original_module", "the base's module under one that is saved whole"),
    Private("peft.utils", "load_peft_weights", "reads an adapter for a pipeline's denoiser", takes=("model_id",)),
)

TRANSFORMERS = (
    Private(TRAINER, "_save_checkpoint", "a checkpoint that is pushed as it is saved is pushed with its card"),
    Private(TRAINER, "hub_model_id", "the repository that a trainer's card names"),
    Private(f"{TRAINER}.push_to_hub", "save_model", "it saves the adapter before the card is written"),
    Private(f"{TRAINER}.push_to_hub", "create_model_card", "a trainer's draft of the card becomes ours"),
    Private(f"{TRAINER}.create_model_card", "create_or_update_model_card", "it asks the PeftModel for the card"),
    Private("transformers.modelcard", "extract_hyperparameters_from_trainer", "the arguments on a card", ("trainer",)),
    Private("transformers.modelcard", "TASK_MAPPING", "what a class of models does"),
    Private(PUSH, "model_card", "a local: the card that is uploaded"),
    Private(PUSH, "repo_id", "a local: where it is uploaded to"),
    Private(PUSH, "tags", "a local: what it has put on the card"),
    Private("peft.PeftModel.save_pretrained", "selected_adapters", "a local: the adapters that the card is about"),
    Private("peft.PeftModel.save_pretrained", "create_or_update_model_card", "it asks the model for the card"),
    Private("transformers.PreTrainedConfig", "_attn_implementation", "the attention backend in use"),
    Private("transformers.PreTrainedConfig", "_attn_implementation_internal", "is set to the tapped backend, and back, without a reload"),
    Private("transformers.utils.generic.GeneralInterface", "_global_mapping", "a tapped function leaves the registry with its last tap"),
    Private("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", f"{TAPPED}, and a class whose code names it is an attention"),
    Private(MASKS, "ALL_MASK_ATTENTION_FUNCTIONS", f"{TAPPED}, with its mask function: without one padding would be dropped silently"),
    Private(
        "transformers.integrations.sdpa_attention",
        "sdpa_attention_forward",
        "the tapped function calls it by these names",
        takes=("module", "query", "key", "value", "attention_mask", "scaling", "is_causal", "position_bias"),
        through="sdpa",
    ),
    Private(
        "transformers.models.llama.modeling_llama",
        "eager_attention_forward",
        "eager attention is the function that has this word in its name and stands in the code of an attention",
        takes=("module", "query", "key", "value", "attention_mask"),
        through="eager",
    ),
    *(
        Private(f"{LLAVAS}.{name}Model", "pack_image_features", LAYING, takes=("image_features", "image_sizes", "image_newline"))
        for name in LLAVA_MODELS
    ),
    *(Private(f"{LLAVAS}.{name}Model", "get_video_features", LAYING, takes=("pixel_values_videos",)) for name in LLAVA_MODELS[1:]),
    *(
        Private(MASKS, f"create_{name}", MASK)
        for name in (
            *("causal_mask", "sliding_window_causal_mask", "chunked_causal_mask", "masks_for_generate"),
            *("bidirectional_mask", "bidirectional_sliding_window_mask"),
        )
    ),
    Private("transformers.models.auto.auto_factory", "_BaseAutoModelClass", "an adapter may name such a class as its base's"),
    Private("transformers.modeling_layers", "GradientCheckpointingLayer", "a block of it checkpoints its own class's forward"),
    Private("transformers.modeling_layers.GradientCheckpointingLayer", "gradient_checkpointing", "a block under it throws its cache away"),
    Private(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "_gradient_checkpointing_func",
        "what a checkpoint runs again runs with the edited weights too",
    ),
    Private("transformers.modeling_layers", "GenericForSequenceClassification", "says how this Transformers calls a cache"),
    Private(f"{CACHES}.Cache", "layers", "our layers are put into it, in place"),
    Private(f"{CACHES}.EncoderDecoderCache", "self_attention_cache", "the part that holds a decoder's own tokens"),
    Private(f"{CACHES}.CacheLayerMixin", "is_initialized", LAYER_OF_CACHE),
    Private(f"{CACHES}.CacheLayerMixin", "is_compileable", LAYER_OF_CACHE),
    Private(f"{CACHES}.CacheLayerMixin", "is_croppable", LAYER_OF_CACHE),
    Private(f"{CACHES}.CacheLayerMixin", "lazy_initialization", LAYER_OF_CACHE, ("key_states", "value_states")),
    Private(f"{CACHES}.CacheLayerMixin", "update", LAYER_OF_CACHE, ("key_states", "value_states", "args", "kwargs")),
    Private(f"{CACHES}.CacheLayerMixin", "get_seq_length", LAYER_OF_CACHE, ()),
    Private(f"{CACHES}.CacheLayerMixin", "get_mask_sizes", LAYER_OF_CACHE, ("query_length",)),
    Private(f"{CACHES}.CacheLayerMixin", "get_max_length", LAYER_OF_CACHE, ()),
    Private(f"{CACHES}.CacheLayerMixin", "reset", LAYER_OF_CACHE, ()),
    Private(f"{CACHES}.CacheLayerMixin", "offload", LAYER_OF_CACHE, ()),
    Private(f"{CACHES}.CacheLayerMixin", "prefetch", LAYER_OF_CACHE, ()),
    Private(f"{CACHES}.CacheLayerMixin", "reorder_cache", LAYER_OF_CACHE, ("beam_idx",)),
    Private(f"{CACHES}.DynamicLayer", "is_sliding", LAYER_OF_CACHE),
    Private(f"{CACHES}.DynamicLayer", "crop", LAYER_OF_CACHE, ("tokens_to_remove",)),
    Private(f"{CACHES}.DynamicLayer", "batch_repeat_interleave", LAYER_OF_CACHE, ("repeats",)),
    Private(f"{CACHES}.DynamicLayer", "batch_select_indices", LAYER_OF_CACHE, ("indices",)),
    Private(f"{CACHES}.DynamicSlidingWindowLayer", "activate_past_recording", LAYER_OF_CACHE, ()),
    Private(f"{CACHES}.DynamicSlidingWindowLayer", "record_past", "a layer that is taken over goes on recording"),
    Private(f"{CACHES}.DynamicSlidingWindowLayer", "sliding_window", "a layer that is taken over keeps its window"),
    Private(CACHES, "StaticLayer", "a cache of such layers is refused, or gets tokens in front"),
    Private(f"{CACHES}.StaticLayer", "update", "ours keeps what stands in front apart", ("key_states", "value_states", "args", "kwargs")),
    Private(CACHES, "DummyLayer", "stands where a block stores nothing, and may stay in a cache that is taken over"),
    Private("transformers.models.llama.modeling_llama.LlamaAttention", "layer_idx", "the slot of a block in the cache"),
    Private(
        "transformers.models.gemma3n.modeling_gemma3n.Gemma3nTextAttention", "is_kv_shared_layer", "a block that reads another one's keys"
    ),
    Private("transformers.models.t5.modeling_t5.T5Attention", "has_relative_attention_bias", "which block makes the bias of distances"),
    Private(
        "transformers.models.t5.modeling_t5.T5Attention",
        "compute_bias",
        "makes the bias of the whole sequence, which is cut to the tokens that are left",
        takes=("query_length", "key_length", "past_seen_tokens"),
    ),
    Private("transformers.generation.GenerationMixin", "_get_candidate_generator", "assisted decoding asks for it before its first pass"),
    Private("transformers.generation.GenerationMixin", "_prepare_multimodal_encoder_kwargs_for_generation", "`generate` encodes there"),
    Private("transformers.generation.GenerationMixin", "_prepare_special_tokens", "`generate` calls it before anything is computed"),
    Private(
        "transformers.generation.GenerationMixin",
        "_prefill",
        "says whether a prompt comes in chunks",
        ("input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
    ),
    Private("transformers.generation.GenerationMixin", "init_continuous_batching", "continuous batching begins with it"),
    Private(
        "transformers.models.whisper.generation_whisper.WhisperGenerationMixin",
        "_postprocess_outputs",
        "it cuts a cache into plain rows, which one of which more is known than its keys must not become",
        ("seek_outputs", "decoder_input_ids", "return_token_timestamps", "generation_config", "is_shortform", "seek", "batch_idx_map"),
        through="ROWS_OF_CACHE",
    ),
    Private("transformers.RagTokenForGeneration", "_reorder_cache", "makes a plain cache of the rows of ours", takes=("beam_idx",)),
    Private(
        "transformers.generation.GenerationMixin",
        "_sample",
        "decodes with a large model's logits beside the small one's",
        takes=("input_ids", "logits_processor", "stopping_criteria", "generation_config", "model_kwargs"),
    ),
    Private(
        "transformers.generation.GenerationMixin",
        "prepare_inputs_for_generation",
        "prepares the large model's inputs",
        takes=("input_ids", "next_sequence_length", "attention_mask", "is_first_iteration"),
    ),
    Private("transformers.GenerationConfig", "_eos_token_tensor", "a text that has ended is not handed to the large model"),
    Private(
        "transformers.integrations.peft.PeftAdapterMixin.load_adapter",
        "peft_weight_conversions",
        "a local: what it knows of the names in an adapter's file, which is told those of the LoRAs in a stack too",
    ),
    Private(
        "transformers.integrations.peft.PeftAdapterMixin",
        "load_adapter",
        "its arguments say which tensors it puts into a model",
        takes=("peft_model_id", "adapter_state_dict", "load_config"),
    ),
    *(
        Private("transformers.modeling_utils.LoadStateDictConfig", name, "which file of tensors it finds")
        for name in ("use_safetensors", "download_kwargs")
    ),
    Private("transformers.PreTrainedModel.save_pretrained", "state_dict", "the tensors of the file that it writes behind our config"),
    Private("transformers.core_model_loading", "WeightRenaming", "how it is told", takes=("source_patterns", "target_patterns")),
    Private("transformers.core_model_loading.WeightRenaming", "rename_source_key", "tries what it is told", ("source_key",)),
    Private("transformers.integrations.peft.PeftAdapterMixin", "_hf_peft_config_loaded", "goes with the last adapter of a model"),
    Private("transformers.loss.loss_utils", "LOSS_MAPPING", "says whether a model's loss shifts its labels"),
    Private("transformers.loss.loss_utils", "ForCausalLMLoss", "the loss that shifts its labels"),
    Private("transformers.PreTrainedModel", "loss_type", "names a model's loss"),
    Private("transformers.PreTrainedModel", "loss_function", "is a model's loss"),
    Private(TRAINER, "model_accepts_loss_kwargs", LOSS),
    Private(TRAINER, "loss_is_scaled_for_ga", LOSS),
    Private(TRAINER, "compute_loss_func", LOSS),
    Private(TRAINER, "current_gradient_accumulation_steps", LOSS),
    Private(TRAINER, "label_smoother", "an objective that replaces the loss cannot be smoothed"),
    Private(
        TRAINER,
        "compute_loss",
        "is wrapped for trainers that do not read the model's own loss",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
    ),
    Private(f"{TRAINER}.training_step", "train", "sets the model to training, which is where a surgery finds its trainer"),
    Private("transformers.convert_slow_tokenizer", "bytes_to_unicode", "how a byte-level vocabulary writes bytes"),
    Private("transformers.pytorch_utils", "Conv1D", "GPT-2's linear layer, whose width lies the other way round"),
    Private("transformers.models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "a specimen of every family", through="_TASKS"),
    Private("transformers.models.auto.configuration_auto", "CONFIG_MAPPING_NAMES", "a specimen of every family"),
    Private("transformers.models.auto.configuration_auto", "CONFIG_MAPPING", "a specimen of every family"),
)

DIFFUSERS = (
    Private("diffusers.models.modeling_utils.ModelMixin", "_supports_gradient_checkpointing", "whether a model can be checkpointed"),
    Private(f"{HOOKS}.HookRegistry", "_diffusers_hook", "`cache_context` finds the registry of a module of ours under it"),
    Private(f"{HOOKS}.HookRegistry", "_hook_order", "a hook is listed without a rewritten forward, which no deepcopy survives"),
    Private(f"{HOOKS}.HookRegistry", "hooks", "a hook is listed without a rewritten forward, which no deepcopy survives"),
    Private(f"{HOOKS}.HookRegistry", "invalidate_child_registries_cache", "the model looks for its children's registries once"),
    Private(f"{HOOKS}.ModelHook", "_is_stateful", "`cache_context` speaks to hooks that hold state"),
    Private(f"{HOOKS}.ModelHook", "reset_state", "the end of a pipeline's run", ("module",)),
    Private(f"{HOOKS}.StateManager", "_context", "what is told of the call that runs; the public property raises where there is none"),
    Private(HOOKS, "StateManager", "`cache_context` tells what it finds of this class in a hook"),
    *(Private(f"{HOOKS}.CacheContext", name, "what is told of a call") for name in ("name", "step_index", "num_inference_steps")),
    Private(HOOKS, "BaseState", "a StateManager is made for one"),
    Private("diffusers.pipelines.pipeline_utils.DiffusionPipeline", "_reset_stateful_cache", "what a pipeline calls at its end"),
    Private("diffusers.hooks", "_helpers", "where the registry of blocks stands"),
    Private("diffusers.hooks._helpers.TransformerBlockRegistry", "_register", "fills the registry"),
    Private("diffusers.hooks._helpers.TransformerBlockRegistry", "_registry", HIDDEN),
    *(
        Private("diffusers.hooks._helpers.TransformerBlockMetadata", name, HIDDEN)
        for name in (
            *("hidden_states_argument_name", "encoder_hidden_states_argument_name"),
            *("return_hidden_states_index", "return_encoder_hidden_states_index"),
        )
    ),
    Private("diffusers.StableDiffusionPipeline", "do_classifier_free_guidance", "whether one batch holds both parts of guidance"),
    Private("diffusers.PixArtAlphaPipeline.__call__", "do_classifier_free_guidance", "the same, a local of a pipeline's call"),
    Private("diffusers.pipelines", "pipeline_utils", "says whether pipelines were imported, without importing them"),
    *(
        Private("diffusers.models.attention_processor", name, ALONE)
        for name in ("AttnProcessor", "AttnProcessor2_0", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "JointAttnProcessor2_0")
    ),
    Private("diffusers.models.attention", "FeedForward", ALONE),
    *(
        Private("diffusers.models.attention_processor.Attention", name, ALONE)
        for name in ("processor", "group_norm", "spatial_norm", "norm_cross", "residual_connection", "fused_projections")
    ),
    Private("diffusers.ConfigMixin.from_config", "_class_name", "how a config of diffusers names its class"),
    Private("diffusers.loaders.peft.PeftAdapterMixin", "unload_lora", "forgets all adapters; ours stands in its place", parameters=()),
    Private(f"{SCALES}.scale_lora_layers", "scale_layer", A_LORA),
    Private(f"{SCALES}.unscale_lora_layers", "unscale_layer", A_LORA),
    Private(f"{SCALES}.set_weights_and_activate_adapters", "set_scale", A_LORA),
    Private(f"{SCALES}.get_adapter_name", "r", A_LORA),
)

OTHERS = (
    Private("torch", "_C", "where the autograd engine says which backward pass it is in"),
    Private("torch._C", "_current_graph_task_id", "whether a block is run again by a checkpoint; there is no public way to ask"),
    Private("torch.Tensor", "_version", "whether a tensor was written to between its hash and its file"),
    Private("torch.nn.Module", "_call_impl", "whether another thread is inside a call of the model"),
    Private("torch.nn.Module", "_modules", "children without the detour of `__getattr__`, and by names that are none of Python's"),
    Private("torch.nn.Module", "_parameters", "an edited weight stands in for the base's own while a block runs"),
    Private("torch.utils", "_python_dispatch", "where the mode stands that sees every write into a tensor"),
    Private("torch.utils._python_dispatch", "TorchDispatchMode", "refuses writes into the base while PEFT puts a LoRA in"),
    Private("torch._ops.OpOverload", "_schema", "says which arguments of an operation it writes into"),
    Private("torch", "_dynamo", "a model that is compiled already is refused"),
    Private("torch._dynamo", "OptimizedModule", "a model that is compiled already is refused"),
    Private("torch.ops.aten", "_scaled_dot_product_flash_attention_for_cpu", "its FLOPs, which torch does not count"),
    Private("torch.ops.aten", "_grouped_mm", "its FLOPs, which torch does not count"),
    Private("accelerate.hooks.add_hook_to_module", "_old_forward", "a forward of ours under a hook of Accelerate's is taken off there"),
    Private("re", "_parser", "takes a pattern of a stranger's apart, so that its steps are counted before they are walked"),
    Private("re", "_constants", "the names of its parts"),
    Private("sys", "_getframe", "a surgery finds the Trainer or the pipeline that is calling"),
    Private("sys", "_current_frames", "whether another thread is inside a call of the model"),
)

TABLE = (*PEFT, *TRANSFORMERS, *DIFFUSERS, *OTHERS)
NOTHING = object()


def code_of(owner) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(owner)))


def says(code: ast.AST, name: str) -> bool:
    """Whether code has an attribute, a variable or a string of this name."""
    return any(name in (getattr(node, field, None) for field in ("attr", "id", "value")) for node in ast.walk(code))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.owner}.{row.name}")
def test_it_is_where_it_was(row):
    try:
        owner = pkgutil.resolve_name(row.owner)
    except (ImportError, AttributeError) as gone:
        raise AssertionError(f"There is no {row.owner} any more. We touch its {row.name} because: {row.why}.") from gone
    found = getattr(owner, row.name, NOTHING)
    if found is NOTHING:
        typed = inspect.isclass(owner) and any(row.name in inspect.get_annotations(cls) for cls in owner.__mro__)
        assert typed or says(code_of(owner), row.name), f"{row.owner} has no {row.name} any more. We touch it because: {row.why}."
    if row.parameters is not None or row.takes:
        names = tuple(name for name in inspect.signature(found).parameters if name not in ("self", "cls"))
        why = f"{row.owner}.{row.name} takes {names} now. We touch it because: {row.why}."
        assert row.parameters in (None, names) and set(row.takes) <= set(names), why


def test_each_is_listed_once():
    listed = [(row.owner, row.name) for row in TABLE]
    assert len(set(listed)) == len(listed)


# -- our own code ----------------------------------------------------------------------------------------------------

PACKAGES = ("hf_tokens", "hf_tokens_adapters", "hf_tokens_kernels")
LIBRARIES = ("torch", "transformers", "peft", "diffusers", "accelerate", "huggingface_hub")
NAMED_BY_US = "_hf_tokens"
PARTS = ("endswith", "startswith", "removesuffix", "removeprefix", "split")  # what they take is a part of a name


@functools.cache
def sources() -> dict[Path, ast.Module]:
    roots = [Path(package.__path__[0]) for package in (hf_tokens, hf_tokens_adapters, hf_tokens_kernels)]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for root in roots for path in sorted(root.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", NAMED_BY_US)) and name.isidentifier() and name != "_"


def own(tree: ast.Module) -> set[str]:
    """Private names that a file makes: functions, classes, variables, attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id == "self" else set()
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "vars(self)":
            found.add(ast.literal_eval(node.slice))
    return {name for name in found if is_private(name)}


def used(tree: ast.Module):
    """(line, name) of every private name that a file imports, reads as an attribute, or says as a string."""
    parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PARTS:
            parts |= {id(value) for argument in node.args for value in ast.walk(argument)}
    for node in ast.walk(tree):
        names = ()
        if isinstance(node, ast.Attribute):
            names = (node.attr,)
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            names = (node.value,)
        yield from ((node.lineno, name) for name in names if is_private(name))


def test_every_private_name_that_is_not_ours_is_in_the_table():
    ours, listed = set().union(*map(own, sources().values())), {row.name for row in TABLE}
    ours |= {part for path in sources() for part in path.with_suffix("").parts}
    strange = [f"{path.name}:{line} {name}" for path, tree in sources().items() for line, name in used(tree) if name not in ours | listed]
    assert not strange, f"Private names of others, which TABLE must hold with a reason: {strange}"


def classes():
    """Every class of ours that stands at the top of a module."""
    for path in sources():
        parts = path.with_suffix("").parts
        start = max(i for i, part in enumerate(parts) if part in PACKAGES)
        module = importlib.import_module(".".join(parts[start:]).removesuffix(".__init__"))
        yield from (cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__)


def test_what_we_override_of_others_is_in_the_table():
    listed, strange = {row.name for row in TABLE}, set()
    for cls in classes():
        others = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
        theirs = {name for base in others for name in (*vars(base), *inspect.get_annotations(base))}
        strange |= {f"{cls.__qualname__}.{name}" for name in theirs & own(code_of(cls)) - listed}
    assert not strange, f"Private names of others, which TABLE must hold with a reason: {sorted(strange)}"


def test_nothing_is_listed_that_we_do_not_touch():
    fields = ("attr", "id", "name", "value", "arg", "module")
    nodes = [node for tree in sources().values() for node in ast.walk(tree)]
    said = {value for node in nodes for field in fields if isinstance(value := getattr(node, field, None), str)}
    said |= {part for word in said for part in word.split(".")}
    assert not [f"{row.owner}.{row.name}" for row in TABLE if (row.through or row.name) not in said]
