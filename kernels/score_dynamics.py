"""How a quantity changes between sampling steps: its speed, smoothed or over its channels, and how its path bends."""

import torch
from kornia.filters import filter2d_separable, get_gaussian_kernel1d

from .dispatch import with_triton

TRUNCATE = 4.0
"""The Gaussian is cut off at this many standard deviations, as in scipy.ndimage.gaussian_filter."""


def mirror_pad(x: torch.Tensor, pad: int) -> torch.Tensor:
    """Pad height and width by `pad` pixels mirrored about the image's edge (d c b a | a b c d | d c b a).

    torch's own "reflect" leaves the edge pixel out and refuses pads as large as the image; this is scipy's "reflect".
    x: (B, C, H, W), any dtype; gives (B, C, H + 2 pad, W + 2 pad).
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        index = torch.arange(-pad, size + pad, device=x.device) % (2 * size)
        x = x.index_select(dim, torch.where(index < size, index, 2 * size - 1 - index))
    return x


def blur_radius(sigma: float) -> int:
    """How many pixels a Gaussian of `sigma` pixels reaches to each side."""
    return int(TRUNCATE * sigma + 0.5)


def gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of each channel over height and width; `sigma` in pixels, 0 gives x back. x: (B, C, H, W)."""
    radius = blur_radius(sigma)
    if radius == 0:
        return x
    kernel = get_gaussian_kernel1d(2 * radius + 1, sigma, device=x.device, dtype=x.dtype)
    return filter2d_separable(mirror_pad(x, radius), kernel, kernel, padding="valid")


@with_triton("score_dynamics_triton")
def change_speed(current: torch.Tensor, previous: torch.Tensor, sigma: float) -> torch.Tensor:
    """Smoothed speed of change, d_t = blur(|current - previous|), computed in float32.

    ASCED's released code takes this of 8-bit images of the clean estimate and blurs across the colour channels too;
    here it is taken of raw floats and of each channel by itself.

    Args:
        current, previous: (B, C, H, W), the quantity at this step and at the one before it.
        sigma: standard deviation of the blur in pixels.

    Returns:
        (B, C, H, W) float32, not negative, in the units of the input.
    """
    return gaussian_blur((current.float() - previous.float()).abs(), sigma)


@with_triton("score_dynamics_triton")
def change_maps(current: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """|current - previous| over the channels, in float32: (mean, largest), each (B, H, W).

    Args:
        current, previous: (B, C, H, W), any floating dtype.
    """
    change = (current.float() - previous.float()).abs()
    return change.mean(dim=1), change.amax(dim=1)


@with_triton("score_dynamics_triton")
def bend_map(velocity: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor:
    """How much a velocity differs from the mean of its neighbours in time: |V_t - (V_(t-1) + V_(t+1)) / 2|.

    Args:
        velocity, before, after: (B, C, H, W) float32. With one neighbour that one counts alone; one at least is there.

    Returns:
        (B, H, W), the largest channel, in the units of the velocity.
    """
    if before is None or after is None:
        usual = after if before is None else before
    else:
        usual = (before + after) / 2
    return (velocity - usual).abs().amax(dim=1)
