"""Generation: with a cache as without, in beams, in chunks, over turns; a padded row as that row alone; a static cache right or refused."""

from hf_tokens.testing.contract.checks.generation import *  # noqa: F403
