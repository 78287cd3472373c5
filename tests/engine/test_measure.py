"""What a forward costs, of models without a surgery too."""

import pytest
import torch

from hf_tokens import measure
from hf_tokens.testing import zoo

FAMILIES = ("idefics2", "llava", "qwen2_vl", "smolvlm", "blip-2", "llama", "vit", "bert")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_wants_gradients_is_measured_and_left_as_it_was(family):
    one = zoo.build(family)
    frozen = next(one.model.parameters()).requires_grad_(False)
    wanting = [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
    with torch.enable_grad():
        cost = measure(one.model, **one.inputs)
    assert cost.tokens > 0 and cost.flops > 0 and not frozen.requires_grad
    assert wanting == [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
