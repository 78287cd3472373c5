"""Pipelines of diffusers: which of their components denoise, and of whose prompt the parts of their denoiser's calls are."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import UnsupportedError, explain
from . import families
from .classes import class_name
from .parts import all_attentions
from .signatures import parameters

# -- which components denoise ------------------------------------------------------------------------------------------
SURGICAL = ("transformer", "unet")  # the names of components in which a surgery is
SECOND = ("transformer_2", "unconditional_transformer")  # names of a second denoiser, whatever is wrapped around it
BESIDE_DENOISER = re.compile(r"ControlNet|Adapter")  # these take a timestep, and put out what a denoiser reads


def denoisers(pipeline: str, components: dict[str, Any]) -> dict[str, Any]:
    """The denoisers among the components of a pipeline by their names: one, several of a class that share its run, or none.

    Raises:
        UnsupportedError: There are several, of which not all are those: a surgery in some of them would be half of one.
    """
    found = {name: component for name, component in components.items() if denoises(name, component)}
    known = {name: component for name, component in found.items() if name in (*SURGICAL, *SECOND)}
    if len(found) > 1 and (known != found or len({type(component) for component in found.values()}) > 1):
        raise apart("A surgery in a pipeline is in all that denoises, one `transformer` or `unet`, or two of one class", pipeline, found)
    return known


def apart(rule: str, pipeline: str, names: Iterable[str]) -> UnsupportedError:
    """What is said where the denoisers of a pipeline are to be passed by themselves."""
    remedy = f"Pass each by itself, `{'`, `'.join(f'pipe.{name}' for name in names)}`: each gets an adapter of its own, edits too."
    return UnsupportedError(explain(rule, f"a {pipeline} with {' and '.join(names)}", remedy))


def denoises(name: str, component: Any) -> bool:
    """Whether a component of a pipeline denoises: by its name, or as a model that takes a timestep."""
    if component is None or name in (*SURGICAL, *SECOND):
        return component is not None
    model = isinstance(component, sys.modules["diffusers"].ModelMixin) and not BESIDE_DENOISER.search(class_name(component))
    return model and not set(families.TIMESTEPS).isdisjoint(parameters(type(component)))


# -- caches of diffusers' own -------------------------------------------------------------------------------------------
CACHE_HOOKS = re.compile(r"Cache|^FBC|Broadcast")  # classes of their hooks
WHOLE_BLOCKS = re.compile(r"^FBC")  # those that run a block whole or not at all
SHARED_CACHES = re.compile(r"^(FasterCache|PyramidAttentionBroadcast)")  # those that keep the same for a prompt and the negative prompt


def their_caches(model: nn.Module) -> list[str]:
    """The classes of hooks by which caches of diffusers' own are in a model."""
    registries = (vars(module).get("_diffusers_hook") for module in model.modules())
    hooks = (type(hook).__name__ for registry in registries if registry is not None for hook in registry.hooks.values())
    return sorted({name for name in hooks if CACHE_HOOKS.search(name)})


# -- processors that keep what others read ------------------------------------------------------------------------------
STORING = {"CrossAttnStoreProcessor", "AttendExciteAttnProcessor", "LEDITSCrossAttnProcessor"}  # the probabilities of all tokens in a call


def storing_processors(blocks: Iterable[nn.Module]) -> list[str]:
    """The classes of processors in blocks of a denoiser that keep its attention for their pipeline."""
    processors = (getattr(module, "processor", None) for block in blocks for _, module in all_attentions(block))
    return sorted(STORING & {type(processor).__name__ for processor in processors})


# -- how far it is ------------------------------------------------------------------------------------------------------
STEPPED = ("t", "t_sched")  # how pipelines call the timestep of their scheduler at which they call
CLOCKS = ("scheduler", "inverse_scheduler")  # their schedulers
GIVE_SHARES = ("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline")  # whose denoiser is given sigma / (1 + sigma) as the timestep

# -- whose prompt a call is given --------------------------------------------------------------------------------------
POSITIVE, NEGATIVE = False, True  # of each part of a batch, whether its prompt is the negative one
Parts = tuple[bool, ...]
PAIR, ALONE, OTHER = (NEGATIVE, POSITIVE), (POSITIVE,), (NEGATIVE,)
DECIDES = "do_classifier_free_guidance"  # what decides on several parts, a variable of the pipeline's call or a property
PERTURBED = "do_perturbed_attention_guidance"  # the same of one more part, which has the prompt again
# Names of a cache context that say it, whoever calls; the third is that of a batch.
CONTEXTS: dict[str, Parts] = {"cond": ALONE, "uncond": OTHER, "cond_uncond": PAIR}
# Names that the guiders of diffusers give to what they call the denoiser for; where a modular pipeline keeps what it does so with, and the
# name in that.
PREDICTIONS: dict[str, Parts] = {
    **{"pred_cond": ALONE, "pred_uncond": OTHER},
    **dict.fromkeys(("pred_cond_skip", "pred_cond_stg", "pred_cond_seg", "pred_cond_modality"), ALONE),
}
PREPARED, PREDICTION = "guider_state_batch", "__guidance_identifier__"
# Pipelines whose attention reads the samples of a call together, beside those that perturb it, and what does so.
JOINS = {
    **dict.fromkeys(("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"), "cross-frame attention"),
    **dict.fromkeys(("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL"), "store of attention maps"),
    "StableDiffusionPix2PixZeroPipeline": "guidance by attention maps",
}
Variables = Callable[[str], Any]  # of the code that calls, by name; None for one that it has not
Handed = dict[str, "Parts | Callable[[Variables], Parts]"]


def where(decides: str, above: float) -> Callable[[Variables], Parts]:
    """A pair where a variable of the pipeline's code is above a number, else the prompt alone."""
    return lambda of: PAIR if of(decides) > above else ALONE


def of_edits(of: Variables) -> Parts:
    """The prompts that edit a picture, behind the negative one."""
    return OTHER + ALONE * of("self").enabled_editing_prompts


# What a pipeline's code hands over as the prompt -> its parts under guidance, or a function of the code's variables that says all of them;
# and the pipelines. One that names the context of each call needs no row; one that is not here is not known.
HANDED: tuple[tuple[Handed, str], ...] = (
    (
        {"prompt_embeds": PAIR},
        "AllegroPipeline AltDiffusionImg2ImgPipeline AltDiffusionPipeline AnimateDiffControlNetPipeline AnimateDiffPAGPipeline "
        "AnimateDiffPipeline AnimateDiffSDXLPipeline AnimateDiffSparseControlNetPipeline AnimateDiffVideoToVideoControlNetPipeline "
        "AnimateDiffVideoToVideoPipeline AnyFlowPipeline AuraFlowPipeline BriaPipeline CogVideoXFunControlPipeline "
        "CogVideoXImageToVideoPipeline CogVideoXPipeline CogVideoXVideoToVideoPipeline CogView3PlusPipeline ConsisIDPipeline "
        "EasyAnimateControlPipeline EasyAnimateInpaintPipeline EasyAnimatePipeline HunyuanDiTControlNetPipeline HunyuanDiTPAGPipeline "
        "HunyuanDiTPipeline I2VGenXLPipeline IFImg2ImgPipeline IFImg2ImgSuperResolutionPipeline IFInpaintingPipeline "
        "IFInpaintingSuperResolutionPipeline IFPipeline IFSuperResolutionPipeline JoyImageEditPlusPipeline Kandinsky3Img2ImgPipeline "
        "Kandinsky3Pipeline KolorsImg2ImgPipeline KolorsPAGPipeline KolorsPipeline LTXConditionPipeline LTXI2VLongMultiPromptPipeline "
        "LTXImageToVideoPipeline LTXPipeline LattePipeline MochiPipeline PIAPipeline PixArtAlphaPipeline PixArtSigmaPAGPipeline "
        "PixArtSigmaPipeline SanaPAGPipeline StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3ControlNetPipeline "
        "StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline "
        "StableDiffusionAdapterPipeline StableDiffusionControlNetImg2ImgPipeline StableDiffusionControlNetInpaintPipeline "
        "StableDiffusionControlNetPAGInpaintPipeline StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPipeline "
        "StableDiffusionControlNetXSPipeline StableDiffusionDepth2ImgPipeline StableDiffusionGLIGENPipeline "
        "StableDiffusionGLIGENTextImagePipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline "
        "StableDiffusionInpaintPipelineLegacy StableDiffusionLDM3DPipeline StableDiffusionLatentUpscalePipeline "
        "StableDiffusionModelEditingPipeline StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline "
        "StableDiffusionPAGPipeline StableDiffusionPipeline StableDiffusionUpscalePipeline StableDiffusionXLAdapterPipeline "
        "StableDiffusionXLControlNetImg2ImgPipeline StableDiffusionXLControlNetInpaintPipeline "
        "StableDiffusionXLControlNetPAGImg2ImgPipeline StableDiffusionXLControlNetPAGPipeline StableDiffusionXLControlNetPipeline "
        "StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline "
        "StableDiffusionXLControlNetUnionPipeline StableDiffusionXLControlNetXSPipeline StableDiffusionXLImg2ImgPipeline "
        "StableDiffusionXLInpaintPipeline StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline "
        "StableDiffusionXLPAGPipeline StableDiffusionXLPipeline StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline TextToVideoSDPipeline "
        "VideoToVideoSDPipeline",
    ),
    (
        {"prompt_embeds": ALONE},
        "Flux2KleinKVPipeline Flux2Pipeline FluxControlImg2ImgPipeline FluxControlInpaintPipeline FluxControlNetImg2ImgPipeline "
        "FluxControlNetInpaintPipeline FluxControlPipeline FluxFillPipeline LatentConsistencyModelImg2ImgPipeline "
        "LatentConsistencyModelPipeline SanaWMLTX2Refiner StableAudio3AudioToAudioPipeline "
        "StableAudio3InpaintPipeline VisualClozeGenerationPipeline",
    ),
    (
        {"prompt_embeds": ALONE, "negative_prompt_embeds": OTHER},
        "ChromaImg2ImgPipeline ChromaInpaintPipeline ChromaPipeline ChronoEditPipeline CogView4ControlPipeline "
        "Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline Cosmos2_5_PredictBasePipeline CosmosTextToWorldPipeline "
        "CosmosVideoToWorldPipeline FluxControlNetPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextInpaintPipeline "
        "FluxKontextPipeline HunyuanSkyreelsImageToVideoPipeline HunyuanVideoFramepackPipeline HunyuanVideoImageToVideoPipeline "
        "JoyImageEditPipeline Krea2Pipeline LongCatAudioDiTPipeline Lumina2Pipeline NucleusMoEImagePipeline WanVideoToVideoPipeline",
    ),
    (
        {"prompt_embeds": (POSITIVE, NEGATIVE, NEGATIVE)},
        "StableDiffusionInstructPix2PixPipeline StableDiffusionXLInstructPix2PixPipeline",
    ),
    ({"prompt_embeds": (POSITIVE, NEGATIVE)}, "LuminaPipeline"),
    ({"prompt_embeds": PAIR, "original_prompt_embeds": ALONE}, "StableDiffusion3Pipeline"),
    ({"prompt_embeds": PAIR, "uncond_emb": OTHER}, "StableDiffusionSAGPipeline"),
    ({"prompt_embeds": PAIR, "text_embedding": ALONE, "text_embeddings": ALONE}, "StableDiffusionAttendAndExcitePipeline"),
    (
        {"prompt_embeds.to(dtype=transformer_dtype)": PAIR},
        "SanaControlNetPipeline SanaImageToVideoPipeline SanaPipeline SanaVideoPipeline",
    ),
    ({"prompt_embeds.to(dtype=transformer_dtype)": ALONE}, "SanaSprintImg2ImgPipeline SanaSprintPipeline"),
    (
        {"prompt_embeds_qwen.to(dtype)": ALONE, "negative_prompt_embeds_qwen.to(dtype)": OTHER},
        "Kandinsky5I2IPipeline Kandinsky5I2VPipeline Kandinsky5T2IPipeline Kandinsky5T2VPipeline",
    ),
    (
        {"connector_prompt_embeds": PAIR, "video_prompt_embeds": ALONE},
        "LTX2ConditionPipeline LTX2HDRPipeline LTX2ImageToVideoPipeline LTX2InContextPipeline LTX2Pipeline",
    ),
    ({"image_embeddings": PAIR}, "PaintByExamplePipeline StableDiffusionImageVariationPipeline StableVideoDiffusionPipeline"),
    ({"text_encoder_hidden_states": PAIR}, "KandinskyImg2ImgPipeline KandinskyInpaintPipeline KandinskyPipeline"),
    ({"text_embeddings": PAIR}, "BlipDiffusionControlNetPipeline BlipDiffusionPipeline"),
    ({"text": ALONE}, "MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline"),
    ({"ca_embed": PAIR}, "PRXPipeline PRXPixelPipeline"),
    (
        {
            "torch.cat([encoder_hidden_states, null_encoder_hidden_states], dim=0)": (POSITIVE, NEGATIVE),
            **{"encoder_hidden_states": ALONE, "non_cover_encoder_hidden_states": ALONE},
        },
        "AceStepPipeline",
    ),
    ({"generated_prompt_embeds": PAIR}, "AudioLDM2Pipeline"),
    ({"llm_features": ALONE, "neg_llm_features": OTHER}, "Ideogram4Pipeline"),
    ({"prompt_embeds": where("guidance_scale", 1)}, "BriaFiboPipeline BriaFiboEditPipeline"),
    ({"encoder_hidden_states": where("guidance_scale", 1)}, "AmusedPipeline AmusedImg2ImgPipeline AmusedInpaintPipeline"),
    ({"context": lambda of: ALONE if of("guidance_scale") == 1 else PAIR}, "LDMTextToImagePipeline"),
    ({"prompt_embeds": lambda of: PAIR if of("task") == "generate" else OTHER + PAIR}, "DreamLitePipeline"),
    ({"prompt_embeds": ALONE}, "DreamLiteMobilePipeline"),
    (  # a mask is of two prompts, each of which may have a negative one
        {"prompt_embeds": lambda of: (PAIR if of(DECIDES) else ALONE) * (1 if of("target_prompt_embeds") is None else 2)},
        "StableDiffusionDiffEditPipeline",
    ),
    ({"prompt_embeds_input": lambda of: (PAIR if of(DECIDES) else ALONE) * of("vb_size")}, "StableDiffusionPanoramaPipeline"),
    (  # behind the prompt stands what the picture shall not show
        {"prompt_embeds": lambda of: PAIR + OTHER * bool(of("enable_safety_guidance")) if of(DECIDES) else ALONE},
        "StableDiffusionPipelineSafe",
    ),
    (  # behind the prompt stand those of the edits, of which it is told by how much they move the picture
        {"text_embeddings": lambda of: PAIR + OTHER * of("enabled_editing_prompts") if of(DECIDES) else ALONE},
        "SemanticStableDiffusionPipeline",
    ),
    ({"concat_prompt_embeds": OTHER * 2 + ALONE * 2}, "CycleDiffusionPipeline"),
    (
        {"prompt_embeds": PAIR, "prompt_embeds_edit": PAIR, "prompt_embeds_edit.detach()": PAIR},
        "StableDiffusionPix2PixZeroPipeline",
    ),
    ({"prompt_embeds": PAIR}, "TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline VQDiffusionPipeline"),
    ({"prompt_embeds": PAIR}, "VersatileDiffusionTextToImagePipeline"),
    ({"image_embeddings": PAIR}, "VersatileDiffusionImageVariationPipeline"),
    (
        {"text_embed_input": of_edits, "uncond_embedding": OTHER, "text_embeddings": ALONE},
        "LEditsPPPipelineStableDiffusion",
    ),
    (
        {"prompt_embeds": of_edits, "negative_prompt_embeds": lambda of: PAIR if of(DECIDES) else OTHER},
        "LEditsPPPipelineStableDiffusionXL",
    ),
    ({"model_prompt_embeds": PAIR}, "StableAudio3Pipeline"),
    ({"text_audio_duration_embeds": PAIR}, "StableAudioPipeline"),
    ({"encoder_hidden_states": PAIR, "prompt_embeds": PAIR}, "AnyFlowFARPipeline"),
    ({"encoder_hidden_states": ALONE, "neg_encoder_hidden_states": OTHER}, "Cosmos2_5_TransferPipeline"),
    (
        {"prompt_embeds if use_text_images else base_prompt_embeds": ALONE, "negative_prompt_embeds": OTHER},
        "BriaFibo2Pipeline",
    ),
    (  # its first call only fills a cache with the pictures, for both
        {"torch.zeros_like(prompt_embeds)[:1, :0, ...]": OTHER, "prompt_embeds": ALONE, "negative_prompt_embeds": OTHER},
        "GlmImagePipeline",
    ),
)
PROMPTS = {name: row for row, names in HANDED for name in names.split()}
