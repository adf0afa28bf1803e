"""The numpy reference of the published detection rule, on changes made by hand."""

import numpy as np
import pytest

from tests.quality.published import abnormal_pixels, detect, keep_regions


def steps(changes):
    """Clean estimates (S + 1, 1, C, H, W) whose differences are `changes` (S, C, H, W), plus faint noise."""
    noise = 1e-3 * np.random.default_rng(0).standard_normal(changes.shape)
    return np.concatenate([np.zeros_like(changes[:1]), np.cumsum(changes + noise, axis=0)])[:, None]


def test_finds_a_jump_in_any_channel_and_step():
    changes = np.zeros((4, 3, 128, 128))
    changes[1, 2, 40:56, 60:80] = 0.5
    changes[3, 0, 90:100, 10:20] = -0.5
    found = detect(steps(changes))[0]
    truth = np.abs(changes).max(axis=(0, 1)) > 0
    assert found[truth].all()
    grown = found & ~truth  # blur spreads a jump by up to its reach of 4 px
    assert grown[:30].sum() == 0 and grown.sum() < 700


def test_threshold_is_median_plus_k_mad_of_the_smoothed_change():
    change = np.random.default_rng(1).standard_normal((1, 2, 128, 128))
    d = np.abs(change[0])
    line = np.exp(-0.5 * np.arange(-4, 5) ** 2)  # sigma 2 px at 256 is 1 px at 128, cut at 4 sigma
    line /= line.sum()
    d = np.pad(d, ((0, 0), (4, 4), (4, 4)), mode="symmetric")
    d = np.apply_along_axis(np.convolve, 1, np.apply_along_axis(np.convolve, 2, d, line, "valid"), line, "valid")
    for k in (1.0, 3.0):
        limit = np.median(d) + k * 1.4826 * np.median(np.abs(d - np.median(d)))
        estimates = np.stack([np.zeros_like(change[0]), change[0]])[:, None]
        assert np.array_equal(abnormal_pixels(estimates, k)[0], (d > limit).any(axis=0))


@pytest.mark.parametrize("height, width, kept", [(3, 3, True), (2, 20, False), (49, 50, True), (50, 50, False)])
def test_area_and_thickness(height, width, kept):
    """At 128 px the square is 3 wide (5 * 128 / 256 = 2.5, rounded to 2, made odd); 15 % of the area are 2,457 px."""
    abnormal = np.zeros((128, 128), dtype=bool)
    abnormal[20:20 + height, 30:30 + width] = True
    # 0.15 % are 24.6 px: the 3x3 square alone is too small, a thin tail makes it large enough
    abnormal[20, 30:60] |= (height, width) == (3, 3)
    assert np.array_equal(keep_regions(abnormal), abnormal if kept else np.zeros_like(abnormal))


def test_regions_touching_at_a_corner_are_two():
    abnormal = np.zeros((64, 64), dtype=bool)
    abnormal[10:13, 10:13] = abnormal[13:20, 13:20] = True
    found = keep_regions(abnormal)
    assert np.array_equal(found[10:13, 10:13], np.ones((3, 3))) and found.sum() == abnormal.sum()
    assert not keep_regions(np.eye(64, dtype=bool)).any()  # 64 regions of one pixel, each below 0.15 %


def test_a_region_is_judged_without_what_else_lies_in_its_box():
    abnormal = np.zeros((128, 128), dtype=bool)
    abnormal[50:56, 50:56] = True
    square = abnormal.copy()
    abnormal[40:70, 40] = abnormal[69, 40:70] = True  # an L, too thin, around the square
    assert np.array_equal(keep_regions(abnormal), square)


def test_images_of_a_batch_are_judged_alone():
    changes = np.zeros((2, 1, 64, 64))
    changes[1, 0, 20:30, 20:30] = 0.5
    quiet, loud = steps(np.zeros_like(changes)), steps(changes)
    both = detect(np.concatenate([quiet, loud * 100.0], axis=1))
    assert np.array_equal(both[1], detect(loud)[0]) and np.array_equal(both[0], detect(quiet)[0])
