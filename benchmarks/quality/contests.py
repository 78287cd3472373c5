"""Real documents with lines to look up in them, after RULER's tasks: one needle, several keys, a traced variable."""

from __future__ import annotations

import pydoc_data.topics
import random
import re
from dataclasses import dataclass
from typing import Any

from hf_tokens.commands.material import MARK, split

CONTINUATION = 48  # tokens of the document behind its context
DOCUMENTS = {1024: 12, 2048: 6, 4096: 3}
CITIES = "Paris Rome Berlin Madrid Vienna Oslo Dublin Athens Cairo Tokyo Lima Boston Sydney Moscow".split()
NAMES = "ALPHA DELTA OMEGA SIGMA GAMMA KAPPA".split()
DEPTHS = 10
ASKED_KEYS = 5  # of the ten, in turns from document to document
TASKS = ("one needle", "several keys", "traced variable")


@dataclass(frozen=True)
class Question:
    """What is asked, as the model's template puts it, and how the answer begins; each of `accepted` is right."""

    task: str
    question: list[int]
    cue: list[int]
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A context with needles in it, as token ids, what follows it, and questions."""

    context: list[int]
    continuation: list[int]
    questions: list[Question]


def insert(text: str, lines: list[tuple[float, str]]) -> str:
    """A text with lines between its own, each at its depth."""
    own = text.split("\n")
    places = [(round(depth * len(own)), line) for depth, line in lines]
    for place, line in sorted(places, reverse=True):
        own.insert(place, line)
    return "\n".join(own)


def needles(number: int) -> tuple[list[tuple[float, str]], list[tuple[str, str, str, tuple[str, ...]]]]:
    """Lines with their depths, and (task, question, cue, accepted answers), of the document of that number."""
    draw = random.Random(number)
    codes = iter(draw.sample(range(1000, 10000), 20))
    lines, asked = [], []
    for i, city in enumerate(draw.sample(CITIES, DEPTHS)):
        code = str(next(codes))
        lines.append(((i + 0.5) / DEPTHS, f"The special magic number for {city} is {code}."))
        if i % 2 == number % 2:
            cue = f"The special magic number for {city} is"
            asked.append(("several keys", f"What is the special magic number for {city}?", cue, (code,)))
    phone = str(next(codes))
    lines.append((number % DEPTHS / DEPTHS + 0.02, f"The phone number of the library is {phone}."))
    asked.append(("one needle", "What is the phone number of the library?", "The phone number of the library is", (phone,)))
    tickets = [str(next(codes)) for _ in range(3)]
    # three values of one key stand in the way only: asked for the third of them, the full cache was right once in three times
    lines += [(depth, f"One of the winning tickets is {ticket}.") for depth, ticket in zip((0.22, 0.52, 0.82), tickets, strict=True)]
    first, second, third = draw.sample(NAMES, 3)
    value = str(next(codes))
    chain = (f"VAR {first} = {value}", f"VAR {second} = VAR {first}", f"VAR {third} = VAR {second}")
    lines += list(zip((0.18, 0.47, 0.77), chain, strict=True))
    for cue, answer in ((f"VAR {third} = VAR", second), (f"VAR {second} = VAR", first), (f"VAR {first} =", value)):
        asked.append(("traced variable", f"What is the value of VAR {cue.split()[1]}?", cue, (answer,)))
    return lines, asked


def documents(tokenizer: Any, length: int) -> list[Document]:
    """Pieces of the held-out documentation of about that many tokens with needles in them; of one length no two share a token."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = encode("\n\n".join(split(pydoc_data.topics.topics)[1]))
    told = [{"role": "user", "content": MARK}]
    before, after = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True).split(MARK)
    found, start = [], 0
    for number in range(DOCUMENTS[length]):
        lines, asked = needles(number)
        size = length - sum(len(encode(line + "\n")) for _, line in lines) - len(encode(before))
        text, rest = stream[start : start + size], stream[start + size : start + size + CONTINUATION]
        start += size + CONTINUATION
        questions = [Question(task, encode(f"\n\n{one}{after}"), encode(cue), accepted) for task, one, cue, accepted in asked]
        found.append(Document(encode(before) + encode(insert(tokenizer.decode(text), lines)), rest, questions))
    if len(stream) < start:
        raise ValueError(f"The held-out text has {len(stream)} tokens, {start} are needed")
    return found


def is_right(text: str, accepted: tuple[str, ...]) -> bool:
    """Whether the first word of an answer is one of those that are right."""
    word = re.match(r"\s*(\w+)", text)
    return word is not None and word[1] in accepted
