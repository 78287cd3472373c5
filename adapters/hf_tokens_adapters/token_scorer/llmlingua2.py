"""LLMLingua-2: a small token classifier says of each word of a prompt whether it may go, and the likeliest to stay are the short prompt.

Paper:   LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression (Pan et al., Findings of ACL 2024),
         arXiv:2403.12968
Needs:   nothing, in a token classifier that was trained for it
Maths:   p_t = softmax(logits_t)_keep;  p(word) = mean of its tokens' p, 1 where it is forced;  of each chunk those words stay whose p is
         above the percentile floor(100 (1 - rate) + 1) of all p, each as many times as its word has tokens for the budget
Differs: any token classifier is the scorer; it is LLMLingua-2 with that release's weights. The text is scored as it is, forced or not,
         where the release puts untrained tokens in the place of forced texts. What comes out is made of the given characters: words that
         were neighbours keep what stood between them, where the release's tokenizer writes the words anew, in lower case or without the
         unknown ones where it does. Words count by the scorer's own tokens, or those of `counted_by`, where the release takes GPT-3.5's;
         a chunk has at most `chunk` tokens with its special ones, where the release cuts the last one off.
Checked: microsoft/LLMLingua@e0e9d99b, the words that stay of 60 random texts in float64, with a WordPiece and a Unigram tokenizer:
         largest difference 0 words in 57 of them; in the 3 others it reads a chunk of 511 tokens, one more than fits.

>>> import torch
>>> from transformers import BertConfig, BertForTokenClassification
>>> from hf_tokens import LLMLingua2Config, compress_prompt, get_token_model
>>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, num_labels=2)
>>> model = get_token_model(BertForTokenClassification(BertConfig(**sizes)), LLMLingua2Config(rate=0.5))
>>> [len(ids) for ids in compress_prompt(model, torch.arange(20)[None])]  # of ids each is a word; given text, it returns text
[10]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import ConfigError, Dims, MethodConfig, TextWords, TokenScorer, option, register


@dataclass(frozen=True)
class LLMLingua2Config(MethodConfig):
    rate: float = option(0.5, gt=0, le=1, zero=1.0, help="Share of the tokens that stay, in each chunk (release: rate).")
    label: int = option(1, ge=0, help="Class of the tokens that stay.")
    token_to_word: str = option("mean", choices=("mean", "first"), help="Which of its tokens' probabilities is a word's.")
    force_reserve_digit: bool = option(False, help="Whether a token with a digit counts as sure to stay.")
    drop_consecutive: bool = option(False, help="Whether a forced text goes where the same one stands before it and nothing between stays.")
    threshold: float | None = option(
        None, ge=0, lt=1, help="Probability above which a word stays, in the place of the rate (SecurityLingua: 0.5)."
    )
    context_rate: float = option(1.0, gt=0, le=1, help="Share of the contexts that stay, by mean p (release, when asked: (1 + rate) / 2).")
    chunk: int = option(512, ge=8, help="Tokens that the model reads at a time, special ones included (release: max_seq_len).")


def percentile(values: Tensor, counts: Tensor, percent: Tensor) -> Tensor:
    """Of each row of values (b w), each as often as it counts, the percentile (b), between two of them in proportion."""
    values, order = values.masked_fill(counts == 0, torch.inf).sort(dim=1)
    seen = counts.gather(1, order).cumsum(dim=1)
    place = (seen[:, -1:] - 1).clamp(min=0) * (percent[:, None] / 100)
    at = lambda i: values.gather(1, torch.searchsorted(seen, i.long(), right=True).clamp(max=values.shape[1] - 1))
    low, high, part = at(place.floor()), at(place.ceil()), place - place.floor()
    between = torch.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1 - part))
    return torch.where(low == high, low, between)[:, 0]


@register("llmlingua2", LLMLingua2Config)
class LLMLingua2(TokenScorer):
    share = property(lambda self: self.config.rate)
    chunk = property(lambda self: self.config.chunk)
    chooses = property(lambda self: self.config.context_rate < 1)

    def __init__(self, config: LLMLingua2Config, dims: Dims):
        super().__init__(config, dims)
        if config.label >= dims.outputs:
            rule = f"LLMLingua2Config.label must be one of the {dims.outputs} classes of the model's head"
            raise ConfigError(f"{rule}, got {config.label}. Name the class of tokens that stay, as `model.config.id2label` lists them.")

    def score(self, logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)[..., self.config.label]

    def of_words(self, chance: Tensor, of: Tensor, words: int) -> Tensor:
        """What a word's tokens (b m) make of it, (b w); 1 where it has none."""
        place = of.masked_fill(of < 0, words)
        spread = lambda value, start, reduce: start.scatter_reduce(1, place, value, reduce)[:, :words]
        zeros = chance.new_zeros(len(of), words + 1)
        if self.config.token_to_word == "first":
            index = torch.arange(of.shape[1], device=of.device).expand_as(of)
            first = spread(index, torch.full_like(zeros, of.shape[1], dtype=torch.long), "amin")
            return torch.cat([chance, torch.ones_like(chance[:, :1])], dim=1).gather(1, first)
        number = spread(torch.ones_like(chance), zeros, "sum")
        return torch.where(number > 0, spread(chance, zeros, "sum") / number.clamp(min=1), 1)

    def keep(self, scores: Tensor, words: TextWords) -> Tensor:
        sure = words.digits if self.config.force_reserve_digit else torch.zeros_like(words.digits)
        forced = words.forced >= 0
        chance = self.of_words(scores.double().masked_fill(sure, 1), words.of, words.real.shape[1]).masked_fill(forced, 1)
        less = 100 * (1 - words.share.double()).clamp(min=0)
        if self.config.drop_consecutive:
            above = chance > percentile(chance, words.real.long(), less.floor())[:, None]
            chance = chance.masked_fill(self.again(words.forced, words.real & ~forced & above), 0)
        limit = percentile(chance, words.counts * words.real, (less + 1).floor())
        limit = limit if self.config.threshold is None else torch.full_like(limit, self.config.threshold)
        stays = words.real & ((chance > limit[:, None]) | (limit[:, None] == 1) & (chance == 1))
        if self.config.drop_consecutive:
            stays = stays & ~self.again(words.forced.masked_fill(~stays, -1), stays & ~forced)
        return stays | words.real & (words.share == 1)[:, None]

    def again(self, forced: Tensor, between: Tensor) -> Tensor:
        """Forced texts (b w; -1 for other words) whose last one was the same, with no word `between` (b w), (b w) bool."""
        index = torch.arange(forced.shape[1], device=forced.device).expand_as(forced)
        behind = lambda there: torch.nn.functional.pad(index.masked_fill(~there, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
        last = behind(forced >= 0)  # b w
        return (forced >= 0) & (last > behind(between)) & (forced.gather(1, last.clamp(min=0)) == forced)

    def worth(self, scores: Tensor, words: TextWords) -> Tensor:
        return self.of_words(scores.double(), words.of, words.real.shape[1])

    def choose(self, worth: Tensor) -> Tensor:
        percent = worth.new_tensor([100 * (1 - self.config.context_rate)]).floor()
        return worth >= percentile(worth[None], torch.ones_like(worth[None], dtype=torch.long), percent)
