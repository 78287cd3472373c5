"""What a surgery costs that changes nothing, and what one saves that drops half of the tokens in the middle of SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import hf_tokens
from hf_tokens.commands.material import load_base, packaged_smollm2
from hf_tokens.testing import probe_config
from hf_tokens.testing.probe import ProbeDropConfig

from .paired import Row, ratios

TOKENS, ROUNDS = 512, 15


@torch.no_grad()
def rows() -> Iterator[Row]:
    """Both."""
    name = str(packaged_smollm2())
    base = load_base(name, "cpu")
    ids = torch.randint(100, 40000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    nothing = hf_tokens.get_token_model(load_base(name, "cpu"), [*probe_config(0.0), hf_tokens.DeepPromptConfig(tokens=0)]).eval()
    half = hf_tokens.get_token_model(load_base(name, "cpu"), ProbeDropConfig(share=0.5)).eval()
    given = dict(input_ids=ids, use_cache=False, logits_to_keep=1)
    found = ratios([lambda model=model: model(**given) for model in (base, nothing, half)], ROUNDS)
    cost = {key: hf_tokens.measure(model, **given) for key, model in (("base", base), ("half", half))}
    share = {"FLOPs": cost["half"].flops / cost["base"].flops, "tokens": cost["half"].tokens / cost["base"].tokens}
    setting = f"SmolLM2-135M, {TOKENS} tokens"
    yield Row("a surgery that changes nothing in each block", setting, *found[0], 1.03, {"FLOPs": 1.0, "tokens": 1.0})
    yield Row("half the tokens dropped at the middle", setting, *found[1], 1 - 0.85 * (1 - share["FLOPs"]), share)
