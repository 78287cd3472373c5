"""Dr.LLM: a small router in front of each block of a frozen LLM lets a sample skip it, run it, or run it twice.

Paper:   Dr.LLM: Dynamic Layer Routing in LLMs (Heakl et al., ICLR 2026), arXiv:2510.12773
Needs:   training
Maths:   z_l = mean over W windows of W2 gelu(W1 m_w + b1) + b2, m_w the mean of the hidden states of window w of the prompt;
         y_l = argmax softmax(z_l) in {skip, run, repeat};  L = -1/L sum_l a_c (1 - p_c)^gamma log p_c with c = y*_l,
         a_c ~ (1 - beta) / (1 - beta^{n_c}), scaled to a mean of 1;  in training the block follows y*, not y
Differs: y* comes as a column `hf_tokens_targets` of the batch, the runs of each block (-100 leaves one to its router), and the loss joins
         the model's own; without that column the routers learn from the latter, straight through. A second run has a KV cache of its
         own. The first prompt decides for all that follows in its cache; without a cache each pass is routed anew. `threshold` is ours.
         `search_path` finds y*. As in the paper, routers that are not trained route at random.
Checked: parameterlab/dr-llm@14e88373, `RouterBlock` on the windows' means in float64: largest difference 1.1e-3 of 11, as its gelu is the
         tanh's; windows by reading.

>>> import torch
>>> from hf_tokens import DrLLMConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> model = get_token_model(base.model, DrLLMConfig()).eval()
>>> runs = torch.tensor([[1, 2, 2, 1]]).expand(2, -1)
>>> measure(model, **base.inputs, hf_tokens_targets=runs).tokens / (2 * 16)
6.0
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import merge
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from hf_tokens import ConfigError, Dims, LayerRouter, MethodConfig, option, register, straight_through

ACTIONS = 3  # skip, run, repeat: also how often the block runs


@dataclass(frozen=True)
class DrLLMConfig(MethodConfig):
    windows: int = option(8, ge=1, help="Windows of the prompt that vote (paper: W); fewer where it has fewer tokens.")
    hidden: int = option(128, ge=1, help="Width of a router's hidden layer (paper: h).")
    threshold: float = option(0.0, ge=0, le=1, zero=1.0, help="A block is skipped or repeated only if more probable than this.")
    gamma: float = option(2.0, ge=0, help="Focus of the loss on what a router gets wrong.")
    beta: float = option(0.999, ge=0, lt=1, help="How much rare actions weigh in the loss; 0 weighs them alike.")
    counts: tuple[int, ...] = option((), ge=1, help="Times that skip, run and repeat stand in the labels (paper: n_c); () weighs alike.")

    def __post_init__(self):
        super().__post_init__()
        if len(self.counts) not in (0, ACTIONS):
            raise ConfigError(f"DrLLMConfig.counts must have one number for each of {ACTIONS} actions, got {len(self.counts)}. Give three.")


def windowed_means(hidden: Tensor, mask: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """Means of the real tokens (b m d) over at most so many windows of one size, (b w d), and which of these there are, (b w)."""
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # b 1
    there = count.clamp(max=windows)
    size = count // there
    window = ((mask.cumsum(dim=1) - 1).clamp(min=0) // size).where(mask, windows).clamp(max=windows)
    window = window.where(window < there, -1)  # tokens behind the last window
    return merge(hidden, window, windows), torch.arange(windows, device=hidden.device) < there


@register("dr-llm", DrLLMConfig)
class DrLLM(LayerRouter):
    kinds = ("text",)
    chunks = False
    trains_dense = True

    def __init__(self, config: DrLLMConfig, dims: Dims):
        super().__init__(config, dims)
        inner, outer = nn.Linear(dims.width, config.hidden), nn.Linear(config.hidden, ACTIONS)
        self.w1, self.b1, self.w2, self.b2 = inner.weight, inner.bias, outer.weight, outer.bias
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            nn.init.xavier_uniform_(weight)
            nn.init.zeros_(bias)

    def route(self, hidden: Tensor, mask: Tensor, targets: Tensor | None, memory: dict) -> Tensor | None:
        if self.config.threshold == 1 and targets is None:
            return None
        key = f"{self.key}.{self.dims.layer}"
        chance = None
        if key not in memory.rows:
            chance = self.logits(hidden, mask).softmax(dim=-1)  # b 3
            best = chance.argmax(dim=-1)
            sure = chance.amax(dim=-1) > self.config.threshold
            memory.rows[key] = torch.where(sure, best, 1)
        runs = memory.rows[key]
        if targets is not None:
            runs = self.follow(runs, chance, targets.to(runs.device))
        hard = torch.stack([runs >= 1, runs >= 2], dim=1).to(hidden.dtype)  # b 2
        if chance is None or targets is not None:
            return hard
        return straight_through(hard, torch.stack([1 - chance[:, 0], chance[:, 2]], dim=1).to(hidden.dtype))

    def logits(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The windows' mean vote, (b 3)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        means, there = windowed_means(hidden.to(wide), mask, self.config.windows)
        w1, b1, w2, b2 = (p.to(wide) for p in (self.w1, self.b1, self.w2, self.b2))
        votes = linear(gelu(linear(means, w1, b1)), w2, b2)  # b w 3
        return votes.masked_fill(~there[..., None], 0).sum(dim=1) / there.sum(dim=1, keepdim=True)

    def follow(self, runs: Tensor, chance: Tensor | None, targets: Tensor) -> Tensor:
        """The labels of this block where there are any; in training, what the router says of them is a loss."""
        if targets.shape != (len(runs), self.dims.layers) or bool((targets >= ACTIONS).any()):
            rule = f"The column hf_tokens_targets must hold 0, 1 or 2 runs for each of {self.dims.layers} blocks of each sample, or -100"
            raise ConfigError(f"{rule}, got {tuple(targets.shape)} up to {int(targets.max())}. Give it so, or name one `stream`.")
        label = targets[:, self.dims.layer]
        known = label >= 0
        if chance is not None and self.training and torch.is_grad_enabled():
            right = chance.gather(1, label.clamp(min=0)[:, None])[:, 0].clamp(min=torch.finfo(chance.dtype).tiny)
            blame = -self.weights(chance)[label.clamp(min=0)] * (1 - right) ** self.config.gamma * right.log()
            routed = self.dims.layers if self.config.layers is None else len({i % self.dims.layers for i in self.config.layers})
            self.add_loss(blame.masked_fill(~known, 0).sum() / (known.sum().clamp(min=1) * routed))
        return torch.where(known, label, runs)

    def weights(self, like: Tensor) -> Tensor:
        """What each action weighs in the loss, (3)."""
        if not self.config.counts:
            return like.new_ones(ACTIONS)
        rare = (1 - self.config.beta) / (1 - self.config.beta ** like.new_tensor(self.config.counts))
        return rare / rare.mean()
