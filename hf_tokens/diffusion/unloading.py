"""When diffusers unloads its LoRAs from a model, it forgets all adapters in it: ours stay, and are listed as before."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.block import BlockSurgery
from ..engine.hooks import BoundForward
from ..errors import UnsupportedError, explain

CONFIGS, LOADED = "peft_config", "_hf_peft_config_loaded"  # how diffusers notes the adapters of a model, and that it has some


class UnloadLora(BoundForward):
    """A model's method of this name, for as long as a surgery is in it."""

    name = "unload_lora"

    def run(self) -> Any:
        """Unload all adapters but ours.

        Raises:
            UnsupportedError: One of ours has a LoRA in it, which would be unloaded too.
        """
        ours = adapters_in(self.module)
        configs = {name: config for name, config in vars(self.module).get(CONFIGS, {}).items() if name in ours}
        stacks = [name for name, config in configs.items() if config.peft_configs()]
        if stacks:
            rule = "An adapter of hf-tokens with a LoRA in it is taken out as a whole"
            raise UnsupportedError(explain(rule, stacks, "Call `hf_tokens.unload`, or `delete_adapters` with the names of the others."))
        output = self.inner()
        if configs:
            vars(self.module).update({CONFIGS: configs, LOADED: True})
        return output


def adapters_in(model: nn.Module) -> set[str]:
    """Names of our adapters in the blocks of a model."""
    return {name for module in model.modules() if isinstance(module, BlockSurgery) for name in module.hf_tokens_methods}
