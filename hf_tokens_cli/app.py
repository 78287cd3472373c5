"""The command line: look at models and methods, work with them, share what comes out. What needs PyTorch is imported by its command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import authors, looking, sharing, working

DISTRIBUTION = "hf-tokens"

app = typer.Typer(name=DISTRIBUTION, no_args_is_help=True, pretty_exceptions_enable=False)
for group in (looking.group, working.group, sharing.group):
    app.add_typer(group)
authors.add_to(app)


def show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"hf-tokens {version(DISTRIBUTION)}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Model surgery for Hugging Face models: learnable tokens, routers and compression in pretrained models."""


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
