"""The torch kernels against numpy and scipy, and the detector made of them against the published rule."""

import numpy as np
import pytest
import torch
from artifact_guard.kernels import regions
from artifact_guard.kernels import robust_threshold as thresholds
from artifact_guard.kernels.renoise import renoise
from artifact_guard.kernels.robust_threshold import median_and_mad, robust_threshold
from artifact_guard.kernels.score_dynamics import blurred_by_bands, blurred_by_shifts, change_speed, gaussian_blur
from artifact_guard.nodes.asced.detector import keep_regions
from artifact_guard.nodes.asced.estimate import Estimate
from artifact_guard.nodes.asced.published import CleanEstimateDetector
from artifact_guard.nodes.asced.options import AscedOptions
from scipy import ndimage

from tests.quality import published

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Speed of change


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 5), (17, 32), (40, 33)])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.3, 6.0])
def test_blur_is_scipys(size, sigma):
    """Every size, images smaller than the kernel's radius included, equals gaussian_filter(mode="reflect"), in both its forms."""
    x = normal(2, 3, *size)
    wanted = ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="reflect")
    for blur in (gaussian_blur, blurred_by_shifts, blurred_by_bands):
        np.testing.assert_allclose(blur(x, sigma).numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(20, 20), (0, 39)])
def test_what_is_not_finite_spreads_as_far_as_the_blur_and_changes_nothing_else(at, value):
    x = normal(2, 2, 40, 40)
    whole = gaussian_blur(x, 1.0)
    x[(0, 0, *at)] = value
    blurred, sums = gaussian_blur(x, 1.0), blurred_by_shifts(x, 1.0)
    lost = ~sums.isfinite()
    assert lost.any() and torch.equal(blurred[~lost], whole[~lost])
    torch.testing.assert_close(blurred[lost], sums[lost], rtol=0, atol=0, equal_nan=True)


def test_sums_that_overflow_are_no_trouble():
    """All values finite, their sum is not."""
    x = torch.full((1, 2, 20, 20), 1e37)
    torch.testing.assert_close(gaussian_blur(x, 1.0), x, rtol=1e-5, atol=0)


def test_blur_of_zero_width_changes_nothing():
    """sigma 0 is off, and so is a sigma whose kernel would be one pixel."""
    x = normal(1, 2, 5, 5)
    assert torch.equal(gaussian_blur(x, 0.0), x) and torch.equal(gaussian_blur(x, 0.1), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_speed_is_computed_in_float32(dtype):
    """Half precision estimates are subtracted and blurred in float32: equal to the speed of the upcast ones."""
    now, before = normal(2, 4, 9, 11, seed=1, dtype=dtype), normal(2, 4, 9, 11, seed=2, dtype=dtype)
    speed = change_speed(now, before, 1.0)
    assert speed.dtype == torch.float32
    assert torch.equal(speed, change_speed(now.float(), before.float(), 1.0))
    wanted = ndimage.gaussian_filter((now.double() - before.double()).abs().numpy(), (0, 0, 1, 1), mode="reflect")
    np.testing.assert_allclose(speed.numpy(), wanted, rtol=0, atol=2e-6)


def test_speed_of_non_contiguous_estimates():
    """Transposed and strided views give what their copies give; a NaN stays in its own sample and channel."""
    now, before = normal(2, 3, 20, 30)[:, :, ::2].transpose(2, 3), normal(2, 3, 10, 30, seed=1).transpose(2, 3)
    assert not now.is_contiguous()
    speed = change_speed(now, before, 1.0)
    assert torch.equal(speed, change_speed(now.contiguous(), before.contiguous(), 1.0))
    now = now.clone()
    now[1, 2, 5, 5] = torch.nan
    hurt = change_speed(now, before, 1.0)
    assert hurt[1, 2].isnan().any() and torch.equal(hurt[0], speed[0]) and torch.equal(hurt[1, :2], speed[1, :2])


# Robust threshold


@pytest.fixture(params=[("cpu",), ()], ids=["numpy", "torch"])
def numpy_devices(request, monkeypatch):
    """Medians by numpy, as on the CPU, and by torch, as on every other device."""
    monkeypatch.setattr(thresholds, "NUMPY_DEVICES", request.param)


def numpy_threshold(values, k):
    values = np.asarray(values, dtype=np.float64)
    median = np.median(values)
    return median + k * 1.4826 * np.median(np.abs(values - median))


def test_threshold_by_hand(numpy_devices):
    """median 3, MAD 1 of 1..5; median 2.5, MAD 1 of 1..4."""
    five, four = torch.arange(1.0, 6.0)[None], torch.arange(1.0, 5.0)[None]
    assert robust_threshold(five, 3.0).item() == pytest.approx(3 + 3 * 1.4826)
    assert robust_threshold(four, 2.0).item() == pytest.approx(2.5 + 2 * 1.4826)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3, 5, 7), (2, 4, 6, 7)])
def test_threshold_is_numpys(shape, dtype, numpy_devices):
    """Each sample's median + k MAD, for odd and even numbers of values, also through non-contiguous memory."""
    values = normal(*shape, dtype=dtype)
    wanted = [numpy_threshold(row, 3.0) for row in values.double().flatten(1).numpy()]
    tolerance = 16 * torch.finfo(dtype).eps
    for given in (values, values.movedim(0, -1).contiguous().movedim(-1, 0)):
        threshold = robust_threshold(given, 3.0)
        assert threshold.dtype == dtype
        np.testing.assert_allclose(threshold.double().numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 35])
def test_threshold_looks_at_valid_entries_only(count, numpy_devices):
    """`valid`, one for all channels or samples, leaves the others out of median and MAD, whatever they hold."""
    values = normal(2, 3, 5, 7)
    valid = torch.zeros(35, dtype=torch.bool)
    valid[torch.randperm(35, generator=torch.Generator().manual_seed(4))[:count]] = True
    valid = valid.view(5, 7)
    wanted = [numpy_threshold(sample[:, valid].numpy(), 2.0) for sample in values]
    values[..., ~valid] = torch.tensor([torch.nan, torch.inf, 1e30]).repeat(12)[: 35 - count]
    for mask in (valid, valid.expand(1, 1, 5, 7), valid.expand(2, 1, 5, 7)):
        np.testing.assert_allclose(robust_threshold(values, 2.0, mask).numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_threshold_with_nan_and_without_entries(numpy_devices):
    """NaN counts as larger than any number; rows of NaN and rows without a valid entry give NaN: nothing exceeds it."""
    row = [3.0, torch.nan, 1.0, 2.0, torch.nan, 5.0, 4.0]
    values = torch.tensor([row, [torch.nan] * 7])
    wanted = numpy_threshold([3.0, 1e9, 1.0, 2.0, 1e9, 5.0, 4.0], 1.0)
    for valid in (None, torch.ones(2, 7, dtype=torch.bool)):
        threshold = robust_threshold(values, 1.0, valid)
        assert threshold[0].item() == pytest.approx(wanted) and threshold[1].isnan()
    none = torch.tensor([[False] * 7, [True] * 7])
    assert robust_threshold(normal(2, 7), 3.0, none).isnan().tolist() == [True, False]
    assert all(x.isnan().all() for x in median_and_mad(normal(2, 7), torch.zeros(7, dtype=torch.bool)))


# Regions


def spiral(side):
    """A one pixel wide spiral with one pixel between its turns: the longest region there is, (1, side, side)."""
    mask = np.zeros((side + 4, side + 4), dtype=bool)  # a frame of two keeps the walk inside
    mask[[0, -1]] = mask[:, [0, -1]] = True
    y, x, dy, dx = 2, 2, 0, 1
    mask[2, 2] = True
    while not mask[y + 2 * dy, x + 2 * dx] or not mask[y + 2 * dx, x - 2 * dy]:
        if mask[y + 2 * dy, x + 2 * dx]:
            dy, dx = dx, -dy
        y, x = y + dy, x + dx
        mask[y, x] = True
    return torch.from_numpy(mask[2:-2, 2:-2].copy())[None]


def random_masks(share, *shape, seed=5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


MASKS = {
    "sparse": random_masks(0.3, 3, 23, 31), "even": random_masks(0.55, 2, 32, 32), "one": torch.ones(1, 1, 1) > 0,
    "percolating": random_masks(0.6, 3, 29, 40), "dense": random_masks(0.9, 2, 19, 24),
    "row": random_masks(0.7, 2, 1, 33), "column": random_masks(0.7, 2, 33, 1), "diagonal": torch.eye(9)[None] > 0,
    "spiral": spiral(41), "two spirals": torch.cat([spiral(21), ~spiral(21)]),
    "empty": torch.zeros(2, 7, 9) > 0, "full": torch.ones(2, 7, 9) > 0,
    "view": random_masks(0.6, 2, 30, 22).transpose(1, 2)[:, ::2],
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def scipy_regions(mask):
    """The regions of (H, W), each as a mask of its own."""
    labels, count = ndimage.label(mask)
    return [labels == label for label in range(1, count + 1)]


def test_the_spiral_is_one_long_region():
    """What the label test stands on: one region that takes hundreds of steps from end to end."""
    assert ndimage.label(spiral(41)[0].numpy())[1] == 1 and 400 < spiral(41).sum() < 41 * 41 * 0.6


@each_mask
def test_labels_are_scipys(mask):
    """4-connected regions, each numbered 1 + the largest flat index of its pixels, 0 outside; the mask is untouched."""
    before, labels = mask.clone(), regions.label_regions(mask)
    for sample, got in zip(mask.numpy(), labels.numpy()):
        wanted = np.zeros(sample.shape, dtype=np.int64)
        for region in scipy_regions(sample):
            wanted[region] = 1 + np.flatnonzero(region).max()
        np.testing.assert_array_equal(got, wanted)
    assert labels.dtype == torch.int64 and torch.equal(mask, before)


@each_mask
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_erosion_is_scipys_region_by_region(mask, side):
    """interior() is binary_erosion of each region by itself, odd and even squares; outside the image is empty."""
    inside = regions.interior(mask, side)
    for sample, got in zip(mask.numpy(), inside.numpy()):
        wanted = np.zeros(sample.shape, dtype=bool)
        for region in scipy_regions(sample):
            wanted |= ndimage.binary_erosion(region, np.ones((side, side)), border_value=0)
        np.testing.assert_array_equal(got, wanted)


@each_mask
@pytest.mark.parametrize("bounds", [(0, 1e9, 1), (2, 20, 1), (3, 60, 2), (0, 1e9, 3)])
def test_regions_kept_are_scipys(mask, bounds):
    """Whole regions within the area bounds, thick enough somewhere, and nothing else."""
    smallest, largest, width = bounds
    kept = regions.filter_regions(mask, smallest, largest, width)
    for sample, got in zip(mask.numpy(), kept.numpy()):
        wanted = np.zeros(sample.shape, dtype=bool)
        for region in scipy_regions(sample):
            thick = ndimage.binary_erosion(region, np.ones((width, width)), border_value=0).any()
            wanted |= region & bool(thick and smallest < region.sum() < largest)
        np.testing.assert_array_equal(got, wanted)


def test_area_bounds_are_excluded():
    """A region of exactly min_area or max_area pixels goes; one pixel more or less stays."""
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[0, 1:3, 1:4] = True
    for smallest, largest, stays in [(6, 9, False), (5, 6, False), (5, 7, True), (5.9, 6.1, True)]:
        assert regions.filter_regions(mask, smallest, largest, 1).any().item() is stays


def test_regions_that_touch_at_a_corner_do_not_hold_each_other_up():
    """Two 2x2 squares corner to corner: 3 wide together, neither by itself."""
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 1:3, 1:3] = mask[0, 3:5, 3:5] = True
    assert not regions.filter_regions(mask, 0, 99, 3).any()
    assert torch.equal(regions.filter_regions(mask, 0, 99, 2), mask)


@each_mask
def test_dilation_and_counts_are_scipys(mask):
    """dilate_square is binary_dilation by 2 radius + 1 pixels; count_in_region counts within regions, 0 outside."""
    labels, pixels = regions.label_regions(mask), random_masks(0.4, *mask.shape, seed=8)
    counts = regions.count_in_region(labels, pixels)
    for radius in (0, 1, 3):
        grown = regions.dilate_square(mask, radius)
        for sample, got in zip(mask.numpy(), grown.numpy()):
            square = np.ones((2 * radius + 1,) * 2)
            np.testing.assert_array_equal(got, ndimage.binary_dilation(sample, square))
    for sample, inside, got in zip(mask.numpy(), pixels.numpy(), counts.numpy()):
        wanted = np.zeros(sample.shape, int)
        for region in scipy_regions(sample):
            wanted[region] = (region & inside).sum()
        np.testing.assert_array_equal(got, wanted)


# Renoising


@pytest.mark.parametrize("dtype", DTYPES)
def test_renoise_keeps_the_outside_bit_for_bit(dtype):
    """Outside the mask every bit stays, NaN, infinity and -0 included; inside it is a * x0 + b * eps in x's dtype."""
    x = normal(3, 4, 8, 7, dtype=dtype).transpose(2, 3)
    x[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 6e-8], dtype=dtype)
    x0, eps, mask = normal(3, 4, 7, 8, seed=1), normal(3, 4, 7, 8, seed=2), random_masks(0.4, 3, 7, 8)
    mask[0, 0, :4], mask[1], mask[2] = False, True, False
    result, everywhere = renoise(x, x0, eps, mask, 0.6, 0.8), mask[:, None].expand_as(x)
    assert result.dtype == dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(result.contiguous().view(bits)[~everywhere], x.contiguous().view(bits)[~everywhere])
    assert torch.equal(result[everywhere], (0.6 * x0 + 0.8 * eps).to(dtype)[everywhere])


def test_renoised_pixels_have_the_forward_process_statistics():
    """With unit noise the inside has mean a * x0 and standard deviation b."""
    x, mask = normal(1, 1, 200, 200), torch.ones(1, 200, 200, dtype=torch.bool)
    inside = renoise(x, torch.full_like(x, 0.5), normal(1, 1, 200, 200, seed=3), mask, 0.8, 2.0)
    assert inside.mean().item() == pytest.approx(0.4, abs=0.04) and inside.std().item() == pytest.approx(2.0, abs=0.03)


# The detector made of them


def smooth_trajectory(size, steps=4, batch=4, channels=3):
    """Clean estimates (S, B, C, H, W): a smooth drift, and at each step a smooth bump somewhere in each sample."""
    random = np.random.default_rng(sum(size))
    y, x = np.mgrid[: size[0], : size[1]]
    drift = random.normal(size=(steps, batch, channels, *size))
    moved = 0.1 * ndimage.gaussian_filter(drift, (0, 0, 0, 2, 2)) / 0.14
    for step in range(steps):
        for sample in range(batch):
            cy, cx, radius = random.uniform(0, size[0]), random.uniform(0, size[1]), random.uniform(0.4, 8.0)
            bump = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius**2))
            moved[step, sample, random.integers(channels)] += random.uniform(0.2, 1.5) * bump
    return torch.from_numpy(moved.cumsum(0).astype(np.float32))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 72), (128, 128)])
def test_masks_equal_the_published_rule(size):
    """The pack's clean-estimate detector at its defaults gives the published rule's masks, pixel for pixel."""
    denoised, options = smooth_trajectory(size), AscedOptions()
    detector = CleanEstimateDetector(options, 1.0, min(size))
    steps = [Estimate(d, d, 1.0, 1.0) for d in denoised]
    for pair in zip(steps, steps[1:]):
        detector.observe(*pair, None)
    abnormal = detector.onset > 0
    wanted = published.detect(denoised.numpy())
    assert 0 < wanted.sum() < wanted.size // 2, "the trajectory shows nothing to compare"
    np.testing.assert_array_equal(abnormal.numpy(), published.abnormal_pixels(denoised.numpy()))
    np.testing.assert_array_equal(keep_regions(abnormal, options).numpy(), wanted)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 72), (96, 96), (128, 128), (160, 130)])
def test_regions_kept_equal_the_published_rule(size):
    """Of ragged masks, thin regions and ones at the area bounds included, the same regions are kept."""
    noise = np.random.default_rng(size[1]).normal(size=(6, *size))
    ragged = np.stack([ndimage.gaussian_filter(n, min(size) / 256 * (1 + i / 2)) for i, n in enumerate(noise)])
    masks = ragged > np.quantile(ragged, 0.75, axis=(1, 2), keepdims=True)
    wanted = np.stack([published.keep_regions(mask) for mask in masks])
    assert wanted.any() and (masks & ~wanted).any()
    np.testing.assert_array_equal(keep_regions(torch.from_numpy(masks), AscedOptions()).numpy(), wanted)
