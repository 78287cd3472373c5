"""Commands that look: at a model, at the methods, at this machine. No weight is read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import catalogue
from .output import Json, columns, console, grid, print_json, say, working

group = typer.Typer()
PANEL = "Look"
ModelId = Annotated[str, typer.Argument(help="Folder or Hub id of a Transformers or Diffusers model or pipeline.")]


@group.command(rich_help_panel=PANEL)
def inspect(model: ModelId, as_json: Json = False) -> None:
    """Show where a model's streams, blocks, attention and heads are. Needs its config only, no weights."""
    from hf_tokens.commands.blueprint import anatomies, anatomy_as_plain

    found = working(lambda: anatomies(model))
    if as_json:
        print_json([anatomy_as_plain(part, one, base) for part, one, base in found])
        return
    for part, one, base in found:
        if part:
            console().print(f"[bold]{part}[/]")
        # as the VAE of nearly every pipeline
        say(f"{type(one).__name__}: no stream of Transformer blocks" if base is None else str(base))


@group.command("list", rich_help_panel=PANEL)
def list_methods(
    role: Annotated[str | None, typer.Option(help="Only the methods of this role.", autocompletion=catalogue.role_names)] = None,
    modality: Annotated[
        str | None,
        typer.Option(help="Only those for text, image, video, audio, diffusion or image-text.", autocompletion=catalogue.modality_names),
    ] = None,
    needs_training: Annotated[
        bool | None, typer.Option("--needs-training/--no-needs-training", help="Only those that need training, or that need none.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only those that fit this folder or Hub id. Reads its config only.")] = None,
    as_json: Json = False,
) -> None:
    """Every method: its name, its role, what it is for, what it needs, its paper."""
    cards = catalogue.chosen(role, modality, needs_training)
    if model is not None:
        from hf_tokens.commands.fits import methods_that_fit

        refused = working(lambda: methods_that_fit(model))
        cards = [card for card in cards if refused[card["name"]] is None]
    if as_json:
        print_json([{key: value for key, value in card.items() if key not in ("maths", "differs", "checked", "knobs")} for card in cards])
        return
    rows = [[card["name"], card["role"], ", ".join(card["modality"]), card["need"] or "", card["paper"]] for card in cards]
    typer.echo(columns([["name", "role", "for", "needs", "paper"], *rows]))
    typer.echo(f"{len(cards)} methods")


@group.command(rich_help_panel=PANEL)
def show(
    method: Annotated[str, typer.Argument(help="A name from `hf-tokens list`.", autocompletion=catalogue.method_names)],
    as_json: Json = False,
) -> None:
    """The card of a method: what it claims, its paper, what it needs, its maths and every knob."""
    card = catalogue.one_card(method)
    if as_json:
        print_json(card)
        return
    out = console()
    out.print(f"[bold]{card['name']}[/] [dim]{card['role']}, version {card['version']}, for {', '.join(card['modality'])}[/]")
    out.print(card["claim"], markup=False, highlight=False)
    for heading in ("paper", "needs", "maths", "differs", "checked"):
        if text := card[heading]:
            out.print(f"{heading.capitalize()}: {text}", markup=False, highlight=False)
    out.print(grid([f"knobs of {card['config']}", "default", "allowed", "meaning"], card["knobs"]))


@group.command(rich_help_panel=PANEL)
def recipe(
    job: Annotated[str, typer.Argument(help=f"One of: {', '.join(catalogue.jobs())}.", autocompletion=catalogue.job_names)],
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model that it is for.")],
    keep: Annotated[float, typer.Option(help="Share that stays, of what the job is about.")] = 0.5,
    as_json: Json = False,
) -> None:
    """The stack that won at a job, as YAML that `apply` reads, and what was measured of it."""
    from hf_tokens.commands.recipes import RECIPES_MEASURED, plain_stack, recipe_as_text, recipe_for

    if not as_json:
        typer.echo(working(lambda: recipe_as_text(job, model, keep)), nl=False)
        return
    stack = working(lambda: recipe_for(job, model, keep))
    print_json({"job": job, "keep": keep, "model": model, "methods": plain_stack(stack), "measured": RECIPES_MEASURED[job]})


@group.command(rich_help_panel=PANEL)
def doctor(as_json: Json = False) -> None:
    """Versions, devices, what works here, and what to install for the rest. Ends with 1 where something that is needed is not right."""
    from hf_tokens.commands.doctor import examine, is_well

    found = working(examine)
    if as_json:
        print_json(found)
    else:
        show_health(found)
    raise typer.Exit(0 if is_well(found) else 1)


def show_health(found: dict[str, Any]) -> None:
    out = console()
    state = lambda row: "" if row["right"] else "missing" if row["version"] is None else "out of bounds"
    rows = [[row["name"], row["version"] or "", row["wanted"], state(row)] for row in found["versions"]]
    out.print(grid(["package", "version", "wanted", ""], rows))
    for device in found["devices"]:
        say(", ".join(f"{key} {value}" if key in ("threads", "cores", "gigabytes") else str(value) for key, value in device.items()))
    methods = found["methods"]
    say(methods["broken"] or f"{methods['count']} methods, from {', '.join(methods['entry_points'])}")
    out.print(grid(["what", "here", "install"], [[row["what"], "yes" if row["works"] else "no", row["install"]] for row in found["works"]]))
