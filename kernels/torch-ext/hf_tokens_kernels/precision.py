"""In what numbers is computed, and in what summed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of such numbers are kept: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def of_autocast(device: torch.device) -> tuple[Callable[[Tensor], Tensor], AbstractContextManager]:
    """What an operation does under an autocast, as `scaled_dot_product_attention`: it takes its states in that dtype, whatever each
    of them came in, and does inside what it does without one."""
    if not torch.is_autocast_enabled(device.type):
        return lambda x: x, nullcontext()
    dtype = torch.get_autocast_dtype(device.type)
    return lambda x: x if x.dtype == torch.float64 else x.to(dtype), torch.autocast(device.type, enabled=False)
