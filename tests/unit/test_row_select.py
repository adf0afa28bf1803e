"""Selection by a sample is exact, whatever the rows look like: the values at their ranks are those of the sorted row."""

import numpy as np
import pytest
from artifact_guard.kernels import row_select

LONG = 3 * row_select.LEAST + 7


def rows():
    """Rows long enough for a sample, by name, some of them made so that the sample misleads."""
    random = np.random.default_rng(0)
    normal = random.standard_normal(LONG).astype(np.float32)
    stride = LONG // row_select.SAMPLE | 1
    broken, misleading, narrow = normal.copy(), normal.copy(), normal.copy()
    broken[random.permutation(LONG)[: LONG // 4]] = np.nan
    broken[:5], broken[5:9] = np.inf, -np.inf
    misleading[::stride] += 100.0
    narrow[::stride] = 0.0
    return {
        "normal": normal, "smooth": np.cumsum(normal, dtype=np.float32), "sorted": np.sort(normal), "falling": -np.sort(normal),
        "few values": random.integers(0, 5, LONG).astype(np.float32), "mostly zero": np.maximum(normal - 1, 0),
        "constant": np.full(LONG, 3.0, np.float32), "NaN and infinity": broken, "all NaN": np.full(LONG, np.nan, np.float32),
        "mostly NaN": np.where(normal > 1, normal, np.float32(np.nan)), "sample too high": misleading,
        "sample too narrow": narrow, "strided": np.repeat(normal, 3)[::3], "short": normal[: row_select.LEAST - 1],
    }


@pytest.mark.parametrize("name", rows())
def test_selection_is_that_of_the_sorted_row(name):
    row = rows()[name]
    before, ordered = row.copy(), np.sort(row)
    last = len(row) - 1
    ranks = {0, 1, last // 8, last // 2, last // 2 + 1, int(0.7 * last), int(0.85 * last), last - 1, last}
    for rank in sorted(ranks):
        np.testing.assert_equal(row_select.value_at(row, rank, rank), ordered[rank])
        if rank:
            wanted = (ordered[rank - 1] + ordered[rank]) / np.float32(2)
            np.testing.assert_equal(row_select.value_at(row, rank - 1, rank), wanted)
    np.testing.assert_array_equal(row, before)


def test_few_rows_are_partitioned_whole(monkeypatch):
    """Of rows of noise and of smooth ones: what the sample leaves to choose from is a small part of them."""
    partitioned, whole = [], row_select._partitioned
    monkeypatch.setattr(row_select, "_partitioned", lambda row, *ranks: partitioned.append(len(row)) or whole(row, *ranks))
    for seed in range(20):
        noise = np.random.default_rng(seed).standard_normal(LONG).astype(np.float32)
        for row in (noise, np.convolve(noise, np.ones(40, np.float32), mode="same")):
            row_select.value_at(row, len(row) // 2, len(row) // 2)
    assert max(partitioned) < LONG // 6 and np.median(partitioned) < LONG // 20
