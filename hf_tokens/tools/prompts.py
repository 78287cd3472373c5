"""Prompts made short by one model for another: the tokens that are left, as ids, and vectors in the place of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ..engine.model import ModelSurgery
from ..engine.run import StreamRun
from ..engine.surgery import Listener, StreamSurgery
from ..errors import ConfigError, UnsupportedError, explain
from ..handlers.token_reducer import reducing_blocks
from ..handlers.token_scorer import scorers_of
from ..model.signatures import parameters
from ..roles.token_scorer import TextWords, TokenScorer
from ..tokens.token_map import take
from .surgeries import evaluated, surgery_of
from .texts import Chunk, by_tokens, check_tokenizer, chunk_inputs, chunks, count_tokens, read_text, write_text


class Passes(Listener):
    """The passes through a stream that have ended."""

    def __init__(self, surgery: StreamSurgery):
        self.surgery, self.runs = surgery, []

    def closed(self, surgery: StreamSurgery, run: StreamRun) -> None:
        if surgery is self.surgery:
            self.runs.append(run)


PromptPart = str | tuple[str, float]
CHUNK_ENDS = (".", "\n")


class TokenScores(Listener):
    """What scorers say of the tokens of one call."""

    scores = True

    def __init__(self):
        self.found: dict[TokenScorer, Tensor] = {}

    def scored(self, method: TokenScorer, scores: Tensor) -> None:
        self.found[method] = scores


@overload
def compress_prompt(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]: ...
@overload
def compress_prompt(
    model: Any,
    input_ids: str | Sequence[PromptPart],
    *,
    tokenizer: Any,
    force_tokens: Sequence[str] = (),
    max_tokens: int | None = None,
    counted_by: Any = None,
    chunk_end_tokens: Sequence[str] = CHUNK_ENDS,
    batch_size: int = 50,
) -> str: ...
@torch.no_grad()
def compress_prompt(
    model: Any,
    input_ids: Tensor | str | Sequence[PromptPart],
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Any = None,
    force_tokens: Sequence[str] = (),
    max_tokens: int | None = None,
    counted_by: Any = None,
    chunk_end_tokens: Sequence[str] = CHUNK_ENDS,
    batch_size: int = 50,
) -> list[Tensor] | str:
    """A prompt without the tokens that a model's reducers drop, or the words that its scorer says may go: for any other model.

    ```python
    ids = hf_tokens.compress_prompt(decoder, input_ids, attention_mask)  # a TokenReducer in a decoder-only language model
    text = hf_tokens.compress_prompt(scorer, text, tokenizer=tokenizer, force_tokens=["<|im_start|>", "<|im_end|>", "\\n"])
    text = hf_tokens.compress_prompt(scorer, [(instruction, 1.0), (document, 0.3), (question, 1.0)], tokenizer=tokenizer)
    ```

    Args:
        model: A decoder-only language model with a method that drops tokens of the text, or a token classifier with a scorer.
        input_ids: A prompt: ids (b n), a text, or its parts one behind the other, each a text or a text and the share of it that stays;
            one of share 1 stays whole, and one without a share has the method's, and may go as a whole where the method says so.
        attention_mask: Real tokens of ids, (b n).
        tokenizer: The model's own, for text.
        force_tokens: Texts that stay wherever they stand, such as the tokens of a chat template.
        max_tokens: How many tokens of the parts without a share stay, in the place of the method's share.
        counted_by: The tokenizer whose tokens budgets count; the model's own by default.
        chunk_end_tokens: Behind which words a chunk that the model reads may end.
        batch_size: Chunks that it reads at a time.

    Returns:
        Of ids what is left of each row, (k), in their order and without padding; of text, text, made of the given characters.

    Raises:
        UnsupportedError: The model has nothing that shortens a prompt, tokens joined, so that no id stands for them, or a text has no word.
        ConfigError: A budget is out of its bounds, or keeps nothing.
    """
    surgery = surgery_of(model)
    if isinstance(input_ids, Tensor):
        more = {"tokenizer": tokenizer, "force_tokens": force_tokens or None, "max_tokens": max_tokens, "counted_by": counted_by}
        if given := [name for name, value in more.items() if value is not None]:
            raise UnsupportedError(explain("Of ids each is a word, without a text around it", given, "Leave them out, or pass the text."))
        places = kept_of_ids(surgery, input_ids, attention_mask)
        return [row[kept] for row, kept in zip(input_ids, places, strict=True)]
    check_tokenizer(tokenizer)
    parts = as_parts(input_ids)
    check_budgets(parts, max_tokens, force_tokens, batch_size)
    if not any(text.strip() for text, _ in parts):
        raise UnsupportedError(explain("A prompt has one word at least", repr("".join(text for text, _ in parts)), "Leave it out."))
    if (method := only_scorer(surgery)) is None:
        return reduced_text(surgery, parts, tokenizer, [*force_tokens, *([] if max_tokens is None else ["max_tokens"])])
    reading = Reading(surgery, method, tokenizer, batch_size)
    return "".join(scored_texts(reading, parts, force_tokens, max_tokens, counted_by, chunk_end_tokens))


def only_scorer(surgery: ModelSurgery) -> TokenScorer | None:
    """The scorer that acts in a model; None if there is none, and refused where there are several."""
    scorers = scorers_of(surgery)
    if len(scorers) > 1:
        names = [type(method).__name__ for method in scorers]
        raise UnsupportedError(explain("One scorer at a time says which words stay", names, "Switch to one adapter with one of them."))
    return next(iter(scorers), None)


def as_parts(prompt: str | Sequence[PromptPart]) -> list[tuple[str, float | None]]:
    """A prompt's parts, each with its share or None."""
    parts = [prompt] if isinstance(prompt, str) else [*prompt]
    pairs = [(part, None) if isinstance(part, str) else tuple(part) if isinstance(part, (tuple, list)) else (part,) for part in parts]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str):
            rule = "A prompt is ids (b n), a text, or a list of texts and of pairs (text, share)"
            raise ConfigError(explain(rule, f"{type(pair[0]).__name__} among its parts", "Pass `[(instruction, 1.0), document]`."))
    return pairs


def check_budgets(parts: list[tuple[str, float | None]], max_tokens: int | None, force_tokens: Sequence[str], batch_size: int) -> None:
    """Refuse budgets out of bounds, and forced tokens that are no texts."""
    for _, share in parts:
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise ConfigError(explain("The share of a part that stays is in (0, 1]", repr(share), "Pass 1.0 to keep it whole."))
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(explain(f"`{name}` is a number of one at least", repr(value), "Leave it out for the default."))
    if max_tokens is not None and parts and all(share is not None for _, share in parts):
        rule = "`max_tokens` is a budget of the parts without a share of their own"
        raise ConfigError(explain(rule, f"{len(parts)} parts that have one", "Leave it out, or leave out the share of a part."))
    if isinstance(force_tokens, str) or not all(isinstance(word, str) and word for word in force_tokens):
        raise ConfigError(explain("`force_tokens` is a list of texts that are not empty", repr(force_tokens), 'Pass `["<|im_start|>"]`.'))


def kept_of_ids(surgery: ModelSurgery, input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The places of each row that are left, by the reducers of a model or its scorer."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise UnsupportedError(
            explain("`compress_prompt` needs prompts of one token at least, (b n)", tuple(input_ids.shape), "Leave them out.")
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if (method := only_scorer(surgery)) is None:
        return reduced_places(surgery, input_ids, mask)
    real = mask.bool()
    of = torch.arange(input_ids.shape[1], device=real.device).expand_as(input_ids)
    share, none = torch.full_like(of[:, 0], method.share, dtype=torch.float64), torch.full_like(of, -1)
    words = TextWords(of.masked_fill(~real, -1), torch.zeros_like(real), real, none, real.long(), share, none[:, 0])
    stays = method.keep(scores_of(surgery, method, {"input_ids": input_ids, "attention_mask": mask}), words)
    return [row.nonzero()[:, 0] for row in stays]


def reduced_places(surgery: ModelSurgery, input_ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The places of each row whose tokens the reducers of a decoder-only model leave."""
    rule = "`compress_prompt` needs a decoder-only language model in which a TokenReducer acts on the text, or a TokenScorer"
    streams = [stream for stream in surgery.streams if stream.stream.kind == "text" and reducing_blocks(stream)]
    if len(streams) != 1 or surgery.base.config.is_encoder_decoder:
        got = f"{type(surgery.base).__name__} with {len(streams)} of such streams"
        raise UnsupportedError(explain(rule, got, "Add a method such as one that prunes tokens, or switch its adapter on."))
    (stream,) = streams
    more = {"logits_to_keep": 1} if "logits_to_keep" in parameters(type(surgery.base)) else {}
    passes = Passes(stream)
    with evaluated(surgery.base), surgery.listening(passes), stream.stopping_after(max(reducing_blocks(stream))):
        surgery.base(input_ids=input_ids, attention_mask=mask, use_cache=False, **more)
    if not passes.runs:  # no method was called
        return [real.nonzero()[:, 0] for real in mask.bool()]
    ledger = passes.runs[-1].ledger
    left = ledger.flags(ledger.filled, True) & ~ledger.flags(ledger.fresh, False) & mask.bool().gather(1, ledger.rows)
    if bool((ledger.all_sizes() > 1)[left].any()):
        raise UnsupportedError(explain(rule, "tokens that joined, for which no id stands", "Choose a method that drops tokens."))
    return [place[kept] for place, kept in zip(ledger.rows, left, strict=True)]


def reduced_text(surgery: ModelSurgery, parts: list[tuple[str, float | None]], tokenizer: Any, more: list[str]) -> str:
    """A text without the tokens that the reducers of a model drop."""
    if len(parts) > 1 or parts[0][1] is not None or more:
        rule = "Shares of parts, `force_tokens` and `max_tokens` are for a scorer; a reducer has a share of its own"
        raise UnsupportedError(explain(rule, f"{len(parts)} parts and {more}", "Pass one text, or use a scorer."))
    read = by_tokens(read_text(parts[0][0], tokenizer))
    (front, back), n = read.special, len(read.ids)
    ids = torch.tensor([[*front, *read.ids, *back]], device=surgery.base.get_input_embeddings().weight.device)
    (places,) = reduced_places(surgery, ids, torch.ones_like(ids))
    left = {*(places - len(front)).tolist()}
    return write_text(read, [i in left for i in range(n)])


@dataclass(frozen=True)
class Reading:
    """Who reads a text: the surgery of a token classifier, its scorer and tokenizer, and how many chunks at a time."""

    surgery: ModelSurgery
    method: TokenScorer
    tokenizer: Any
    batch_size: int

    @property
    def limit(self) -> int:
        """Tokens of a chunk, special ones included: no more than the tokenizer says that the model reads."""
        return min(self.method.chunk, self.tokenizer.model_max_length)

    def score(self, chunks: list[Chunk]) -> Iterator[tuple[Tensor, TextWords]]:
        """The scores of the tokens of some chunks at a time, and their words."""
        table, tokenizer = self.surgery.base.get_input_embeddings(), self.tokenizer
        if tokenizer.pad_token_id is None:
            rule = "Chunks of several lengths need a tokenizer with a token for padding"
            raise UnsupportedError(explain(rule, type(tokenizer).__name__, "Set its `pad_token`."))
        for start in range(0, len(chunks), self.batch_size):
            given, words = chunk_inputs(chunks[start : start + self.batch_size], self.limit, tokenizer.pad_token_id, table.weight.device)
            if (most := int(given["input_ids"].max())) >= table.num_embeddings:
                rule = f"The tokenizer is that of the token classifier, which knows {table.num_embeddings} ids"
                raise UnsupportedError(explain(rule, f"the id {most}", "Load it from the classifier's own folder."))
            yield scores_of(self.surgery, self.method, given), words


def scores_of(surgery: ModelSurgery, method: TokenScorer, given: dict[str, Tensor]) -> Tensor:
    """What a scorer says of the tokens, (b m)."""
    heard = TokenScores()
    with evaluated(surgery.base), surgery.listening(heard):
        surgery.base(**given)
    return heard.found[method]


def scored_texts(
    reading: Reading,
    parts: list[tuple[str, float | None]],
    forced: Sequence[str],
    max_tokens: int | None,
    counted_by: Any,
    ends: Sequence[str],
) -> list[str]:
    """What stays of each part: first the parts that may go as a whole, then the words of each chunk."""
    read = {i: read_text(text, reading.tokenizer, forced) for i, (text, share) in enumerate(parts) if share != 1 and text.strip()}
    counts = {i: count_tokens(text, counted_by) for i, text in read.items()}
    free = [i for i in read if parts[i][1] is None]
    cut = {i: chunks(text, reading.limit, ends) for i, text in read.items()}
    share = reading.method.share
    if len(free) > 1 and reading.method.chooses:
        asked = [Chunk(read[i], words, counts[i], 1.0, free.index(i)) for i in free for words in cut[i]]
        chosen = choose_texts(reading, asked, len(free))
        free = [i for i, stays in zip(free, chosen, strict=True) if stays]
    if max_tokens is not None:
        share = min(1.0, max_tokens / max(1, sum(sum(counts[i]) for i in free)))
    shares = {i: share if parts[i][1] is None else float(parts[i][1]) for i in read if parts[i][1] is not None or i in free}
    todo = [(i, Chunk(read[i], words, counts[i], part, -1)) for i, part in shares.items() if part < 1 for words in cut[i]]
    kept: dict[int, list[bool]] = {i: [part == 1] * len(read[i].words) for i, part in shares.items()}
    stays = [row for scores, words in reading.score([chunk for _, chunk in todo]) for row in reading.method.keep(scores, words).tolist()]
    for (i, chunk), row in zip(todo, stays, strict=True):
        for word, stay in zip(chunk.words, row, strict=False):
            kept[i][word] = stay
    for i, part in shares.items():
        if not any(kept[i]):
            rule = "A part of a prompt keeps one word at least"
            raise ConfigError(explain(rule, f"none of {len(kept[i])} at a share of {part:g}", "Raise its share, or leave the part out."))
    whole = lambda i: parts[i][0] if i not in read else ""
    return [write_text(read[i], kept[i]) if i in shares else whole(i) for i in range(len(parts))]


def choose_texts(reading: Reading, asked: list[Chunk], texts: int) -> list[bool]:
    """Which of so many texts, that may go as a whole, stay: by the mean of their words."""
    total = number = torch.zeros(texts, dtype=torch.float64)
    for scores, words in reading.score(asked):
        has = torch.zeros_like(words.forced).scatter_add(1, words.of.clamp(min=0), (words.of >= 0).long()) > 0  # b w
        worth, text = reading.method.worth(scores, words).double(), words.text.cpu()
        total = total.index_add(0, text, (worth * has).sum(dim=1).cpu())
        number = number.index_add(0, text, has.sum(dim=1).double().cpu())
    return reading.method.choose(total / number.clamp(min=1)).tolist()


def embed_prompt(model: Any, *parts: Tensor) -> dict[str, Tensor]:
    """A prompt of tokens and vectors for a decoder, which stays as it is: `inputs_embeds` and its mask, with padding in front.

    Args:
        model: The decoder.
        parts: One behind the other: ids (b n), which the model looks up, and vectors (b p d) in the place of embeddings, such as an encoder
            puts out; an id of -1 and a vector of zeros are padding.
    """
    table = model.get_input_embeddings()
    real = torch.cat([part != -1 if part.dim() == 2 else part.any(dim=-1) for part in parts], dim=1)
    hidden = torch.cat([table(part.clamp(min=0)) if part.dim() == 2 else part.to(table.weight) for part in parts], dim=1)
    order = real.long().argsort(dim=1, stable=True)
    return {"inputs_embeds": take(hidden, order), "attention_mask": real.long().gather(1, order)}
