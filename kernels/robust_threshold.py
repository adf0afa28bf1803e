"""Outlier thresholds from median and median absolute deviation (MAD), one a sample, without a host round trip."""

from collections.abc import Callable

import numpy as np
import torch

from .dispatch import with_triton
from .row_select import value_at

NORMAL_CONSISTENCY = 1.4826
"""MAD times this estimates the standard deviation of normally distributed values."""


NUMPY_DEVICES = ("cpu",)
"""Where numpy selects. Measured on 8 rows of 65536 values, one thread: 0.6 ms, torch's kthvalue 5.1 ms."""

Ranks = Callable[[int], tuple[int, int]]
"""Number of values of a row -> the two ranks, counted from 0 and equal or next to each other, whose mean is wanted."""


def middle(count: int) -> tuple[int, int]:
    return (count - 1) // 2, count // 2


MILLION = 1_000_000


def millionths(share: float) -> int:
    """A share in whole numbers, in which every device finds the same rank."""
    return round(share * MILLION)


def rank_at(share: float, count: int) -> int:
    """The rank, counted from 0, below which this share of so many values lies."""
    return (count - 1) * millionths(share) // MILLION


def _numpy_rows(values: torch.Tensor, valid: torch.Tensor | None) -> list[np.ndarray]:
    """Of each row of `values` (B, N), on the CPU, the entries that count, float32; compress is faster than row[counts]."""
    rows = values.detach().float().numpy()
    return list(rows) if valid is None else [row.compress(counts) for row, counts in zip(rows, valid.numpy())]


def _selected(row: np.ndarray, ranks: Ranks) -> np.float32:
    """Mean of the values at two ranks of a row; NaN if it is empty."""
    return value_at(row, *ranks(len(row))) if len(row) else np.float32(np.nan)


def _from_numpy(values: list, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)).to(like.dtype)


LONGEST_ROW = 65536
"""Values of a sample that a Triton form holds in one program: a 2048x2048 picture's latent has as many."""


def row_length(tensors: list[torch.Tensor]) -> int:
    """Values of one sample."""
    return max(x[0].numel() for x in tensors)


def too_long(tensors: list[torch.Tensor]) -> str | None:
    """Why the Triton forms cannot take rows of this length; None if they can."""
    longest = row_length(tensors)
    return f"its Triton form takes up to {LONGEST_ROW} values a sample, and here are {longest}" if longest > LONGEST_ROW else None


selecting = with_triton("robust_threshold_triton", dtypes=(torch.float32, torch.bool), unfit=too_long, size_of=row_length)


def _row_median(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Median (B,) of rows (B, N), of those values that `valid` (B, N) marks."""
    if values.device.type in NUMPY_DEVICES:
        return _from_numpy([_selected(row, middle) for row in _numpy_rows(values, valid)], values)
    if values.shape[1] == 0:
        return values.new_full((len(values),), torch.nan)
    if valid is None:
        lower, upper = (values.kthvalue(rank + 1, dim=1).values for rank in middle(values.shape[1]))
        return (upper + lower) / 2
    ordered = values.masked_fill(~valid, torch.nan).sort(dim=1).values
    count = valid.sum(dim=1, keepdim=True)
    pair = torch.cat([(count - 1) // 2, count // 2], dim=1).clamp(min=0, max=values.shape[1] - 1)
    return torch.where(count[:, 0] > 0, ordered.gather(1, pair).mean(dim=1), torch.nan)


@selecting
def median_and_mad(values: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Median and median absolute deviation of each sample: (B, ...) gives two of (B,) in the dtype of `values`.

    A median is the mean of the two middle values where their number is even, as in numpy.

    Args:
        values: (B, ...). NaN counts as larger than any number.
        valid: bool, broadcastable to the shape of `values`, optional: the entries that count. A sample without any
            gives NaN.
    """
    rows = values.flatten(1)
    rows_valid = None if valid is None else valid.expand_as(values).flatten(1)
    if rows.device.type in NUMPY_DEVICES:  # row by row, so that what is made on the way stays in the cache
        chosen = _numpy_rows(rows, rows_valid)
        medians = [_selected(row, middle) for row in chosen]
        mads = [_selected(np.abs(away := row - median, out=away), middle) for row, median in zip(chosen, medians)]
        return _from_numpy(medians, rows), _from_numpy(mads, rows)
    median = _row_median(rows, rows_valid)
    return median, _row_median((rows - median[:, None]).abs_(), rows_valid)


def robust_threshold(values: torch.Tensor, k: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """median + k * 1.4826 * MAD of each sample: (B, ...) gives (B,); see `median_and_mad`.

    Args:
        k: how many robust standard deviations above the median the threshold lies.
    """
    median, mad = median_and_mad(values, valid)
    return torch.add(median, mad, alpha=k * NORMAL_CONSISTENCY)


@selecting
def sample_quantile(values: torch.Tensor, share: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The value below which `share` of each sample's entries lie, without interpolation: (B, ...) gives (B,).

    Args:
        values: (B, ...). NaN counts as larger than any number.
        share: 0 to 1; 0.5 of an odd number of entries is the median.
        valid: bool, broadcastable to the shape of `values`, optional: the entries that count. A sample without any
            gives NaN.
    """
    rows = values.flatten(1)
    rows_valid = None if valid is None else valid.expand_as(values).flatten(1)
    if rows.device.type in NUMPY_DEVICES:
        def rank(count):
            return (rank_at(share, count),) * 2

        return _from_numpy([_selected(row, rank) for row in _numpy_rows(rows, rows_valid)], rows)
    if rows.shape[1] == 0:
        return rows.new_full((len(rows),), torch.nan)
    if valid is None:
        return rows.kthvalue(1 + rank_at(share, rows.shape[1]), dim=1).values
    ordered = rows.masked_fill(~rows_valid, torch.nan).sort(dim=1).values
    count = rows_valid.sum(dim=1, keepdim=True)
    index = ((count - 1) * millionths(share) // MILLION).clamp(min=0)
    return torch.where(count[:, 0] > 0, ordered.gather(1, index)[:, 0], torch.nan)
