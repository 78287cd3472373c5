"""A cache compressor as a page of code that runs without hf-tokens: its own words, with what they call, behind the mechanism of page.py."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, explain
from ..roles.base import Method
from ..roles.registry import MethodInfo, method_info

PAGE = Path(__file__).with_name("page.py")
METHOD_BEGINS = "# -- the method"  # where the code of a method begins in it
PACKAGES = ("hf_tokens", "hf_tokens_adapters")
OF_THE_CODE = ("torch", "transformers")
LAST_ALONE = "of_last"  # the one word of the signal `scores` that a page has


def repository(method: Method) -> dict[str, str]:
    """The files of a repository by their names, for a method that leaves as code.

    Raises:
        UnsupportedError: It learned something, or calls what cannot be written down.
    """
    config = method.config
    info = method_info(config.method, config.version)
    rule = f"{info.name!r} leaves as code if its words need nothing but torch"
    if held := [name for name, _ in (*method.named_parameters(), *method.named_buffers())]:
        raise UnsupportedError(explain(rule, f"the tensors {held}, which would be lost", "Save the adapter instead."))
    if config.stream is not None:
        raise UnsupportedError(explain(rule, f"stream={config.stream!r}", "Leave the stream out: a page acts in a decoder."))
    code, needs = definitions(type(method), rule)
    page = PAGE.read_text(encoding="utf-8")
    page = page[: page.index(METHOD_BEGINS)].rstrip()
    page = page[page.index('"""\n') :]  # behind what its docstring says
    written = f"In torch and Transformers alone; written by hf-tokens {version('hf-tokens')}."
    doc = f'"""{info.claim}\n\nPaper:   {info.paper}\n\n{written}\n{page}'
    knobs = {f.name: getattr(config, f.name) for f, _ in config.knobs() if f.name != "stream"}
    kinds = ("ge", "gt", "le", "lt")
    bounds = {f.name: {k: f.metadata[k] for k in kinds if k in f.metadata} for f, _ in config.knobs() if f.name in knobs}
    bounds = {name: bound for name, bound in bounds.items() if bound and name != "layers"}
    name = f"compressed_{re.sub(r'[^a-z0-9]+', '_', info.name.lower())}"
    facts = f"INTERFACE, CONFIG_NAME = {name!r}, {type(config).__name__!r}\nKNOBS = {knobs!r}\nLIMITS = {bounds!r}\n"
    extra = "".join(f"{line}\n" for line in sorted(needs))
    text = f"{doc}\n\n\n# -- the method {'-' * 105}\n{extra}\n{facts}\n\n{code}"
    ast.parse(text)
    return {
        "custom_generate/generate.py": text,
        "custom_generate/requirements.txt": requirements(),
        "README.md": readme(info, knobs, config),
    }


def requirements() -> str:
    """What the code needs, in the versions that hf-tokens itself takes."""
    known = {re.match(r"[A-Za-z0-9_.-]+", line)[0]: line for line in requires("hf-tokens") or () if "extra ==" not in line}
    return "".join(f"{known[name]}\n" for name in OF_THE_CODE)


def definitions(cls: type[Method], rule: str) -> tuple[str, set[str]]:
    """The source of a method's class as a page has it, behind that of what it calls; and the imports that this needs."""
    words = own_words(cls)
    found: dict[str, str] = {}
    needs: set[str] = set()
    for word in words:
        collect(word, found, needs, rule)
    bodies = [textwrap.indent(textwrap.dedent(inspect.getsource(word)), "    ") for word in words]
    slack = isinstance(inspect.getattr_static(cls, "slack", 0), property)
    facts = [f"    signals, decodes = {cls.signals!r}, {cls.decodes!r}\n"]
    facts += ['    slack = property(lambda self: getattr(self.config, "slack", 0))\n'] if slack else []
    body = "\n".join([*facts, *bodies])
    return "\n\n".join([*(part for part in found.values()), f"class Compressor(PlainCompressor):\n{body}"]), needs


def own_words(cls: type[Method]) -> list[Any]:
    """The functions of a method that its page has: its verb, its budget and check, and those of its own that these call."""
    words: dict[str, Any] = {}
    todo = [cls.verb, "budget", *(["check"] if "check" in vars(cls) else [])]
    while todo:
        name = todo.pop(0)
        word = inspect.getattr_static(cls, name, None)
        function = word.__func__ if isinstance(word, (classmethod, staticmethod)) else word
        if name in words or not isinstance(function, types.FunctionType):
            continue
        words[name] = function
        todo += [
            node.attr for node in ast.walk(parsed(function)) if isinstance(node, ast.Attribute) and named(node.value) in ("self", "cls")
        ]
    return [*words.values()]


def parsed(thing: Any) -> ast.Module:
    """The syntax tree of a function or class, without annotations, which a page does not read."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    return tree


def named(node: ast.AST) -> str | None:
    """The name that a node is."""
    return node.id if isinstance(node, ast.Name) else None


def collect(thing: Any, found: dict[str, str], needs: set[str], rule: str) -> None:
    """Collect what a function or class names of its module: the source of what is ours, in the order of use, and imports of the rest."""
    tree = parsed(thing)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and named(node.value) == "scores" and node.attr != LAST_ALONE:
            raise UnsupportedError(explain(rule, f"`scores.{node.attr}` of all queries", "Save the adapter instead."))
    scope = inspect.getmodule(thing).__dict__
    for name in dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in scope):
        value = scope[name]
        if value is thing or name in found or name in ("SimpleNamespace", "Any", "Tensor", "torch", "MethodConfig"):
            continue
        home = getattr(inspect.getmodule(value), "__name__", "")
        if isinstance(value, (bool, int, float, str)):
            found[name] = f"{name} = {value!r}\n"
        elif isinstance(value, types.ModuleType):
            needs.add(f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}"))
        elif home.partition(".")[0] not in PACKAGES:
            needs.add(f"from {home} import {value.__name__}" + ("" if value.__name__ == name else f" as {name}"))
        elif isinstance(value, (types.FunctionType, type)):
            found[name] = ""  # it may name itself
            collect(value, found, needs, rule)
            found[name] = found.pop(name) or textwrap.dedent(inspect.getsource(value))
        else:
            raise UnsupportedError(explain(rule, f"{name}, {type(value).__name__}", "Save the adapter instead."))


def readme(info: MethodInfo, knobs: dict[str, Any], config: Any) -> str:
    """What stands in front of the code for a stranger."""
    rows = "\n".join(f"| `{f.name}` | {knobs[f.name]!r} | {f.metadata['help']} |" for f, _ in config.knobs() if f.name in knobs)
    return f"""---
library_name: transformers
tags: [custom_generate, hf-tokens, {info.name}]
---

# {info.name}

{info.claim}

```python
model.generate(**inputs, custom_generate="<this repository>", trust_remote_code=True)
```

| argument | default | |
|---|---|---|
{rows}

It needs a decoder whose blocks attend to all that came, and takes one row or a padded batch. Attention runs by torch's own (`sdpa`).

Paper: {info.paper}

Written by hf-tokens {version("hf-tokens")}; `hf_tokens.export(model, folder, form="custom-generate")` writes it again.
"""
