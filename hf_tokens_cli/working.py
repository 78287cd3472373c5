"""Commands that work with a model: put methods in, train, count, compare, shorten."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import catalogue
from .options import Options
from .output import Json, console, grid, print_json, say, working

group = typer.Typer()
PANEL = "Work"
Source = Annotated[
    str, typer.Argument(help="A model or an adapter, folder or Hub id; or the file of a recipe, as `hf-tokens recipe` writes.")
]
Methods = Annotated[
    list[str] | None,
    typer.Argument(help="Methods with their knobs, such as `snapkv:budget=0.25,window=32`.", autocompletion=catalogue.method_names),
]
Device = Annotated[str | None, typer.Option(help="Where, such as cpu or cuda. Default: a GPU where there is one.")]


@group.command(rich_help_panel=PANEL)
def apply(
    source: Source,
    methods: Methods = None,
    output: Annotated[Path | None, typer.Option(help="Folder to save the adapter in. Without it no weight is read.")] = None,
    as_json: Json = False,
) -> None:
    """Say where methods go in a model and what they do; with --output, put them in and save the adapter."""
    from hf_tokens.commands.apply import save_methods, where_they_go
    from hf_tokens.commands.sources import read_source

    named = read_source(source, methods or ())
    placed = working(lambda: where_they_go(named))
    saved = None if output is None else working(lambda: save_methods(named, output))
    if as_json:
        print_json({"model": named.model, "methods": placed, "saved": saved})
        return
    show_placed(named.model, placed)
    if saved is not None:
        say(f"{saved['folder']}: {saved['trainable']:,} numbers to train, {saved['bytes'] / 1e3:.0f} kB")


def show_placed(model: str, placed: list[dict[str, Any]]) -> None:
    from hf_tokens.commands.apply import ranges

    say(model)
    where = lambda row: f"{row['part'] and row['part'] + ', '}{row['stream']}, blocks {ranges(tuple(row['layers']))} of {row['blocks']}"
    rows = [[row["method"], where(row), row["does"].split(": ", 1)[-1], row["needs"]] for row in placed]
    console().print(grid(["method", "where", "does", "needs"], rows))


@group.command(rich_help_panel=PANEL)
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML with `model`, `methods`, `data` and `training`, the last of TrainingArguments.")],
    check: Annotated[bool, typer.Option("--check", help="Check the recipe, and say where its methods go; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train methods in a language model on texts of yours, with transformers' Trainer, as a recipe says."""
    from hf_tokens.commands.recipe_file import read_recipe
    from hf_tokens.commands.train import check_recipe, train_recipe

    read = read_recipe(recipe)
    if check:
        placed = working(lambda: check_recipe(read))
        if as_json:
            print_json({"model": read.model, "methods": placed})
        else:
            show_placed(read.model, placed)
        return
    done = working(lambda: train_recipe(read))
    if done is None:  # a process beside the first
        return
    if as_json:
        print_json(done)
        return
    shown = {name: value for name, value in done.items() if name != "losses" and value is not None}
    if done["losses"]:
        shown |= {"first loss": done["losses"][0], "last loss": done["losses"][-1]}
    text = lambda value: f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    console().print(grid(["", ""], [[name.replace("_", " "), text(value)] for name, value in shown.items()]))


@group.command(rich_help_panel=PANEL)
def measure(
    source: Source,
    methods: Methods = None,
    text: Annotated[Path | None, typer.Option(help="File with the text, or - for what comes in.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text itself.")] = None,
    image: Annotated[Path | None, typer.Option(help="File with a picture; a model of both reads it beside a text.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the text that are read. Default: all.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Count tokens, FLOPs and bytes of the KV cache of one forward, without the methods and with them."""
    from hf_tokens.commands.cost import cost_of, text_or_prompt
    from hf_tokens.commands.sources import best_device, read_source

    named, words = read_source(source, methods or ()), text_or_prompt(text, prompt)
    found = working(lambda: cost_of(named, words, image, tokens, best_device(device)))
    if as_json:
        print_json({"model": named.model, **found})
        return
    base, own = found["base"], found["with"]
    part = lambda name: f"{own[name] / base[name]:.2f}" if base[name] else ""
    names = {"tokens": "tokens in all blocks", "flops": "FLOPs", "kv_bytes": "bytes of the KV cache"}
    rows = [[label, f"{base[name]:,}", f"{own[name]:,}", part(name)] for name, label in names.items()]
    console().print(grid(["", "base", "with the methods", "share"], rows))


@group.command(rich_help_panel=PANEL)
def bench(
    source: Source,
    methods: Methods = None,
    text: Annotated[Path | None, typer.Option(help="File with a text, for a language model.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures, for a model that reads them; folders in it may be labels.")
    ] = None,
    vary: Annotated[
        str | None, typer.Option(help="A knob and its values, such as `budget=0.1,0.25`. Default: that of its strength.")
    ] = None,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a piece of text.")] = 512,
    most: Annotated[int, typer.Option(min=1, help="Pieces of text, or pictures, at most.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the timing, in which all take turns.")] = 7,
    output: Annotated[Path, typer.Option(help="Folder of the numbers and the picture.")] = Path("bench-output"),
    picture: Annotated[bool, typer.Option(help="Draw the picture, which needs matplotlib.")] = True,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Quality and speed of methods over the values of a knob, on a text or on pictures of yours: a table and a Pareto picture."""
    from hf_tokens.commands.bench import Extent, bench_as_plain, keep_bench, run_bench
    from hf_tokens.commands.sources import best_device, read_source

    named, extent = read_source(source, methods or ()), Extent(length, most, rounds, best_device(device))
    found = working(lambda: run_bench(named, vary, text, images, extent, picture))
    files = keep_bench(found, output, picture)
    if as_json:
        print_json({**bench_as_plain(found), "files": files})
        return
    told = {"speed": "speed", "prompt_speed": "speed of reading", "kv": "KV bytes", "flops": "FLOPs", "tokens": "tokens"}
    names = [name for name in told if vars(found.trials[0])[name] is not None]
    rows = [[t.setting, f"{t.quality:.4f}", *(f"{vars(t)[name]:.2f}" for name in names), ", ".join(t.best_in)] for t in found.trials]
    console().print(grid(["", found.quality, *(told[name] for name in names), "beaten by none in"], rows))
    say(f"Shares and speeds are those of the base. In {output}: {', '.join(Path(file).name for file in files.values())}")


@group.command("compress-prompt", rich_help_panel=PANEL)
def compress_prompt(
    source: Source,
    methods: Methods = None,
    text: Annotated[Path, typer.Option(help="File with the prompt, or - for what comes in.")] = Path("-"),
    instruction: Annotated[str | None, typer.Option(help="What stands in front of it, and stays whole.")] = None,
    question: Annotated[str | None, typer.Option(help="What stands behind it, and stays whole.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt that stay, in place of the method's share.")] = None,
    force: Annotated[list[str] | None, typer.Option(help="A text that stays wherever it stands; may be repeated.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Shorten a prompt for any other model: the text on stdout, how many tokens it had and has on stderr."""
    from hf_tokens.commands.shorten import shorten
    from hf_tokens.commands.sources import best_device, read_source, text_of_file

    named, words = read_source(source, methods or ()), text_of_file(text)
    found = working(lambda: shorten(named, words, instruction, question, max_tokens, force or [], best_device(device)))
    if as_json:
        print_json(found)
        return
    typer.echo(found["text"])
    typer.echo(f"{found['tokens_before']} tokens, {found['tokens']} are left", err=True)


@group.command(rich_help_panel=PANEL)
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
