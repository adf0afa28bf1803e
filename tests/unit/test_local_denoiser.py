"""The denoiser that works patch by patch: its limits, its window, its labels, and that it invents pictures."""

import pytest
import torch

from tests.exact.denoiser import ExactDenoiser
from tests.exact.images import shape_images
from tests.exact.local import LocalDenoiser
from tests.exact.model import exact_model, sample


@pytest.fixture(scope="module")
def images():
    return shape_images(40, 16, seed=3)


def noisy(images, a, b):
    random = torch.Generator().manual_seed(5)
    return a * images[:3] + b * torch.randn(images[:3].shape, generator=random)


@pytest.mark.parametrize("a, b", [(1.0, 0.3), (1.0, 2.0), (0.4, 0.6)])
def test_far_sight_is_the_exact_denoiser(images, a, b):
    x = noisy(images, a, b)
    coefficients = [torch.full((3, 1), value) for value in (a, b)]
    local = LocalDenoiser(images, reach=1e4, least=1e4).denoise(x, *coefficients)
    torch.testing.assert_close(local, ExactDenoiser(images).denoise(x, *coefficients).float(), rtol=0, atol=1e-3)


def test_each_pixel_is_the_posterior_of_its_window(images):
    """One pixel's formula, written out."""
    a, b, reach, power = 1.0, 0.8, 2.0, 0.5
    x = noisy(images, a, b)
    i, j, spread = 5, 11, reach * (b / a)**power
    far = torch.arange(16.0)
    window = torch.exp(-((far[:, None] - i)**2 + (far - j)**2) / (2 * spread**2))
    v = a**2 * 0.05**2 + b**2
    weights = (-((x[:, None] - a * images)**2 * window).sum((2, 3, 4)) / (2 * v)).softmax(1)
    wanted = (a * 0.05**2 * x[:, :, i, j] + b**2 * weights @ images[:, :, i, j]) / v
    got = LocalDenoiser(images, reach, power, least=0.5).denoise(x, a, b)[:, :, i, j]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_labels_bar_the_other_images(images):
    labels = torch.arange(40) % 2
    x, label = noisy(images, 1.0, 1.0), torch.tensor([1, -1, 0])
    got = LocalDenoiser(images, labels=labels).denoise(x, 1.0, 1.0, label)
    for row, allowed in enumerate((images[1::2], images, images[::2])):
        torch.testing.assert_close(got[row], LocalDenoiser(allowed).denoise(x, 1.0, 1.0)[row], rtol=1e-4, atol=1e-4)


def test_it_invents_pictures():
    """Runs of the exact denoiser end at an image of the data set, of this one far from all of them, and stay moderate."""
    images = shape_images(60, 32, seed=4)
    results = [
        sample(exact_model(images, denoiser=denoiser), steps=15, seed=2, latent=(8, 3, 32, 32))
        for denoiser in (None, LocalDenoiser(images, reach=3.0))
    ]
    exact, local = (torch.cdist(x.flatten(1), images.flatten(1)).min(1).values / 3072**0.5 for x in results)
    assert exact.max() < 0.1 and (local > 0.15).float().mean() > 0.7
    assert results[1].abs().max() < 1.5
