"""How a quantity changes between sampling steps: its speed, smoothed or over its channels, and how its path bends."""

import functools
import math

import torch
from kornia.filters import get_gaussian_kernel1d

from .dispatch import with_triton
from .regions import dilate_square

TRUNCATE = 4.0
"""The Gaussian is cut off at this many standard deviations, as in scipy.ndimage.gaussian_filter."""


PRODUCT_DEVICES = ("cpu",)
"""Where the blur is made of products. Measured on 8 x 4 x 128 x 128, one thread of a Zen 4: 1.0 ms, by shifted images 1.2; while
other programs use the cache 1.1 to 1.3 and 1.4 to 4.8; kornia's convolution 4.7. On a Zen 3, without AVX-512, either way 2 to 3.5.
On GPUs products and convolutions in float32 may run in TF32, of which a threshold would see the rounding."""

BAND = 16
"""Results of a blur that one product gives. Measured with 8, 12, 16, 24, 32, 48: fastest for blurs of 1 and 2 pixels."""


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
    """Gaussian blur of each channel over height and width; `sigma` in pixels, 0 gives x back. x: (B, C, H, W) float32."""
    if blur_radius(sigma) == 0:
        return x
    return blurred_by_bands(x, sigma) if x.device.type in PRODUCT_DEVICES else blurred_by_shifts(x, sigma)


def blurred_by_shifts(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The blur as sums of shifted images."""
    radius, weights = blur_radius(sigma), gaussian_weights(sigma)
    for dim in (-2, -1):
        padded, size = mirror_pad(x, radius, dim), x.shape[dim]
        x = padded.narrow(dim, radius, size) * weights[radius]
        for shift in range(1, radius + 1):
            for side in (radius - shift, radius + shift):
                x.add_(padded.narrow(dim, side, size), alpha=weights[side])
    return x


def blurred_by_bands(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The blur as products with the bands of a matrix: an image is read twice instead of once for every weight.

    As far as the blur reaches from what is not finite the result is that of the sums: 0 * NaN would spread over a whole band.
    """
    if math.isfinite(x.sum()):
        return _products(x, sigma)
    lost = ~x.isfinite()
    reached = dilate_square(lost.flatten(0, 1), blur_radius(sigma)).view(x.shape)
    return torch.where(reached, blurred_by_shifts(x, sigma), _products(x.masked_fill(lost, 0.0), sigma))


def _products(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Of finite x."""
    frames = x.contiguous().flatten(0, 1)
    # bmm, as the matrix product of torch would copy the frames to make one product of all: 1.5 ms instead of 1.8
    bands = [(entries, band.T.expand(len(frames), -1, -1)) for entries, band in blur_bands(x.shape[-2], sigma)]
    frames = torch.cat([torch.bmm(band, frames[:, entries]) for entries, band in bands], dim=1)
    rows = frames.flatten(0, 1)
    return torch.cat([rows[:, entries] @ band for entries, band in blur_bands(x.shape[-1], sigma)], dim=1).view(x.shape)


@functools.lru_cache(maxsize=64)
def blur_bands(size: int, sigma: float) -> list[tuple[slice, torch.Tensor]]:
    """The blur of an axis of `size` entries, mirrored edges included: for each BAND of its results the entries that they are
    made of, and the weights (entries, results).
    """
    radius = blur_radius(sigma)
    weights = blurred_by_shifts(torch.eye(size, dtype=torch.float64)[None, :, None], sigma)[0, :, 0].float()
    bands = []
    for first in range(0, size, BAND):
        entries = slice(max(0, first - radius), min(size, first + BAND + radius))
        bands.append((entries, weights[entries, first : first + BAND].contiguous()))
    return bands


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
def bend_map(velocity: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How much a velocity differs from the mean of its neighbours in time: |V_t - (V_(t-1) + V_(t+1)) / 2|.

    Args:
        velocity, before, after: (B, C, H, W) float32. Where there is one neighbour only it stands on both sides.

    Returns:
        (B, H, W), the largest channel, in the units of the velocity.
    """
    return (velocity - (before + after) / 2).abs_().amax(dim=1)
