"""Local renoising: a fresh noisy sample inside a mask, everything outside it bit for bit as it was."""

import torch

from .dispatch import with_triton


@with_triton("renoise_triton")
def renoise(
    x: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, mask: torch.Tensor, a: float, b: float
) -> torch.Tensor:
    """x' = a * x0 + b * eps inside the mask (ASCED, Eq. 6), x outside.

    Args:
        x: (B, C, H, W) noisy sample at the step.
        x0: (B, C, H, W) clean sample to renoise from.
        eps: (B, C, H, W) noise of unit variance.
        mask: (B, H, W) bool.
        a, b: coefficients of the step's forward process, x = a * x0 + b * eps.
    """
    return torch.where(mask[:, None], (a * x0 + b * eps).to(x.dtype), x)
