"""Fill holes of an image from what surrounds them: the smoothest surface that meets the hole's border (a membrane)."""

import torch
import torch.nn.functional as F

RELAXATIONS = 24
"""Jacobi steps at each resolution. Measured on a hole of half the side: a linear ramp comes back to rounding, the saddle
x^2 - y^2 to 8 % of its range."""


def fill_from_surroundings(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Replace x inside the mask by an approximate solution of Laplace's equation with x outside it as boundary.

    Coarse to fine: each hole is first filled at half the resolution, from averages of the pixels that are known, and
    then relaxed. So a hole costs the same few passes whatever its size.

    Args:
        x: (B, C, H, W). NaN inside the mask is not looked at.
        mask: (B, H, W) bool, the holes. An image that is all hole gets zeros.

    Returns:
        (B, C, H, W) float32, x bit for bit outside the mask.
    """
    hole = mask[:, None]
    known = torch.where(hole, 0.0, x.float())
    return torch.where(hole, _fill(known, (~hole).float()), x.float())


def _fill(known: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x where weight (B, 1, H, W) is above 0, filled elsewhere; `known` is x there and 0 elsewhere."""
    if min(known.shape[-2:]) <= 2:
        total = weight.sum((2, 3), keepdim=True).clamp(min=1e-12)
        return torch.where(weight > 0, known, (known * weight).sum((2, 3), keepdim=True) / total)
    coarse_weight = F.avg_pool2d(weight, 2, ceil_mode=True)
    coarse = F.avg_pool2d(known * weight, 2, ceil_mode=True) / coarse_weight.clamp(min=1e-12)
    coarse = _fill(coarse, coarse_weight)
    filled = F.interpolate(coarse, size=known.shape[-2:], mode="bilinear", align_corners=False)
    filled = torch.where(weight > 0, known, filled)
    for _ in range(RELAXATIONS):
        padded = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        mean = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
        filled = torch.where(weight > 0, known, mean / 4)
    return filled
