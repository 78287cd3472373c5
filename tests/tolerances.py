"""How far two ways to compute the same thing may lie apart: said where the contract reads it, and no test has a number of its own."""

from hf_tokens.testing.tolerances import ROUNDING, all_close, all_equal, allowed, close, differs, scale

__all__ = ["ROUNDING", "all_close", "all_equal", "allowed", "close", "differs", "scale"]
