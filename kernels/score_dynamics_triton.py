"""Triton forms of score_dynamics.py: each reads its inputs once and writes maps that have no channels any more."""

import functools

import torch
import triton
import triton.language as tl

from .score_dynamics import blur_radius, gaussian_weights

BLOCK = 1024


@triton.jit
def _change_maps(current, previous, mean, largest, channels, pixels, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    place = sample * channels * pixels + pixel
    total = tl.zeros((BLOCK,), tl.float32)
    top = tl.zeros((BLOCK,), tl.float32)
    for _ in range(channels):
        now = tl.load(current + place, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(previous + place, mask=inside, other=0.0).to(tl.float32)
        change = tl.abs(now - before)
        total += change
        top = tl.maximum(top, change)
        place += pixels
    top = tl.where(total != total, total, top)  # NaN in any channel
    tl.store(mean + sample * pixels + pixel, total / channels, mask=inside)
    tl.store(largest + sample * pixels + pixel, top, mask=inside)


def change_maps(current: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    current, previous = current.contiguous(), previous.contiguous()
    batch, channels, height, width = current.shape
    mean = torch.empty(batch, height, width, dtype=torch.float32, device=current.device)
    largest = torch.empty_like(mean)
    pixels = height * width
    grid = (batch, triton.cdiv(pixels, BLOCK))
    _change_maps[grid](current, previous, mean, largest, channels, pixels, BLOCK=BLOCK)
    return mean, largest


@triton.jit
def _bend_map(velocity, before, after, out, channels, pixels, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    place = sample * channels * pixels + pixel
    total = tl.zeros((BLOCK,), tl.float32)
    top = tl.zeros((BLOCK,), tl.float32)
    for _ in range(channels):
        usual = tl.load(before + place, mask=inside, other=0.0) + tl.load(after + place, mask=inside, other=0.0)
        bend = tl.abs(tl.load(velocity + place, mask=inside, other=0.0) - usual * 0.5)
        total += bend
        top = tl.maximum(top, bend)
        place += pixels
    top = tl.where(total != total, total, top)
    tl.store(out + sample * pixels + pixel, top, mask=inside)


def bend_map(velocity: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = velocity.shape
    out = torch.empty(batch, height, width, dtype=torch.float32, device=velocity.device)
    pixels = height * width
    given = [x.contiguous() for x in (velocity, before, after)]
    _bend_map[(batch, triton.cdiv(pixels, BLOCK))](*given, out, channels, pixels, BLOCK=BLOCK)
    return out


@triton.jit
def _blur_axis(
    source, other, out, weights, rows, columns, lift, radius, DIFFERENCE: tl.constexpr, ALONG_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One axis of a separable blur of images (rows, columns), mirrored at the edge; of |source - other| if DIFFERENCE."""
    pixels = rows * columns
    image = tl.program_id(0).to(tl.int64) * pixels
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    row, column = pixel // columns, pixel % columns
    total = tl.zeros((BLOCK,), tl.float32)
    for tap in range(2 * radius + 1):
        if ALONG_ROWS:
            size, index = columns, column + tap - radius
        else:
            size, index = rows, row + tap - radius
        index = (index + lift) % (2 * size)  # lift, a multiple of 2 * size, keeps it from being negative
        index = tl.where(index < size, index, 2 * size - 1 - index)
        place = image + (row * columns + index if ALONG_ROWS else index * columns + column)
        value = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        if DIFFERENCE:
            value = tl.abs(value - tl.load(other + place, mask=inside, other=0.0).to(tl.float32))
        total += value * tl.load(weights + tap)
    tl.store(out + image + pixel, total, mask=inside)


@functools.lru_cache(maxsize=16)
def _weights_on(device: torch.device, sigma: float) -> torch.Tensor:
    """gaussian_weights on the device, brought there once: the host waits for a copy."""
    return torch.tensor(gaussian_weights(sigma), dtype=torch.float32, device=device)


def change_speed(current: torch.Tensor, previous: torch.Tensor, sigma: float) -> torch.Tensor:
    current, previous = current.contiguous(), previous.contiguous()
    batch, channels, height, width = current.shape
    radius = blur_radius(sigma)
    weights = _weights_on(current.device, sigma)
    out = torch.empty(current.shape, dtype=torch.float32, device=current.device)
    grid = (batch * channels, triton.cdiv(height * width, BLOCK))
    shared = {"rows": height, "columns": width, "radius": radius, "BLOCK": BLOCK}
    _blur_axis[grid](
        current, previous, out, weights, lift=2 * width * (radius // (2 * width) + 1), DIFFERENCE=True,
        ALONG_ROWS=True, **shared,
    )
    if radius == 0:
        return out
    blurred = torch.empty_like(out)
    _blur_axis[grid](
        out, out, blurred, weights, lift=2 * height * (radius // (2 * height) + 1), DIFFERENCE=False,
        ALONG_ROWS=False, **shared,
    )
    return blurred
