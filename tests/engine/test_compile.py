"""A model with a surgery under `torch.compile`: one graph where nothing depends on the values of tensors, few breaks a block elsewhere."""

import pytest
import torch

from hf_tokens import get_token_model
from hf_tokens.testing import zoo

pytestmark = pytest.mark.filterwarnings("ignore")  # torch tells of its graph breaks by warnings
IDS = torch.arange(1, 17).view(2, 8)
PADDED = {"input_ids": IDS, "attention_mask": (IDS != 1).long(), "use_cache": False}
LEARNING = {"input_ids": IDS, "labels": IDS, "use_cache": False}

# family, method, what it is called with (None: the zoo's own inputs)
ONE_GRAPH = (
    ("llama", {"method": "deep-prompt", "tokens": 3}, PADDED),
    ("bert", {"method": "deep-prompt", "tokens": 3}, None),
    ("vit", {"method": "vqt"}, None),
    ("llama", {"method": "ssd-unlearn"}, PADDED),
    ("llama", {"method": "dr-llm", "threshold": 1.0}, PADDED),
    ("vit", {"method": "simpool"}, None),
    ("llama", {"method": "goldfish-loss"}, LEARNING),
    ("llama", {"method": "caft"}, LEARNING),
    ("llama", {"method": "cpt", "label_tokens": (5, 6)}, LEARNING),
)


def attached(family, config):
    """A model of a family with the method, and the inputs of the zoo."""
    one = zoo.build(family)
    return get_token_model(one.model, config), one.inputs


def value(output):
    """What a call is judged by."""
    return output["loss"] if output.get("loss") is not None else next(iter(output.values()))


@pytest.mark.parametrize(("family", "config", "call"), ONE_GRAPH, ids=lambda one: one["method"] if "method" in (one or ()) else None)
def test_what_looks_at_no_value_compiles_to_one_graph(family, config, call):
    torch.compiler.reset()
    model, inputs = attached(family, config)
    call = call or inputs
    learning = "labels" in call
    model.train(learning)
    with torch.set_grad_enabled(learning):
        eager = value(model(**call))  # an objective checks the loss that it replaces at its first call
        compiled = value(torch.compile(model, backend="aot_eager", fullgraph=True)(**call))
    torch.testing.assert_close(compiled, eager)


BREAKS, BEHIND = 5, 1  # in each block where the data decide which tokens run it, and behind them all


def test_a_block_breaks_the_graph_a_few_times_at_most():
    torch.compiler.reset()
    model, _ = attached("llama", {"method": "ftp"})
    with torch.no_grad():
        found = torch._dynamo.explain(model.eval())(**PADDED)
    assert found.graph_break_count <= BREAKS * model.config.num_hidden_layers + BEHIND, found.break_reasons
