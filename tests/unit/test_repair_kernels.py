"""Filling holes from their surroundings, steps across borders, opening, hysteresis and quantiles: by hand and by scipy."""

import numpy as np
import pytest
import torch
from artifact_guard.kernels import robust_threshold
from artifact_guard.kernels.fill import fill_from_surroundings
from artifact_guard.kernels.regions import close_square, grow_from, open_square
from artifact_guard.kernels.robust_threshold import median_and_mad, sample_quantile
from artifact_guard.kernels.seams import border_jump
from scipy import ndimage


def ramp(height, width):
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x + y, 2 * x - y])[None]


def hole(height, width, batch=1):
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[:, height // 3 : 2 * height // 3, width // 4 : 3 * width // 4] = True
    return mask


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (33, 47), (5, 9), (2, 2)])
def test_a_filled_ramp_is_a_ramp(size):
    """Linear functions solve Laplace's equation; outside the hole no bit changes, and the hole's content is not seen."""
    image, mask = ramp(*size), hole(*size)
    spoiled = torch.where(mask[:, None], torch.nan, image)
    filled = fill_from_surroundings(spoiled, mask)
    assert torch.equal(filled[~mask[:, None].expand_as(filled)], image[~mask[:, None].expand_as(image)])
    assert torch.isfinite(filled).all()
    if min(size) >= 32:
        assert (filled - image).abs().max() < 0.07 * (image.max() - image.min())


def test_a_fill_stays_between_the_values_around_it():
    """No new extremes (maximum principle), for any hole: here of random pixels, of everything, and of nothing."""
    image = torch.rand(3, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    filled = fill_from_surroundings(image, mask)
    for one, other, where in zip(image, filled, mask):
        known = one[:, ~where]
        assert (other.flatten(1).amin(1) >= known.amin(1) - 1e-6).all()
        assert (other.flatten(1).amax(1) <= known.amax(1) + 1e-6).all()
    assert not fill_from_surroundings(image, torch.ones_like(mask)).any()
    assert torch.equal(fill_from_surroundings(image, torch.zeros_like(mask)), image)


def test_the_step_across_a_border_by_hand():
    image = torch.zeros(2, 1, 6, 6)
    mask = torch.zeros(2, 6, 6, dtype=torch.bool)
    image[0, 0, 2:4, 2:4] = 3.0
    mask[:, 2:4, 2:4] = True
    assert border_jump(image, mask).tolist() == [3.0, 0.0]
    assert border_jump(image, torch.zeros_like(mask)).tolist() == [0.0, 0.0]
    assert border_jump(image[:, :, :, :5], mask[:, :, :5])[0] == 3.0, "an image that is not square"


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_opening_is_scipys(side):
    mask = torch.rand(4, 19, 23, generator=torch.Generator().manual_seed(2)) < 0.75
    expected = np.stack([ndimage.binary_opening(one, np.ones((side, side))) for one in mask.numpy()])
    assert np.array_equal(open_square(mask, side).numpy(), expected)
    assert not open_square(mask[:, :2, :2], 3).any()


@pytest.mark.parametrize("radius", [0, 1, 2, 9])
def test_closing_is_scipys(radius):
    """With room around the image, so that a mask at its edge is not eaten from outside."""
    mask = torch.rand(4, 19, 23, generator=torch.Generator().manual_seed(2)) < 0.2
    room, square = 2 * radius + 1, np.ones((2 * radius + 1,) * 2)
    expected = np.stack([
        ndimage.binary_closing(np.pad(one, room), square)[room:-room, room:-room] for one in mask.numpy()
    ])
    assert np.array_equal(close_square(mask, radius).numpy(), expected)


def test_hysteresis_keeps_what_holds_a_strong_pixel():
    weak = torch.zeros(1, 5, 9, dtype=torch.bool)
    weak[0, 1:3, 1:4] = weak[0, 1:3, 6:8] = True
    strong = torch.zeros_like(weak)
    strong[0, 1, 1] = strong[0, 4, 4] = True  # the second lies in no weak region
    expected = weak.clone()
    expected[0, :, 5:] = False
    assert torch.equal(grow_from(strong, weak), expected)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_quantiles_are_numpys(share):
    values = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(3))
    valid = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(4)) < 0.5
    plain = [np.quantile(v.numpy(), share, method="lower") for v in values]
    assert np.allclose(sample_quantile(values, share), plain)
    masked = [np.quantile(v[m].numpy(), share, method="lower") for v, m in zip(values, valid)]
    assert np.allclose(sample_quantile(values, share, valid), masked)
    assert sample_quantile(values, share, torch.zeros_like(valid)).isnan().all()


@pytest.mark.parametrize("devices", [("cpu",), ()])
def test_rows_of_nothing_give_nan(devices, monkeypatch):
    """By numpy and by torch."""
    monkeypatch.setattr(robust_threshold, "NUMPY_DEVICES", devices)
    empty = torch.zeros(2, 0)
    for given in ((empty,), (empty, empty > 0)):
        assert all(x.shape == (2,) and x.isnan().all() for x in median_and_mad(*given))
        assert sample_quantile(given[0], 0.7, *given[1:]).isnan().all()
