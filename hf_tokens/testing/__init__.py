"""Tools for testing methods: tiny models of every family, with inputs."""

from hf_tokens.testing import zoo
from hf_tokens.testing.probe import probe_config

__all__ = ["probe_config", "zoo"]
