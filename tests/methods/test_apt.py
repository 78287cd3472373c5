"""APT against a slow loop over one sample, written from the description of its diffusion step in arXiv:2306.15706."""

import math

import pytest
import torch
from hf_tokens_adapters.attention_edit.apt import APT

from hf_tokens import APTConfig, Dims, UnsupportedError, anatomy, get_token_model, unload
from hf_tokens.testing import zoo

# per case: tokens of the sequence, prompt tokens, rank, scale
CASES = {"usual": (7, 5, 3, 1.0), "one token": (1, 4, 2, 1.0), "one prompt": (4, 1, 2, 0.5), "wide": (3, 2, 6, 2.0)}
D = 6


def naive(x, update, method, scale):
    """(X + w relu(X (P + P D U)^T) P) e^s for one token after the other, w the highest of its products."""
    prompts = [p.double() for p in method.prompts]
    keys = [p + method.up.weight @ (method.down.weight @ p) for p in prompts]
    out = []
    for token, said in zip(x, update, strict=True):
        products = [max(0.0, float(token @ key)) for key in keys]
        read = sum(product * prompt for product, prompt in zip(products, prompts, strict=True))
        out.append((said + scale * max(products) * read) * math.exp(float(method.log_scale)))
    return torch.stack(out)


def naive_low_rank(x, update, method, scale):
    """X + the weighted prompts that each token attends to, by itself, in r dimensions."""
    out, down, up = [], method.down.weight, method.up.weight
    for token, said in zip(x, update, strict=True):
        small = [sum(float(down[i, j]) * float(token[j]) for j in range(len(token))) for i in range(len(down))]
        products = [sum(a * float(b) for a, b in zip(small, prompt, strict=True)) / math.sqrt(len(small)) for prompt in method.prompts]
        powers = [math.exp(product - max(products)) for product in products]
        read = sum(power / sum(powers) * prompt for power, prompt in zip(powers, method.prompts, strict=True))
        out.append(said + scale * (up @ read))
    return torch.stack(out)


@pytest.mark.parametrize(("form", "loop"), [("release", naive), ("low-rank", naive_low_rank)])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case, form, loop):
    n, tokens, rank, scale = CASES[case]
    torch.manual_seed(0)
    config = APTConfig(tokens=tokens, rank=rank, scale=scale, form=form)
    method = APT(config, Dims(D, 2, 2, 3, 0, 4, "vision", False)).double().requires_grad_(False)
    for parameter in method.parameters():
        parameter.normal_()
    x, update = torch.randn(2, n, D, dtype=torch.float64), torch.randn(2, n, D, dtype=torch.float64)
    got = method.edit(attention_input=x, attention_output=update)
    for row in range(2):
        torch.testing.assert_close(got[row], loop(x[row], update[row], method, scale))


def test_the_low_rank_form_starts_from_the_base():
    method = APT(APTConfig(form="low-rank"), Dims(D, 2, 2, 3, 0, 4, "vision", False))
    x, update = torch.randn(2, 5, D), torch.randn(2, 5, D)
    assert torch.equal(method.edit(attention_input=x, attention_output=update), update)


def test_no_gradient_reaches_the_weight_of_a_token():
    method = APT(APTConfig(tokens=1), Dims(D, 2, 2, 3, 0, 4, "vision", False)).double()
    torch.nn.init.ones_(method.prompts)
    x = torch.ones(1, 1, D, dtype=torch.float64, requires_grad=True)
    method.edit(attention_input=x, attention_output=torch.zeros(1, 1, D, dtype=torch.float64)).sum().backward()
    assert x.grad.flatten().tolist() == [D * D] * D  # of w (x 1) 1, summed: w d, and w = d stays


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2"])
def test_it_is_added_to_what_the_attention_returns(family):
    """The same numbers by a hook on the attention of a copy of the model."""
    specimen, other = zoo.build(family), zoo.build(family)
    torch.manual_seed(0)
    model = get_token_model(specimen.model, APTConfig(layers=(1,), tokens=3, rank=2))
    method = model.base_model.model.get_submodule(anatomy(model).streams[0].paths[1]).hf_tokens.hf_tokens_methods["default"]["0"]
    torch.nn.init.normal_(method.up.weight)

    def add(module, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        said = output[0] if isinstance(output, tuple) else output
        edited = method.edit(attention_input=given, attention_output=said)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    anatomy(other.model).streams[0].attention(1).register_forward_hook(add, with_kwargs=True)
    with torch.no_grad():
        got, want, base = (m(**specimen.inputs)[0] for m in (model, other.model, zoo.build(family).model))
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, base)


def test_an_attention_that_the_model_has_put_another_one_in_the_place_of_is_refused():
    specimen = zoo.build("bigbird_pegasus")  # the first call with a short text makes its attention a full one
    get_token_model(specimen.model, APTConfig())
    with pytest.raises(UnsupportedError, match="something else than BigBirdPegasusBlockSparseAttention at model.encoder.layers.0"):
        specimen.run()
    unload(specimen.model)
    get_token_model(specimen.model, APTConfig())
    specimen.run()


def test_an_attention_that_returns_a_scale_with_each_tensor_is_refused():
    specimen = zoo.build("ibert")
    get_token_model(specimen.model, APTConfig())
    with pytest.raises(UnsupportedError, match="needs a self-attention that returns a tensor, got a tuple at ibert.encoder.layer.0"):
        specimen.run()
