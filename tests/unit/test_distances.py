"""The benchmarks' distances: unbiased, paired, and with intervals that hold what they say."""

import pytest
import torch
from tests.bench.distances import (
    BLOCKS, Samples, blocks, frechet, jackknife_ratio, kernel, statistics, unbiased_mean,
)


def normal(count, seed, shift=0.0, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def rows(count):
    return torch.arange(count)


def test_kid_of_the_same_distribution_is_zero_whatever_the_number():
    """Its mean over draws is 0 for 32 samples as for 128; FD's is not."""
    real = normal(1500, 0)
    mean = float(unbiased_mean(kernel(real, real)))
    for count in (32, 128):
        values = torch.tensor([Samples(normal(count, seed), real).kid(rows(count), mean) for seed in range(1, 60)])
        assert abs(values.mean()) < 3 * values.std() / 59 ** 0.5 + 0.01
    fd = [frechet(statistics(normal(count, 5)), statistics(real)) for count in (32, 128)]
    assert fd[0] > 2 * fd[1] > 0.1


def test_kid_is_what_its_definition_says():
    one, other = normal(5, 1), normal(4, 2)
    pairs = [kernel(a[None], b[None]).item() for i, a in enumerate(one) for j, b in enumerate(one) if i != j]
    others = [kernel(a[None], b[None]).item() for i, a in enumerate(other) for j, b in enumerate(other) if i != j]
    across = [kernel(a[None], b[None]).item() for a in one for b in other]
    expected = sum(pairs) / 20 + sum(others) / 12 - 2 * sum(across) / 20
    told = Samples(one, other).kid(rows(5), float(unbiased_mean(kernel(other, other))))
    assert told == pytest.approx(expected)


def test_endless_fd_is_nearer_to_the_truth():
    """Shifted by 1 in each of 6 axes: 6. From 64 samples FD overshoots."""
    real = statistics(normal(20000, 0))
    plain, endless = zip(*((s.fd(rows(64), real), s.endless_fd(rows(64), real)) for s in (
        Samples(normal(64, seed, 1.0), normal(10, 0)) for seed in range(1, 40))))
    assert abs(sum(endless) / 39 - 6) < 0.5 * abs(sum(plain) / 39 - 6)


def test_blocks_leave_out_every_row_once():
    whole, *parts = blocks(100)
    assert len(whole) == 100 and len(parts) == BLOCKS
    left_out = torch.cat([rows(100)[~torch.isin(rows(100), part)] for part in parts])
    assert torch.equal(left_out.sort().values, rows(100))


def test_interval_of_a_ratio_holds_it_about_as_often_as_it_says():
    """Means of squares of paired numbers, the second ones shrunk by a half: 0.25 lies inside in 95 % of draws."""
    inside, draws = 0, 200
    for seed in range(draws):
        random = torch.Generator().manual_seed(seed)
        one = torch.randn(64, generator=random, dtype=torch.float64)
        other = 0.5 * one + 0.1 * torch.randn(64, generator=random, dtype=torch.float64)
        values = [[float(x[part].square().mean()) for part in blocks(64)] for x in (one, other)]
        ratio, low, high = jackknife_ratio(*values)
        inside += low <= 0.26 <= high
    assert 0.9 <= inside / draws <= 1.0


def test_equal_samples_have_ratio_1_and_distances_about_zero_have_none():
    assert jackknife_ratio([2.0, *range(1, 17)], [2.0, *range(1, 17)]) == [1.0, 1.0, 1.0]
    assert jackknife_ratio([1.0] * 17, [1.0] * 16 + [-0.1]) == [None, None, None]
