"""Means over the cells of a grid."""

import torch
import torch.nn.functional as F

EQUAL_CELLS = ("mps",)
"""Where torch takes means over cells of one size alone (seen in 2.13: "input sizes must be divisible by output sizes"). Others are
taken on the CPU."""


def cell_means(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mean of each of size[0] x size[1] cells, which overlap where they do not divide the sides: (F, ..., H, W) gives (F, ..., *size)."""
    uneven = any(side % cells for side, cells in zip(x.shape[-2:], size))
    if uneven and x.device.type in EQUAL_CELLS:
        return F.adaptive_avg_pool2d(x.cpu(), size).to(x.device)
    return F.adaptive_avg_pool2d(x, size)
