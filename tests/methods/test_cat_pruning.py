"""CAT Pruning against slow loops over one sample, written from the description of arXiv:2502.00433."""

import math

import pytest
import torch
from denoisers import alone, calls, denoiser, half, sampled
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hf_tokens_adapters.feature_cache.cat_pruning import CATPruning, cluster, turns

from hf_tokens import CATPruningConfig, Dims, UnsupportedError, anatomy, get_token_model, load, measure
from hf_tokens.model.pictures import grid as grid_of
from hf_tokens.testing import zoo

KINDS = ("unet", "dit", "pixart", "sd3")  # Flux is refused


def naive_clusters(noise, grid, k, weight):
    """Ten rounds of k-means over (row / h, column / w, weight * sqrt(2 / f) * noise), from evenly spaced tokens, noise (n f)."""
    (height, width), n, f = grid, len(noise), noise.shape[1]
    points = [[i // width / height, i % width / width, *(weight * math.sqrt(2 / f) * noise[i]).tolist()] for i in range(n)]
    k = min(k, n)
    centres = [points[math.floor((c + 0.5) * n / k)] for c in range(k)]
    for _ in range(10):
        labels = [min(range(k), key=lambda c: (math.dist(point, centres[c]), c)) for point in points]
        for c in range(k):
            members = [point for point, label in zip(points, labels, strict=True) if label == c]
            centres[c] = [sum(axis) / len(members) for axis in zip(*members, strict=True)] if members else centres[c]
    return labels


def naive_turns(magnitude, labels):
    """Tokens in the order of choice: from the cluster of the largest mean on, the best of each, then the second best of each, ..."""
    groups = {label: sorted((i for i in range(len(labels)) if labels[i] == label), key=lambda i: (-magnitude[i], i)) for label in labels}
    mean = lambda label: sum(magnitude[i] for i in groups[label]) / len(groups[label])
    standing = sorted(groups, key=lambda label: (-mean(label), label))
    rounds = range(max(map(len, groups.values())))
    return [groups[label][r] for r in rounds for label in standing if r < len(groups[label])]


class Naive:
    """The choices of one run of one sample: told the noise of the step before at every step but the first."""

    def __init__(self, knobs, grid):
        self.knobs, self.grid, self.reference, self.labels = knobs, grid, None, None
        self.frequency = [0.0] * (grid[0] * grid[1])

    def choose(self, noise, elapsed):
        knobs, n = self.knobs, len(noise)
        if elapsed <= knobs.start or self.reference is None:
            self.reference = noise
            return list(range(n))
        if self.labels is None:
            self.labels = naive_clusters(noise, self.grid, knobs.clusters, knobs.content)
        order = naive_turns([float((a - b).norm()) for a, b in zip(noise, self.reference, strict=True)], self.labels)
        total = max(1, math.floor(knobs.alpha * n + 1e-9))
        stale = math.floor(knobs.stale * total + 1e-9)
        chosen = order[: total - stale]
        rest = sorted((i for i in order if i not in chosen), key=lambda i: (self.frequency[i], order.index(i)))
        chosen = chosen + rest[:stale]
        self.frequency = [f / 2 + (i in chosen) for i, f in enumerate(self.frequency)]
        return sorted(chosen)


GRIDS = {
    "square": ((4, 4), 5),
    "odd": ((3, 5), 4),
    "a row": ((1, 7), 3),
    "one token": ((1, 1), 20),
    "more clusters than tokens": ((2, 3), 20),
}


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("content", [0.01, 0.05, 3.0])
def test_clusters_and_turns(case, content):
    grid, k = GRIDS[case]
    torch.manual_seed(0)
    noise = torch.randn(3, grid[0] * grid[1], 4, dtype=torch.float64)
    labels, magnitude = cluster(noise, grid, k, content), noise.norm(dim=-1)
    place = turns(magnitude, labels)
    for i in range(3):
        assert labels[i].tolist() == naive_clusters(noise[i], grid, k, content)
        order = naive_turns(magnitude[i].tolist(), labels[i].tolist())
        assert [place[i].tolist().index(turn) for turn in range(len(order))] == order


def test_turns_take_from_every_cluster():
    magnitude = torch.tensor([[9.0, 8.0, 7.0, 1.0, 6.0, 0.5]])
    assert naive_turns(magnitude[0].tolist(), [0, 0, 0, 1, 1, 2]) == [0, 4, 5, 1, 3, 2]


# alpha, start, stale, clusters, steps
KNOBS = {
    "usual": (0.3, 0.28, 0.75, 5, 9),
    "by the change alone": (0.5, 0.0, 0.0, 4, 6),
    "by staleness alone": (0.4, 0.0, 1.0, 4, 8),
    "hardly any": (0.01, 0.0, 0.5, 20, 5),
    "nearly all": (0.99, 0.3, 0.5, 3, 5),
    "never": (0.3, 1.0, 0.75, 5, 4),
}


@pytest.mark.parametrize("case", KNOBS)
@pytest.mark.parametrize("grid", [(3, 5), (1, 1)], ids=["grid", "one token"])
def test_choices_are_the_loop(case, grid):
    alpha, start, stale, clusters, steps = KNOBS[case]
    knobs = CATPruningConfig(alpha=alpha, start=start, stale=stale, clusters=clusters)
    n = grid[0] * grid[1]
    torch.manual_seed(1)
    noise = torch.randn(2, n, 4, dtype=torch.float64) + 0.3 * torch.randn(steps, 2, n, 4, dtype=torch.float64)
    method = CATPruning(knobs, Dims(width=8, heads=2, kv_heads=2, head_dim=4, layer=0, layers=1, kind="denoiser", causal=False))
    memory, loops = {}, [Naive(knobs, grid), Naive(knobs, grid)]
    for step in range(1, steps):
        given = dict(hidden=noise[0], noise=noise[step - 1], grid=grid, step=step, elapsed=step / steps, memory=memory)
        index = method.reuse(**given)
        assert index is method.reuse(**given)  # of all sublayers of a step
        want = [loop.choose(noise[step - 1, row], step / steps) for row, loop in enumerate(loops)]
        found = [list(range(n))] * 2 if index is None else [sorted(row.tolist()) for row in index]
        assert found == want


def test_the_stalest_take_turns():
    knobs = CATPruningConfig(alpha=0.5, start=0.0, stale=1.0, clusters=1)
    loop, noise = Naive(knobs, (1, 4)), torch.arange(4.0)[:, None].double()
    loop.choose(noise * 0, 0.1)
    assert [loop.choose(noise, 0.2) for _ in range(4)] == [[2, 3], [0, 1], [2, 3], [0, 1]]


def sublayers(model):
    places = [(stream, i, block) for stream in anatomy(model).streams for i, block in enumerate(stream.blocks)]
    found = [part for stream, i, block in places for part in (stream.attention(i), stream.mlp(i), block._modules.get("attn2"))]
    return [part for part in found if part is not None]


def masked(kind, run, knobs):
    """What a model puts out if each sublayer computes all tokens, and those that are not chosen get what they got before."""
    model, kept, now, outputs, loops = denoiser(kind), {}, {"step": 0, "chosen": {}, "noise": None}, [], {}
    steps = [1 - float(call["timestep"][0]) / float(run[0]["timestep"][0]) for call in run]

    def chosen(rows, n):
        if n not in now["chosen"]:
            grid = grid_of(n, (8, 8))
            p = 8 // grid[1]
            for row in range(rows):
                cut = [(r * p, c * p) for r in range(grid[0]) for c in range(grid[1])]
                tokens = torch.stack([now["noise"][row, :, r : r + p, c : c + p].flatten() for r, c in cut])
                loop = loops.setdefault((n, row), Naive(knobs, grid))
                now["chosen"].setdefault(n, []).append(loop.choose(tokens, steps[now["step"]]))
        return torch.stack([torch.isin(torch.arange(n), torch.tensor(row)) for row in now["chosen"][n]])

    def hear(module, args, output):
        out = output[0] if isinstance(output, tuple) else output
        if now["step"]:
            out = torch.where(chosen(*out.shape[:2])[..., None], out, kept[module])
        kept[module] = out
        return (out, *output[1:]) if isinstance(output, tuple) else out

    for part in sublayers(model):
        part.register_forward_hook(hear)
    for step, call in enumerate(run):
        now.update(step=step, chosen={})
        outputs.append(sampled(model, [call])[0])
        now["noise"] = outputs[-1][:, :4]
    return torch.stack(outputs)


@pytest.mark.drawn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.3, 0.6])
def test_denoiser_is_the_loop(kind, alpha):
    run, knobs = calls(kind, 6), CATPruningConfig(alpha=alpha, start=0.2, clusters=4)
    model = get_token_model(denoiser(kind), knobs)
    got = sampled(model, run)
    torch.testing.assert_close(got, masked(kind, run, knobs), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got[-1], sampled(denoiser(kind), run)[-1])
    for i in range(2):
        torch.testing.assert_close(sampled(model, [alone(call, i) for call in run])[:, 0], got[:, i], rtol=1e-9, atol=1e-9)
    costs = [measure(model, **call).flops for call in run]
    assert costs[0] == costs[1] > costs[-1]


@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_guidance_by_one_call_and_by_two(kind):
    run = calls(kind, 5, guided=True)
    want = sampled(get_token_model(denoiser(kind), "cat-pruning"), run)
    model = get_token_model(denoiser(kind), "cat-pruning")
    for named in (True, False):
        got = []
        for call in run:
            pair = []
            for which, name in enumerate(("cond", "uncond")):
                _set_cache_context(model.base_model.model, CacheContext(name) if named else None)
                pair.append(sampled(model, [half(call, which)])[0])
            got.append(torch.cat(pair))
        _set_cache_context(model.base_model.model, None)
        torch.testing.assert_close(torch.stack(got), want, rtol=1e-9, atol=1e-9)


def test_runs_begin_anew_and_may_change_their_size():
    first, second, wide = calls("pixart", 5), calls("pixart", 4, seed=2), calls("pixart", 4, size=(8, 12), seed=3)
    fresh = lambda run: sampled(get_token_model(denoiser("pixart"), "cat-pruning"), run)
    model = get_token_model(denoiser("pixart"), "cat-pruning")
    for run in (first, second, wide, first):
        assert torch.equal(sampled(model, run), fresh(run))
    sampled(model, first[:4])
    assert torch.equal(sampled(model, second), fresh(second))

    def fail(module, args):
        raise ArithmeticError

    sampled(model, first[:3])
    handle = model.base_model.model.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        sampled(model, first[3:4])
    handle.remove()
    assert torch.equal(sampled(model, second), fresh(second))


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_off_zero_and_out(kind, tmp_path):
    run, model = calls(kind, 4), denoiser(kind)
    base, attributes = sampled(model, run), set(vars(model))
    assert torch.equal(sampled(get_token_model(denoiser(kind), CATPruningConfig().at_zero()), run), base)
    surgery = get_token_model(model, CATPruningConfig(alpha=0.4))
    changed = sampled(surgery, run)
    with surgery.disable_adapter():
        assert torch.equal(sampled(surgery, run), base)
    assert torch.equal(sampled(surgery, run), changed) and not torch.allclose(changed, base)
    surgery.save_pretrained(tmp_path)
    assert torch.equal(sampled(load(tmp_path, denoiser(kind)), run), changed)
    plain = surgery.unload()
    assert torch.equal(sampled(plain, run), base) and set(vars(plain)) == attributes
    assert all("forward" not in vars(module) and not module._forward_hooks for module in plain.modules())


def test_training_computes_everything():
    run = calls("sd3", 3)
    model = denoiser("sd3").requires_grad_()
    want = torch.autograd.grad(sum(model(**call).sample.square().sum() for call in run), list(model.parameters()), allow_unused=True)
    surgery = get_token_model(denoiser("sd3"), CATPruningConfig(start=0.0))
    inner = surgery.base_model.model.requires_grad_()
    got = torch.autograd.grad(sum(surgery(**call).sample.square().sum() for call in run), list(inner.parameters()), allow_unused=True)
    torch.testing.assert_close(got, want)


def test_uses_that_are_refused():
    with pytest.raises(UnsupportedError, match="compute some tokens alone.*FluxAttnProcessor.*reuses whole blocks"):
        get_token_model(zoo.build("diffusers/FluxTransformer2DModel").model, "cat-pruning")
    with pytest.raises(UnsupportedError, match="needs a model with a timestep"):
        method = CATPruning(CATPruningConfig(), Dims(8, 2, 2, 4, 0, 1, "denoiser", False))
        method.reuse(torch.zeros(1, 4, 8), None, (2, 2), 1, 0.5, {})
