"""Connected regions of boolean masks: labelling, hysteresis, filters by area and width, opening, dilation."""

import torch
import torch.nn.functional as F

from .dispatch import with_triton


@with_triton("regions_triton")
def label_regions(mask: torch.Tensor) -> torch.Tensor:
    """Label the 4-connected regions of each mask.

    Each pixel starts with its own number; every pass spreads the largest number to the four neighbours and then
    follows it to the number that its owner has by now (pointer jumping), until nothing changes.

    Args:
        mask: (B, H, W) bool.

    Returns:
        (B, H, W) int64: 0 outside, inside a number that is the same over the region and different between regions
        of one mask (1 + the largest flat index of the region's pixels).
    """
    batch, height, width = mask.shape
    own = torch.arange(1, height * width + 1, device=mask.device).view(1, height, width)
    labels = torch.where(mask, own, 0)
    while True:
        padded = F.pad(labels, (1, 1, 1, 1))
        neighbours = (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
        spread = labels
        for neighbour in neighbours:
            spread = torch.maximum(spread, neighbour)
        spread = torch.where(mask, spread, 0)
        owners = F.pad(spread.flatten(1), (1, 0))
        spread = owners.gather(1, spread.flatten(1)).view_as(labels)
        if torch.equal(spread, labels):
            return labels
        labels = spread


def dilate_square(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Dilate by a square of 2 radius + 1 pixels. mask: (B, H, W) bool."""
    if radius == 0:
        return mask
    return F.max_pool2d(mask.float()[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0.5


def open_square(mask: torch.Tensor, side: int) -> torch.Tensor:
    """Opening: of a mask (B, H, W) bool, the pixels that some square of side x side pixels within it covers."""
    if side <= 1:
        return mask
    if side > min(mask.shape[-2:]):
        return torch.zeros_like(mask)
    whole = -F.max_pool2d(-mask.float()[:, None], side, stride=1)
    return F.max_pool2d(F.pad(whole, [side - 1] * 4), side, stride=1)[:, 0] > 0.5


def count_in_region(labels: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Number of true `pixels` (B, H, W) in the region of each pixel of `labels` (B, H, W); 0 outside."""
    flat = labels.flatten(1)
    counts = torch.zeros(flat.shape[0], flat.shape[1] + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(1, flat, pixels.flatten(1).long())
    counts[:, 0] = 0
    return counts.gather(1, flat).view_as(labels)


def grow_from(strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
    """Hysteresis: the 4-connected regions of `weak` that hold a `strong` pixel. Both (B, H, W) bool."""
    return weak & (count_in_region(label_regions(weak), strong & weak) > 0)


def interior(labels: torch.Tensor, side: int) -> torch.Tensor:
    """Pixels whose side x side square lies wholly in their own region: true erosion, region by region.

    All labels in the square are equal exactly if the largest and the smallest are. float32 holds labels of up to
    4096 x 4096 pixels exactly.
    """
    before = side // 2
    padded = F.pad(labels.float()[:, None], (before, side - 1 - before, before, side - 1 - before))
    largest = F.max_pool2d(padded, side, stride=1)[:, 0]
    smallest = -F.max_pool2d(-padded, side, stride=1)[:, 0]
    return (labels > 0) & (largest == smallest)


def filter_regions(mask: torch.Tensor, min_area: float, max_area: float, min_width: int) -> torch.Tensor:
    """Keep the 4-connected regions with min_area < area < max_area that survive erosion by a min_width square.

    Each region is eroded by itself, so that two that touch at a corner do not hold each other up.

    Args:
        mask: (B, H, W) bool.
        min_area, max_area: pixels, both bounds excluded, as in ASCED's released code.
        min_width: side of the square in pixels; 1 keeps every width.

    Returns:
        (B, H, W) bool, a subset of `mask`.
    """
    labels = label_regions(mask)
    area = count_in_region(labels, mask)
    kept = mask & (area > min_area) & (area < max_area)
    if min_width > 1:
        kept = kept & (count_in_region(labels, interior(labels, min_width)) > 0)
    return kept
