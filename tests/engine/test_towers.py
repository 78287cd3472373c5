"""Encoders of pictures whose MLP is two modules, whose samples share a table of places, or that have tokens behind their patches."""

import inspect

import pytest
import torch
from hf_tokens_adapters.token_reducer.atc import ATC
from tolerances import all_close, all_equal, close
from transformers import DPTConfig, YolosConfig, YolosModel
from transformers.models.dpt.modeling_dpt import DPTModel

from hf_tokens import ATCConfig, DeepPromptConfig, PPTConfig, TokenMap, anatomy, get_token_model
from hf_tokens.model import families
from hf_tokens.model.anatomy import special_tokens
from hf_tokens.testing import zoo

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
TWO_PARTS = {
    "yolos": lambda: YolosModel(YolosConfig(**SIZES, image_size=[32, 32], patch_size=8, num_detection_tokens=3), add_pooling_layer=False),
    "dpt": lambda: DPTModel(DPTConfig(**SIZES, image_size=32, patch_size=8), add_pooling_layer=False),
}
FAMILIES = ("dinov3_vit", "chmv2", "yolos", "dpt")
METHODS = {
    "ppt, some go": lambda layers: PPTConfig(r=4, tau=0.0, layers=layers),
    "ppt, some join": lambda layers: PPTConfig(r=4, tau=1.0, layers=layers),
    "atc": lambda layers: ATCConfig(keep_rate=0.5, layers=layers),
}


def made(family):
    torch.manual_seed(0)
    model = TWO_PARTS[family]()
    zoo.liven(model)
    return model.eval(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def maps(monkeypatch):
    """The maps that ATC has made, and the signals that it was given."""
    seen, assign = [], ATC.assign

    def spy(self, **signals):
        seen.append((assign(self, **signals), signals))
        return seen[-1][0]

    monkeypatch.setattr(ATC, "assign", spy)
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_keeps_its_own_tokens_in_their_own_places(family, method):
    specimen = zoo.build(family)
    base = specimen.run()
    pixels = specimen.inputs["pixel_values"]
    model = get_token_model(specimen.model, METHODS[method]((1, 2))).eval()
    with torch.no_grad():
        together = zoo.tensors(model(pixel_values=pixels))
        alone = [zoo.tensors(model(pixel_values=pixels[i : i + 1])) for i in range(len(pixels))]
    for i, tensors in enumerate(alone):
        all_close([t[i : i + 1] for t in together], tensors)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(together, base, strict=True))
    model.unload()
    all_equal(specimen.run(), base)


def test_tokens_put_in_front_of_the_special_ones_have_no_place_in_the_table_of_the_patches():
    specimen, entered = zoo.build("dinov3_vit"), []
    block = anatomy(specimen.model).streams[0].blocks[-1]
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: entered.append((args[0], kwargs)), with_kwargs=True)
    specimen.run()
    handle.remove()
    (x, others), pixels = entered[0], specimen.inputs["pixel_values"]
    model = get_token_model(specimen.model, DeepPromptConfig(tokens=3, layers=(3,))).eval()
    (prompts,) = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        got = model(pixel_values=pixels).last_hidden_state
        model.unload()
        out = block(torch.cat([prompts.expand(len(x), -1, -1), x], dim=1), **others)
        close(got, specimen.model.norm(out[:, 3:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_to_do_is_the_base_to_the_bit(family):
    specimen = zoo.build(family)
    base = specimen.run()
    for config in (PPTConfig(r=0), ATCConfig(keep_rate=1.0)):
        model = get_token_model(specimen.model, config).eval()
        all_equal(specimen.run(), base)
        model.unload()


@pytest.mark.parametrize("family", TWO_PARTS)
def test_what_joins_between_attention_and_a_mlp_of_two_modules_is_written_out(family, maps):
    base, pixels = made(family)
    block = anatomy(base).streams[0].blocks[-1]
    entered = []
    handle = block.register_forward_hook(lambda module, args, output: entered.append(args[0]))
    with torch.no_grad():
        base(pixels)
        handle.remove()
        x = entered[0]
        attended = x + block.attention(block.layernorm_before(x))
        get_token_model(base, ATCConfig(keep_rate=0.5, layers=(3,))).eval()
        got = base(pixels).last_hidden_state
        tokens = maps[0][0]
        for i in range(2):
            slots = {}
            for token, slot in enumerate(tokens.slot[i].tolist()):
                slots.setdefault(slot, []).append(token)
            assert len(slots) < x.shape[1] - 4
            for group in slots.values():
                mean = attended[i, group].mean(dim=0)
                update = block.output.dense(block.intermediate(block.layernorm_after(mean)))
                want = base.layernorm(mean + update)
                close(got[i, group], want.expand(len(group), -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_give_the_same_gradients(family):
    specimen = zoo.build(family)
    pixels = specimen.inputs["pixel_values"].requires_grad_()
    blocks = anatomy(specimen.model).streams[0].blocks
    model = get_token_model(specimen.model, PPTConfig(r=4, tau=0.0, layers=(1, 2))).eval()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            specimen.model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in blocks:
                block.training = True
        loss = sum(t.square().mean() for t in zoo.tensors(model(pixel_values=pixels)))
        gradients += torch.autograd.grad(loss, pixels)
    close(*gradients)


def test_tokens_that_answer_behind_the_patches_join_no_other(maps):
    base, pixels = made("yolos")
    assert special_tokens(base, anatomy(base).streams[0]) == (1, 3)
    get_token_model(base, ATCConfig(keep_rate=0.05, layers=(1, 2)))
    with torch.no_grad():
        base(pixels)
    assert len(maps) == 2
    for tokens, signals in maps:
        assert isinstance(tokens, TokenMap)
        fresh = signals["fresh"]
        assert fresh.sum(dim=1).tolist() == [3, 3] and fresh[:, -3:].all()
        counts = torch.stack([row.bincount(minlength=tokens.m)[row] for row in tokens.slot])
        assert (counts[fresh] == 1).all() and (counts[:, 0] == 1).all()


# learnt tokens that are no part of the sequence of patches: what stands for a hidden patch, queries of another stream, groups of a stage
APART = ("mask_token", "query_tokens", "group_token", "segment_token_", "type_token_")


@pytest.mark.parametrize("family", ["yolos", "radio", "chmv2", "dinov2_with_registers", "tipsv2", "vit", "deit", "groupvit", "seggpt"])
def test_every_learnt_token_beside_the_patches_is_known(family):
    model = zoo.build(family).model
    names = {name for name, _ in model.named_parameters() if "_token" in name.rpartition(".")[2]}
    known = {name for name in names if families.PREFIX_TOKENS.search(name) or families.SUFFIX_TOKENS.search(name)}
    assert all(name.rpartition(".")[2].startswith(APART) for name in names - known)


def test_several_special_tokens_in_one_parameter_are_counted():
    model = zoo.build("radio").model
    assert special_tokens(model, anatomy(model).streams[0]) == (len(model.embeddings.cls_register_token), 0)


@pytest.mark.parametrize("name", ["dinov3_vit", "eomt_dinov3", "sapiens2"])
def test_blocks_that_lay_a_table_over_their_heads_do_so_as_it_is(name):
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["apply_rotary_pos_emb"])
    blocks = [block for block in vars(module) if families.LAID_OVER_HEADS.search(block)]
    assert len(blocks) == 1
    q, table = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 5, 8)  # samples, heads, tokens; cos and sin of each sample's own places
    together = module.apply_rotary_pos_emb(q, q, table[0][:, None], table[1][:, None])
    for i in range(2):
        all_close([t[i : i + 1] for t in together], module.apply_rotary_pos_emb(q[i : i + 1], q[i : i + 1], table[0][i], table[1][i]))
    assert "num_prefix_tokens" in inspect.getsource(module.apply_rotary_pos_emb)
