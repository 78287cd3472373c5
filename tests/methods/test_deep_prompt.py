"""Deep prompts against a slow loop over one sample, written from the equation of the card: [_, H_i] = L_i([P_i, H_{i-1}])."""

import pytest
import torch
from tolerances import close
from transformers import GPT2Config, GPT2Model, GPTNeoXConfig, GPTNeoXModel, ViTConfig, ViTModel

from hf_tokens import DeepPrompt, DeepPromptConfig, get_token_model
from hf_tokens.testing import CACHE, zoo

# per case: real tokens of each sample, prompt tokens k, blocks
CASES = {
    "usual": ([6, 6], 3, 2),
    "odd sizes": ([7, 5, 2], 1, 3),
    "one token": ([1], 2, 2),
    "one token beside many": ([1, 4], 2, 2),
    "no prompts": ([4, 3], 0, 2),
    "more prompts than tokens": ([3, 2], 9, 1),
}


def gpt2(layers):
    """Causal, learned positions, which come with the embeddings."""
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=layers, n_head=2, n_positions=32, initializer_range=0.5)
    return GPT2Model(config), lambda model: model.h, lambda model, positions: {}


def neox(layers):
    """Causal, rotary positions: those of the prompts are the first token's."""
    config = GPTNeoXConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2, initializer_range=0.5,
    )  # fmt: skip

    def rotary(model, positions):
        return {"position_embeddings": model.rotary_emb(torch.zeros(1).double(), position_ids=torch.tensor([positions]))}

    return GPTNeoXModel(config), lambda model: model.layers, rotary


def vit(layers):
    """Bidirectional; its `pixel_values` are the rows that its first block gets."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        initializer_range=0.5,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    model.embeddings.forward = lambda pixel_values, **_: pixel_values
    return model, lambda model: model.layers, lambda model, positions: {}


FAMILIES = {"gpt2": gpt2, "neox": neox, "vit": vit}


def naive(blocks, hidden, prompts, extra):
    """H_1..H_M of one sample (n d), given the prompts of each block (k d); L_i is the block itself, on one sequence without padding."""
    states = []
    for block, prompt in zip(blocks, prompts, strict=True):
        k = len(prompt)
        positions = [0] * k + list(range(len(hidden)))
        out = type(block).forward(block, torch.cat([prompt, hidden])[None], **extra(positions))[0]
        hidden = out[k:]
        states.append(hidden)
    return states


@pytest.mark.drawn
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_model_equals_naive(case, family, side):
    lengths, k, layers = CASES[case]
    torch.manual_seed(0)
    base, blocks, extra = FAMILIES[family](layers)
    base = base.double().eval().requires_grad_(False)
    model = get_token_model(base, DeepPromptConfig(tokens=k, init_std=1.0))
    prompts = [module.prompt.detach() for module in model.modules() if isinstance(module, DeepPrompt)]
    outputs = []
    for block in blocks(base):
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))

    longest = max(lengths)
    place = torch.arange(longest)
    mask = torch.stack([place < n if side == "right" else place >= longest - n for n in lengths])
    ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    rows = torch.randn(len(lengths), longest, 8).double()
    if family == "vit":
        given = rows
        model(pixel_values=rows, attention_mask=mask.long())
    else:
        given = rows + base.wpe(ids) if family == "gpt2" else rows
        model(inputs_embeds=rows, attention_mask=mask.long(), position_ids=ids)

    assert len(outputs) == layers
    for index, real in enumerate(mask):
        states = naive(blocks(base), given[index, real], prompts, lambda positions: extra(base, positions))
        for got, want in zip(outputs, states, strict=True):
            torch.testing.assert_close(got[index, real], want, rtol=1e-9, atol=1e-9)


def test_prompts_start_from_the_normal_distribution_of_the_config():
    torch.manual_seed(0)
    model = get_token_model(gpt2(2)[0], DeepPromptConfig(tokens=500, init_std=0.3))
    prompts = [module.prompt for module in model.modules() if isinstance(module, DeepPrompt)]
    assert [tuple(p.shape) for p in prompts] == [(500, 8)] * 2
    for prompt in prompts:
        assert abs(prompt.mean().item()) < 0.02 and abs(prompt.std().item() - 0.3) < 0.02


def test_dropout_acts_on_the_prompts_in_training_only():
    model = get_token_model(gpt2(1)[0], DeepPromptConfig(tokens=200, dropout=0.5))
    (bank,) = [module for module in model.modules() if isinstance(module, DeepPrompt)]
    torch.manual_seed(0)
    dropped = (bank.train().tokens() == 0).double().mean().item()
    assert 0.4 < dropped < 0.6
    torch.testing.assert_close(bank.eval().tokens(), bank.prompt, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["jamba", "qwen3_next"])
def test_a_state_reads_the_prompts_once_behind_the_padding(family):
    """Blocks without an attention have no cache of keys to tell that the prompts are in: their state has read them."""
    specimen = zoo.build(family)
    model = get_token_model(specimen.model, DeepPromptConfig(tokens=3, init_std=0.5))
    ids = specimen.inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    head = model(input_ids=ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
    step = model(input_ids=ids[:, -2:-1], attention_mask=mask[:, :-1], **{CACHE: head.past_key_values})
    step = model(input_ids=ids[:, -1:], attention_mask=mask, **{CACHE: head.past_key_values})
    for row, pads in ((0, 0), (1, 5)):
        alone = model(input_ids=ids[row : row + 1, pads:], use_cache=False).logits
        close(step.logits[row], alone[0, -1:])
