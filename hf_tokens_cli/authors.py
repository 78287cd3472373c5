"""What the author of a method runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new_method(
    name: Annotated[str, typer.Argument(help="The method's name: small letters, digits and hyphens.")],
    role: Annotated[str, typer.Option(help="Its role, such as TokenReducer: see `hf-tokens list`.")],
    package: Annotated[Path, typer.Option(help="Where the package goes: a folder that is empty or not there.")],
) -> None:
    """Start a method in a package of its own: a method that works, its test, and the whole contract."""
    from hf_tokens.commands.package import write_package

    for path in write_package(name, role, package):
        typer.echo(path)


def add_to(app: typer.Typer) -> None:
    """Give the command line the commands of this file."""
    app.command("new-method")(new_method)
