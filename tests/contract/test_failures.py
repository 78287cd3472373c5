"""A call that raises, whatever it is and wherever, leaves nothing of itself: the next one answers as if it had never been."""

import torch

from hf_tokens.testing.contract.architectures import built
from hf_tokens.testing.contract.checks.failures import *  # noqa: F403
from hf_tokens.testing.contract.checks.failures import residue
from hf_tokens.testing.contract.pairs import ContractPair


def test_the_residue_of_a_call_under_way_is_seen():
    pair = ContractPair("prefixkv", "llama")
    model = pair.attach()
    seen = []
    list(model.get_base_model().modules())[-1].register_forward_pre_hook(lambda *_: seen.append(residue(model)))
    with torch.no_grad():
        model(**built("llama")[1])
    assert seen and all(seen) and not residue(model)
