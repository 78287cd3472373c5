"""A page: pick a recipe or a method and its strengths, and see the answer, the tokens and the cost beside the base's.

python examples/space/app.py                              # SmolLM2-135M and DINOv2-small
python examples/space/app.py --text MODEL --picture MODEL # a language model and an image classifier or tower, Hub ids or folders
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os.path
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.media import get_image
from matplotlib.ticker import EngFormatter
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer
from trials import Trial, read_picture, read_text

import hf_tokens
from hf_tokens.commands.material import load_base, packaged_smollm2
from hf_tokens.commands.recipes import JOBS
from hf_tokens.commands.vision import packaged_dinov2
from hf_tokens.errors import HFTokensError

STYLE = Path(__file__).with_name("style.css")
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
# what stands first; any other method that acts on tokens comes behind, and one that does not fit says so
FIRST = {
    "text": ("recipe:long-context", "snapkv", "h2o", "kivi", "streaming-llm", "expected-attention", "dynamic-token-pooling", "ftp"),
    "picture": ("recipe:fast-vit", "tome", "atc", "ppt", "deep-prompt", "ggem"),
}
KEEP = {"gt": 0, "le": 1}  # what a recipe is told
FEWEST = 0.25  # `keep` at the start
STEPS = 100  # of a slider over numbers that are not whole
PICTURES = ("cheetah.jpg", "lion.jpg", "tower.jpg")
STORY = """The lighthouse on Gull Rock was lit for the first time in October 1871. Ada Brown, who had drawn its plans, lived in the tower \
for its first winter, and noted in her log how far the light could be seen: nineteen miles on a clear night, four in fog. The oil for the \
lamp came by boat every second Tuesday, if the sea allowed. In March the boat did not come for five weeks. The keeper then burned the oil \
that was meant for cooking, and the three of them ate cold food until the spring. In 1904 the lamp was given an electric arc, and the last \
keeper, Tom Hale, left the rock in 1958 with two cats and a barometer. Since then the light has been switched on and off from the harbour. \
The log is kept in the town's museum, beside the barometer.

Who was the last keeper, and what did he take with him?"""


# -- strengths ---------------------------------------------------------------------------------------------------------


Knob = tuple[Any, Mapping[str, Any], Any]  # its type without None, its declaration, and its value at the start


def knobs_of(choice: str) -> dict[str, Knob]:
    """What can be set of a recipe or a method, by name, strengths first; lists and words stay as they come."""
    if choice.startswith("recipe:"):
        share = JOBS[choice.removeprefix("recipe:")].share
        return {"keep": (float, {**KEEP, "zero": 1.0, "help": f"What stays, as a share of {share}."}, FEWEST)}
    found = {}
    for field, hint in hf_tokens.method_info(choice).config.knobs():
        kinds = {*(typing.get_args(hint) or (hint,))} - {type(None)}
        kind = float if kinds == {int, float} else next(iter(kinds))
        if len(kinds) == 1 and kind in (bool, int, float) or "choices" in field.metadata:
            found[field.name] = kind, field.metadata, start_of(kind, field.default, field.metadata)
    return dict(sorted(found.items(), key=lambda item: "zero" not in item[1][1]))


def ends_of(told: Mapping[str, Any], step: float) -> tuple[float | None, float | None]:
    """The least and the greatest value that the bounds let in; None where there is no bound."""
    low = told.get("ge", told["gt"] + step if "gt" in told else None)
    return low, told.get("le", told["lt"] - step if "lt" in told else None)


def start_of(kind: Any, default: Any, told: Mapping[str, Any]) -> Any:
    """The default; of a number between two bounds that is left out by default, the middle."""
    low, high = ends_of(told, 0)
    return kind((low + high) / 2) if default is None and low is not None and high is not None else default


def widget(name: str, knob: Knob) -> gr.components.Component:
    """What sets a knob: a slider from bound to bound, or a field where there is but one."""
    kind, told, start = knob
    shown = {"label": name, "info": told["help"], "value": start, "interactive": True}
    if kind is bool:
        return gr.Checkbox(**shown)
    if "choices" in told:
        return gr.Dropdown([*told["choices"]], **shown)
    low, high = ends_of(told, 0)
    if low is None or high is None:
        return gr.Number(precision=0 if kind is int else None, **shown)
    step = 1 if kind is int else (high - low) / STEPS
    return gr.Slider(*ends_of(told, step), step=step, buttons=[], **shown)


# -- what is shown -----------------------------------------------------------------------------------------------------


def tile(name: str, value: float, base: float, write: Callable[[float], str]) -> str:
    """One number beside the base's, with its unit, and a bar of the share."""
    share = value / base
    kind = ' class="more"' if share > 1.005 else ""
    bar = f'<div class="bar"><i{kind} style="width:{min(share, 1):.1%}"></i></div>'
    parts = f'<span class="name">{name}</span><span class="value">{write(value)}</span>{bar}'
    return f'<div class="tile">{parts}<span class="of">{share:.0%} of the base\'s {write(base).replace(" ", "&nbsp;")}</span></div>'


def tiles(trial: Trial) -> str:
    """All numbers; one that the base has none of is left out."""
    unit = lambda name: EngFormatter(unit=name, places=1)
    seconds = lambda s: f"{s:.2f} s" if s >= 1 else f"{s * 1000:.0f} ms"
    first = "First token after" if trial.base.later else "Time"
    rows = [
        ("Tokens in all blocks", trial.cost.tokens, trial.base.tokens, lambda n: f"{n:,}"),
        ("FLOPs", trial.cost.flops, trial.base.flops, unit("FLOP")),
        ("KV cache", trial.cost.kv_bytes, trial.base.kv_bytes, unit("B")),
        (first, trial.cost.seconds, trial.base.seconds, seconds),
        ("Each further token", trial.cost.later, trial.base.later, seconds),
    ]
    return f'<div class="tiles">{"".join(tile(*row) for row in rows if row[2])}</div>'


def differing(text: str, base: str) -> str:
    """A text as HTML; what follows the beginning that both have is marked."""
    same = len(os.path.commonprefix([text, base]))
    rest = html.escape(text[same:])
    return html.escape(text[:same]) + (f"<mark>{rest}</mark>" if rest else "")


def inline(image: Image.Image) -> str:
    """A small picture within the page."""
    stream = io.BytesIO()
    image.save(stream, "png")
    return f'<img alt="what the model sees" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def answers(trial: Trial, choice: str) -> str:
    """Both answers, side by side where there is room."""
    base, text = trial.texts
    bodies = (
        [html.escape(base), html.escape(text)] if trial.images else [html.escape(base) or "(nothing)", differing(text, base) or "(nothing)"]
    )
    images = [inline(image) for image in trial.images] or ["", ""]
    parts = zip((choice.replace(":", ": "), "base"), bodies[::-1], images[::-1], strict=True)
    cards = "".join(f'<div class="answer"><span class="name">{name}</span>{image}<p>{body}</p></div>' for name, body, image in parts)
    return f'<div class="answers{" seen" if trial.images else ""}">{cards}</div>'


def claim(choice: str) -> str:
    """What a recipe or a method is, in a sentence."""
    if choice.startswith("recipe:"):
        name = choice.removeprefix("recipe:")
        return f"The stack that won at **{name}** where it was measured: `hf_tokens.recipe({name!r}, model)`"
    info = hf_tokens.method_info(choice)
    link = f" [arXiv:{info.arxiv}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else ""
    return f"{' '.join(info.claim.split())}{link}"


# -- the page ----------------------------------------------------------------------------------------------------------


def choices_of(kind: str) -> list[tuple[str, str]]:
    """What can be picked: the first ones, and all others that act on tokens."""
    others = [info.name for info in hf_tokens.list_methods() if info.cls.counts and info.name not in FIRST[kind]]
    return [(name.replace(":", ": "), name) for name in (*FIRST[kind], *others)]


def tab(kind: str, bring: Callable[[], Sequence[Any]], read: Callable[..., Trial]) -> None:
    """One tab: results, what they are made with, and pictures of them.

    Args:
        kind: "text" or "picture".
        bring: Makes the components of the input.
        read: Makes a trial of a choice, its knobs and the values of these components.
    """
    with gr.Row(elem_classes="bench"):
        with gr.Column(elem_classes="result"):
            message, result = gr.HTML(elem_id=f"{kind}-message"), gr.HTML(elem_id=f"{kind}-result", min_height=220)
        with gr.Column(elem_classes="controls"):
            choice = gr.Dropdown(choices_of(kind), value=FIRST[kind][0], label="Recipe or method", elem_id=f"{kind}-choice")
            about = gr.Markdown(claim(FIRST[kind][0]))
            strengths = gr.Column()
            given = bring()
            run = gr.Button("Run", variant="primary", elem_id=f"{kind}-run")
        with gr.Column(elem_classes="figures"):
            plots = [gr.Plot(show_label=False, visible=False, elem_id=f"{kind}-plot-{i}") for i in range(2)]
    outputs = [message, result, *plots]

    def show(choice: str, knobs: dict[str, Any], values: Sequence[Any]) -> list[Any]:
        try:
            trial = read(choice, knobs, *values)
        except HFTokensError as refused:
            gr.Warning(str(refused))
            said = f'<div class="refused" role="alert">{html.escape(str(refused))}</div>'
            return [said, *(gr.skip() for _ in outputs[1:])]
        notes = "".join(f'<div class="note">{html.escape(note)}</div>' for note in trial.notes)
        figures = [*trial.figures, None, None][: len(plots)]
        drawn = [gr.Plot(value=figure, visible=figure is not None) for figure in figures]
        return ["", tiles(trial) + answers(trial, choice) + notes, *drawn]

    def at_start(choice: str, *values: Any) -> list[Any]:
        return show(choice, {name: start for name, (_, _, start) in knobs_of(choice).items()}, values)

    quiet = {"outputs": outputs, "show_progress_on": [result], "concurrency_id": "machine", "api_visibility": "private"}
    gr.on([page_of().load, choice.select], at_start, [choice, *given], trigger_mode="always_last", **quiet)
    choice.change(claim, choice, about, show_progress="hidden", api_visibility="private")

    with strengths:

        @gr.render(inputs=choice)
        def sliders(chosen: str) -> None:
            made = knobs_of(chosen)
            strong = [name for name, (_, told, _) in made.items() if "zero" in told]
            widgets = {name: widget(name, made[name]) for name in strong}
            if len(made) > len(strong):
                with gr.Accordion("More knobs", open=not strong):
                    widgets |= {name: widget(name, knob) for name, knob in made.items() if name not in strong}

            def with_knobs(*values: Any) -> list[Any]:
                number = len(widgets)
                return show(chosen, dict(zip(widgets, values[:number], strict=True)), values[number:])

            def with_input(*values: Any) -> list[Any]:
                return [gr.skip() for _ in outputs] if None in values[len(widgets) :] else with_knobs(*values)

            moved = [one.release if isinstance(one, gr.Slider) else one.input for one in widgets.values()]
            brought = [one.release if isinstance(one, gr.Slider) else one.change for one in given if not isinstance(one, gr.Textbox)]
            gr.on([run.click, *moved], with_knobs, [*widgets.values(), *given], trigger_mode="always_last", **quiet)
            gr.on(brought, with_input, [*widgets.values(), *given], trigger_mode="always_last", **quiet)


def page_of() -> gr.Blocks:
    """The page that is being made."""
    return gr.context.Context.root_block


def bring_text() -> list[Any]:
    text = gr.Textbox(STORY, label="Text", lines=6, max_lines=9, elem_id="text-input")
    return [text, gr.Slider(4, 96, value=32, step=4, label="Tokens of the answer, at most", buttons=[])]


def bring_picture() -> list[Any]:
    image = gr.Image(
        get_image(PICTURES[0]), type="pil", label="Picture", height=220, elem_id="picture-input", sources=["upload", "clipboard"]
    )
    gr.Examples([get_image(name) for name in PICTURES], image, label="Examples")
    return [image]


def build(text: tuple[Any, Any], picture: tuple[Any, Any]) -> gr.Blocks:
    """The page for a language model and its tokenizer, and a vision model and its processor."""
    model, tokenizer = text
    tower, processor = picture
    with gr.Blocks(title="hf-tokens", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## hf-tokens\nOne model, with a method in it and without: what it answers, what became of its tokens, what it costs.")
        with gr.Tab("Text"):
            tab("text", bring_text, lambda c, k, *v: read_text(model, tokenizer, v[0], c, k, int(v[1])))
        with gr.Tab("Picture"):
            tab("picture", bring_picture, lambda c, k, *v: read_picture(tower, processor, v[0], c, k))
    return page.queue(default_concurrency_limit=1, max_size=32)


def launch(page: gr.Blocks, **more: Any) -> Any:
    """Serve the page."""
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, text_size="sm", spacing_size="sm")
    return page.launch(theme=theme, css_paths=STYLE, ssr_mode=False, footer_links=[], max_file_size="10mb", show_error=True, **more)


def or_from_hub(packaged: Callable[[], Path], name: str) -> str:
    """The folder of a model that is installed as a package; where it is not, its id on the Hub."""
    try:
        return str(packaged())
    except HFTokensError:
        return name


def load_picture(name: str) -> tuple[Any, Any]:
    """A classifier or, where a model has no head for that, a tower, and its processor."""
    classifies = any(one.endswith("ForImageClassification") for one in AutoConfig.from_pretrained(name).architectures or ())
    made = AutoModelForImageClassification if classifies else AutoModel
    return made.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="language model, a Hub id or a folder")
    parser.add_argument("--picture", help="image classifier or vision tower, a Hub id or a folder")
    parser.add_argument("--port", type=int, help="of the server; the first free one from 7860 on")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's own
    text = given.text or or_from_hub(packaged_smollm2, "HuggingFaceTB/SmolLM2-135M-Instruct")
    picture = given.picture or or_from_hub(packaged_dinov2, "facebook/dinov2-small")
    language = load_base(text, "cpu"), AutoTokenizer.from_pretrained(text)
    read_text(*language, "Hello", "recipe:long-context", {"keep": FEWEST}, 2)  # what is made once is not in the first visitor's seconds
    launch(build(language, load_picture(picture)), server_port=given.port)


if __name__ == "__main__":
    main()
