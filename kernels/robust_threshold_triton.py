"""Triton forms of robust_threshold.py: one program a row selects by radix, without sorting and without copies.

A float becomes an unsigned number of the same order. The number of rank r is then found digit by digit, from the
highest: a histogram of the digit over the values that agree so far tells which it is. Four digits of eight bits.
"""

import torch
import triton
import triton.language as tl

BLOCK = 2048
NAN_KEY = tl.constexpr(0xFFFFFFFF)


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
def _load(values, valid, start, size, centre, CENTRED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of a block, of |value - centre| if CENTRED, and which of them count."""
    offset = start + tl.arange(0, BLOCK)
    counts = offset < size
    value = tl.load(values + offset, mask=counts, other=0.0)
    if CENTRED:
        value = tl.abs(value - centre)
    if MASKED:
        counts = counts & (tl.load(valid + offset, mask=counts, other=0) != 0)
    return _key(value), counts


@triton.jit
def _select(values, valid, size, rank, centre, CENTRED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The values of rank `rank` and `rank + 1`, counted from 0; the latter only if there are as many."""
    bins = tl.arange(0, 512)
    prefix = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)
    left = rank
    for digit in range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros((512,), tl.int32)
        for start in range(0, size, BLOCK):
            key, counts = _load(values, valid, start, size, centre, CENTRED, MASKED, BLOCK)
            agrees = counts & ((key & known) == prefix)
            number = ((key >> shift) & 0xFF).to(tl.int32)
            histogram += tl.histogram(tl.where(agrees, number, 256), 512)
        histogram = tl.where(bins < 256, histogram, 0)
        below = tl.cumsum(histogram, 0)
        chosen = tl.sum(((below <= left) & (bins < 256)).to(tl.int32), 0)
        chosen = tl.minimum(chosen, 255)
        left -= tl.sum(tl.where(bins < chosen, histogram, 0), 0)
        prefix = prefix | (chosen.to(tl.uint32) << shift)
        known = known | (tl.full((), 255, tl.uint32) << shift)
    up_to = tl.zeros((), tl.int32)
    following = tl.full((), NAN_KEY, tl.uint32)
    for start in range(0, size, BLOCK):
        key, counts = _load(values, valid, start, size, centre, CENTRED, MASKED, BLOCK)
        up_to += tl.sum((counts & (key <= prefix)).to(tl.int32), 0)
        above = tl.where(counts & (key > prefix), key, NAN_KEY)
        following = tl.minimum(following, tl.min(above, 0))
    following = tl.where(up_to > rank + 1, prefix, following)
    return _value(prefix), _value(following)


@triton.jit
def _count(valid, size, BLOCK: tl.constexpr):
    total = tl.zeros((), tl.int32)
    for start in range(0, size, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        total += tl.sum((tl.load(valid + offset, mask=offset < size, other=0) != 0).to(tl.int32), 0)
    return total


@triton.jit
def _middle(values, valid, size, count, centre, CENTRED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Median of the values that count."""
    lower, upper = _select(values, valid, size, (count - 1) // 2, centre, CENTRED, MASKED, BLOCK)
    return tl.where(count % 2 == 1, lower, (lower + upper) / 2)


@triton.jit
def _median_and_mad(values, valid, median, mad, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values += row * size
    valid += row * size
    count = size
    if MASKED:
        count = _count(valid, size, BLOCK)
    counted = tl.maximum(count, 1)
    centre = _middle(values, valid, size, counted, 0.0, False, MASKED, BLOCK)
    spread = _middle(values, valid, size, counted, centre, True, MASKED, BLOCK)
    nothing = count == 0
    tl.store(median + row, tl.where(nothing, float("nan"), centre))
    tl.store(mad + row, tl.where(nothing, float("nan"), spread))


@triton.jit
def _quantile(values, valid, out, size, rank, millionths, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values += row * size
    valid += row * size
    count = size
    if MASKED:
        count = _count(valid, size, BLOCK)
        rank = ((tl.maximum(count, 1) - 1).to(tl.int64) * millionths // 1000000).to(tl.int32)
    quantile, _ = _select(values, valid, size, rank, 0.0, False, MASKED, BLOCK)
    tl.store(out + row, tl.where(count == 0, float("nan"), quantile))


def _rows(values: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous rows (B, N) of float32 values and of bytes that say which count (the values again if all do)."""
    rows = values.flatten(1).contiguous()
    if valid is None:
        return rows, rows
    return rows, valid.expand_as(values).flatten(1).contiguous().view(torch.uint8)


def median_and_mad(values: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, counted = _rows(values, valid)
    median = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    mad = torch.empty_like(median)
    _median_and_mad[(len(rows),)](rows, counted, median, mad, rows.shape[1], MASKED=valid is not None, BLOCK=BLOCK)
    return median, mad


def sample_quantile(values: torch.Tensor, share: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    rows, counted = _rows(values, valid)
    out = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    size = rows.shape[1]
    rank = int(share * (size - 1))
    millionths = round(share * 1_000_000)  # a float argument would come as float32
    _quantile[(len(rows),)](rows, counted, out, size, rank, millionths, MASKED=valid is not None, BLOCK=BLOCK)
    return out
