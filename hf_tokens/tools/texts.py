"""Texts as words: which characters and tokens a word is, chunks that a model reads, and the text that some of the words make."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UnsupportedError, explain
from ..roles.token_scorer import TextWords


@dataclass(frozen=True)
class Word:
    """The characters of a word, from `start` up to `end`; which of the forced texts it is, or -1; and its tokens, from `first` on."""

    start: int
    end: int
    forced: int
    first: int
    tokens: int


@dataclass(frozen=True)
class ReadText:
    """A text, its tokens without special ones, and those in front and behind.

    Attributes:
        text: The characters.
        ids: Its tokens.
        spans: Where the characters of each token stand, white space around them left out.
        words: Its words in their order.
        special: Ids in front of a text and behind it.
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[Word]
    special: tuple[list[int], list[int]]


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what does not tell which characters a token is."""
    if tokenizer is None or not tokenizer.is_fast:
        rule, got = "Text needs the model's own tokenizer, one that tells the characters of its tokens", type(tokenizer).__name__
        raise UnsupportedError(explain(rule, got, "Pass `tokenizer=AutoTokenizer.from_pretrained(...)`, a fast one."))


def forced_spans(text: str, forced: Sequence[str]) -> list[tuple[int, int, int]]:
    """Where forced texts stand, and which; one that begins or ends with a letter or digit does not stand inside of a word."""
    edge = lambda character, look: rf"(?{look}\w)" if re.match(r"\w", character) else ""
    each = [edge(word[0], "<!") + re.escape(word) + edge(word[-1], "!") for word in forced]
    longest = sorted(range(len(forced)), key=lambda i: -len(forced[i]))
    pattern = "|".join(f"(?P<w{i}>{each[i]})" for i in longest)
    return [(*found.span(), int(found.lastgroup[1:])) for found in re.finditer(pattern, text)] if forced else []


def read_text(text: str, tokenizer: Any, forced: Sequence[str] = ()) -> ReadText:
    """A text as the words of a tokenizer: those that it tells apart, and single punctuation, which begins one; a forced text is one."""
    encoding = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
    own = [i for i, which in enumerate(encoding.sequence_ids(0)) if which is not None]
    ids, offsets, numbers = encoding["input_ids"], encoding["offset_mapping"], encoding.word_ids(0)
    special = (ids[: own[0]], ids[own[-1] + 1 :]) if own else (ids, [])
    trimmed = [trim(text, *offsets[i]) for i in own]
    words = split_words(text, trimmed, [numbers[i] for i in own], forced_spans(text, forced))
    return ReadText(text, [ids[i] for i in own], trimmed, words, special)


def trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters without white space around them; nothing, at their end, where there is nothing else."""
    inside = text[start:end]
    return (end - len(inside.lstrip()), start + len(inside.rstrip())) if inside.strip() else (end, end)


def split_words(text: str, spans: list[tuple[int, int]], numbers: list[int], forced: list[tuple[int, int, int]]) -> list[Word]:
    """The words of tokens, given where they stand and which of the tokenizer's words they are; forced texts without a token too."""
    touched = [next((f for f, (a, b, _) in enumerate(forced) if max(a, s) < min(b, e)), None) for s, e in spans]
    bare = [span for f, span in enumerate(forced) if f not in touched]
    words: list[Word] = []
    for i, (start, end) in enumerate(spans):
        while bare and bare[0][0] < max(end, start + 1) and bare[0][1] <= start:
            words.append(Word(*bare.pop(0), i, 0))
        mine, before = touched[i], touched[i - 1] if i else None
        apart = i == 0 or mine != before or mine is None and numbers[i] != numbers[i - 1]
        if mine is None and not apart:
            apart = bool(re.search(r"\s", text[spans[i - 1][1] : start])) or 0 < end - start and text[start:end] in string.punctuation
        if apart or words[-1].tokens == 0:
            a, b, which = (start, end, -1) if mine is None else forced[mine]
            words.append(Word(min(a, start), max(b, end), which, i, 1))
        else:
            last = words[-1]
            words[-1] = Word(last.start, max(last.end, end), last.forced, last.first, last.tokens + 1)
    return words + [Word(*span, len(spans), 0) for span in bare]


def chunks(read: ReadText, limit: int, ends: Iterable[str]) -> list[list[int]]:
    """The words of a text in chunks of at most `limit` tokens, as places in `words`; a chunk ends behind one of `ends` where one is in it.

    A word of more tokens than that is a chunk of its own, of which the model reads the beginning.
    """
    room, ends, done, start = limit - sum(map(len, read.special)), {*ends}, [], 0
    while start < len(read.words):
        stop, tokens = start, 0
        while stop < len(read.words) and (stop == start or tokens + read.words[stop].tokens <= room):
            tokens += read.words[stop].tokens
            stop += 1
        if stop < len(read.words):
            closing = lambda i: {read.text[read.words[i].start : read.words[i].end], white_behind(read, i)} & ends
            stop = next((i + 1 for i in range(stop - 1, start, -1) if closing(i)), stop)
        done.append([*range(start, stop)])
        start = stop
    return done


def white_behind(read: ReadText, i: int) -> str:
    """The character behind a word, a space for what is no white space."""
    behind = read.text[read.words[i].end : read.words[i].end + 1]
    return behind if behind.isspace() else " "


def by_tokens(read: ReadText) -> ReadText:
    """The same text, of which each token is a word."""
    return replace(read, words=[Word(*span, -1, i, 1) for i, span in enumerate(read.spans)])


def count_tokens(read: ReadText, tokenizer: Any | None) -> list[int]:
    """How many tokens each word is: of its own, or of another tokenizer, with the space in front of it."""
    if tokenizer is None:
        return [word.tokens for word in read.words]
    spaced = lambda word: " " * read.text[: word.start][-1:].isspace() + read.text[word.start : word.end]
    written = [spaced(word) for word in read.words]
    return [len(ids) for ids in tokenizer(written, add_special_tokens=False)["input_ids"]] if written else []


@dataclass(frozen=True)
class Chunk:
    """Some words of a text (places in its `words`), the share that stays, and which of the texts it is that may go, or -1."""

    read: ReadText
    words: list[int]
    counts: list[int]
    share: float
    text: int


def chunk_inputs(batch: Sequence[Chunk], limit: int, pad: int, device: torch.device) -> tuple[dict[str, Tensor], TextWords]:
    """What a model is given of some chunks, and their words."""
    ids, masks, of, digits, forced, counts = [], [], [], [], [], []
    for chunk in batch:
        read, (front, back) = chunk.read, chunk.read.special
        own = [(i, t) for i, w in enumerate(chunk.words) for t in range(read.words[w].first, read.words[w].first + read.words[w].tokens)]
        own = own[: limit - len(front) - len(back)]
        ids.append([*front, *(read.ids[t] for _, t in own), *back])
        masks.append([1] * len(ids[-1]))
        around = lambda inside, blank, front=front, back=back: [blank] * len(front) + inside + [blank] * len(back)
        of.append(around([i for i, _ in own], -1))
        digits.append(around([bool(re.search(r"\d", read.text[slice(*read.spans[t])])) for _, t in own], False))
        forced.append([read.words[w].forced for w in chunk.words])
        counts.append([chunk.counts[w] for w in chunk.words])
    laid = lambda rows, value: pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)
    real = laid([[True] * len(row) for row in forced], False)
    share = torch.tensor([chunk.share for chunk in batch], dtype=torch.float64, device=device)
    text = torch.tensor([chunk.text for chunk in batch], device=device)
    words = TextWords(laid(of, -1), laid(digits, False), real, laid(forced, -1), laid(counts, 0), share, text)
    return {"input_ids": laid(ids, pad), "attention_mask": laid(masks, 0)}, words


def write_text(read: ReadText, kept: Sequence[bool]) -> str:
    """The text of the words that are kept, in the given characters.

    What stood between neighbours stays, and white space around the whole; where something went, a space stands for white space in front of
    a word, and where two words would run into one.
    """
    shown = [(word, stays) for word, stays in zip(read.words, kept, strict=True) if word.end > word.start]
    if not shown:
        return read.text
    lead, tail = read.text[: shown[0][0].start], read.text[max(word.end for word, _ in shown) :]
    made, end, together = lead if lead.isspace() else "", None, True
    for word, stays in shown:
        if stays:
            start = word.start if end is None else max(word.start, end)
            gap, body = read.text[end:start] if end is not None else "", read.text[start : word.end]
            if end is not None and not together:
                runs = bool(re.search(r"[\W_]", gap)) and made[-1:].isalnum() and body[:1].isalnum()
                gap = " " if (gap[-1:].isspace() or runs) and not made[-1:].isspace() and not body[:1].isspace() else ""
            made, end = made + gap + body, word.end
        together = stays
    return made + (tail if tail.isspace() else "")
