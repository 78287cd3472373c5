"""What a call of a block or of a head may bring and give back, and whose the errors in it are."""

import pytest

from hf_tokens import get_token_model
from hf_tokens.testing import zoo


@pytest.mark.parametrize("family", ["depth_anything", "dpt", "prompt_depth_anything", "glpn"])
def test_a_head_that_reads_a_list_of_maps_is_left_alone(family):
    specimen = zoo.build(family)
    base = specimen.run()
    get_token_model(specimen.model, {"method": "apt"})
    assert [tensor.shape for tensor in specimen.run()] == [tensor.shape for tensor in base]
