"""Objectives: the loss changes and the outputs do not; padding counts for nothing, and accumulated batches are one large one."""

from hf_tokens.testing.contract.checks.objectives import *  # noqa: F403
