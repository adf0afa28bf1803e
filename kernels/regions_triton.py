"""Triton form of region labelling: union-find with atomic operations, three launches and no word from the host.

Every pixel points to itself or to a pixel of its region with a larger index; the largest one of a region points to
itself. Joining two regions lets the smaller of their two last pixels point to the larger one (Komura 2015; Playne and
Hawick 2018 compare such methods).
"""

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def _last(parent, node, active):
    """Follow the pointers from each active node to the end."""
    up = tl.load(parent + node, mask=active, other=0)
    going = active & (up != node)
    while tl.max(going.to(tl.int32), 0) > 0:
        node = tl.where(going, up, node)
        up = tl.load(parent + node, mask=going, other=0)
        going = going & (up != node)
    return node


@triton.jit
def _join(parent, one, other, active):
    """Make one region of those that hold `one` and `other`."""
    while tl.max(active.to(tl.int32), 0) > 0:
        one = _last(parent, one, active)
        other = _last(parent, other, active)
        active = active & (one != other)
        low = tl.minimum(one, other)
        high = tl.maximum(one, other)
        was = tl.atomic_max(parent + low, high, mask=active)
        active = active & (was != low)  # somebody was faster: what `low` points to by now is to be joined instead
        one = tl.where(active, was, one)
        other = high


@triton.jit
def _join_neighbours(mask, parent, height, width, BLOCK: tl.constexpr):
    pixels = height * width
    image = tl.program_id(1).to(tl.int64) * pixels
    mask += image
    parent += image
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    here = inside & (tl.load(mask + pixel, mask=inside, other=0) != 0)
    has_right = here & (pixel % width + 1 < width)
    right = has_right & (tl.load(mask + pixel + 1, mask=has_right, other=0) != 0)
    _join(parent, pixel, pixel + 1, right)
    has_below = here & (pixel + width < pixels)
    below = has_below & (tl.load(mask + pixel + width, mask=has_below, other=0) != 0)
    _join(parent, pixel, pixel + width, below)


@triton.jit
def _name_regions(mask, parent, labels, pixels, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64) * pixels
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    here = inside & (tl.load(mask + image + pixel, mask=inside, other=0) != 0)
    last = _last(parent + image, pixel, here)
    tl.store(labels + image + pixel, tl.where(here, last + 1, 0).to(tl.int64), mask=inside)


def label_regions(mask: torch.Tensor) -> torch.Tensor:
    batch, height, width = mask.shape
    pixels = height * width
    bytes_ = mask.contiguous().view(torch.uint8)
    parent = torch.arange(pixels, dtype=torch.int32, device=mask.device).repeat(batch)
    labels = torch.empty(batch, height, width, dtype=torch.int64, device=mask.device)
    grid = (triton.cdiv(pixels, BLOCK), batch)  # the first axis has room for 2^31 programs, the second for 65535
    _join_neighbours[grid](bytes_, parent, height, width, BLOCK=BLOCK)
    _name_regions[grid](bytes_, parent, labels, pixels, BLOCK=BLOCK)
    return labels
