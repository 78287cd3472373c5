"""ToCa against a slow loop over one sample, written from the equations of arXiv:2410.05317 and what its code makes of them."""

import contextlib
import math
from dataclasses import dataclass

import denoisers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from hf_tokens_adapters.feature_cache import toca
from hf_tokens_adapters.feature_cache.toca import ToCa
from hf_tokens_kernels import attention_entropy
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from hf_tokens import HFTokensConfig, ToCaConfig, UnsupportedError, anatomy, get_token_model, load, measure, save_adapter, unload
from hf_tokens.api import adapter_config
from hf_tokens.handlers.feature_cache import beside
from hf_tokens.testing import zoo
from hf_tokens.tools.measure import TokenCounts

KINDS = ("attn", "cross", "mlp")


@dataclass(frozen=True)
class Knobs:
    cycle: int = 2  # N: every N-th step computes and stores everything
    ratio: float = 0.7  # R: the share of tokens that is reused
    rule: str = "release"  # or "abstract": signals as they are, a constant bonus, factors of the share that is reused
    weights: tuple[float, float, float, float] = (1.0, 0.5, 0.25, 0.4)  # lambda_1..lambda_4
    cell: int = 2  # k: side of a cell of the grid
    kinds: tuple[float, float, float] = (1.0, 1.0, 1.0)  # lambda_type of KINDS
    depth: float = 0.0  # lambda_l
    time: float = 0.0  # lambda_t


# per case: grid (height, width), steps, layers, context tokens (0: no cross-attention), valid context tokens, knobs
CASES = {
    "usual": ((4, 4), 5, 2, 3, None, Knobs(cycle=3)),
    "odd sizes": ((3, 5), 4, 2, 3, None, Knobs(cycle=3, ratio=0.5)),
    "no cross-attention": ((2, 4), 4, 2, 0, None, Knobs(cycle=3, weights=(1.0, 0.0, 0.25, 0.6))),
    "one token": ((1, 1), 4, 1, 2, None, Knobs()),
    "one step": ((2, 2), 1, 1, 2, None, Knobs()),
    "every step computes": ((2, 3), 3, 2, 2, None, Knobs(cycle=1)),
    "nothing reused": ((2, 3), 4, 2, 2, None, Knobs(cycle=4, ratio=0.0)),
    "everything reused": ((2, 3), 4, 2, 2, None, Knobs(cycle=4, ratio=1.0)),
    "only the MLP": ((3, 3), 4, 2, 2, None, Knobs(cycle=4, kinds=(0.0, 0.0, 1.0))),
    "attention reused whole": ((3, 3), 4, 2, 2, None, Knobs(cycle=4, ratio=0.6, kinds=(0.0, 1.0, 2.0))),
    "as the abstract has it": ((3, 5), 4, 3, 3, None, Knobs(cycle=4, rule="abstract", depth=0.6, time=0.6)),
    "deeper reuses more": ((3, 4), 5, 3, 2, None, Knobs(cycle=4, depth=0.6)),
    "later reuses more": ((3, 4), 5, 2, 2, None, Knobs(cycle=4, time=0.6)),
    "longest reused first": ((2, 2), 6, 1, 2, None, Knobs(cycle=6, ratio=0.5, weights=(0.0, 0.0, 1.0, 0.0))),
    "context padded but one": ((2, 3), 4, 1, 4, 1, Knobs(cycle=3)),
}


def linear(layer, x):
    out = layer.weight.double() @ x
    return out if layer.bias is None else out + layer.bias.double()


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    normed = (x - mean) / math.sqrt(variance + layer.eps)
    return normed if layer.weight is None else normed * layer.weight.double() + layer.bias.double()


def attend(query, keys, values, heads):
    """The output of one query and its attention weights, their mean over heads."""
    width = len(query) // heads
    out, weights = torch.zeros(len(query), dtype=torch.float64), [0.0] * len(keys)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = [float(key[part] @ query[part]) / math.sqrt(width) for key in keys]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        for j, (power, value) in enumerate(zip(powers, values, strict=True)):
            out[part] += power / sum(powers) * value[part]
            weights[j] += power / sum(powers) / heads
    return out, weights


def attention(module, asking, given, chosen):
    """Rows `chosen` of the attention of `asking` to all of `given`: {token: output}, {token: weights}."""
    keys = [linear(module.to_k, x) for x in given]
    values = [linear(module.to_v, x) for x in given]
    out, weights = {}, {}
    for i in chosen:
        mixed, weights[i] = attend(linear(module.to_q, asking[i]), keys, values, module.heads)
        out[i] = linear(module.to_out[0], mixed)
    return out, weights


def gelu(x, approximate="none"):
    if approximate == "tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def feed_forward(module, asking, chosen):
    out, first = {}, module.net[0]
    for i in chosen:
        inner = linear(first.proj, asking[i])
        if isinstance(first, GEGLU):
            inner, gate = inner.chunk(2)
            inner = inner * gelu(gate)
        else:
            inner = gelu(inner, first.approximate)
        out[i] = linear(module.net[2], inner)
    return out, {}


def influence(weights):
    """s_1(x_i) = sum_j a_ji: what all the tokens together read from token i."""
    return {i: sum(row[i] for row in weights.values()) for i in weights}


def control(weights):
    """s_2(x_i) = -sum_j c_ij log c_ij: the entropy of what token i reads from the context."""
    return {i: -sum(c * math.log(c) for c in row if c > 0) for i, row in weights.items()}


def unit(values):
    size = math.sqrt(sum(v * v for v in values.values()))
    return {i: v / size for i, v in values.items()}


def score(s1, s2, ages, grid, knobs):
    """S = sum_j lambda_j s_j with s_1 and 1 + s_2 of length 1, s_3 = n_i / N; the best of each k x k cell is raised by lambda_4 of it."""
    l1, l2, l3, l4 = knobs.weights
    height, width = grid
    s2 = dict(enumerate(s2)) if isinstance(s2, list) else s2
    if knobs.rule == "release":
        s1, s2 = unit(s1), unit({i: 1 + value for i, value in s2.items()})
    total = [l1 * s1[i] + l2 * s2[i] + l3 * ages[i] / knobs.cycle for i in range(height * width)]
    best = {}
    for i in range(height * width):
        cell = (i // width // knobs.cell, i % width // knobs.cell)
        if cell not in best or total[i] > total[best[cell]]:
            best[cell] = i
    return [v + l4 * (v if knobs.rule == "release" else 1) * (i in best.values()) for i, v in enumerate(total)]


def count(knobs, kind, layer, layers, step, steps, n):
    """How many of n tokens are computed, floor(r n) of r = (1 - R) l_type (1 + l_l - 2 l_l l/L) (1 + l_t - 2 l_t t/T), kept in [0, 1].

    The abstract has n - floor(R(l, type, t) n) of R l_type 2 (1/2 + l_l (l/L - 1/2)) 2 (1/2 + l_t (1/2 - t/T)), T one step less.
    """
    along, factor = layer / (layers - 1) if layers > 1 else 0.5, knobs.kinds[KINDS.index(kind)]
    if knobs.rule == "release":
        later = 1 + knobs.time - 2 * knobs.time * step / steps
        share = (1 - knobs.ratio) * factor * (1 + knobs.depth - 2 * knobs.depth * along) * later
        return math.floor(min(1.0, max(0.0, share)) * n + 1e-9)
    noise = 1 - step / (steps - 1) if steps > 1 else 0.5
    share = knobs.ratio * factor * 2 * (0.5 + knobs.depth * (along - 0.5)) * 2 * (0.5 + knobs.time * (0.5 - noise))
    return n - math.floor(min(1.0, max(0.0, share)) * n + 1e-9)


def choose(scores, number):
    """The tokens to compute, of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:number])


# shift, scale and gate of the attention, then of the MLP: what a block without conditioning has
PLAIN = (0.0, 1.0, 1.0, 0.0, 1.0, 1.0)


def sublayer(block, kind, hidden, context, chosen, condition=PLAIN):
    """Rows `chosen` of one sublayer before its gate: {token: output}, {token: weights}."""
    if block.norm_type == "ada_norm_single":
        norms = {"attn": block.norm1, "cross": None, "mlp": block.norm2}
    else:
        first = block.norm1.norm if block.norm_type == "ada_norm_zero" else block.norm1
        norms = {"attn": first, "cross": block.norm2, "mlp": block.norm3}
    shift, scale = {"attn": condition[:2], "cross": (0.0, 1.0), "mlp": condition[3:5]}[kind]
    asking = [x if norms[kind] is None else layer_norm(norms[kind], x) * scale + shift for x in hidden]
    if kind == "attn":
        return attention(block.attn1, asking, asking, chosen)
    if kind == "cross":
        return attention(block.attn2, asking, context, chosen)
    return feed_forward(block.ff, asking, chosen)


def naive(blocks, steps, context, grid, knobs, valid=None, conditions=None):
    """The hidden states after the blocks at every step (steps n d) and the tokens computed, {(step, layer, kind): [..]}.

    steps holds what enters the first block at each denoising step; the stores start empty at the first one. Conditions holds what
    shifts, scales and gates the sublayers, for each step and block.
    """
    n = grid[0] * grid[1]
    kinds = KINDS if len(context) else ("attn", "mlp")
    context = [row.double() for row in context[:valid]]
    stored, ages, computed, outputs = {}, {}, {}, []
    s1, s2 = {}, {}
    for step, entering in enumerate(steps):
        hidden = [row.double() for row in entering]
        for layer, block in enumerate(blocks):
            condition = PLAIN if conditions is None else conditions[step][layer]
            for kind in kinds:
                site = layer, kind
                chosen = list(range(n))
                if step % knobs.cycle:
                    scores = score(s1[layer], s2.get(layer, [0.0] * n), ages[site], grid, knobs)
                    chosen = choose(scores, count(knobs, kind, layer, len(blocks), step, len(steps), n))
                fresh, weights = sublayer(block, kind, hidden, context, chosen, condition)
                if step % knobs.cycle == 0 and kind == "attn":
                    s1[layer] = influence(weights)
                if step % knobs.cycle == 0 and kind == "cross":
                    s2[layer] = control(weights)
                stored[site] = {**stored.get(site, {}), **fresh}
                ages[site] = [0 if i in fresh else ages[site][i] + 1 for i in range(n)]
                computed[step, layer, kind] = chosen
                gate = {"attn": condition[2], "cross": 1.0, "mlp": condition[5]}[kind]
                hidden = [x + gate * stored[site][i] for i, x in enumerate(hidden)]
        outputs.append(torch.stack(hidden))
    return torch.stack(outputs), computed


def tiny(layers, cross, seed=0):
    torch.manual_seed(seed)
    blocks = [BasicTransformerBlock(8, 2, 4, cross_attention_dim=6 if cross else None, activation_fn="gelu") for _ in range(layers)]
    for block in blocks:
        block.double().eval().requires_grad_(False)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return blocks


def sample(case):
    grid, steps, layers, context, valid, knobs = CASES[case]
    blocks = tiny(layers, cross=context > 0)
    torch.manual_seed(1)
    entering = torch.randn(1, grid[0] * grid[1], 8) + 0.3 * torch.randn(steps, grid[0] * grid[1], 8)
    return blocks, entering.double(), torch.randn(context, 6).double(), grid, knobs, valid


def plain(blocks, steps, context, valid=None):
    """Every step computed, by the blocks themselves."""
    hidden = steps
    for block in blocks:
        given = context[None, :valid].expand(len(steps), -1, -1) if len(context) else None
        hidden = block(hidden, encoder_hidden_states=given)
    return hidden


@pytest.mark.parametrize("case", ["one step", "every step computes", "nothing reused"])
def test_naive_that_reuses_nothing_is_the_model(case):
    blocks, steps, context, grid, knobs, valid = sample(case)
    got, computed = naive(blocks, steps, context, grid, knobs, valid)
    torch.testing.assert_close(got, plain(blocks, steps, context, valid), rtol=1e-10, atol=1e-10)
    assert all(tokens == list(range(grid[0] * grid[1])) for tokens in computed.values())


@pytest.mark.parametrize("case", CASES)
def test_naive_of_steps_that_are_equal_is_the_model(case):
    blocks, steps, context, grid, knobs, valid = sample(case)
    steps = steps[:1].expand_as(steps)
    torch.testing.assert_close(
        naive(blocks, steps, context, grid, knobs, valid)[0], plain(blocks, steps, context, valid), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("case", CASES)
def test_naive_computes_as_many_tokens_as_the_ratio_says(case):
    blocks, steps, context, grid, knobs, valid = sample(case)
    computed = naive(blocks, steps, context, grid, knobs, valid)[1]
    n = grid[0] * grid[1]
    for (step, layer, kind), tokens in computed.items():
        assert len(tokens) == (n if step % knobs.cycle == 0 else count(knobs, kind, layer, len(blocks), step, len(steps), n))
        assert len(set(tokens)) == len(tokens)


def test_naive_that_reuses_everything_adds_what_the_first_step_added():
    blocks, steps, context, grid, knobs, _ = sample("everything reused")
    got = naive(blocks, steps, context, grid, knobs)[0]
    torch.testing.assert_close(got - steps, (got - steps)[:1].expand_as(got), rtol=1e-10, atol=1e-10)


def test_naive_by_age_alone_takes_turns():
    blocks, steps, context, grid, knobs, _ = sample("longest reused first")
    computed = naive(blocks, steps, context, grid, knobs)[1]
    assert [computed[step, 0, "mlp"] for step in range(1, 5)] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_naive_scores_of_known_attention():
    even = {i: [0.25] * 4 for i in range(4)}
    assert list(influence(even).values()) == [1.0] * 4
    assert control(even)[0] == pytest.approx(math.log(4))
    assert control({0: [1.0, 0.0]})[0] == 0
    assert influence({0: [0.1, 0.9], 1: [0.0, 1.0]}) == pytest.approx({0: 0.1, 1: 1.9})


def test_naive_bonus_goes_to_one_token_of_every_cell():
    knobs = Knobs(weights=(1.0, 0.0, 0.0, 10.0), cell=2)
    s1 = dict(enumerate([1, 5, 2, 3, 4, 9, 0, 7, 8, 6, 11, 10, 12, 13, 14]))
    scores = score(s1, [0.0] * 15, [0] * 15, (3, 5), knobs)
    plain = unit(s1)
    assert [i for i, value in enumerate(scores) if value == pytest.approx(11 * plain[i]) and s1[i]] == [5, 8, 9, 10, 13, 14]


def test_naive_factors_of_depth_and_time_keep_the_mean():
    knobs = Knobs(ratio=0.6, depth=0.5, time=0.5)
    over_depth = [count(knobs, "mlp", layer, 5, 2, 4, 1000) for layer in range(5)]
    assert over_depth == sorted(over_depth, reverse=True) and sum(over_depth) / 5 == pytest.approx(400)
    over_time = [count(knobs, "mlp", 1, 3, step, 4, 1000) for step in range(5)]
    assert over_time == sorted(over_time, reverse=True) and sum(over_time) / 5 == pytest.approx(400)


# per case: model, latents (height, width), steps, valid context tokens, knobs, config
MODELS = {
    "DiT": ("dit", (8, 8), 5, None, Knobs(cycle=3, weights=(1.0, 0.0, 0.25, 0.4))),
    "DiT, odd sizes": ("dit", (10, 10), 4, None, Knobs(cycle=4, ratio=0.5, cell=3, weights=(1.0, 0.0, 0.25, 0.4))),
    "DiT, one token": ("dit", (2, 2), 3, None, Knobs(cycle=2, weights=(1.0, 0.0, 0.25, 0.4))),
    "DiT, deeper and later reuse more": ("dit", (6, 6), 5, None, Knobs(cycle=4, depth=0.6, time=0.5, weights=(1.0, 0.0, 0.25, 0.4))),
    "DiT, all reused": ("dit", (4, 4), 4, None, Knobs(cycle=4, ratio=1.0, weights=(1.0, 0.0, 0.25, 0.4))),
    "DiT, only the MLP": ("dit", (6, 6), 4, None, Knobs(cycle=4, kinds=(0.0, 0.0, 1.0), weights=(1.0, 0.0, 0.25, 0.4))),
    "PixArt": ("pixart", (8, 8), 5, 3, Knobs(cycle=3, weights=(0.0, 1.0, 0.25, 0.4))),
    "PixArt, both signals, odd grid": ("pixart", (6, 10), 4, None, Knobs(cycle=3, ratio=0.5, weights=(0.7, 1.0, 0.25, 0.6))),
    "PixArt, context padded but one": ("pixart", (4, 4), 4, 1, Knobs(cycle=3, weights=(0.5, 1.0, 0.25, 0.4))),
    "PixArt, as the abstract has it": ("pixart", (6, 10), 4, None, Knobs(cycle=3, rule="abstract", weights=(0.7, 1.0, 0.25, 0.6))),
    "PixArt, its schedule": ("pixart", (8, 8), 5, None, Knobs(cycle=3, kinds=(0.0, 0.6, 1.6), depth=0.6, time=0.9, cell=4)),
    "U-Net": ("unet", (4, 6), 5, None, Knobs(cycle=3, weights=(0.5, 1.0, 0.25, 0.4))),
}
PARTS = {"attn": "attention", "cross": "cross_attention", "mlp": "mlp"}
DIMS = dict(num_attention_heads=2, attention_head_dim=4, in_channels=4, norm_num_groups=4, sample_size=8, patch_size=2)


def denoiser(kind, dtype=torch.float64):
    torch.manual_seed(0)
    if kind == "dit":
        model = DiTTransformer2DModel(num_layers=3, out_channels=8, num_embeds_ada_norm=1000, **DIMS)
    elif kind == "pixart":
        options = dict(caption_channels=6, cross_attention_dim=8, num_embeds_ada_norm=1000, use_additional_conditions=False)
        model = PixArtTransformer2DModel(num_layers=2, out_channels=8, **options, **DIMS)
    else:
        model = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(kind, size, steps, valid=None, seed=1, dtype=torch.float64):
    """The arguments of every denoising step, a batch of two different pictures."""
    torch.manual_seed(seed)
    names = {"unet": "sample"}
    picture, noise = torch.randn(2, 4, *size, dtype=torch.float64), torch.randn(steps, 2, 4, *size, dtype=torch.float64)
    more = {}
    if kind == "dit":
        more = {"class_labels": torch.tensor([3, 7])}
    else:
        more = {"encoder_hidden_states": torch.randn(2, 5, 6, dtype=torch.float64).to(dtype)}
    if valid is not None:
        more |= {"encoder_attention_mask": (torch.arange(5) < valid).long().expand(2, -1)}
    if kind == "pixart":
        more |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    times = [torch.tensor([990 - 90 * step] * 2) for step in range(steps)]
    return [
        {names.get(kind, "hidden_states"): (picture + 0.3 * noise[step]).to(dtype), "timestep": time, **more}
        for step, time in enumerate(times)
    ]


def config_of(knobs, steps, **more):
    l1, l2, l3, l4 = knobs.weights
    return ToCaConfig(
        cycle=knobs.cycle, ratio=knobs.ratio, influence=l1, control=l2, frequency=l3, bonus=l4, cell=knobs.cell, types=knobs.kinds,
        depth=knobs.depth, time=knobs.time, steps=steps, normalise=knobs.rule == "release", rule=knobs.rule, **more,
    )  # fmt: skip


def conditioning(block, arguments):
    """Shift, scale and gate of both sublayers of one block, for each sample."""
    with torch.no_grad():
        if block.norm_type == "ada_norm_zero":
            embedded = block.norm1.emb(arguments["timestep"], arguments["class_labels"], hidden_dtype=torch.float64)
            six = block.norm1.linear(torch.nn.functional.silu(embedded)).chunk(6, dim=1)
        elif block.norm_type == "ada_norm_single":
            six = (block.scale_shift_table[None] + arguments["timestep"].unflatten(1, (6, -1))).unbind(1)
        else:
            return [PLAIN, PLAIN]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
    return list(zip(shift_a, 1 + scale_a, gate_a, shift_m, 1 + scale_m, gate_m, strict=True))


def sampled(model, calls):
    """What the model puts out at every step."""
    with torch.no_grad():
        return torch.stack([model(**call).sample for call in calls])


@pytest.mark.parametrize("case", MODELS)
def test_denoiser_is_the_loop(case):
    kind, size, steps, valid, knobs = MODELS[case]
    model, calls = denoiser(kind), inputs(kind, size, steps, valid)
    surgery = get_token_model(model, config_of(knobs, steps))
    streams = anatomy(model).streams
    heard = {(s, step): {} for s in range(len(streams)) for step in range(steps)}
    surgeries, now, handles = [stream.blocks[0].hf_tokens.surgery for stream in streams], [0], []
    for s, stream in enumerate(streams):

        def entering(module, args, kwargs, s=s):
            heard[s, now[0]].update(hidden=args[0], arguments=kwargs)

        def leaving(module, args, output, s=s):
            heard[s, now[0]].update(out=output)

        handles += [stream.blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
        handles += [stream.blocks[-1].register_forward_hook(leaving)]
    counts = {}
    for step, call in enumerate(calls):
        now[0] = step
        listeners = [TokenCounts(one) for one in surgeries]
        with contextlib.ExitStack() as stack:
            for one, listener in zip(surgeries, listeners, strict=True):
                stack.enter_context(one.model.listening(listener))
            sampled(surgery, [call])
        counts |= {(s, step): listener.counts for s, listener in enumerate(listeners)}
    for s, stream in enumerate(streams):
        entered = torch.stack([heard[s, step]["hidden"] for step in range(steps)])
        got = torch.stack([heard[s, step]["out"] for step in range(steps)])
        given = [heard[s, step]["arguments"] for step in range(steps)]
        height = round(math.sqrt(entered.shape[2] * size[0] / size[1]))
        grid = height, entered.shape[2] // height
        conditions = [[conditioning(block, arguments) for block in stream.blocks] for arguments in given]
        computed = {}
        for row in range(2):
            context = given[0].get("encoder_hidden_states")
            context = [] if context is None else context[row]
            picked = [[layer[row] for layer in step] for step in conditions]
            want, computed[row] = naive(stream.blocks, entered[:, row], context, grid, knobs, valid, picked)
            torch.testing.assert_close(got[:, row], want, rtol=1e-9, atol=1e-9)
        for (step, layer, part), tokens in computed[0].items():
            assert counts[s, step][layer, PARTS[part]] == 2 * len(tokens)


SETTINGS = {"dit": {**toca.PLAIN, "influence": 1.0, "control": 0.0}, "pixart": {**toca.CROSSED, "influence": 0.0, "control": 1.0}}


@pytest.mark.parametrize("kind", SETTINGS)
def test_knobs_that_are_not_given_follow_the_kind_of_block(kind):
    calls = inputs(kind, (8, 8), 4)
    given = sampled(get_token_model(denoiser(kind), ToCaConfig(**SETTINGS[kind])), calls)
    assert torch.equal(sampled(get_token_model(denoiser(kind), "toca"), calls), given)


@pytest.mark.parametrize("guided", [True, False])
def test_both_halves_under_guidance_compute_the_same_tokens(guided, monkeypatch):
    calls, seen, verb = inputs("pixart", (8, 8), 4), [], ToCa.reuse
    if guided:
        calls = [{**call, "hidden_states": call["hidden_states"][:1].expand(2, -1, -1, -1)} for call in calls]

    def spied(self, **signals):
        got = verb(self, **signals)
        seen.extend([] if got is None or signals["part"] != "mlp" else [(signals["age"], signals["shared_doubt"], got)])
        return got

    monkeypatch.setattr(ToCa, "reuse", spied)
    sampled(get_token_model(denoiser("pixart"), ToCaConfig(cycle=4, ratio=0.5, types=(0.0, 1.0, 1.0), depth=0.0, time=0.0)), calls)
    knobs, picked = Knobs(cycle=4, weights=(0.0, 1.0, 0.25, 0.4), cell=4), []
    for age, doubt, got in seen:
        for row in range(2):
            scores = score(dict.fromkeys(range(16), 1.0), doubt[row].tolist(), (age[row] - 1).tolist(), (4, 4), knobs)
            assert sorted(got[row].tolist()) == choose(scores, 8)
        picked.append(got.sort().values)
    assert all(torch.equal(*rows) for rows in picked) == guided and seen


def masked(model, run, knobs):
    """The same on a model that computes all tokens: at a sublayer, those that are not chosen get what they got before."""
    seen, influence, parts = {}, {}, []
    for i, block in enumerate(model.transformer_blocks):
        parts += [(i, "attn", block.attn), (i, "mlp", block.ff)]
    now = [0]

    def choose_rows(i, kind, old, n):
        chosen = torch.zeros(len(old), n, dtype=torch.bool)
        for row in range(len(old)):
            s1 = {token: float(influence[i][row, token]) for token in range(n)}
            scores = score(s1, [0.0] * n, [int(a) for a in seen[i, kind][1][row]], (4, 4), knobs)
            chosen[row, choose(scores, count(knobs, kind, 0, 1, 0, 1, n))] = True
        return chosen

    def hear(module, args, kwargs, output, i, kind):
        out = output[0] if isinstance(output, tuple) else output
        n = out.shape[1]
        if kind == "attn" and now[0] % knobs.cycle == 0:
            qk = []
            for name, letter in (("", "q"), ("", "k"), ("add_", "q"), ("add_", "k")):
                x = kwargs["encoder_hidden_states" if name else "hidden_states"]
                projected = module.get_submodule(f"add_{letter}_proj" if name else f"to_{letter}")(x)
                norm = module.get_submodule(f"norm_added_{letter}" if name else f"norm_{letter}")
                qk.append(norm(projected.unflatten(-1, (module.heads, -1)).transpose(1, 2)))
            q, k = torch.cat(qk[::2], dim=2), torch.cat(qk[1::2], dim=2)
            influence[i] = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1).sum(1)[:, :n]
        if now[0] % knobs.cycle == 0:
            seen[i, kind] = out, torch.zeros(out.shape[:2])
            return output
        old, age = seen[i, kind]
        chosen = choose_rows(i, kind, old, n)
        mixed = torch.where(chosen[..., None], out, old)
        seen[i, kind] = mixed, torch.where(chosen, 0, age + 1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    for i, kind, module in parts:
        module.register_forward_hook(lambda *args, i=i, kind=kind: hear(*args, i=i, kind=kind), with_kwargs=True)
    outputs = []
    for step, call in enumerate(run):
        now[0] = step
        outputs += [denoisers.sampled(model, [call])[0]]
    return torch.stack(outputs)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_block_of_two_sequences_is_the_loop(ratio):
    run, knobs = denoisers.calls("sd3", 5), Knobs(cycle=3, ratio=ratio, weights=(1.0, 0.0, 0.25, 0.4))
    model = get_token_model(denoisers.denoiser("sd3"), config_of(knobs, 5))
    got = denoisers.sampled(model, run)
    torch.testing.assert_close(got, masked(denoisers.denoiser("sd3"), run, knobs), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got[1], denoisers.sampled(denoisers.denoiser("sd3"), run)[1])
    assert measure(model, **run[0]).flops > measure(model, **run[1]).flops


def test_second_run_begins_anew():
    first, second = inputs("pixart", (8, 8), 4), inputs("pixart", (8, 8), 3, seed=2)
    model = get_token_model(denoiser("pixart"), ToCaConfig(cycle=5))
    alone = sampled(model, second)
    assert torch.equal(sampled(model, first + second)[4:], alone)
    assert torch.equal(sampled(model, second * 2)[3:], alone)
    assert torch.equal(sampled(model, first[:2] + second)[2:], alone)


@pytest.mark.parametrize("ended", ["interrupted", "one step", "failed"])
def test_run_behind_one_that_ended_early_begins_anew(ended):
    def pipeline():
        parts = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = StableDiffusionPipeline(
            AutoencoderKL(),
            unet=denoiser("unet", torch.float32),
            scheduler=DDIMScheduler(timestep_spacing="trailing", steps_offset=1, clip_sample=False),
            **parts,
        )
        pipe.set_progress_bar_config(disable=True)
        return get_token_model(pipe, ToCaConfig(cycle=5))

    def draw(pipe, seed, steps=4, **more):
        torch.manual_seed(seed)
        given = dict(prompt_embeds=torch.randn(1, 5, 6), latents=torch.randn(1, 4, 8, 8), guidance_scale=1, output_type="latent")
        return pipe(height=8, width=8, num_inference_steps=steps, **given, **more).images

    def interrupt(pipe, step, time, given):
        pipe._interrupt = True
        return given

    def fail(module, args):
        raise ArithmeticError

    want, pipe = draw(pipeline(), 1), pipeline()
    if ended == "failed":
        handle = pipe.unet.conv_out.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            draw(pipe, 2)
        handle.remove()
    else:
        draw(pipe, 2, **({"steps": 1} if ended == "one step" else {"callback_on_step_end": interrupt}))
    assert torch.equal(draw(pipe, 1), want)


@pytest.mark.parametrize("named", [True, False])
def test_two_calls_a_step_are_kept_apart(named):
    cond, uncond = inputs("dit", (8, 8), 4), inputs("dit", (8, 8), 4, seed=2)
    model = get_token_model(denoiser("dit"), ToCaConfig(cycle=5))
    inner = model.base_model.model
    want = [sampled(model, cond), sampled(model, uncond)]
    for run in range(2):
        got = []
        for step in range(4):
            for name, call in (("cond", cond[step]), ("uncond", uncond[step])):
                _set_cache_context(inner, CacheContext(name) if named else None)
                got.append(sampled(model, [call])[0])
                _set_cache_context(inner, None)
        assert torch.equal(torch.stack(got[::2]), want[0]) and torch.equal(torch.stack(got[1::2]), want[1]), run


def test_step_that_the_pipeline_tells():
    calls = inputs("dit", (8, 8), 4)
    model = get_token_model(denoiser("dit"), ToCaConfig(cycle=5, time=0.5))
    inner = model.base_model.model
    want = sampled(get_token_model(denoiser("dit"), ToCaConfig(cycle=5, time=0.5, steps=4)), calls)
    for _ in range(2):
        got = []
        for step, call in enumerate(reversed(calls)):  # the timestep of some models rises
            _set_cache_context(inner, CacheContext("cond", step_index=step, num_inference_steps=4))
            got.append(sampled(model, [{**calls[step], "timestep": call["timestep"] * 0 + calls[step]["timestep"]}])[0])
            _set_cache_context(inner, None)
        assert torch.equal(torch.stack(got), want)
    with pytest.raises(UnsupportedError, match="number of denoising steps"):
        sampled(get_token_model(denoiser("dit"), ToCaConfig(cycle=5, time=0.5, rule="abstract")), calls)


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", ["dit", "pixart", "unet"])
def test_zero_strength_off_and_out(kind):
    calls, model = inputs(kind, (8, 8), 4), denoiser(kind)
    base, attributes = sampled(model, calls), set(vars(model))
    assert torch.equal(sampled(get_token_model(model, ToCaConfig().at_zero()), calls), base)
    surgery = get_token_model(denoiser(kind), ToCaConfig())
    changed = sampled(surgery, calls)
    assert not torch.allclose(changed, base)
    with surgery.disable_adapter():
        assert torch.equal(sampled(surgery, calls), base)
    assert torch.equal(sampled(surgery, calls), changed)
    plain = surgery.unload()
    assert torch.equal(sampled(plain, calls), base)
    assert set(vars(plain)) == attributes and "_diffusers_hook" not in vars(plain)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in plain.modules())


def pipeline():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16)
    return DiTPipeline(denoiser("dit", torch.float32), vae.eval(), DDIMScheduler())


def drawn(pipe, labels=(1, 2), seed=0):
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        class_labels=list(labels), num_inference_steps=4, guidance_scale=4.0, generator=torch.manual_seed(seed), output_type="np"
    )  # fmt: skip
    return torch.from_numpy(picture.images)


def test_pipeline(tmp_path):
    pipe = pipeline()
    base, other = drawn(pipe), drawn(pipe, (5, 6), 1)
    assert get_token_model(pipe, ToCaConfig(cycle=4, ratio=0.9)) is pipe
    fast = drawn(pipe)
    assert not torch.equal(fast, base) and torch.equal(drawn(pipe), fast)
    assert not torch.equal(drawn(pipe, (5, 6), 1), other) and torch.equal(drawn(pipe), fast)
    save_adapter(pipe, tmp_path)
    again = load(tmp_path, pipeline())
    assert torch.equal(drawn(again), fast)
    assert unload(pipe) is pipe
    assert torch.equal(drawn(pipe), base) and "_diffusers_hook" not in vars(pipe.transformer)
    assert torch.equal(drawn(get_token_model(pipe, ToCaConfig(ratio=0.0))), base)


def test_stacked_on_lora_and_saved(tmp_path):
    calls = inputs("pixart", (8, 8), 4)
    lora = LoraConfig(target_modules=["to_q", "to_v"], r=2, init_lora_weights=False)
    model = get_token_model(denoiser("pixart"), [ToCaConfig(cycle=3), lora])
    out = sampled(model, calls)
    assert not torch.allclose(out, sampled(get_token_model(denoiser("pixart"), ToCaConfig(cycle=3)), calls))
    model.save_pretrained(tmp_path)
    assert torch.equal(sampled(load(tmp_path, denoiser("pixart")), calls), out)
    base = sampled(denoiser("pixart"), calls)
    assert torch.equal(sampled(model.unload(), calls), base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # what PEFT says to any second adapter
def test_loras_that_diffusers_loads_beside_it_are_named_and_weighed():
    calls, lora = inputs("unet", (8, 8), 4), LoraConfig(target_modules=["to_q", "to_v"], r=2, init_lora_weights=False)
    giver = denoiser("unet")
    giver.add_adapter(lora)
    weights = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(giver).items()}
    model = denoiser("unet")
    inject_adapter_in_model(adapter_config(ToCaConfig()), model, "ours")
    model.set_adapters("ours", 1.0)
    alone = sampled(model, calls)
    model.load_lora_adapter(dict(weights))
    model.load_lora_adapter(dict(weights))
    assert set(model.peft_config) == {"ours", "default_0", "default_1"}
    model.set_adapters(["ours", "default_0"], [1.0, 0.5])
    half = denoiser("unet")
    half.load_lora_adapter(dict(weights))
    half.set_adapters(["default_0"], [0.5])
    base = sampled(half, calls)
    inject_adapter_in_model(adapter_config(ToCaConfig()), half, "ours")
    both = sampled(half, calls)
    assert torch.equal(sampled(model, calls), both) and not torch.allclose(both, base) and not torch.allclose(both, alone)
    scaled = [{**call, "cross_attention_kwargs": {"scale": 0.5}} for call in calls]
    model.set_adapters(["ours", "default_0"])
    torch.testing.assert_close(sampled(model, scaled), both)
    with pytest.raises(UnsupportedError, match="must be 1, got 0.5 for 'ours'"):
        model.set_adapters(["ours", "default_0"], [0.5, 1.0])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # so it is
def test_it_is_saved_after_diffusers_has_unloaded_its_loras(tmp_path):
    calls, model = inputs("unet", (8, 8), 4), denoiser("unet")
    inject_adapter_in_model(adapter_config(ToCaConfig(ratio=0.4)), model, "ours")
    model.add_adapter(LoraConfig(target_modules=["to_q"], r=2), "theirs")
    model.set_adapters(["ours", "theirs"])
    model.unload_lora()
    want = sampled(model, calls)
    with pytest.raises(UnsupportedError, match=r"must be one of \['ours'\], got 'mine'"):
        save_adapter(model, tmp_path, "mine")
    save_adapter(model, tmp_path, "ours")
    config = HFTokensConfig.from_pretrained(tmp_path)
    assert config.stack() == [ToCaConfig(ratio=0.4)]
    again = denoiser("unet")
    inject_adapter_in_model(config, again, "ours")
    torch.testing.assert_close(sampled(again, calls), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions(dtype):
    want = sampled(get_token_model(denoiser("pixart"), ToCaConfig()), inputs("pixart", (8, 8), 4))
    got = sampled(get_token_model(denoiser("pixart", dtype), ToCaConfig()), inputs("pixart", (8, 8), 4, dtype=dtype))
    assert got.dtype == dtype and got.isfinite().all()
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_training_computes_everything():
    calls = inputs("pixart", (8, 8), 3)
    model = denoiser("pixart").requires_grad_(True)
    want = torch.autograd.grad(sum(model(**call).sample.square().sum() for call in calls), list(model.parameters()))
    for train in (True, False):
        surgery = get_token_model(denoiser("pixart"), ToCaConfig())
        inner = surgery.base_model.model.requires_grad_(True)
        if train:
            inner.enable_gradient_checkpointing()
        inner.train(train)
        out = [surgery(**call).sample for call in calls]
        got = torch.autograd.grad(sum(x.square().sum() for x in out), list(inner.parameters()))
        torch.testing.assert_close(got, want)


@pytest.mark.drawn(most=0)  # a feature cache in a denoiser is compiled in the contract too
@pytest.mark.filterwarnings("ignore")  # torch.compile tells of its graph breaks by warnings
def test_a_compiled_denoiser_hears_what_it_scores_by():
    both = ToCaConfig(influence=0.7, control=1.0)
    calls, model = inputs("pixart", (8, 8), 4), get_token_model(denoiser("pixart"), both).base_model.model
    want = sampled(model, calls)
    torch.compiler.reset()
    torch.testing.assert_close(sampled(torch.compile(model, backend="eager"), calls), want)


def test_counts_of_work():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            sampled(model, inputs("dit", (16, 16), 4))
        return counter.get_total_flops()

    assert flops(get_token_model(denoiser("dit"), ToCaConfig(cycle=4, ratio=0.9))) < 0.7 * flops(denoiser("dit"))


REFUSED = {
    "FluxTransformer2DModel": "compute some tokens alone",
    "SanaTransformer2DModel": "compute some tokens alone",
    "WanTransformer3DModel": "compute some tokens alone",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name):
    specimen = zoo.build(f"diffusers/{name}")
    base, attributes = specimen.run(), set(vars(specimen.model))
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        get_token_model(specimen.model, ToCaConfig())
    assert set(vars(specimen.model)) == attributes
    assert all("forward" not in vars(module) and not module._forward_hooks for module in specimen.model.modules())
    assert all(torch.equal(one, other) for one, other in zip(specimen.run(), base, strict=True))


def test_uses_that_are_refused():
    calls = inputs("unet", (8, 8), 2)
    with pytest.raises(UnsupportedError, match="stands alone"):
        get_token_model(denoiser("unet"), [ToCaConfig(), ToCaConfig()])
    with pytest.raises(UnsupportedError, match="stands alone"):
        get_token_model(denoiser("unet"), [ToCaConfig(), "probe-drop"])
    model = get_token_model(denoiser("unet"), ToCaConfig())
    for module in model.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(32, 1)
    with pytest.raises(UnsupportedError, match="once a step"):
        sampled(model, calls)


def test_the_entropy_under_guidance_is_that_of_the_mean():
    torch.manual_seed(0)
    q, k = torch.randn(4, 2, 6, 3, dtype=torch.float64), torch.randn(4, 2, 5, 3, dtype=torch.float64)
    maps = (q @ k.mT * 0.5).softmax(-1).mean(1)
    mean = (maps[:2] + maps[2:]) / 2
    torch.testing.assert_close(attention_entropy(beside(q), beside(k), scaling=0.5, pooled=True), -(mean * mean.log()).sum(-1))
