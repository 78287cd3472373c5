"""CrossLMM's two cross-attentions against a slow loop over one sample, written from their description in arXiv:2505.17020."""

import math

import pytest
import torch
from hf_tokens_adapters.attention_edit import crosslmm
from hf_tokens_adapters.attention_edit.crosslmm import CrossLMM

from hf_tokens import CrossLMMConfig, Dims, FourierVLMConfig, get_token_model, measure
from hf_tokens.testing import CACHE, zoo

D = 8
# per case: kind of each token ("v" visual, "t" text), its place, visual tokens that are there, where their pictures begin, heads
CASES = {
    "a picture in front": ("vvtt", (0, 2, 4, 5), (1, 1, 1, 1), (0, 0, 0, 0), 2),
    "text in front of it": ("ttvt", (0, 1, 2, 6), (1, 1, 1, 1), (2, 2, 2, 2), 1),
    "two pictures": ("vtvt", (0, 3, 4, 9), (1, 1, 1, 1, 1), (0, 0, 0, 4, 4), 4),
    "some are not there": ("vt", (0, 4), (1, 1, 0), (0, 0, 0), 2),
    "none is there": ("tt", (0, 1), (0, 0), (0, 0), 2),
    "no picture at all": ("tt", (0, 1), (), (), 2),
}


def naive(p, kinds, places, x, update, pictures, there, since, heads):
    """What the attention said, and what each token reads of the pictures that began before it, by the weights of its kind."""
    out, width = [], len(p["t_wq"]) // heads
    for kind, place, token, said in zip(kinds, places, x, update, strict=True):
        seen = [i for i in range(len(pictures)) if there[i] and since[i] <= place]
        if not seen:
            out.append(said)
            continue
        ask = p[f"{kind}_wq"] @ token
        read = torch.zeros_like(ask)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            products = [float(ask[part] @ (p[f"{kind}_wk"] @ pictures[i])[part]) / math.sqrt(width) for i in seen]
            powers = [math.exp(product - max(products)) for product in products]
            read[part] = sum(power / sum(powers) * (p[f"{kind}_wv"] @ pictures[i])[part] for power, i in zip(powers, seen, strict=True))
        out.append(said + math.tanh(float(p[f"{kind}_gate"])) * (p[f"{kind}_wo"] @ read))
    return torch.stack(out)


@pytest.mark.parametrize("together", [1024, 3], ids=["all at once", "three at a time"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case, together, monkeypatch):
    monkeypatch.setattr(crosslmm, "AT_A_TIME", together)
    kinds, places, there, since, heads = CASES[case]
    torch.manual_seed(0)
    method = CrossLMM(CrossLMMConfig(heads=heads), Dims(D, 2, 2, 4, 0, 4, "text", True)).double().requires_grad_(False)
    for parameter in method.parameters():
        parameter.normal_()
    m, v = len(kinds), len(there)
    x, update, pictures = (torch.randn(1, n, D, dtype=torch.float64) for n in (m, m, v))
    visual = torch.tensor([[kind == "v" for kind in kinds]])
    seen = pictures, torch.tensor([there], dtype=torch.bool).view(1, v), torch.tensor([since], dtype=torch.long).view(1, v)
    got = method.edit(attention_input=x, attention_output=update, visual=visual, positions=torch.tensor([places]), pictured=seen)
    p = {
        f"{kind}_{name}": weight
        for kind, reader in (("v", method.visual), ("t", method.text))
        for name, weight in reader.named_parameters()
    }
    p = {name.removesuffix(".weight"): weight for name, weight in p.items()}
    got = update if got is None else got
    torch.testing.assert_close(got[0], naive(p, kinds, places, x[0], update[0], pictures[0], there, since, heads))


def test_it_starts_from_the_base():
    specimen = zoo.build("llava")
    with torch.no_grad():
        before = specimen.model(**specimen.inputs).logits
        after = get_token_model(specimen.model, CrossLMMConfig(heads=2)).eval()(**specimen.inputs).logits
    torch.testing.assert_close(after, before)


def test_beside_a_reducer_the_language_model_still_sees_all_of_the_picture():
    specimen = zoo.build("llava")
    base = measure(specimen.model, **specimen.inputs, use_cache=True)
    model = get_token_model(specimen.model, [FourierVLMConfig(keep=0.25), CrossLMMConfig(heads=2, every=1)]).eval()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, CrossLMM):
            torch.nn.init.ones_(module.text.gate)
        if name.endswith("layers.2.hf_tokens.hf_tokens_methods.default.1.text.wk"):
            module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    got = measure(model, **specimen.inputs, use_cache=True)
    assert got.kv_bytes < base.kv_bytes
    assert seen and seen[0] == 16, "the whole picture, although one token of it is left in the stream"


def test_generated_tokens_read_the_pictures_of_their_prompt():
    specimen = zoo.build("llava")
    model = get_token_model(specimen.model, CrossLMMConfig(heads=2, every=1)).eval()
    for module in model.modules():
        if isinstance(module, CrossLMM):
            torch.nn.init.constant_(module.text.gate, 0.7)
    ids, mask = specimen.inputs["input_ids"], specimen.inputs["attention_mask"]
    more = torch.randint(5, 80, (len(ids), 2), generator=torch.Generator().manual_seed(0))
    longer = {**specimen.inputs, "input_ids": torch.cat([ids, more], 1), "attention_mask": torch.cat([mask, torch.ones_like(more)], 1)}
    with torch.no_grad():
        want = model(**longer).logits[:, -1]
        cache = model(**specimen.inputs, use_cache=True).past_key_values
        for i in range(2):
            got = model(input_ids=more[:, i : i + 1], attention_mask=longer["attention_mask"][:, : ids.shape[1] + i + 1], **{CACHE: cache})
    torch.testing.assert_close(got.logits[:, -1], want)
