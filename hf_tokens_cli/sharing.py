"""Commands that bring an adapter to the Hub and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, console, grid, print_json, say, working

group = typer.Typer()
PANEL = "Share"


@group.command(rich_help_panel=PANEL)
def push(
    folder: Annotated[Path, typer.Argument(help="The folder of an adapter.")],
    repo: Annotated[str, typer.Argument(help="Hub id, such as me/smollm2-snap; it is made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload adapter",
    as_json: Json = False,
) -> None:
    """Upload an adapter with its card. Its files are checked before."""
    from hf_tokens.commands.hub import push as upload

    done = working(lambda: upload(folder, repo, private, message))
    if as_json:
        print_json(done)
    else:
        say(f"{done['url']}: {len(done['methods'])} methods, {done['bytes'] / 1e3:.0f} kB")


@group.command(rich_help_panel=PANEL)
def pull(
    repo: Annotated[str, typer.Argument(help="Hub id or folder of an adapter.")],
    output: Annotated[Path | None, typer.Option(help="Folder to put it in. Default: the cache of the Hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: Json = False,
) -> None:
    """Download an adapter, check its files, and say what it does; no model is loaded."""
    from hf_tokens.commands.hub import pull as download

    found = working(lambda: download(repo, output, revision))
    if as_json:
        print_json(found)
        return
    show_contents(found)


@group.command(rich_help_panel=PANEL)
def card(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")],
    output: Annotated[Path | None, typer.Option(help="A file to write it to. Default: print it.")] = None,
    as_json: Json = False,
) -> None:
    """The card of an adapter, made anew from what it holds: what it does, two lines that load it, its knobs."""
    import hf_tokens

    made = working(lambda: hf_tokens.card(hf_tokens.load(adapter)))
    if output is not None:
        made.save(output)
    if as_json:
        print_json({"data": made.data.to_dict(), "text": made.text, "file": output})
    elif output is None:
        typer.echo(str(made))


def show_contents(found: dict[str, Any]) -> None:
    say(f"{found['adapter']}, for {found['base']}: {found['bytes'] / 1e3:.0f} kB in {found['folder']}")
    knobs = lambda method: ", ".join(f"{k}={v}" for k, v in method["config"].items() if k not in ("method", "version", "peft_type"))
    rows = [[method["method"], method["role"], method["does"].split(": ", 1)[-1], knobs(method)] for method in found["methods"]]
    console().print(grid(["method", "role", "does", "knobs"], rows))
    say(f"import hf_tokens\nmodel = hf_tokens.load({found['adapter']!r})")
