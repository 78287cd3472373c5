"""Training: gradients reach all of the adapter and nothing of the base, the same ones under checkpointing; hidden states and compiling."""

from hf_tokens.testing.contract.checks.training import *  # noqa: F403
