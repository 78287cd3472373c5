"""In what numbers are summed."""

import torch


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of such numbers are kept: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
