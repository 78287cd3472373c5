"""The command line: look into a model, read the methods' cards, run the main job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Options

app = typer.Typer(name="hf-tokens", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Model surgery for Hugging Face models: learnable tokens, routers and compression in pretrained models."""


@app.command()
def inspect(model: Annotated[str, typer.Argument(help="Folder or Hub id of a Transformers or Diffusers model or pipeline.")]) -> None:
    """Show where a model's streams, blocks, attention and heads are. Needs its config only, no weights."""
    import hf_tokens

    from ..errors import UnsupportedError
    from .blueprint import blueprints

    for part, found in blueprints(model):
        if part:
            console().print(f"[bold]{part}[/]")
        try:
            text = str(hf_tokens.anatomy(found))
        except UnsupportedError:
            if not part:
                raise
            text = f"{type(found).__name__}: no stream of Transformer blocks"  # as in the VAE of nearly every pipeline
        console().print(text, markup=False, highlight=False, soft_wrap=True)


@app.command("list")
def list_methods(role: Annotated[str | None, typer.Option(help="Only the methods of this role.")] = None) -> None:
    """Every method: its name, its role, its paper."""
    import hf_tokens

    from ..errors import HFTokensError, explain

    found = hf_tokens.list_methods()
    if role is not None and role not in {info.role for info in found}:
        raise HFTokensError(explain(f"A role must be one of {sorted({info.role for info in found})}", repr(role), "See `hf-tokens list`."))
    chosen = [info for info in found if role in (None, info.role)]
    console().print(grid(["name", "role", "paper"], [[info.name, info.role, info.paper] for info in chosen]))
    console().print(f"{len(chosen)} methods")


@app.command()
def show(method: Annotated[str, typer.Argument(help="A name from `hf-tokens list`.")]) -> None:
    """The card of a method: what it claims, its paper, its maths and every knob."""
    from ..roles.registry import method_info
    from .cards import knob_rows

    info = method_info(method)
    out = console()
    out.print(f"[bold]{info.name}[/] [dim]{info.role}, version {info.version}[/]")
    for heading, text in (("", info.claim), ("Paper", info.paper), ("Maths", info.maths), ("Differs", info.differs)):
        if text:
            out.print(f"{heading + ': ' if heading else ''}{text}", markup=False, highlight=False)
    out.print(grid([f"knobs of {info.config.__name__}", "default", "allowed", "meaning"], knob_rows(info)))


@app.command()
def quickstart(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a causal language model. Default: SmolLM2-135M from PyPI.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = Options.steps,
    seq_len: Annotated[int, typer.Option(min=32, help="Tokens per piece of text.")] = Options.seq_len,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = Options.output,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = Options.seed,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: what torch takes.")] = None,
) -> None:
    """The main job on two CPU cores: operate on a model, train it, measure it, save it, load it elsewhere, take it out again."""
    from .blueprint import check_source
    from .quickstart import run

    if model is not None:
        check_source(model)
    run(Options(model=model, steps=steps, seq_len=seq_len, output=output, seed=seed, threads=threads))


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
        from ..errors import HFTokensError

        text = str(error)
        message = text if isinstance(error, HFTokensError) or not text else text.splitlines()[0]
        print(f"hf-tokens: {message or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
