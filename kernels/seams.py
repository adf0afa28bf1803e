"""How visible the border of a mask is in an image."""

import torch


def border_jump(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean step across a mask's border: |x_p - x_q|, largest channel, over the neighbours p inside and q outside.

    Args:
        x: (B, C, H, W).
        mask: (B, H, W) bool.

    Returns:
        (B,) float32, in the units of x; 0 where the mask has no border.
    """
    total = torch.zeros(len(x), device=x.device)
    count = torch.zeros(len(x), device=x.device)
    for dim in (-2, -1):
        size = x.shape[dim]
        step = (x.narrow(dim, 1, size - 1) - x.narrow(dim, 0, size - 1)).float().abs().amax(dim=1)
        border = mask.narrow(dim, 1, size - 1) ^ mask.narrow(dim, 0, size - 1)
        total = total + torch.where(border, step, 0.0).flatten(1).sum(1)
        count = count + border.flatten(1).sum(1)
    return total / count.clamp(min=1)
