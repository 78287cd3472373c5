"""The function `transplant`: a model gets another tokenizer's vocabulary by rows that a VocabularyEdit makes from the rows it has.

It is no adapter: an adapter that is switched off would leave the ids of one tokenizer to the rows of another. The result is a plain
model that saves as one; `undo` gives back its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import UnsupportedError, explain
from ..model.anatomy import image_tokens
from ..roles.config import MethodConfig
from ..roles.registry import method_config, method_info
from ..roles.vocabulary_edit import VocabularyEdit
from ..tokens.token_map import in_float32
from .progress import track
from .undo import AllOrNothing

CHUNK = 1024  # rows that are made at once
ROLES = {"bos": ("bos", "cls"), "eos": ("eos", "sep"), "cls": ("cls", "bos"), "sep": ("sep", "eos"), "pad": ("pad",), "unk": ("unk",)}


@dataclass
class Transplant:
    """What a transplant did, and how to undo it.

    Attributes:
        model: The model, with the new vocabulary.
        shared: Tokens that both vocabularies have; their rows are the model's own.
        unseen: Tokens whose rows were made.
    """

    model: nn.Module
    shared: int
    unseen: int
    changes: list[tuple[Callable[[Any], None], Any]] = field(default_factory=list, repr=False)  # setters, each with the value before

    def undo(self) -> nn.Module:
        """Give the model its own rows back: the same tensors as before."""
        while self.changes:
            put, value = self.changes.pop()
            put(value)
        return self.model

    def put(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute, to be undone."""
        self.changes.append((lambda old: setattr(target, name, old), getattr(target, name)))
        setattr(target, name, value)


def transplant(
    model: nn.Module,
    tokenizer: Any,
    donor_embeddings: Tensor,
    donor_tokenizer: Any,
    method: str | dict | MethodConfig,
    donor_head: Tensor | None = None,
) -> Transplant:
    """Give a model another tokenizer's vocabulary.

    Args:
        model: A Transformers model with one vocabulary. It is changed in place.
        tokenizer: Its tokenizer.
        donor_embeddings: Rows of the donor's tokens in any space that places them by what they mean, such as its own model's input
            embeddings, (v e).
        donor_tokenizer: The tokenizer that the model is to have.
        method: The name or config of a VocabularyEdit.
        donor_head: The rows of the donor model's head, if the model's head should be made from them and not from the embeddings.

    Returns:
        What was done. The model saves by `save_pretrained` like any other, beside the donor's tokenizer.

    Raises:
        UnsupportedError: The model is no plain one with a vocabulary of its own, or the tokenizers share no token. After this or an
            interrupt the model is as it was.
    """
    config = method_config(method)
    info = method_info(config.method, config.version)
    if info.role != VocabularyEdit.role:
        raise UnsupportedError(explain("`transplant` needs a method of the role VocabularyEdit", repr(info.name), "See `hf-tokens list`."))
    tables = find_tables(model, donor_head)
    base_ids, donor_ids, roles = shared(tokenizer, donor_tokenizer)
    size, rows = max(donor_tokenizer.get_vocab().values()) + 1, min(len(table.weight) for table in tables)
    check_rows(donor_embeddings, donor_head, size, max(base_ids.tolist() + list(roles.values())), rows)
    edit, done = info.cls(config), Transplant(model, len(base_ids) + len(roles), size - len(base_ids) - len(roles))
    known = torch.zeros(size, dtype=torch.bool)
    known[torch.cat([donor_ids, torch.tensor(list(roles), dtype=torch.long)])] = True
    unseen = (~known).nonzero().flatten()
    with AllOrNothing((), done.undo):
        for group in {False, True} if donor_head is not None else {False}:
            chosen = [table for table in tables if donor_head is None or table.head == group]
            space = in_float32((donor_head if group else donor_embeddings).detach())
            own = torch.cat([in_float32(table.rows.detach()) for table in chosen], dim=1)  # all that are made from one space, at once: v d
            made = own.new_empty(size, own.shape[1])
            made[donor_ids.to(own.device)] = own[base_ids.to(own.device)]
            for donor, base in roles.items():
                made[donor] = own[base]
            anchors = {"anchors": own[base_ids], "donor_anchors": space[donor_ids].to(own.device)}
            for ids in track(unseen.split(CHUNK), "transplant: rows"):
                made[ids] = call(edit, {**anchors, "donor_rows": space[ids].to(own.device)})
            for table, part in zip(chosen, made.split([table.rows.shape[1] for table in chosen], dim=1), strict=True):
                replace(done, table, part)
        resize(done, size, tokenizer, donor_tokenizer, dict(zip(base_ids.tolist(), donor_ids.tolist(), strict=True)))
    return done


@torch.no_grad()
def call(edit: VocabularyEdit, signals: dict[str, Tensor]) -> Tensor:
    """The rows that the verb makes of the signals that it names."""
    return edit.rows(**{name: signals[name] for name in edit.signals})


@dataclass(frozen=True, eq=False)
class Table:
    """A parameter with a row for each token, wherever it stands.

    Attributes:
        weight: The parameter, (v d) or (v).
        head: Whether it belongs to the head alone.
        places: The modules that hold it, with its name in them: one, or several if it is tied.
    """

    weight: nn.Parameter
    head: bool
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def rows(self) -> Tensor:
        return self.weight if self.weight.dim() == 2 else self.weight[:, None]


def find_tables(model: nn.Module, donor_head: Tensor | None) -> list[Table]:
    """The embeddings, and the head and its bias where they are no part of them. A model with another vocabulary is refused, and one
    with more than embeddings and a head for this one."""
    check_model(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = {id(embeddings.weight): (embeddings.weight, False)}
    for name in ("weight", "bias"):
        weight = None if head is None else vars(head)["_parameters"].get(name)
        if weight is not None:
            weights.setdefault(id(weight), (weight, True))
    places: dict[int, list] = {key: [] for key in weights}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in weights:
                places[id(weight)].append((module, name))
            elif isinstance(module, nn.Embedding) and module.num_embeddings == len(embeddings.weight):
                rule = "A vocabulary is transplanted where the embeddings and the head are all that has a row for each token"
                raise UnsupportedError(explain(rule, f"another {type(module).__name__} in {type(model).__name__}", "Choose another model."))
    tables = [Table(weight, head, tuple(places[key])) for key, (weight, head) in weights.items()]
    check_tables(model, tables, donor_head)
    return tables


def check_model(model: nn.Module) -> None:
    """Refuse a model that reads more than one vocabulary, or none of its own."""
    if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
        rule = "A vocabulary is given to a Transformers model itself"
        raise UnsupportedError(explain(rule, type(model).__name__, "Transplant first, then put adapters into it."))
    images = image_tokens(model)
    if images or model.config.is_encoder_decoder:
        rule = "A vocabulary is transplanted in a model of text alone, with one stack of blocks"
        got = f"{type(model).__name__}, with {f'image tokens {images}' if images else 'an encoder and a decoder'}"
        raise UnsupportedError(explain(rule, got, "Transplant its language model."))


def check_tables(model: nn.Module, tables: list[Table], donor_head: Tensor | None) -> None:
    """Refuse tables that no others can stand in for, and a head for a model whose head is tied."""
    for weight in (table.weight for table in tables):
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            rule, got = "Rows of a vocabulary are plain floating-point parameters", f"{type(weight).__name__} of {weight.dtype}"
            raise UnsupportedError(explain(rule, got, "Load the model without quantisation, and take adapters out."))
    if donor_head is not None and not any(table.head for table in tables):
        rule = "A donor's head makes the rows of a head that is not tied to the embeddings"
        raise UnsupportedError(explain(rule, f"the tied head of {type(model).__name__}", "Leave `donor_head` out."))


def check_rows(donor_embeddings: Tensor, donor_head: Tensor | None, size: int, highest: int, rows: int) -> None:
    """Refuse matrices that lack rows of their tokenizer."""
    for name, matrix in (("donor_embeddings", donor_embeddings), ("donor_head", donor_head)):
        if matrix is not None and (matrix.dim() != 2 or len(matrix) < size):
            rule = f"`{name}` has a row for each token of the donor's tokenizer, ({size} e)"
            raise UnsupportedError(explain(rule, tuple(matrix.shape), "Pass the matrix of the model that it belongs to."))
    if highest >= rows:
        rule = "The model has a row for each token of its tokenizer"
        raise UnsupportedError(explain(rule, f"token {highest} for {rows} rows", "Pass the tokenizer that it was trained with."))


def replace(done: Transplant, table: Table, rows: Tensor) -> None:
    """Put new rows in the place of a table, in all its places."""
    old = table.weight
    new = nn.Parameter(rows.reshape(len(rows), *old.shape[1:]).to(old).contiguous(), requires_grad=old.requires_grad)
    for module, name in table.places:
        done.put(module, name, new)
        for count in ("num_embeddings", "out_features"):
            if vars(module).get(count) == len(old):
                done.put(module, count, len(new))


def resize(done: Transplant, size: int, tokenizer: Any, donor_tokenizer: Any, to_donor: dict[int, int]) -> None:
    """Write the new vocabulary into the model and its configs."""
    model = done.model
    text = model.config.get_text_config()
    before = text.vocab_size
    for module in model.modules():
        if vars(module).get("vocab_size") == before:
            done.put(module, "vocab_size", size)
    for config in {id(c): c for c in (model.config, text, vars(model).get("generation_config")) if c is not None}.values():
        if vars(config).get("vocab_size") == before:
            done.put(config, "vocab_size", size)
        for name, value in list(vars(config).items()):
            if name.endswith("_token_id") and value is not None:
                done.put(config, name, new_id(name, value, tokenizer, donor_tokenizer, to_donor))
    embeddings = model.get_input_embeddings()
    if embeddings.padding_idx is not None:
        done.put(embeddings, "padding_idx", role_id(donor_tokenizer, "pad"))


def new_id(name: str, value: Any, tokenizer: Any, donor_tokenizer: Any, to_donor: dict[int, int]) -> Any:
    """What a token id in a config becomes: that of the same role, else of the same token; None where there is none."""
    if isinstance(value, (list, tuple)):
        ids = dict.fromkeys(new_id(name, id_, tokenizer, donor_tokenizer, to_donor) for id_ in value)
        return [id_ for id_ in ids if id_ is not None] or None
    role = name.removesuffix("_token_id")
    if role in ROLES and value == role_id(tokenizer, role) or value not in to_donor:
        return role_id(donor_tokenizer, role)
    return to_donor[value]


def role_id(tokenizer: Any, role: str) -> int | None:
    """The id of the token that has a role, or the nearest one."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in ROLES.get(role, ()))
    return next((id_ for id_ in ids if id_ is not None), None)


def surfaces(tokenizer: Any) -> dict[bytes, int]:
    """The text of each token in UTF-8, a space in front where a word begins, to its id; without special tokens."""
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    marks = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in READ}
    read = READ[max(marks, key=marks.get)] if any(marks.values()) else str.encode
    order = sorted(vocabulary, key=lambda token: (not token.startswith("<0x"), -vocabulary[token]))  # a byte counts where no text does
    return {read(token): vocabulary[token] for token in order if vocabulary[token] not in special}


BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


def byte_level(token: str) -> bytes:
    """As GPT-2 writes bytes."""
    return bytes(BYTES[char] for char in token) if all(char in BYTES for char in token) else token.encode()


def sentence_piece(token: str) -> bytes:
    """A space is a low line, a byte a hexadecimal number."""
    return bytes([int(token[3:5], 16)]) if token.startswith("<0x") and len(token) == 6 else token.replace("▁", " ").encode()


def word_piece(token: str) -> bytes:
    """Tokens that continue a word are marked, not those that begin one."""
    return token.removeprefix("##").encode() if token.startswith("##") else b" " + token.encode()


READ: dict[str, Callable[[str], bytes]] = {"Ġ": byte_level, "▁": sentence_piece, "##": word_piece}


def shared(tokenizer: Any, donor_tokenizer: Any) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Ids of the tokens with the same text in both vocabularies, (a) each; and donor's id to own id of special tokens with one role.

    Raises:
        UnsupportedError: There are none.
    """
    base_surfaces, donor_surfaces = surfaces(tokenizer), surfaces(donor_tokenizer)
    pairs = [(base_surfaces[text], id_) for text, id_ in donor_surfaces.items() if text in base_surfaces]
    if not pairs:
        rule = "A transplant needs tokens that both vocabularies have"
        raise UnsupportedError(explain(rule, f"none of {len(donor_surfaces)}", "Pass the two tokenizers in the right order."))
    vocabulary, special = tokenizer.get_vocab(), set(donor_tokenizer.all_special_ids)
    roles = {id_: vocabulary[token] for token, id_ in donor_tokenizer.get_vocab().items() if id_ in special and token in vocabulary}
    for role in ROLES:
        base_id, donor_id = role_id(tokenizer, role), getattr(donor_tokenizer, f"{role}_token_id", None)
        if base_id is not None and donor_id is not None:
            roles.setdefault(donor_id, base_id)
    base_ids, donor_ids = torch.tensor(pairs, dtype=torch.long).unbind(dim=1)
    return base_ids, donor_ids, roles
