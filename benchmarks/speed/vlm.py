"""The language model of a LLaVA on half of its visual tokens: SmolLM2-135M behind a small untrained tower of 24 x 24 patches."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import hf_tokens
from hf_tokens.commands.material import load_base, packaged_smollm2

from .paired import Row, ratios

SIDE, WORDS, IMAGE, ROUNDS = 24, 32, 5, 7  # patches along a side, words of the question, and the token that stands for a patch
KEEP = 17 / 24  # of each side


class Clock:
    """Seconds that a module's calls took."""

    def __init__(self, module: torch.nn.Module):
        self.seconds = 0.0
        module.register_forward_pre_hook(lambda *_: setattr(self, "start", time.perf_counter()))
        module.register_forward_hook(lambda *_: setattr(self, "seconds", time.perf_counter() - self.start))


def llava() -> LlavaForConditionalGeneration:
    """The language model behind a tower that costs next to nothing."""
    text: Any = load_base(str(packaged_smollm2()), "cpu")
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8 * SIDE, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text.config, image_token_index=IMAGE))
    model.model.language_model, model.lm_head = text.model, text.lm_head
    return model.requires_grad_(False).eval()


@torch.no_grad()
def rows() -> Iterator[Row]:
    """Seconds of the language model alone."""
    torch.manual_seed(0)
    base = llava()
    words = torch.randint(100, 40000, (1, WORDS))
    given = dict(
        input_ids=torch.cat([words[:, :1], torch.full((1, SIDE * SIDE), IMAGE), words[:, 1:]], dim=1),
        pixel_values=torch.randn(1, 3, 8 * SIDE, 8 * SIDE),
        logits_to_keep=1,
        use_cache=True,
    )
    models = [base, hf_tokens.get_token_model(copy.deepcopy(base), hf_tokens.FourierVLMConfig(keep=KEEP)).eval()]
    clocks = [Clock(base.model.language_model), Clock(models[1].get_base_model().model.language_model)]

    def timed(model: Any, clock: Clock) -> float:
        model(**given)
        return clock.seconds

    found = ratios([lambda pair=pair: timed(*pair) for pair in zip(models, clocks, strict=True)], ROUNDS)
    cost = [hf_tokens.measure(model, **given) for model in models]
    share = {name: getattr(cost[1], field) / getattr(cost[0], field) for name, field in (("FLOPs", "flops"), ("KV bytes", "kv_bytes"))}
    yield Row("fourier-vlm: half the visual tokens", f"LLaVA, {SIDE * SIDE} visual tokens, {WORDS} words", *found[0], 1 / 1.7, share)
