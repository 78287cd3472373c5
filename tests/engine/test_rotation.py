"""How a block turns its keys is found at its first call: what it makes of a key is what the model itself makes at the other place."""

import pytest
import torch
from accelerate import cpu_offload
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_tokens import StreamingLLMConfig, TokenPrependingConfig, UnsupportedError, get_token_model
from hf_tokens.engine.block import BlockSurgery
from hf_tokens.engine.rotation import BlockRotation, pattern
from hf_tokens.model.rotations import STEADY, find_rotation
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.snapshots import difference, snapshot

APART = "llama mixtral qwen3_moe gpt_oss gemma3_text gpt_neox phi stablelm persimmon falcon nemotron exaone4 smollm3".split()
PAIRS = "cohere glm glm4v_text helium ernie4_5".split()
PLACELESS = {
    "gpt2": "by a table that the model hands to its attention",
    "gptj": "by a table that the model hands to its attention",
    "bloom": "by a table that the model hands to its attention",
    "llama4_text": "by a table of its model's",
    "deepseek_v3": "the keys alone know their place",
}
CONFIG = StreamingLLMConfig(capacity=4, sinks=2)
DELTA = 9


def ids():
    return torch.randint(5, 80, (2, 6), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def keys_at(model, start):
    """The keys of each block (b k n e) as the model itself stores them, where the first token stands at a place."""
    out = model(input_ids=ids(), position_ids=torch.arange(start, start + 6)[None], use_cache=True)
    return {i: layer.keys for i, layer in enumerate(out["past_key_values"].layers) if getattr(layer, "keys", None) is not None}


def rotations(model):
    """The rotation of each block, by the slot of its cache."""
    with torch.no_grad():
        model(input_ids=ids(), use_cache=True)
    blocks = [module for module in model.modules() if isinstance(module, BlockSurgery) and module.plan.acting]
    return {block.layer_idx: block.state(BlockRotation).find() for block in blocks}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*APART, *PAIRS])
def test_a_key_turned_to_a_place_is_the_key_that_the_model_makes_there(family, dtype):
    base = zoo.build(family, dtype=dtype).model.float()  # its tables are made of rounded frequencies
    found = rotations(get_token_model(zoo.build(family, dtype=dtype).model, CONFIG).eval())
    here, there = keys_at(base, 3), keys_at(base, 3 + DELTA)
    first = min(found)  # what later blocks compute may know the places otherwise
    turned = found[first].turn(here[first], torch.full((1, 1, 1), DELTA))
    torch.testing.assert_close(turned, there[first], rtol=1e-4, atol=1e-5)
    assert {r.pairing is None or r.pairing.apart for r in found.values()} == {family in APART}


def prompt_with(model, inputs, at):
    """The embeddings of a padded prompt, its mask, and both with the bank's token in front of the given real token of each row."""
    rows = model.get_base_model().get_input_embeddings()(inputs)
    mask = torch.ones_like(inputs)
    mask[1, :2] = 0
    token = next(buffer for name, buffer in model.named_buffers() if name.endswith(".pst")).to(rows)
    places = [int(row.argmax()) + at for row in mask]
    longer = torch.stack([torch.cat([row[:i], token, row[i:]]) for row, i in zip(rows, places, strict=True)])
    stays = torch.stack([torch.arange(rows.shape[1] + 1) != i for i in places])
    return mask, longer, torch.nn.functional.pad(mask.flip(1), (0, 1), value=1).flip(1).sort(dim=1).values, stays


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "checkpointed"])
@pytest.mark.parametrize("family", [*APART, *PAIRS, "deepseek_v3"])
def test_a_token_with_a_place_of_its_own_is_a_token_of_the_prompt(family, training):
    """Its row of the vocabulary at that place, and all positions behind it one further on; gradients too."""
    config = TokenPrependingConfig(position=2, end=1, exit=1000)
    model = get_token_model(zoo.build(family).model, config).requires_grad_(True).train(training)
    if training:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base = zoo.build(family).model.requires_grad_(True).train(training)
    mask, longer, longer_mask, stays = prompt_with(model, ids(), 2)
    got = model(input_ids=ids(), attention_mask=mask, use_cache=False)[0]
    want = base(inputs_embeds=longer, attention_mask=longer_mask, use_cache=False)[0][stays].view(*mask.shape, -1)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    got[real].square().sum().backward()
    want[real].square().sum().backward()
    name = next(name for name, p in base.named_parameters() if p.grad is not None and p.dim() == 2 and "mlp" in name)
    assert base.get_parameter(name).grad.abs().max() > 0
    torch.testing.assert_close(model.get_base_model().get_parameter(name).grad, base.get_parameter(name).grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "bloom"])
def test_a_token_with_a_place_of_its_own_is_refused_where_places_are_told_otherwise(family):
    base = zoo.build(family).model
    before = snapshot(base)
    with pytest.raises(UnsupportedError, match="model, or a setting that leaves keys as they are"):
        get_token_model(base, TokenPrependingConfig())
    assert not difference(before, snapshot(base))
    get_token_model(base, TokenPrependingConfig(places="shared"))


@pytest.mark.parametrize("family", PLACELESS)
def test_keys_that_know_their_places_otherwise_are_refused(family):
    with pytest.raises(UnsupportedError, match=PLACELESS[family]):
        rotations(get_token_model(zoo.build(family).model, CONFIG).eval())


def scaled(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, **more}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {"linear": {}, "yarn": {}, "llama3": LLAMA3, "proportional": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_with_a_factor_on_them_turn_by_their_angles_alone(kind):
    """YaRN's cosines and sines are times a factor, which a key that is turned on must not get again."""
    found = rotations(get_token_model(llama(scaled(kind, **KINDS[kind])), CONFIG).eval())
    here, there = (keys_at(llama(scaled(kind, **KINDS[kind])), start) for start in (3, 3 + DELTA))
    torch.testing.assert_close(found[0].turn(here[0], torch.full((1, 1, 1), DELTA)), there[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_change_with_the_length_are_refused(kind):
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    with pytest.raises(UnsupportedError, match=rf"angles that grow with the place alone, as in .*, got \['{kind}'\] at model"):
        get_token_model(llama(scaled(kind, **more)), CONFIG)


def llama(knobs):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    return LlamaForCausalLM(LlamaConfig(**sizes, **knobs, max_position_embeddings=64)).eval()


def test_every_kind_of_table_of_the_library_is_known():
    assert {*ROPE_INIT_FUNCTIONS, "default"} == {*STEADY, "dynamic", "longrope"}


def test_a_rotation_that_none_of_those_known_is_is_refused():
    angles = lambda places: places[:, None] * torch.tensor([1.0, 0.1])
    table = lambda places: (angles(places).cos(), angles(places).sin())
    keys = pattern(torch.Size((1, 4, 4)), torch.device("cpu"))  # keys that no rotation makes of the first one
    with pytest.raises(UnsupportedError, match=r"pairs of their first channels by the table it is handed, got X, whose keys differ"):
        find_rotation(keys, table, "X")


def test_tokens_of_pictures_with_several_places_are_refused_and_text_alone_is_not():
    specimen = zoo.build("qwen2_vl")
    model = get_token_model(specimen.model, CONFIG).eval()
    assert rotations(model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="tokens that have one place each, got those of pictures, which have 3"):
        model(**specimen.inputs, use_cache=True)


def test_nothing_of_the_trial_stays():
    base, counts = zoo.build("llama").model, []
    before = snapshot(base)
    handle = base.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: counts.append(1))
    model = get_token_model(base, CONFIG).eval()
    rotations(model)
    handle.remove()
    assert len(counts) == 1  # a copy was tried, without the hooks of others
    assert not difference(before, snapshot(model.unload()))


def test_weights_that_are_kept_elsewhere_are_not_asked_for():
    kept = zoo.build("llama").model
    model = get_token_model(cpu_offload(zoo.build("llama").model, execution_device="cpu"), CONFIG).eval()
    assert all(p.is_meta for p in model.parameters())
    here, there = keys_at(kept, 3), keys_at(kept, 3 + DELTA)
    torch.testing.assert_close(rotations(model)[0].turn(here[0], torch.full((1, 1, 1), DELTA)), there[0], rtol=1e-4, atol=1e-5)
