"""Tools for testing methods: tiny models of every family, with inputs."""

from hf_tokens.testing import zoo
from hf_tokens.testing.probe import probe_config
from hf_tokens.testing.zoo import CACHE

__all__ = ["CACHE", "probe_config", "zoo"]
