"""The command line, outside of `hf_tokens`, whose import loads PyTorch and PEFT."""

from .app import main as main
