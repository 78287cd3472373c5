"""An adapter's life: saved and loaded, stacked with others and with a LoRA, switched, deleted, and taken out without a trace."""

from hf_tokens.testing.contract.checks.adapters import *  # noqa: F403
