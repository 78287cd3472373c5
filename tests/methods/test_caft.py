"""CAFT against its paper: section 2, the multi-token loss with its weights and schedule."""

import copy
import math

import by_hand
import pytest
import torch
from hf_tokens_adapters.objective.caft import CAFT
from peft import LoraConfig, inject_adapter_in_model
from tolerances import close

from hf_tokens import CAFTConfig, UnsupportedError, aux_loss, get_token_model, set_progress
from hf_tokens.roles.base import Dims
from hf_tokens.testing import zoo

DIMS = dict(heads=1, kv_heads=1, head_dim=4, layer=3, layers=4, kind="text", causal=True)


def gamma(schedule, progress):
    quarter = {"rsine": 1 - progress, "sine": progress}
    return math.sin(math.pi / 2 * quarter[schedule]) if schedule in quarter else progress if schedule == "linear" else 1.0


def head_states(base, hidden, weights, depth, head):
    """What a head of decoder layers makes of the states of one sample (n d): each is the model's last but one with weights of its own."""
    for layer in range(depth):
        block = copy.deepcopy(base.transformer.h[-2])
        block.load_state_dict({name.replace("-", "."): weight[layer, head] for name, weight in weights.items()}, strict=True)
        hidden = block(hidden[None])[0]
    return hidden


def naive_blocks(base, samples, weights, config, progress):
    """The auxiliary losses where heads are decoder layers, sample after sample, without padding."""
    total = 0.0
    for head in range(config.heads):
        losses = []
        for hidden, labels in samples:
            states = head_states(base, hidden, weights, config.depth, head)
            there = [t for t in range(len(hidden) - head - 2) if labels[t + head + 2] != -100]
            losses += [-base.lm_head(states[t]).log_softmax(0)[labels[t + head + 2]].item() for t in there]
        total += config.alpha * gamma(config.schedule, progress) * config.beta ** (head + 1) * sum(losses) / max(1, len(losses))
    return total


def naive(samples, weight, bias, unembed, config, progress):
    """The auxiliary losses of some samples: each has what the head reads, x_1 .. x_n (n d), and labels y_1 .. y_n of the same tokens."""
    total = 0.0
    for head in range(config.heads):
        losses = []
        for hidden, labels in samples:
            for t in range(len(hidden)):
                there = t + head + 2  # head 0 tells the token behind the next one
                if there < len(labels) and labels[there] != -100:
                    x = hidden[t]
                    for layer in range(config.depth):
                        y = weight[layer, head] @ x + (bias[layer, head] if config.bias else 0)
                        x = x + y * torch.sigmoid(y)
                    losses.append(-(unembed @ x).log_softmax(0)[labels[there]].item())
        mean = sum(losses) / max(1, len(losses))
        total += config.alpha * gamma(config.schedule, progress) * config.beta ** (head + 1) * mean
    return total


CASES = [
    ([9, 12], dict(heads=4), 0.0),
    ([9], dict(heads=1, depth=2, alpha=0.5), 0.3),
    ([6, 3], dict(heads=5, beta=0.5, schedule="sine"), 0.6),
    ([2], dict(heads=3, schedule="constant"), 0.5),  # no token is that far ahead
    ([4, 7], dict(heads=2, schedule="linear", alpha=1.0), 0.25),
    ([1], dict(heads=2), 0.0),
    ([9, 5], dict(heads=2, depth=2, bias=False), 0.5),
]


@pytest.mark.parametrize(("lengths", "given", "progress"), CASES)
def test_matches_the_paper(lengths, given, progress):
    config, n, d, v = CAFTConfig(**given, layer="linear"), max(lengths), 4, 11
    method = CAFT(config, Dims(width=d, **DIMS)).double()
    with torch.no_grad():
        method.weight.normal_()
    hidden, unembed = torch.randn(len(lengths), n, d, dtype=torch.float64), torch.randn(v, d, dtype=torch.float64)
    labels = torch.where(torch.rand(len(lengths), n) > 0.2, torch.randint(0, v, (len(lengths), n)), -100)
    labels[torch.arange(n) >= torch.tensor(lengths)[:, None]] = -100
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    positions = torch.arange(n).expand(len(lengths), -1)
    head = lambda states: states @ unembed.T
    value, bias = method.loss(hidden=hidden, head=head, block=None, labels=targets, positions=positions, progress=progress), None
    if config.bias:
        bias = method.bias.detach()
    samples = [(x[:m], y[:m]) for x, y, m in zip(hidden, labels, lengths, strict=True)]
    close(value, torch.tensor(naive(samples, method.weight.detach(), bias, unembed, config, progress), dtype=torch.float64))


def test_in_a_whole_model():
    base = by_hand.gpt2().requires_grad_(False)
    ids, mask = by_hand.batch([11, 17, 6])
    given = {"attention_mask": mask, "position_ids": by_hand.positions(mask)}
    labels = ids.masked_fill(by_hand.positions(mask) < 2, -100)
    plain, config = base(ids, labels=labels, **given), CAFTConfig(heads=3, alpha=0.5, layer="linear")
    samples = []
    for row, real, wanted in zip(ids, mask, labels, strict=True):
        hidden = by_hand.embed(base, row[real], torch.arange(int(real.sum())))
        for block in by_hand.blocks(base):
            hidden = block(hidden)[0]
        samples.append((base.transformer.ln_f(hidden), wanted[real]))
    model = get_token_model(base, config).train()
    weight, bias = (p for p in model.parameters() if p.requires_grad)
    torch.nn.init.normal_(weight)
    set_progress(model, 0.25)
    out = model(ids, labels=labels, **given)
    expected = naive(samples, weight.detach(), bias.detach(), base.lm_head.weight, config, 0.25)
    close(aux_loss(model), torch.tensor(expected, dtype=torch.float64), "auxiliary losses")
    close(out.loss, plain.loss + expected, "loss")
    assert torch.equal(out.logits, plain.logits)
    out.loss.backward()
    assert weight.grad.flatten(2).any(dim=2).all(), "every head learns"
    assert torch.equal(model.eval()(ids, labels=labels, **given).loss, plain.loss), "the heads do not run in evaluation"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("stack", ["alone", "checkpointed", "behind it a LoRA"])
def test_heads_of_decoder_layers_in_a_whole_model(depth, stack):
    """Padded on the left: no head sees padding. They start from the model's last block but one, and learn; so does what they read."""
    base, config = by_hand.gpt2(3), CAFTConfig(heads=2, alpha=0.5, depth=depth)
    ids, mask = by_hand.batch([11, 17, 6], "left")
    given = {"attention_mask": mask, "position_ids": by_hand.positions(mask)}
    labels = ids.masked_fill(by_hand.positions(mask) < 2, -100).masked_fill(~mask, -100)
    reference, samples = by_hand.gpt2(3), []
    for row, real, wanted in zip(ids, mask, labels, strict=True):
        hidden = by_hand.embed(base, row[real], torch.arange(int(real.sum())))
        for block in by_hand.blocks(reference):
            hidden = block(hidden)[0]
        samples.append((reference.transformer.ln_f(hidden), wanted[real]))
    lora = [LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)] if stack == "behind it a LoRA" else []
    model = get_token_model(base, [config, *lora]).train()
    if stack == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {name.rpartition(".blocks.")[2]: p for name, p in model.named_parameters() if ".blocks." in name}
    start = dict(reference.transformer.h[-2].named_parameters())
    assert all(torch.equal(p[0, 1], start[name.replace("-", ".")]) for name, p in weights.items()) and len(weights) == len(start)
    with torch.no_grad():
        for p in weights.values():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    set_progress(model, 0.25)
    out = model(ids, labels=labels, **given)
    expected = naive_blocks(reference, samples, {name: p.detach() for name, p in weights.items()}, config, 0.25)
    close(aux_loss(model), torch.tensor(expected, dtype=torch.float64), "auxiliary losses")
    out.loss.backward()
    assert all(p.grad.flatten(2).any(dim=2).all() for name, p in weights.items() if not name.endswith("c_attn-bias")), "every layer learns"
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT names each further adapter
def test_a_block_with_an_adapter_in_it_is_no_start_for_heads():
    base = inject_adapter_in_model(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), by_hand.gpt2(3))
    with pytest.raises(UnsupportedError, match="copies of one that has no adapter, got Linear at .*h.1. Stack both"):
        get_token_model(base, CAFTConfig(), adapter_name="heads")
    get_token_model(base, CAFTConfig(layer="linear"), adapter_name="heads")


def test_a_block_of_packed_weights_is_no_start_for_heads():
    base = by_hand.gpt2(3)
    packed = base.transformer.h[1].mlp.c_fc
    packed.weight = torch.nn.Parameter(torch.zeros(packed.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"or copied is a plain .*, got Parameter of torch.int8 at GPT2Block.mlp.c_fc.weight. Load"):
        get_token_model(base, CAFTConfig())
    get_token_model(base, CAFTConfig(layer="linear"))


def test_no_head_tells_a_token_of_another_packed_sample():
    base = by_hand.gpt2()
    model = get_token_model(base, CAFTConfig(heads=3, schedule="constant", layer="linear")).train()
    one, _ = by_hand.batch([7])
    other, _ = by_hand.batch([7], seed=1)
    model(torch.cat([one, other]), labels=torch.cat([one, other]))
    apart = aux_loss(model).item()
    ids, places = torch.cat([one, other], dim=1), torch.arange(7).repeat(2)[None]
    labels = ids.masked_fill(places == 0, -100)
    model(ids, position_ids=places, labels=labels)
    assert aux_loss(model).item() > 0
    method = CAFT(CAFTConfig(heads=3, alpha=1.0, schedule="constant", layer="linear"), Dims(width=4, **DIMS)).double()
    hidden, unembed = torch.randn(1, 14, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    told = dict(block=None, head=lambda states: states @ unembed.T, progress=0.0)
    packed = method.loss(hidden=hidden, labels=targets, positions=places, **told)
    rows = method.loss(hidden=hidden.view(2, 7, 4), labels=targets.view(2, 7), positions=places.view(2, 7), **told)
    close(packed, rows)
    assert apart > 0


def test_an_extra_block_drops_out_in_training_whatever_the_base_was_put_in():
    base = zoo.build("gpt2").model
    assert not base.training
    model = get_token_model(base, CAFTConfig()).train()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    for module in base.modules():  # its own dropout apart
        vars(module).update({name: 0.0 for name in ("p", "dropout") if isinstance(vars(module).get(name), float)})
    set_progress(model, 0.5)
    draws = [model(input_ids=ids, labels=ids).loss.item() for _ in range(2)]
    assert draws[0] != draws[1]
