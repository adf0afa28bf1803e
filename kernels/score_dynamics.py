"""How a quantity changes between sampling steps: its speed, smoothed or over its channels, and how its path bends."""

import functools

import torch
from kornia.filters import get_gaussian_kernel1d

from .dispatch import with_triton

TRUNCATE = 4.0
"""The Gaussian is cut off at this many standard deviations, as in scipy.ndimage.gaussian_filter."""


def mirror_pad(x: torch.Tensor, pad: int, dim: int) -> torch.Tensor:
    """Pad a dimension by `pad` entries mirrored about the edge (d c b a | a b c d | d c b a), as scipy's "reflect".

    torch's own "reflect" leaves the edge entry out and refuses pads as large as the dimension.
    """
    size = x.shape[dim]
    if pad <= size:
        return torch.cat([x.narrow(dim, 0, pad).flip(dim), x, x.narrow(dim, size - pad, pad).flip(dim)], dim)
    index = torch.arange(-pad, size + pad, device=x.device) % (2 * size)
    return x.index_select(dim, torch.where(index < size, index, 2 * size - 1 - index))


def blur_radius(sigma: float) -> int:
    """How many pixels a Gaussian of `sigma` pixels reaches to each side."""
    return int(TRUNCATE * sigma + 0.5)


@functools.lru_cache(maxsize=64)
def gaussian_weights(sigma: float) -> tuple[float, ...]:
    """Weights of a Gaussian of `sigma` pixels, 2 * blur_radius(sigma) + 1 of them that sum to 1."""
    return tuple(get_gaussian_kernel1d(2 * blur_radius(sigma) + 1, sigma or 1.0, dtype=torch.float64)[0].tolist())


def gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of each channel over height and width; `sigma` in pixels, 0 gives x back. x: (B, C, H, W).

    By sums of shifted images, not by a convolution: measured on 8 x 4 x 128 x 128, one CPU thread, 1.2 ms against
    kornia's 4.7, and on GPUs convolutions in float32 may run in TF32, of which a threshold would see the rounding.
    """
    radius = blur_radius(sigma)
    if radius == 0:
        return x
    weights = gaussian_weights(sigma)
    for dim in (-2, -1):
        padded, size = mirror_pad(x, radius, dim), x.shape[dim]
        x = padded.narrow(dim, radius, size) * weights[radius]
        for shift in range(1, radius + 1):
            for side in (radius - shift, radius + shift):
                x.add_(padded.narrow(dim, side, size), alpha=weights[side])
    return x


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
    return gaussian_blur((current.float() - previous.float()).abs_(), sigma)


@with_triton("score_dynamics_triton")
def change_maps(current: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """|current - previous| over the channels, in float32: (mean, largest), each (B, H, W).

    Args:
        current, previous: (B, C, H, W), any floating dtype.
    """
    change = (current.float() - previous.float()).abs_()
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
    return (velocity - usual).abs_().amax(dim=1)
