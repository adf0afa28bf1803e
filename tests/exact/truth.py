"""What came of a trap: did the run fall, and is its region probable again under the clean mixture?

All take results x0 (B, C, H, W) or (B, C, T, H, W) and masks (B or 1, H, W); samples without a region give False.
"""

import math

import torch

from .traps import region_of, trapped_rows


def fell(trap, denoiser, x0):
    """(B,) bool: the region is nearer to the attractor's garbage than to the same region of any clean image."""
    flat, inside = denoiser.flatten(x0), region_of(trap.mask, x0).flatten(1)
    garbage = trap.pattern.to(flat).expand_as(x0).flatten(1)
    to_garbage = ((flat - garbage) ** 2 * inside).sum(1)
    to_images = torch.stack([
        _region_distances(denoiser, row[None], region).min() for row, region in zip(flat, inside)])
    return (to_garbage < to_images) & trapped_rows(trap.mask, len(x0)).to(flat.device)


def region_log_likelihood(denoiser, x0, mask, width=0.1):
    """log p(x0 inside the mask | x0 outside it) under the clean mixture smoothed to `width`, (B,).

    Given the outside, so that a region redrawn from another image, with a seam, is improbable too. It is the
    difference of two exact densities, log p(x0) - log p(x0 outside).
    """
    flat = denoiser.flatten(x0)
    components = denoiser.log_components(flat, 1.0, width)
    regions = region_of(mask, x0).flatten(1)
    if len(mask) == 1:
        return _given_outside(denoiser, flat, components, regions[0], width)
    return torch.cat([
        _given_outside(denoiser, flat[i:i + 1], components[i:i + 1], regions[i], width) for i in range(len(flat))])


def clean_floors(denoiser, clean, masks, percentile=1.0, width=0.1):
    """The `percentile`th of clean runs' region log-likelihood for each of the masks (B, H, W), (B,).

    `clean` (R, C, H, W) are results of runs without a trap, with the same sampler and steps: a few hundred of them,
    as their first percentile is asked for.
    """
    flat = denoiser.flatten(clean)
    components = denoiser.log_components(flat, 1.0, width)
    regions = [region_of(mask[None], clean[:1]).flatten() for mask in masks]
    likely = torch.stack([_given_outside(denoiser, flat, components, region, width) for region in regions])
    return torch.quantile(likely, percentile / 100.0, dim=1)


def repaired(denoiser, x0, mask, clean, percentile=1.0, width=0.1):
    """(B,) bool: every region as likely as in clean runs, see clean_floors."""
    floors = clean_floors(denoiser, clean, mask, percentile, width)
    likely = region_log_likelihood(denoiser, x0, mask, width)
    return (likely >= floors) & trapped_rows(mask, len(x0)).to(likely.device)


def _given_outside(denoiser, flat, components, region, width):
    """log p(x) - log p(x outside the region), (B,): components are those of all of x, region (dims,) bool."""
    v = denoiser.variance(1.0, width)
    inside = _region_distances(denoiser, flat, region) / (2.0 * v) + 0.5 * region.sum() * math.log(2.0 * math.pi * v)
    return components.logsumexp(1) - (components + inside).logsumexp(1)


def _region_distances(denoiser, flat, region):
    """|x - x_i|^2 over the dimensions of the region, (B, N)."""
    return torch.cdist(flat[:, region], denoiser.flat[:, region]).square()
