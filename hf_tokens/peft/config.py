"""The one PEFT type, HF_TOKENS, and what an adapter of it is: an ordered stack of methods."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from ..errors import ConfigError, explain
from ..roles.config import MethodConfig
from ..roles.in_peft import HF_TOKENS, NAME, NOTED
from ..roles.registry import install, method_config, package_of
from .doors import CONFIG, about_to_save, file_beside, is_loading, native_saver, tensors_being_saved, without
from .reading import read_config, tensors_of, whole
from .saving import ANNOUNCED, digest_of, has_bytes, hashes_of, replacing

PEFT_METHOD = "peft"
PEFT_FORMS = ("checkpoint", "lora")  # in which a PEFT method of a stack leaves, as `Method.leaves`
FORMAT = 1  # of adapter_config.json and of the names of an adapter's tensors


@dataclass
class HFTokensConfig(PeftConfig):
    """An adapter: an ordered stack of methods, in their JSON form.

    Args:
        methods: Names, method configs, or dicts such as `{"method": "ftp", "sparsity": 0.3}`; a LoRA among them is
            `{"method": "peft", "config": {"peft_type": "LORA", ...}}` or a PeftConfig.
        modules_to_save: Modules that are trained and saved as a whole, such as a new head.
        init_weights: Accepted for PEFT's sake.
        digest: Of the tensors that it was saved with; written when it is saved, and compared when they are loaded.
        made_by: The hf-tokens that saved it, as pip takes it, such as `"hf-tokens==0.1.0"`; written when it is saved.
        packages: Of each method of another package that and its version, such as `{"mine": "my-methods==1.2"}`; written when it is saved.
    """

    methods: list[Any] | None = field(default=None)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    init_weights: bool = field(default=True)
    base: dict[str, list[Any]] | None = field(default=None)
    base_type: str | None = field(default=None)
    hf_tokens_version: int = field(default=FORMAT)
    digest: str | None = field(default=None)
    made_by: str | None = field(default=None)
    packages: dict[str, str] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type, self._weights, self._in_trial, self._is_loaded = HF_TOKENS, None, False, False
        self._hashes: dict[Any, str] = {}
        self._is_announcing = False
        if isinstance(self.methods, (str, dict, MethodConfig, PeftConfig)):
            self.methods = [self.methods]
        if self.methods is not None and not isinstance(self.methods, Iterable):
            rule = "The methods of an adapter are a name, a config, or a list of them"
            raise ConfigError(explain(rule, repr(self.methods), "`hf-tokens list` names them."))
        if not self.methods:
            remedy = "Pass methods=['...']; `hf-tokens list` names them."
            raise ConfigError(explain("An adapter has at least one method", self.methods, remedy))
        self.methods = [plain_form(method, self.source_of(method)) for method in self.methods]
        if self.target_modules or self.exclude_modules:
            got = f"target_modules={self.target_modules!r}, exclude_modules={self.exclude_modules!r}"
            raise ConfigError(explain("A method's own `layers` and `stream` say where it acts", got, "Set those in its config."))
        if self.hf_tokens_version != FORMAT:
            rule = f"This hf-tokens reads adapters of format {FORMAT}"
            remedy = install(self.made_by).rstrip() or "Update hf-tokens, or train the adapter again."
            raise ConfigError(explain(rule, f"hf_tokens_version={self.hf_tokens_version!r}", remedy))

    def source_of(self, method: Any) -> str | None:
        """The package that a method was in when the adapter was saved, as pip takes it; None where that is not known."""
        name = method.get("method") if isinstance(method, dict) else None
        return (self.packages or {}).get(name, self.made_by) if isinstance(name, str) else None

    def note_makers(self) -> None:
        """Note the packages of the methods, and ours."""
        names = [method["method"] for method in self.methods if method["method"] != PEFT_METHOD]
        own = hf_tokens_release()
        foreign = {name: found for name in names if (found := package_of(name)) is not None and not is_release_of(own, found)}
        self.made_by, self.packages = own, foreign or None

    def needs(self) -> list[str]:
        """The packages that it is made of, as pip takes them."""
        self.note_makers()
        return [self.made_by, *dict.fromkeys((self.packages or {}).values())]

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """What the file of a config says, within bounds."""
        path = Path(path_json_file)
        data = read_config(path, cls, NAME)
        if (path.parent / ANNOUNCED / path.name).is_file():
            data = cls._of_the_tensors(path, data)
        return {key: value for key, value in data.items() if key != "runtime_config"}

    @classmethod
    def _of_the_tensors(cls, path: Path, data: dict[str, Any]) -> dict[str, Any]:
        """What the config says that is of the tensors beside it: where a save was killed behind these, it is the one that was announced."""
        weights = file_beside(str(path.parent))
        if weights is None or (digest := digest_of(tensors_of(weights))) == data.get("digest"):
            return data
        announced = read_config(path.parent / ANNOUNCED / path.name, cls, NAME)
        return announced if announced.get("digest") == digest else data

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> HFTokensConfig:
        """The config that a file says."""
        with whole(f"{CONFIG} must be that of an adapter", "Download or save it again."):
            return super().from_peft_type(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> HFTokensConfig:
        """The config in a folder or on the Hub, which knows the file of tensors beside it until it is put into a model."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config._is_loaded, config._weights = True, file_beside(pretrained_model_name_or_path, subfolder, **kwargs)
        if config._weights is None and is_loading():
            raise without(pretrained_model_name_or_path)
        return config

    def take_source(self) -> tuple[Path | None, str | None]:
        """The file of tensors beside the file that this was read from, and its digest; but once."""
        weights, digest = self._weights, self.digest
        self._weights = self.digest = None
        return weights, digest

    @property
    def is_loaded(self) -> bool:
        """Whether it was read from a file, which can say anything."""
        return self._is_loaded

    @property
    def goes_around_layers(self) -> bool:
        """Whether PEFT puts something of it around layers of the model: only a trial shows its tensors."""
        return bool(self.modules_to_save) or any(method["method"] == PEFT_METHOD for method in self.methods)

    @property
    def in_trial(self) -> bool:
        """Whether it goes into a model only to be tried."""
        return self._in_trial

    def for_trial(self) -> HFTokensConfig:
        """A copy that goes into a model to be tried, where nothing begins."""
        config = copy.deepcopy(self)
        config._in_trial = True
        for method in config.methods:
            if method["method"] == PEFT_METHOD:
                method["config"] = {key: value for key, value in method["config"].items() if not key.startswith("init_")}
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config whole or not at all, with the digest of the tensors that a model's `save_pretrained` writes beside it."""
        self.save_with(tensors_being_saved(), save_directory, **kwargs)
        saver = native_saver()
        if saver is not None:
            from .publishing import publish

            publish(saver.f_locals["self"], Path(save_directory))

    def prepare_to_save(self, tensors: Iterable[Tensor], saver: FrameType, adapter_name: str) -> None:
        """Note the hashes of what PEFT is about to save, and announce the config that it will write behind its tensors."""
        if self._is_announcing:
            return
        self._hashes, self._is_announcing = hashes_of(tensors), True
        try:
            save = about_to_save(saver, adapter_name)
        finally:
            self._is_announcing = False
        if save is not None:
            config = copy.copy(self)
            vars(config).update(save.values)
            config.announce(save.tensors, save.folder, auto_mapping_dict=save.auto_mapping)

    def announce(self, tensors: Mapping[str, Tensor], folder: Path, **kwargs: Any) -> None:
        """Write down the config of tensors that come before it: it counts from when they are there, until it is in its place itself."""
        if all(map(has_bytes, tensors.values())):
            self.save_with(tensors, folder / ANNOUNCED, **kwargs)

    def save_with(self, tensors: Mapping[str, Tensor] | None, folder: str | Path, **kwargs: Any) -> None:
        """Write the config beside these tensors; where they are not known, nothing is said of them."""
        known = tensors is not None and all(map(has_bytes, tensors.values()))
        self.note_makers()
        self.digest, self._hashes = digest_of(tensors.items(), self._hashes) if known else None, {}
        try:
            with replacing(Path(folder), CONFIG) as written:
                super().save_pretrained(str(written), **kwargs)
        finally:
            self.digest = None

    @classmethod
    def around(cls, config: MethodConfig) -> HFTokensConfig:
        """The adapter of one method, with what PEFT has noted on its config."""
        return cls(methods=[config], **{name: value for name in NOTED if (value := getattr(config, name)) is not None})

    def aim(self, modules: list[str] | None) -> None:
        """Name the blocks to PEFT, for as long as it injects the adapter."""
        self.target_modules = modules

    def note_base(self, base: dict[str, list[Any]], kind: str) -> None:
        """Note the base that the adapter is made for: its streams, and what it is."""
        self.base, self.base_type = base, kind

    def stack(self) -> list[MethodConfig]:
        """The method configs, in order, without the PEFT configs among them."""
        return [method_config(method) for method in self.methods if method["method"] != PEFT_METHOD]

    def peft_configs(self) -> list[PeftConfig]:
        """The PEFT configs among the methods, each told what is said of the whole adapter."""
        return [get_peft_config({**m["config"], **self._told(m["config"])}) for m in self.methods if m["method"] == PEFT_METHOD]

    def _told(self, inner: dict[str, Any]) -> dict[str, Any]:
        """What a PEFT config in the stack hears of the adapter: a LoRA keeps out of the head of a task, and of modules saved as a whole."""
        saved = dict.fromkeys([*(inner.get("modules_to_save") or ()), *(self.modules_to_save or ())])
        told = {"inference_mode": self.inference_mode, "task_type": inner.get("task_type") or self.task_type}
        takes = {knob.name for knob in fields(PEFT_TYPE_TO_CONFIG_MAPPING[inner["peft_type"]])}
        return {**told, "modules_to_save": list(saved)} if saved and "modules_to_save" in takes else told


def hf_tokens_release() -> str:
    """This hf-tokens, as pip takes it."""
    from .. import __version__

    return f"hf-tokens=={__version__}"


def is_release_of(own: str, package: str) -> bool:
    """Whether a package is a release of another one's distribution."""
    return own.partition("==")[0] == package.partition("==")[0]


def plain_form(method: Any, source: str | None = None) -> dict[str, Any]:
    """The checked JSON form of one method, which was in this package when it was saved."""
    if isinstance(method, PeftConfig) and not isinstance(method, MethodConfig):
        data = {k: sorted(v) if isinstance(v, set) else v for k, v in method.to_dict().items() if v is not None}
        method = {"method": PEFT_METHOD, "config": {**data, "peft_type": str(data["peft_type"].value)}}
    if isinstance(method, dict) and method.get("method") == PEFT_METHOD:
        if not isinstance(method.get("config"), dict) or "peft_type" not in method["config"]:
            raise ConfigError(explain("A 'peft' method has a config with a 'peft_type'", repr(method), "Pass the PeftConfig itself."))
        kind = method["config"]["peft_type"]
        if not isinstance(kind, str) or kind == NAME or not issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(kind, object), BaseTuner):
            rule = "A 'peft' method is one of PEFT's that act on layers, such as LORA"
            raise ConfigError(explain(rule, repr(kind), "Put another kind around the model, by `peft.get_peft_model`."))
        for key, value in method["config"].items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(explain("The numbers of a 'peft' method are finite", f"{key}={value}", "Set another one."))
        return method
    return method_config(method, source).to_dict()
