"""What every method owes without any model: a config that says its bounds, survives JSON and refuses bad values, and a whole card."""

from hf_tokens.testing.contract.checks.methods import *  # noqa: F403
