"""Of whose prompt a denoiser's call is: told by its cache context, by a guider, or by the code of the pipeline that calls."""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType
from typing import Any

from ..errors import UnsupportedError, explain
from ..model import pipelines
from ..model.callers import callers
from ..model.pipelines import ALONE, CONTEXTS, PREDICTIONS, PROMPTS, Parts
from ..model.streams import PROMPT

FRAMES_TO_PIPELINE = 64  # frames between a pipeline's call and its denoiser's
FRAMES_OF_ALL = 1000  # and between that and the call of the outermost pipeline
REMEDY = (
    "Call the denoiser within `CacheMixin.cache_context(denoiser, 'cond')`, for a negative prompt 'uncond', for a batch that begins with "
    "it 'cond_uncond'; or give the tokens to both, where the method has a knob for that."
)


@dataclass(frozen=True)
class Guidance:
    """How the parts of a call's batch are guided.

    Attributes:
        parts: Of each part, whether its prompt is the negative one; None where nobody tells.
        joined: The pipeline whose attention reads the parts together, and what does so; None where it reads each sample alone.
    """

    parts: Parts | None
    joined: str | None = None


def guidance_of(context: str) -> Guidance:
    """How the call that is under way is guided, in a cache context of this name."""
    told = {**CONTEXTS, **PREDICTIONS}.get(context)
    if told is not None and len(told) == 1:
        return Guidance(told)
    for frame in calling():
        if pipelines.PREPARED in frame.f_code.co_varnames:
            prepared = frame.f_locals.get(pipelines.PREPARED)
            return Guidance(told if prepared is None else PREDICTIONS.get(vars(prepared).get(pipelines.PREDICTION)))
        return in_pipeline(frame) if told is None or owner(frame) in PROMPTS else Guidance(told, joined_in(owner(frame)))
    return Guidance(told)


def nesting() -> int:
    """In how many runs of pipelines the code is, each in a step of the one before."""
    return sum(frame.f_code.co_name == "__call__" for frame in calling(FRAMES_OF_ALL))


def calling(most: int = FRAMES_TO_PIPELINE) -> Iterator[FrameType]:
    """The code of a pipeline that calls, the nearest first, within so many frames."""
    diffusers = sys.modules.get("diffusers.pipelines.pipeline_utils")
    for frame in callers(0 if diffusers is None else most):
        names = frame.f_code.co_varnames
        if pipelines.PREPARED in names or names[:1] == ("self",) and isinstance(frame.f_locals.get("self"), diffusers.DiffusionPipeline):
            yield frame


def in_pipeline(frame: FrameType) -> Guidance:
    """How a call out of this code of a pipeline is guided.

    Raises:
        UnsupportedError: The pipeline is not known, or its code is not what is known of it.
    """
    name, pipeline = owner(frame), frame.f_locals["self"]
    row, expression = PROMPTS.get(name), handed(frame.f_code, frame.f_lasti)
    parts = None if row is None else row.get(expression)
    if parts is None:
        rule = "Which prompt is the negative one is known of the pipeline that calls, or told by the context of the call"
        raise UnsupportedError(explain(rule, f"{name}, which gives {expression or 'none'} as the prompt", REMEDY))
    if callable(parts):
        parts = parts(frame.f_locals.get)
    elif len(parts) > 1 and not flag(frame, pipelines.DECIDES):
        parts = ALONE
    perturbed = pipelines.PERTURBED in dir(type(pipeline)) and flag(frame, pipelines.PERTURBED)
    return Guidance((*parts, *ALONE), f"{name}, whose perturbed attention") if perturbed else Guidance(parts, joined_in(name))


def joined_in(pipeline: str) -> str | None:
    """The pipeline and what in it reads the samples of a call together; None where nothing does."""
    return f"{pipeline}, whose {pipelines.JOINS[pipeline]}" if pipeline in pipelines.JOINS else None


def unguided() -> bool:
    """Whether a pipeline is calling that has decided on no guidance by parts of a batch."""
    frame = next(calling(), None)
    known = frame is not None and (pipelines.DECIDES in frame.f_code.co_varnames or decides(type(frame.f_locals.get("self"))))
    return known and not flag(frame, pipelines.DECIDES)


def decides(pipeline: type) -> bool:
    """Whether a class of pipelines has a property that says whether it guides."""
    return isinstance(inspect.getattr_static(pipeline, pipelines.DECIDES, None), property)


def owner(frame: FrameType) -> str:
    """The pipeline whose code this is: the class that a pipeline has it from, with its module where that is not diffusers' own."""
    name, module = frame.f_code.co_qualname.partition(".")[0], frame.f_globals.get("__name__", "")
    return name if module.startswith("diffusers.pipelines.") else f"{module}.{name}"


def flag(frame: FrameType, name: str) -> bool:
    """What a pipeline has decided: a variable of its code, or a property of it."""
    return bool(frame.f_locals[name] if name in frame.f_code.co_varnames else getattr(frame.f_locals["self"], name))


@cache
def handed(code: CodeType, at: int) -> str | None:
    """What the call at this place of a code hands over as the prompt, as it is written; None where it hands over none by this name."""
    line, last, begin, end = next(itertools.islice(code.co_positions(), at // 2, None))
    if None in (line, last, begin, end):  # Python was started without them
        return None
    lines = [text.encode() for text in linecache.getlines(code.co_filename)[line - 1 : last]]
    if not lines:
        return None
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][begin:]
    call: Any = ast.parse(b"".join(lines).decode(), mode="eval").body
    keywords = call.keywords if isinstance(call, ast.Call) else ()
    return next((ast.unparse(keyword.value) for keyword in keywords if keyword.arg == PROMPT), None)
