"""The command line: look into a model, read the methods' cards, run the main job. What needs PyTorch is imported by its command."""

from __future__ import annotations

import json
import pkgutil
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from . import authors
from .options import Options

DISTRIBUTION, BUILT_IN, ENTRY_POINTS = "hf-tokens", "hf_tokens_adapters", "hf_tokens.methods"

app = typer.Typer(name="hf-tokens", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
authors.add_to(app)


def show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hf-tokens {version(DISTRIBUTION)}")
        raise typer.Exit()


def jobs() -> list[str]:
    """The jobs that a recipe is for, as `make cards` wrote them."""
    return [*json.loads(pkgutil.get_data(BUILT_IN, "recipes.json"))]


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Model surgery for Hugging Face models: learnable tokens, routers and compression in pretrained models."""


@app.command()
def inspect(model: Annotated[str, typer.Argument(help="Folder or Hub id of a Transformers or Diffusers model or pipeline.")]) -> None:
    """Show where a model's streams, blocks, attention and heads are. Needs its config only, no weights."""
    from hf_tokens import UnsupportedError, anatomy
    from hf_tokens.commands.blueprint import blueprints

    for part, found in blueprints(model):
        if part:
            console().print(f"[bold]{part}[/]")
        try:
            text = str(anatomy(found))
        except UnsupportedError:
            if not part:
                raise
            text = f"{type(found).__name__}: no stream of Transformer blocks"  # as in the VAE of nearly every pipeline
        console().print(text, markup=False, highlight=False, soft_wrap=True)


@app.command("list")
def list_methods(role: Annotated[str | None, typer.Option(help="Only the methods of this role.")] = None) -> None:
    """Every method: its name, its role, its paper."""
    cards = every_card() if third_parties() else built_in_cards()
    if role is not None:
        cards = [card for card in cards if card["role"] == role] or every_card(role)
    typer.echo(columns([["name", "role", "paper"], *([card["name"], card["role"], card["paper"]] for card in cards)]))
    typer.echo(f"{len(cards)} methods")


@app.command()
def show(method: Annotated[str, typer.Argument(help="A name from `hf-tokens list`.")]) -> None:
    """The card of a method: what it claims, its paper, its maths and every knob."""
    card = next((card for card in built_in_cards() if card["name"] == method), None) or one_card(method)
    out = console()
    out.print(f"[bold]{card['name']}[/] [dim]{card['role']}, version {card['version']}[/]")
    out.print(card["claim"], markup=False, highlight=False)
    for heading in ("paper", "maths", "differs", "checked"):
        if text := card[heading]:
            out.print(f"{heading.capitalize()}: {text}", markup=False, highlight=False)
    out.print(grid([f"knobs of {card['config']}", "default", "allowed", "meaning"], card["knobs"]))


@app.command()
def recipe(
    job: Annotated[str, typer.Argument(help=f"One of: {', '.join(jobs())}.")],
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model that it is for.")],
    keep: Annotated[float, typer.Option(help="Share that stays, of what the job is about.")] = 0.5,
) -> None:
    """The stack that won at a job, as YAML, and what was measured of it."""
    from hf_tokens.commands.recipes import recipe_as_text

    typer.echo(recipe_as_text(job, model, keep), nl=False)


@app.command()
def quickstart(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a causal language model. Default: SmolLM2-135M from PyPI.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = Options.steps,
    seq_len: Annotated[int, typer.Option(min=32, help="Tokens per piece of text that is trained on.")] = Options.seq_len,
    document: Annotated[int, typer.Option(min=32, help="Tokens of the text that questions are asked about.")] = Options.document,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = Options.output,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = Options.seed,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: what torch takes.")] = None,
) -> None:
    """The main job on two CPU cores: compress a document and ask about it, train, measure, save, load elsewhere, take out again."""
    from hf_tokens.commands.blueprint import check_source
    from hf_tokens.commands.quickstart import run

    if model is not None:
        check_source(model)
    run(Options(model=model, steps=steps, seq_len=seq_len, document=document, output=output, seed=seed, threads=threads))


def built_in_cards() -> list[dict[str, Any]]:
    """The cards of the built-in methods, as `make cards` wrote them."""
    return json.loads(pkgutil.get_data(BUILT_IN, "index.json"))


def third_parties() -> bool:
    """Whether a package with more methods is installed."""
    from importlib.metadata import entry_points

    return any(entry.value != BUILT_IN for entry in entry_points(group=ENTRY_POINTS))


def every_card(role: str | None = None) -> list[dict[str, Any]]:
    """The cards of all registered methods, or of those of one role."""
    from hf_tokens import list_methods
    from hf_tokens.commands.cards import index_entry

    return [index_entry(info) for info in list_methods(role)]


def one_card(method: str) -> dict[str, Any]:
    """The card of a registered method that is no built-in one."""
    from hf_tokens import method_info
    from hf_tokens.commands.cards import index_entry

    return index_entry(method_info(method))


def columns(rows: list[list[str]]) -> str:
    """Rows as plain columns, the last one folded at the edge of a terminal. A rich table takes 2 ms a row."""
    widths = [max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:-1]]
    left, edge = sum(widths), shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = []
    for *cells, last in rows:
        first, *more = textwrap.wrap(last, max(edge - left, 20)) or [""]
        lines += ["".join(map(str.ljust, cells, widths)) + first, *(" " * left + part for part in more)]
    return "\n".join(lines)


def console() -> Any:
    from rich.console import Console

    return Console()


def grid(headings: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")  # a name is never cut, however narrow the terminal
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        text, engine = str(error), sys.modules.get("hf_tokens")
        ours = engine is not None and isinstance(error, engine.HFTokensError)
        message = text if ours or not text else text.splitlines()[0]
        print(f"hf-tokens: {message or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
