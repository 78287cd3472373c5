"""A surgery in a model whose parameters Accelerate keeps elsewhere, and brings when a module is called."""

import pytest
import torch
from accelerate import cpu_offload
from contract.pairs import PAIRS
from tolerances import all_equal

from hf_tokens import list_methods
from hf_tokens.testing.contract.configs import tiny_config
from hf_tokens.testing.contract.pairs import planned, refused

OURS = [info for info in list_methods() if info.cls.__module__.startswith("hf_tokens_adapters.") and info.cls.placed]
NAMES = [info.name for info in OURS if info.role != "WeightEdit"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_are_kept_elsewhere_are_there_when_they_are_read(name):
    pairs = (pair for pair in PAIRS if pair.method == name and pair.architecture != "gemma3")  # whose tower reads weights past their module
    pair = next(pair for pair in pairs if planned(pair) is None and refused(pair) is None)
    model = pair.attach(config=tiny_config(pair.info.config))
    want = pair.run(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    all_equal(pair.run(model), want, name)
