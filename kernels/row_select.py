"""Order statistics of one row of numbers in numpy, exact: among the few values that a sample says the wanted one is near.

Floyd and Rivest's SELECT (CACM 18(3), 1975) takes two values of a sorted sample between which the wanted rank lies almost
surely, and selects between them alone. Here one of the two is counted out in the row, from there a nearer one, and then
the other is chosen: the margin is that of the way between them, not that of the whole sample, and few values remain.
"""

import math

import numpy as np

LEAST = 16384
"""Rows shorter than this are partitioned whole. Measured on one thread of a Zen 4, us a row of 16384 and of 65536 values: 108
and 421 whole, 31 and 82 by a sample. With numpy's AVX-512 code switched off (NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL"),
which is the slower one on that processor, 21 and 91 whole, 26 and 73 by a sample."""

SAMPLE = 1024
"""Values of the sample, about."""

PROBES = 2
"""Values of the sample that are counted out. Measured on rows of 65536 values: 95 us with one, 82 with two, 87 with three."""

MARGIN = 3.0
"""Standard deviations of the number of sampled values between two of the row's. Of 320 measured rows one had to be
partitioned whole."""


def value_at(row: np.ndarray, lower: int, upper: int) -> np.float32:
    """Mean of the values of rank `lower` and `upper` of a row (N,) float32 without an order, which stays as it is.

    Args:
        row: NaN counts as larger than any number.
        lower, upper: counted from 0, equal or next to each other.
    """
    if len(row) >= LEAST:
        between, below = near(row, upper)
        if below <= lower and upper < below + len(between):
            return _partitioned(between, lower - below, upper - below)
    return _partitioned(row.copy(), lower, upper)


def near(row: np.ndarray, rank: int) -> tuple[np.ndarray, int]:
    """Values of a row (N,) among which the one of this rank lies almost surely, in no order, and how many are smaller."""
    sample = np.sort(row[:: len(row) // SAMPLE | 1])  # odd, so that it does not keep to some columns of a picture
    last, missing = len(sample) - 1, 0
    at = rank * len(sample) // len(row)
    for _ in range(PROBES):
        at = min(max(0, at + round(missing)), last)
        less = row < sample[at]
        below = np.count_nonzero(less)
        missing = (rank - below) * len(sample) / len(row)
    margin = 2 + MARGIN * math.sqrt(abs(missing))
    if missing >= 0:
        up_to = row <= sample[min(last, math.ceil(at + missing + margin))]
        return row.compress(np.not_equal(up_to, less, out=up_to)), below
    lesser = row < sample[max(0, math.floor(at + missing - margin))]
    return row.compress(np.not_equal(less, lesser, out=less)), np.count_nonzero(lesser)


def _partitioned(row: np.ndarray, lower: int, upper: int) -> np.float32:
    """As `value_at`; the row is reordered."""
    row.partition(upper)
    return row[upper] if lower == upper else (row[:upper].max() + row[upper]) / 2
