"""The architectures that every method meets: one row each, tiny, with random weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ...api import objective_loss
from ...engine.block import BlockSurgery
from ...handlers.objective import objectives_of
from .. import zoo
from ..zoo_rules import BATCH

PADS = 5  # padding tokens of the second row
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")
SHARED = ("img_ids", "txt_ids")  # tables that all samples of a batch share
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A family and what its model can do.

    Attributes:
        family: Name in the zoo.
        streams: Kind of each stream, a star behind the causal ones.
        pads: Sides on which its text may be padded.
        generates: Whether it generates text.
        tensors: Names of the outputs to compare, where a sample's outputs are not all of them.
        timesteps: The timesteps of three denoising steps.
        make: Builds the model and its inputs where the zoo does not.
        headless: Whether it is a text model without its head, which only methods meet that give a short sequence out.
        tagger: Whether its head classifies tokens, which only scorers of tokens meet.
    """

    family: str
    streams: tuple[str, ...]
    pads: tuple[str, ...] = ()
    generates: bool = False
    tensors: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    make: Callable[[], tuple[nn.Module, Inputs]] | None = None
    headless: bool = False
    tagger: bool = False

    @property
    def name(self) -> str:
        return self.family.rpartition("/")[2]

    @property
    def library(self) -> str:
        return "diffusers" if self.family.startswith("diffusers/") else "transformers"

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model, frozen and in eval mode, and a batch of two; the same ones at every call."""
        if self.headless:
            specimen = zoo.build(self.family.removesuffix("_encoder"))
            model, inputs = specimen.model.base_model, {name: specimen.inputs[name] for name in ("input_ids", "attention_mask")}
            model = model.encoder if model.config.is_encoder_decoder else model
        elif self.make is None:
            specimen = zoo.build(self.family)
            model, inputs = specimen.model, dict(specimen.inputs)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, inputs = self.make()
                zoo.liven(model)
        if "decoder_input_ids" in inputs:  # another length than the encoder's, so that no test mixes them up
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :11]
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self.generates:
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
            model.generation_config.decoder_start_token_id = 1
            model.generation_config.suppress_tokens = list(range(80, zoo.VOCAB))  # the places of images among them
        return model.eval().requires_grad_(False), inputs  # torch multiplies in another order where a weight wants gradients

    def read(self, output: Any) -> list[Tensor]:
        """The tensors that a sample's outputs are."""
        return [output[name] for name in self.tensors] if self.tensors else zoo.tensors(output)

    def calls(self, inputs: Inputs) -> list[Inputs]:
        """The calls that make one use of the model: a forward, or some denoising steps."""
        if not self.timesteps:
            return [inputs]
        moments = [torch.full((len(inputs["timestep"]),), value, dtype=inputs["timestep"].dtype) for value in self.timesteps]
        return [{**inputs, "timestep": moment} for moment in moments]

    def run(self, model: nn.Module, inputs: Inputs, **more: Any) -> list[Tensor]:
        return [tensor for call in self.calls(inputs) for tensor in self.read(model(**call, **more))]

    def labelled(self, inputs: Inputs) -> Inputs:
        """The batch with labels: the text itself without padding, places of images and each row's first token, which nothing tells."""
        if "decoder_input_ids" in inputs:
            return {**inputs, "labels": (inputs["decoder_input_ids"] * 7 + 3) % 75 + 5}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ids = ids % 2 if self.tagger else ids
        return {**inputs, "labels": ids.masked_fill((mask * mask.cumsum(dim=1) < 2) | (ids >= IMAGES), -100)}

    def loss(self, model: nn.Module, inputs: Inputs, **more: Any) -> Tensor:
        """What a training step would minimise."""
        if not self.timesteps:
            return model(**self.labelled(inputs), **more).loss
        prediction = zoo.tensors(model(**self.calls(inputs)[-1], **more))[0]
        target = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(3))
        target = target.chunk(2, dim=1)[0] if self.name in VARIANCE else target
        if objectives(model):
            return objective_loss(model, target)
        return torch.nn.functional.mse_loss(prediction[:, : target.shape[1]], target)

    def widened(self, inputs: Inputs, side: str) -> Inputs:
        """The batch with padding on every row."""
        fill = lambda value: torch.zeros_like(value[:, :PADS])
        order = lambda value: [fill(value), value] if side == "left" else [value, fill(value)]
        more = {name: torch.cat(order(inputs[name]), dim=1) for name in PER_TOKEN if name in inputs}
        return self.with_positions({**inputs, **more})

    def padded(self, inputs: Inputs, side: str) -> Inputs:
        """The batch with its second row padded, and positions where the model takes them."""
        out = {name: value.clone() if name in PER_TOKEN else value for name, value in inputs.items()}
        n = inputs["input_ids"].shape[1]
        fill = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0}
        for name in PER_TOKEN:
            if name in inputs:
                row, filler = inputs[name][1, : n - PADS], torch.full((PADS,), fill[name])
                out[name][1] = torch.cat([filler, row] if side == "left" else [row, filler])
        return self.with_positions(out)

    def with_positions(self, inputs: Inputs) -> Inputs:
        """Positions counted from each row's first real token, for models that do not count them so themselves."""
        if self.name not in POSITIONS:
            return inputs
        return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}

    def alone(self, inputs: Inputs, i: int, pads: int = 0) -> Inputs:
        """Sample i without the others, and its text without the last `pads` tokens."""
        out = {name: take_sample(name, value, i) for name, value in inputs.items()}
        if pads:
            out |= {name: out[name][:, :-pads] for name in PER_TOKEN if name in out}
        return self.with_positions(out)

    def real(self, inputs: Inputs, i: int, side: str) -> tuple[int, slice]:
        """Length of the padded text, and where the tokens of sample i stand in it."""
        n, pads = inputs["input_ids"].shape[1], PADS * i
        return n, slice(pads, n) if side == "left" else slice(0, n - pads)

    def sample(self, tensors: list[Tensor], i: int, n: int = 0, pads: slice | None = None) -> list[Tensor]:
        """Sample i of a batch's outputs; where they run over the n text tokens, the real ones."""
        rows = [unfilled(tensor.chunk(BATCH)[i]) for tensor in tensors]
        return rows if pads is None else [row[:, pads] if row.dim() > 2 and row.shape[1] == n else row for row in rows]


POSITIONS = ("gpt2", "gpt2_encoder", "bert", "bert_model", "bert_tagger")
VARIANCE = ("DiTTransformer2DModel", "PixArtTransformer2DModel")  # denoisers that predict a variance beside the noise
IMAGES = 80  # ids from here on stand for images


def objectives(model: nn.Module) -> list:
    """Its active objectives."""
    surgeries = [module for module in model.modules() if isinstance(module, BlockSurgery)]
    return objectives_of(surgeries[0].surgery.model) if surgeries else []


def unfilled(row: Tensor) -> Tensor:
    """One sample without the zeros behind a sequence that came out shorter than another sample's."""
    if row.dim() != 3:
        return row
    there = row.any(dim=-1).any(dim=0)  # n
    return row[:, : len(there) - int(there.flip(0).long().argmax())] if bool(there.any()) else row


def take_sample(name: str, value: Any, i: int) -> Any:
    return value if name in SHARED or not isinstance(value, Tensor) else value.chunk(BATCH)[i]


def siglip() -> tuple[nn.Module, Inputs]:
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    text = dict(**part, **special, vocab_size=zoo.VOCAB, max_position_embeddings=32, projection_size=32)
    config = transformers.SiglipConfig(text_config=text, vision_config=dict(**part, image_size=32, patch_size=8))
    ids = torch.randint(5, 80, (BATCH, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return transformers.SiglipModel(config), {**inputs, "pixel_values": torch.randn(BATCH, 3, 32, 32)}


def bert_model() -> tuple[nn.Module, Inputs]:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    ids = torch.randint(5, 80, (BATCH, 16))
    config = transformers.BertConfig(**sizes, vocab_size=zoo.VOCAB, max_position_embeddings=64, pad_token_id=0)
    model = transformers.BertModel(config, add_pooling_layer=False)  # its pooler reads the first token, padding or not
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tagger(family: str) -> Callable[[], tuple[nn.Module, Inputs]]:
    """A classifier of tokens into two classes."""

    def make() -> tuple[nn.Module, Inputs]:
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=zoo.VOCAB)
        config = transformers.AutoConfig.for_model(family, **sizes, max_position_embeddings=64, pad_token_id=0, num_labels=2)
        ids = torch.randint(5, 80, (BATCH, 16))
        model = transformers.AutoModelForTokenClassification.from_config(config)
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make


def idefics3() -> tuple[nn.Module, Inputs]:
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    text = dict(**part, model_type="llama", num_key_value_heads=2, vocab_size=zoo.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = transformers.Idefics3Config(
        text_config=text, vision_config=dict(**part, image_size=32, patch_size=8), image_token_id=90, scale_factor=2, pad_token_id=0
    )
    ids = torch.randint(5, 80, (BATCH, 18))
    ids[:, 2:6] = 90  # 16 patches, shuffled into 4 tokens
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(BATCH, 1, 3, 32, 32)}
    return transformers.Idefics3ForConditionalGeneration(config), inputs


def small_unet() -> tuple[nn.Module, Inputs]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    context = torch.randn(BATCH, 16, 32)
    return model, {"sample": torch.randn(BATCH, 4, 8, 8), "timestep": torch.tensor([10, 10]), "encoder_hidden_states": context}


BOTH_SIDES = ("left", "right")
INTEGER_TIMES, SHARE_TIMES = (900, 500, 100), (0.9, 0.5, 0.1)
LISTED = (
    Architecture("llama", ("text*",), BOTH_SIDES, generates=True),
    Architecture("qwen2", ("text*",), BOTH_SIDES, generates=True),
    Architecture("gpt2", ("text*",), BOTH_SIDES, generates=True),
    Architecture("gemma3", ("vision", "text*"), BOTH_SIDES, generates=True),
    Architecture("mixtral", ("text*",), BOTH_SIDES, generates=True),
    Architecture("bert", ("text",), BOTH_SIDES),
    Architecture("bert_model", ("text",), BOTH_SIDES, make=bert_model),
    Architecture("bert_tagger", ("text",), BOTH_SIDES, make=tagger("bert"), tagger=True),
    Architecture("xlm_roberta_tagger", ("text",), BOTH_SIDES, make=tagger("xlm-roberta"), tagger=True),
    Architecture("t5", ("text", "text*"), BOTH_SIDES, generates=True),
    Architecture("llama_encoder", ("text*",), BOTH_SIDES, headless=True),
    Architecture("qwen2_encoder", ("text*",), BOTH_SIDES, headless=True),
    Architecture("gpt2_encoder", ("text*",), BOTH_SIDES, headless=True),
    Architecture("t5_encoder", ("text",), BOTH_SIDES, headless=True),
    Architecture("whisper", ("audio", "text*"), generates=True),
    Architecture("vit", ("vision",)),
    Architecture("deit", ("vision",)),
    Architecture("dinov2_with_registers", ("vision",)),
    Architecture("clip", ("text*", "vision"), ("right",), tensors=("text_embeds", "image_embeds")),
    Architecture("siglip", ("text", "vision"), tensors=("text_embeds", "image_embeds"), make=siglip),
    Architecture("llava", ("vision", "text*"), BOTH_SIDES, generates=True, tensors=("logits",)),
    Architecture("qwen2_vl", ("vision", "text*"), BOTH_SIDES, generates=True, tensors=("logits",)),
    Architecture("idefics3", ("vision", "text*"), BOTH_SIDES, generates=True, tensors=("logits",), make=idefics3),
    Architecture("diffusers/UNet2DConditionModel", ("denoiser",) * 4, timesteps=INTEGER_TIMES, make=small_unet),
    Architecture("diffusers/DiTTransformer2DModel", ("denoiser",), timesteps=INTEGER_TIMES),
    Architecture("diffusers/SD3Transformer2DModel", ("denoiser",), timesteps=INTEGER_TIMES),
    Architecture("diffusers/FluxTransformer2DModel", ("denoiser", "denoiser"), timesteps=SHARE_TIMES),
    Architecture("diffusers/PixArtTransformer2DModel", ("denoiser",), timesteps=INTEGER_TIMES),
)
ARCHITECTURES = {row.name: row for row in LISTED}


@cache
def built(name: str) -> tuple[nn.Module, Inputs]:
    """The model and inputs of an architecture, made once and never changed."""
    return ARCHITECTURES[name].build()


class Apart(pickle.Pickler):
    """Writes all of a model but its tensors, and functions, which belong to every copy: these it lists."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.listed: list[Any] = []
        self.places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, (Tensor, FunctionType)):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.listed)
            self.listed.append(value)
        return self.places[id(value)]


class Together(pickle.Unpickler):
    def __init__(self, data: bytes, listed: list[Any]):
        super().__init__(io.BytesIO(data))
        self.listed = listed

    def persistent_load(self, place: int) -> Any:
        return self.listed[place]


@cache
def written(name: str) -> tuple[bytes, list[Any]]:
    writer = Apart(file := io.BytesIO())
    writer.dump(built(name)[0])
    return file.getvalue(), writer.listed


def fresh(name: str) -> nn.Module:
    """A copy of the model of an architecture, as `deepcopy` makes it, in a quarter of its time."""
    data, listed = written(name)
    return Together(data, copy.deepcopy(listed)).load()
