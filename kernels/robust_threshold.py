"""Outlier thresholds from median and median absolute deviation (MAD), one a sample, without a host round trip."""

import torch

from .dispatch import with_triton

NORMAL_CONSISTENCY = 1.4826
"""MAD times this estimates the standard deviation of normally distributed values."""


def sample_median(values: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Median of each row, the mean of the two middle values where their number is even, as in numpy.

    Args:
        values: (B, N). NaN counts as larger than any number.
        valid: (N,) or (B, N) bool, optional: the entries to look at. A row with none gives NaN.

    Returns:
        (B,) in the dtype of `values`.
    """
    if valid is None:
        middle = values.shape[1] // 2
        upper = values.kthvalue(middle + 1, dim=1).values
        if values.shape[1] % 2:
            return upper
        return (upper + values.kthvalue(middle, dim=1).values) / 2
    valid = valid.expand_as(values)
    ordered = values.masked_fill(~valid, torch.nan).sort(dim=1).values
    count = valid.sum(dim=1, keepdim=True)
    pair = torch.cat([(count - 1) // 2, count // 2], dim=1).clamp(min=0, max=values.shape[1] - 1)
    return torch.where(count[:, 0] > 0, ordered.gather(1, pair).mean(dim=1), torch.nan)


@with_triton("robust_threshold_triton", dtypes=(torch.float32, torch.bool))
def median_and_mad(values: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Median and median absolute deviation of each sample: (B, ...) gives two of (B,) in the dtype of `values`.

    Args:
        values: (B, ...), at least one value a sample. NaN counts as larger than any number.
        valid: bool, broadcastable to the shape of `values`, optional: the entries that count. A sample with none gives
            NaN.
    """
    rows = values.flatten(1)
    rows_valid = None if valid is None else valid.expand_as(values).flatten(1)
    median = sample_median(rows, rows_valid)
    return median, sample_median((rows - median[:, None]).abs(), rows_valid)


def robust_threshold(values: torch.Tensor, k: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """median + k * 1.4826 * MAD of each sample: (B, ...) gives (B,); see `median_and_mad`.

    Args:
        k: how many robust standard deviations above the median the threshold lies.
    """
    median, mad = median_and_mad(values, valid)
    return median + k * NORMAL_CONSISTENCY * mad


@with_triton("robust_threshold_triton", dtypes=(torch.float32, torch.bool))
def sample_quantile(values: torch.Tensor, share: float, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The value below which `share` of each sample's entries lie, without interpolation: (B, ...) gives (B,).

    Args:
        values: (B, ...), at least one value a sample. NaN counts as larger than any number.
        share: 0 to 1; 0.5 of an odd number of entries is the median.
        valid: bool, broadcastable to the shape of `values`, optional: the entries that count. A sample with none gives
            NaN.
    """
    rows = values.flatten(1)
    if valid is None:
        return rows.kthvalue(1 + int(share * (rows.shape[1] - 1)), dim=1).values
    rows_valid = valid.expand_as(values).flatten(1)
    ordered = rows.masked_fill(~rows_valid, torch.nan).sort(dim=1).values
    count = rows_valid.sum(dim=1, keepdim=True)
    index = (share * (count - 1)).long().clamp(min=0)
    return torch.where(count[:, 0] > 0, ordered.gather(1, index)[:, 0], torch.nan)
