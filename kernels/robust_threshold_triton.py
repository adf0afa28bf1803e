"""Triton forms of robust_threshold.py: one program a row, which holds the row in its registers and selects by bits.

A float becomes an unsigned number of the same order. The number of rank r is then found bit by bit, from the highest:
the bit is set if no more than r numbers lie below what that gives. 32 counts, no sorting and no copies.
"""

import torch
import triton
import triton.language as tl

from . import robust_threshold
from .robust_threshold import millionths, rank_at

NAN_KEY = tl.constexpr(0xFFFFFFFF)
MILLION = tl.constexpr(robust_threshold.MILLION)

PER_THREAD = 16
"""Values of a row that one thread holds, until a program has as many threads as it can."""


@triton.jit
def _key(value):
    """float32 as uint32 of the same order; every NaN is the largest."""
    bits = value.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)
    return tl.where(value != value, NAN_KEY, key)


@triton.jit
def _value(key):
    bits = tl.where((key >> 31) == 1, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load(values, valid, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """A row, which of its entries count, and how many."""
    offset = tl.arange(0, BLOCK)
    counts = offset < size
    value = tl.load(values + offset, mask=counts, other=0.0)
    if MASKED:
        counts = counts & (tl.load(valid + offset, mask=counts, other=0) != 0)
    return value, counts, tl.sum(counts.to(tl.int32), 0)


@triton.jit
def _select(value, counts, rank):
    """The values of rank `rank` and `rank + 1`, counted from 0, of those that count; the latter only if there are as many."""
    key = tl.where(counts, _key(value), NAN_KEY)  # the largest: never below anything
    chosen = tl.zeros((), tl.uint32)
    for bit in range(32):
        candidate = chosen | (tl.full((), 0x80000000, tl.uint32) >> bit)
        below = tl.sum((key < candidate).to(tl.int32), 0)
        chosen = tl.where(below <= rank, candidate, chosen)
    up_to = tl.sum((key <= chosen).to(tl.int32), 0)
    following = tl.min(tl.where(key > chosen, key, NAN_KEY), 0)
    return _value(chosen), _value(tl.where(up_to > rank + 1, chosen, following))


@triton.jit
def _middle(value, counts, count):
    """Median of the values that count; NaN if none does."""
    lower, upper = _select(value, counts, (tl.maximum(count, 1) - 1) // 2)
    median = tl.where(count % 2 == 1, lower, (lower + upper) / 2)
    return tl.where(count == 0, float("nan"), median)


@triton.jit
def _median_and_mad(values, valid, median, mad, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    value, counts, count = _load(values + row * size, valid + row * size, size, MASKED, BLOCK)
    centre = _middle(value, counts, count)
    tl.store(median + row, centre)
    tl.store(mad + row, _middle(tl.abs(value - centre), counts, count))


@triton.jit
def _quantile(values, valid, out, size, rank, share, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    value, counts, count = _load(values + row * size, valid + row * size, size, MASKED, BLOCK)
    if MASKED:
        rank = ((tl.maximum(count, 1) - 1).to(tl.int64) * share // MILLION).to(tl.int32)
    quantile, _ = _select(value, counts, rank)
    tl.store(out + row, tl.where(count == 0, float("nan"), quantile))


def warps(block: int) -> int:
    """How many warps of 32 threads a program has that holds so many values."""
    return min(32, max(4, block // (32 * PER_THREAD)))


def _rows(values: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Contiguous rows (B, N) of float32 values and of bytes that say which count (the values again if all do), and what the
    kernels are compiled for."""
    rows = values.flatten(1).contiguous()
    block = triton.next_power_of_2(rows.shape[1])
    shared = {"MASKED": valid is not None, "BLOCK": block, "num_warps": warps(block)}
    counted = rows if valid is None else valid.expand_as(values).flatten(1).contiguous().view(torch.uint8)
    return rows, counted, shared


def _one_each(rows: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(rows), dtype=torch.float32, device=rows.device)


def median_and_mad(values: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, counted, shared = _rows(values, valid)
    median, mad = _one_each(rows), _one_each(rows)
    _median_and_mad[(len(rows),)](rows, counted, median, mad, rows.shape[1], **shared)
    return median, mad


def sample_quantile(values: torch.Tensor, share: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    rows, counted, shared = _rows(values, valid)
    out, size = _one_each(rows), rows.shape[1]
    _quantile[(len(rows),)](rows, counted, out, size, rank_at(share, size), millionths(share), **shared)
    return out
