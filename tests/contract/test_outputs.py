"""One forward: the outside of the model does not change, zero strength is the base, and a batch is each sample alone."""

from hf_tokens.testing.contract.checks.outputs import *  # noqa: F403
