"""The PEFT methods inside an adapter, such as a LoRA: which are taken, and that the base stays as it is under them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

from ..engine.block import BlockSurgery
from ..errors import UnsupportedError, explain
from ..handlers.weight_edit import EditedWeights

# knobs that act beyond the layers of their method: the value that they must have, what they need, and whether only training needs it
BEYOND_LAYERS: tuple[tuple[str, Any, str, bool], ...] = (
    ("alora_invocation_tokens", None, "a call that says where in each sample it begins", False),
    ("bias", "none", "weights of the base that are trained", True),
)


def check_nested(config: PeftConfig) -> None:
    """Refuse a method that is more than its layers: a stack has these, and nothing around the model or in its calls."""
    kind = config.peft_type.value
    rule, remedy = "A PEFT method in a stack acts in its own layers alone", "Put it around the model, by `peft.get_peft_model`."
    if PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].forward is not BaseTuner.forward:
        raise UnsupportedError(explain(rule, f"{kind}, which acts in the call of the model too", remedy))
    for knob, plain, needs, in_training in BEYOND_LAYERS:
        value = vars(config).get(knob) or plain
        if value != plain and not (in_training and config.inference_mode):
            raise UnsupportedError(explain(rule, f"{knob}={value!r} of {kind}, which needs {needs}", remedy))


def check_apart(config: PeftConfig, names: set[str], taken: dict[PeftType, set[str]]) -> None:
    """Refuse a second method of one kind in the same modules, where it would take the place of the first; note those that it took."""
    if twice := sorted(names & taken.setdefault(config.peft_type, set())):
        rule = f"Each module has one {config.peft_type.value} of a stack"
        raise UnsupportedError(explain(rule, f"two in {twice[0]}", "Give them other `target_modules`, or make two adapters."))
    taken[config.peft_type] |= names


def bare(module: nn.Module, adapters: set[str]) -> nn.Module:
    """What is left of a module without the layers that only a LoRA or `modules_to_save` of these adapters put around it."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(module, BlockSurgery):
        if not module._get_available_adapters() <= adapters:
            break
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def take_off(model: nn.Module, adapters: set[str]) -> None:
    """Give modules that a LoRA or `modules_to_save` of these adapters wraps their own place back; leave what another adapter wraps."""
    done = None
    for path, module in list(model.named_modules()):
        if done is not None and path.startswith(done):
            continue
        inner = bare(module, adapters)
        if inner is not module:
            model.set_submodule(path, inner)
            done = f"{path}."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            names = module._get_available_adapters()
            for name in names & adapters:
                module.delete_adapter(name, new_active_adapters=sorted(names - adapters)[:1])
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, BlockSurgery):
            for name in module._get_available_adapters() & adapters:
                module.delete_adapter(name)


def bake(model: nn.Module, adapters: set[str], safe_merge: bool = False, nested: bool = True) -> None:
    """Write what acts of these adapters into a model for good: edits of weights, modules that are saved as a whole, and PEFT methods."""
    own = [(path, m) for path, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    own = [(path, m) for path, m in own if m._get_available_adapters() & adapters]
    blocks = [m for _, m in own if isinstance(m, BlockSurgery)]
    for _, layer in own:
        if nested and isinstance(layer, BaseTunerLayer) and not isinstance(layer, BlockSurgery):
            layer.merge(safe_merge=safe_merge)
    for block in blocks:
        block.state(EditedWeights).bake()
    for path, wrapper in own:
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            model.set_submodule(path, wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=safe_merge, adapter_names=None))


def rewrites(changed: list[str]) -> UnsupportedError:
    """What is said of a method that begins by rewriting the base."""
    rule = "A PEFT method in a stack leaves the base as it is, so that it can be switched off and taken out"
    got = f"one that changes {changed[0]}" + (f" and {len(changed) - 1} more of its tensors and modules" if len(changed) > 1 else "")
    remedy = "Let it begin with `init_lora_weights=True` and the model's own layers, or put it around the model, by `peft.get_peft_model`."
    return UnsupportedError(explain(rule, got, remedy))


def address(tensor: Tensor) -> int:
    """Where the values of a tensor begin; 0 for one that has none of its own: on the meta device, or in shards."""
    return 0 if tensor.is_meta or is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()


class WriteGuard(TorchDispatchMode):
    """Refuses to write into tensors, before it is done."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.names = {t.untyped_storage().data_ptr(): name for name, t in tensors.items() if address(t)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        declared = func._schema.arguments
        given = [*zip(declared, args, strict=False), *((each, kwargs[each.name]) for each in declared if each.name in kwargs)]
        for argument, value in given:
            if argument.is_write and isinstance(value, Tensor) and address(value):
                name = self.names.get(value.untyped_storage().data_ptr())
                if name is not None:
                    raise rewrites([name])
        return func(*args, **kwargs)


class BaseRecord:
    """The modules and tensors of a model, as they are before PEFT methods of a stack go in."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.children = {module: dict(module._modules) for module in model.modules()}
        self.parameters = {module: dict(module._parameters) for module in self.children}
        self.tensors = {name: (t, t.data) for tensors in (model.named_parameters(), model.named_buffers()) for name, t in tensors}
        configs = {id(config): config for module in self.children if isinstance(config := vars(module).get("config"), PreTrainedConfig)}
        self.configs = [(config, dict(vars(config))) for config in configs.values()]

    def changes(self) -> list[str]:
        """What is not as it was: tensors with other values, modules that are gone, and modules that came, but for a method's own."""
        rewritten = [name for name, (tensor, data) in self.tensors.items() if address(tensor) != address(data)]
        held = {id(p) for p in self.model.parameters()}
        rewritten += [name for name, (tensor, _) in self.tensors.items() if isinstance(tensor, nn.Parameter) and id(tensor) not in held]
        modules, own, came = set(self.model.modules()), (), []
        for path, module in self.model.named_modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                own += (f"{path}.",)
            elif module not in self.children and not path.startswith(own):
                came.append(path)
        return rewritten + came + [type(module).__name__ for module in self.children if module not in modules]

    @contextlib.contextmanager
    def kept(self, adapter_name: str) -> Iterator[None]:
        """Refuse a method that rewrites the base: it could not be switched off, nor taken out. The model is as it was after any error."""
        try:
            with WriteGuard({name: data for name, (_, data) in self.tensors.items()}):
                yield
            if changed := self.changes():
                raise rewrites(changed)
        except BaseException:
            take_off(self.model, {adapter_name})
            self.restore()
            raise

    def restore(self) -> None:
        """Give the model back what a method changed, once its layers are off."""
        for module, children in self.children.items():
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
            module._parameters.update(self.parameters[module])
        for tensor, data in self.tensors.values():
            if address(tensor) != address(data):
                tensor.data = data
        for config, values in self.configs:
            vars(config).update(values)
