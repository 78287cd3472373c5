"""Tools for testing methods: tiny models of every family, with inputs."""

from hf_tokens.testing import zoo

__all__ = ["zoo"]
