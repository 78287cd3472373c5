"""The pages of the site that are made of what stands elsewhere: cards, roles, results, the command line, the public names."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.testing import CliRunner

import hf_tokens
import hf_tokens_cli
from hf_tokens.commands.cards import BENCH, ROOT, overview, speeds, table_row
from hf_tokens.roles.registry import MethodInfo, list_methods
from hf_tokens.roles.signals import SIGNALS

RESULTS = ROOT / "benchmarks" / "results"
LINK = re.compile(r"(?<!!)\[([^]]+)\]\((?!http|#)([^)]+)\)")
OF_PLOT = ("tokens", "picture", "cache", "costs", "pareto")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation names each role."""
    roles = [{role: f"roles/{role}.md"} for role in sorted({info.role for info in built_in()})]
    config.nav = [{"Roles": roles} if "Roles" in entry else entry for entry in config.nav]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for path, text in {**dict(written()), **dict(copied())}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links into the repository that are no page of the site are plain words here."""
    known = {file.src_uri for file in files}
    here = Path(page.file.src_uri).parent

    def kept(match: re.Match) -> str:
        target = match[2].split("#")[0]
        uri = Path(os.path.normpath(here / target)).as_posix()
        return match[0] if uri in known or uri.rstrip("/") in known else match[1]

    return LINK.sub(kept, markdown)


def built_in() -> list[MethodInfo]:
    return [info for info in list_methods() if info.cls.__module__.startswith("hf_tokens_adapters.")]


def written() -> Iterator[tuple[str, str]]:
    """Path of a page and its text."""
    methods = built_in()
    yield "methods.md", f"# Every method\n\n{overview(methods, 'cards/')}\n"
    roles = sorted({info.role for info in methods})
    for role in roles:
        yield f"roles/{role}.md", role_page(role, [info for info in methods if info.role == role])
    yield "benchmarks/speed.md", speed_page()
    yield "compatibility.md", compatibility_page(methods)
    yield "commands.md", commands_page()
    yield "reference.md", reference_page()


def copied() -> Iterator[tuple[str, str | bytes]]:
    """Cards and results as they are, with their pictures."""
    for card in sorted((ROOT / "model_cards").glob("*.md")):
        if card.stem not in ("template", "INDEX"):
            yield f"cards/{card.name}", card.read_text()
    yield "benchmarks/families.md", (RESULTS / "families.md").read_text()
    yield "benchmarks/sweep.md", (RESULTS / "sweep.md").read_text()
    yield "benchmarks/quality.md", (RESULTS / "quality" / "README.md").read_text()
    for picture in sorted((RESULTS / "quality").glob("*.png")):
        yield f"benchmarks/{picture.name}", picture.read_bytes()


def role_page(role: str, methods: list[MethodInfo]) -> str:
    """What a role decides, its verb, and its methods."""
    base = next(cls for cls in methods[0].cls.__mro__ if cls.__name__ == role)
    verb = getattr(base, base.verb)
    counted = f"\n`record`, `summary` and a trainer's logs count what is **{base.counts}**.\n" if base.counts else ""
    sites = ", ".join(f"`{site}`" for site in base.sites)
    return f"""# {role}

{with_fences(inspect.getdoc(base))}

**Verb** `{base.verb}{inspect.signature(verb)}`

{inspect.getdoc(verb) or ""}

**Sites** {sites}
{counted}
{overview(methods, "../cards/", ("for", "needs", "what it does"))}
"""


def with_fences(text: str) -> str:
    """A docstring in Markdown: its examples as code."""
    return re.sub(r"(^>>>.*?)(?=\n\n|\Z)", r"```pycon\n\1\n```", text, flags=re.MULTILINE | re.DOTALL)


def speed_page() -> str:
    return f"""# What surgeries cost and save

Paired runs on one CPU thread, ratios only, by `make bench`. How much bookkeeping weighs hangs on the processor: measure with yours.

{speeds(json.loads(BENCH.read_text()))}
"""


def compatibility_page(methods: list[MethodInfo]) -> str:
    """Which method goes into which family, as `benchmarks/families.py` found it."""
    found = json.loads((RESULTS / "compatibility.json").read_text())
    families, rows = found["families"], []
    for info in methods:
        takes = found["methods"].get(info.name, [])
        if not takes:
            continue  # of a denoiser, or applied by a function of its own
        rows.append(f'??? note "{info.name}: {len(takes)} of {len(families)} families"\n\n    {", ".join(takes) or "none"}\n')
    also = "Methods for denoisers go into [those of diffusers](benchmarks/sweep.md). `hf-tokens list --model ID` tries a model of yours."
    return "\n".join(["# Which methods go into which model", "", found["says"], also, "", *rows])


def commands_page() -> str:
    """The help of every command."""
    app, runner, out = hf_tokens_cli.app.app, CliRunner(), ["# The command line", ""]
    for arguments in ([], *([name] for name in typer.main.get_command(app).commands)):
        help_text = runner.invoke(app, [*arguments, "--help"], env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}).stdout
        out += [
            f"## {' '.join(['hf-tokens', *arguments])}",
            "",
            "```",
            re.sub(r"[ \t]+$", "", help_text, flags=re.MULTILINE).strip(),
            "```",
            "",
        ]
    return "\n".join(out)


def reference_page() -> str:
    """Every public name, by the module where it lives."""
    out = ["# Python", "", "Everything is imported from `hf_tokens`.", ""]
    for module, names in hf_tokens.PUBLIC.items():
        out += [f"## {module}", ""]
        for name in names:
            where = inspect.getmodule(getattr(hf_tokens, name))
            place = where.__name__ if where is not None and where.__name__.startswith("hf_tokens") else f"hf_tokens.{module}"
            out += [f"::: {place}.{name}", ""]
    out += ["## plot", "", *(f"::: hf_tokens.plot.{name}\n" for name in OF_PLOT)]
    out += ["## Signals", "", "What a verb may name.", "", table_row(["signal", "meaning"]), table_row(["---", "---"])]
    out += [table_row([f"`{name}`", meaning]) for name, meaning in SIGNALS.items()]
    return "\n".join(out)
