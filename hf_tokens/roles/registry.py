"""The registry of methods: a decorator, a walk over the entry points, and what stands on a card."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

from ..errors import ConfigError, did_you_mean, explain
from .base import Method
from .config import MethodConfig
from .signals import AT_SITE, OF_A_CALL, OF_A_WORD, SPANS

ENTRY_POINTS = "hf_tokens.methods"
HEADINGS = ("Paper", "Needs", "Maths", "Differs", "Checked")
NEEDS = ("nothing", "training", "calibration", "an edit")  # what a method wants before it is worth something, as its card begins to say
MODALITY_OF_KIND = {
    "text": "text",
    "vision": "image",
    "video": "video",
    "audio": "audio",
    "denoiser": "diffusion",
}  # kind of a stream -> word
ANY_MODALITY, READS_PICTURES = "any", "image-text"
RELEASE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}==[A-Za-z0-9][A-Za-z0-9.+!_-]{0,40}"  # of a distribution, as pip takes it
FEW_NAMES = 20  # names that an error may list
METHODS: dict[str, dict[int, MethodInfo]] = {}
AMethod = TypeVar("AMethod", bound=type[Method])


@dataclass(frozen=True)
class MethodInfo:
    """One registered method: its name, role and card."""

    name: str
    version: int
    role: str
    cls: type[Method]
    config: type[MethodConfig]
    claim: str
    paper: str
    needs: str
    maths: str
    differs: str
    checked: str
    doc: str

    @property
    def arxiv(self) -> str | None:
        """The arXiv number of the paper."""
        number = re.search(r"arXiv:(\d{4}\.\d{4,5})", self.paper)
        return number and number.group(1)

    @property
    def need(self) -> str | None:
        """Which of `NEEDS` its card says that it needs; None where it says none of them."""
        return next((need for need in NEEDS if re.match(rf"{need}\b", self.needs)), None)

    @property
    def modality(self) -> tuple[str, ...]:
        """What it is for: values of `MODALITY_OF_KIND`, models that read pictures among their text, or any."""
        if SPANS & {name for names in self.cls.words.values() for name in names}:
            return (READS_PICTURES,)
        return tuple(MODALITY_OF_KIND[kind] for kind in self.cls.kinds or self.cls.usual_kinds) or (ANY_MODALITY,)


def read_card(doc: str) -> dict[str, str]:
    """Claim and headings of a method's module docstring."""
    text = doc.split(">>>")[0]
    parts = re.split(rf"^({'|'.join(HEADINGS)}):", text, flags=re.MULTILINE)
    bodies = {key.lower(): inspect.cleandoc(body).strip() for key, body in zip(parts[1::2], parts[2::2], strict=True)}
    return {"claim": parts[0].strip(), **dict.fromkeys(map(str.lower, HEADINGS), ""), **bodies}


def register(name: str, config: type[MethodConfig], *, version: int = 1) -> Callable[[AMethod], AMethod]:
    """Class decorator: register a method under a name.

    Raises:
        ConfigError: The name and version are taken, or the verb names an unknown signal.
    """

    def add(cls: AMethod) -> AMethod:
        known = METHODS.get(name, {})
        if version in known and known[version].cls.__qualname__ != cls.__qualname__:
            raise ConfigError(explain("A method is registered once per version", f"{name!r} v{version} again", "Choose another name."))
        signatures = {word: inspect.signature(getattr(cls, word)) for word in (cls.verb, "observe", "judge", *cls.further)}
        words = {word: tuple(name for name in signature.parameters if name != "self") for word, signature in signatures.items()}
        where, signals = AT_SITE.get(cls.site, ("", cls.vocabulary)) if cls.role == "TokenBank" else ("", cls.vocabulary)
        for word, names in words.items():
            known_signals = OF_A_CALL.get(word, signals) | OF_A_WORD.get(word, frozenset())
            if unknown := sorted(set(names) - known_signals):
                many = "signals of its role, as `hf_tokens.roles.SIGNALS` says"
                offer = sorted(known_signals) if len(known_signals) <= FEW_NAMES else many
                rule = f"{cls.__name__}.{word}{where and f' {where}'} may ask for {offer}"
                raise ConfigError(explain(rule, unknown, f"{did_you_mean(unknown, known_signals)}Rename the arguments."))
        doc = inspect.getdoc(inspect.getmodule(cls)) or ""
        cls.take_words(words)
        config.take_name(name, version)
        info = MethodInfo(name=name, version=version, role=cls.role, cls=cls, config=config, doc=doc, **read_card(doc))
        METHODS.setdefault(name, {})[version] = info
        return cls

    return add


def import_modules(package: ModuleType) -> None:
    """Import every module below a package, so that its decorators run."""
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


@functools.cache
def discover() -> None:
    """Load the built-in methods and those of installed third parties, all through one entry point group."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry.load()
            if isinstance(loaded, ModuleType) and "__path__" in vars(loaded):
                import_modules(loaded)
        except Exception as error:
            rule = f"What an entry point of {ENTRY_POINTS!r} names must import"
            got = f"{entry.name!r} of {entry.dist.name}, {entry.value}, which says: {error!r}"
            raise ConfigError(explain(rule, got, "Repair or uninstall that package.")) from error


@functools.cache
def distributions() -> dict[str, str]:
    """Of each package that an entry point names the distribution and its version, as pip takes them."""
    entries = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {entry.module.partition(".")[0]: f"{entry.dist.name}=={entry.dist.version}" for entry in entries}


def package_of(name: str) -> str | None:
    """The distribution and version that a registered method comes from, as pip takes them; None where no entry point names its package."""
    return distributions().get(method_info(name).cls.__module__.partition(".")[0])


def is_installed(release: str) -> bool:
    """Whether a release is the one that is here."""
    name, _, number = release.partition("==")
    try:
        return importlib.metadata.version(name) == number
    except importlib.metadata.PackageNotFoundError:
        return False


def install(source: str | None) -> str:
    """What to do where an adapter's file names another package or release than is here; empty where that is no help."""
    if source is None or re.fullmatch(RELEASE, source) is None or is_installed(source):
        return ""
    return f"It was saved with {source}: `pip install '{source.replace('==', '>=')}'`, if you trust that package. "


def list_methods(role: str | None = None) -> list[MethodInfo]:
    """Every registered method in its newest version, sorted by name; of one role if given."""
    discover()
    roles = sorted({versions[max(versions)].role for versions in METHODS.values()})
    if role not in (None, *roles):
        remedy = f"{did_you_mean([role], roles)}Leave it out to list all."
        raise ConfigError(explain(f"A role with methods is one of {roles}", repr(role), remedy))
    newest = [versions[max(versions)] for _, versions in sorted(METHODS.items())]
    return [info for info in newest if role in (None, info.role)]


def method_info(name: str, version: int | None = None, source: str | None = None) -> MethodInfo:
    """The registered method of a name; a version that is no more registered is read by the next one that is.

    Args:
        name: Its name.
        version: Its version; None takes the newest.
        source: The package that it was in when it was saved, which an error names.

    Raises:
        ConfigError: No method, or no such version of it, is registered.
    """
    if name not in METHODS:
        discover()
    if name not in METHODS:
        remedy = install(source).rstrip() or f"{did_you_mean([name], METHODS)}Install the package that has it, or fix the name."
        raise ConfigError(explain("A method must be one of those that `hf-tokens list` names", repr(name), remedy))
    versions = METHODS[name]
    version = max(versions) if version is None else version
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= max(versions):
        rule, remedy = f"Method {name!r} has the versions 1 to {max(versions)}", "Update hf-tokens, or train the adapter again."
        raise ConfigError(explain(rule, repr(version), install(source).rstrip() or remedy))
    return versions[min(known for known in versions if known >= version)]


def method_config(spec: str | dict | MethodConfig, source: str | None = None) -> MethodConfig:
    """A config from a method's name, its JSON form, or itself; `source` is the package that it was in when it was saved."""
    if isinstance(spec, MethodConfig):
        return spec
    if isinstance(spec, str):
        return method_info(spec).config()
    if isinstance(spec, dict) and isinstance(spec.get("method"), str):
        return method_info(spec["method"], spec.get("version"), source).config.from_dict(spec)
    raise ConfigError(explain("A method is a name, a MethodConfig, or a dict with the key 'method'", repr(spec), "See `hf-tokens list`."))
