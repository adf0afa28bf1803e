"""Images for tests: range, seeds, and the two data set readers on tiny files of their formats."""

import io
import json
import zipfile

import pytest
import torch
from PIL import Image

from tests.exact.images import as_latents, cifar10, fashion_mnist, shape_images


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 32), (4, 17)])
def test_shapes(channels, size):
    images = shape_images(5, size, channels, seed=2)
    assert images.shape == (5, channels, size, size) and images.dtype == torch.float32
    assert images.abs().max() <= 1.0 and images.flatten(1).std(1).min() > 0.05
    assert torch.equal(images, shape_images(5, size, channels, seed=2))
    assert not torch.equal(images, shape_images(5, size, channels, seed=3))


def test_fashion_mnist(tmp_path):
    for label in range(10):
        rows = [[label] * 784, [255] * 784] + [[]] * (label == 0)
        (tmp_path / f"{label}.json").write_text(json.dumps({"data": rows}))
    images, labels = fashion_mnist(tmp_path, limit=12, channels=3, cache=tmp_path / "cache")
    assert images.shape == (12, 3, 32, 32) and labels.tolist() == [*range(10), 0, 1]
    assert images[7, 0, 2, 2] == pytest.approx(7 / 127.5 - 1) and images[7, 0, 1, 2] == -1.0 and images[11].max() == 1.0
    (tmp_path / "3.json").unlink()
    assert torch.equal(fashion_mnist(tmp_path, 12, 3, cache=tmp_path / "cache")[0], images)


def test_cifar10(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for split, grey in (("train", 100), ("test", 200)):
            for name, red in (("cat", 0), ("dog", 50)):
                for number in range(3):
                    data = io.BytesIO()
                    Image.new("RGB", (32, 32), (grey + red, grey, number)).save(data, "JPEG", quality=95)
                    archive.writestr(f"{split}/{name}/{number:04}.jpg", data.getvalue())
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        images, labels = cifar10(tmp_path / "c.zip", "test", limit=3, cache=cache)
        assert images.shape == (3, 3, 32, 32) and labels.tolist() == [0, 1, 0]
        red = (images[:, 0].mean((1, 2)) + 1) * 127.5
        torch.testing.assert_close(red, torch.tensor([200.0, 250.0, 200.0]), atol=2.0, rtol=0)
    assert len(cifar10(tmp_path / "c.zip")[0]) == 6
    whole = cifar10(tmp_path / "c.zip", "train", cache=tmp_path / "cache")[0]
    with zipfile.ZipFile(tmp_path / "c.zip") as archive, zipfile.ZipFile(tmp_path / "part.zip", "w") as part:
        for name in archive.namelist():
            if name not in ("train/cat/0002.jpg", "train/dog/0001.jpg", "train/dog/0002.jpg"):
                part.writestr(name, archive.read(name))
    images, labels = cifar10(tmp_path / "part.zip", "train", cache=tmp_path / "cache")
    assert labels.tolist() == [0, 1] and torch.equal(images, whole[:2]), "as many of each class as the smallest has"


@pytest.mark.parametrize("whiten, noise", [(False, 0.0), (True, 0.3)])
@pytest.mark.parametrize("channels", [4, 12, 16])
def test_latents(channels, whiten, noise):
    """Half the size, mean 0 and variance 1 in every channel; without whitening all of the pictures' energy is in them."""
    images = shape_images(40, 64, seed=2)
    latents = as_latents(images, channels, whiten, noise, seed=1)
    assert latents.shape == (40, channels, 32, 32)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(channels), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(channels), atol=0.02, rtol=0)
    if channels == 12 and not noise:
        coarse = torch.nn.functional.avg_pool2d(images, 2)
        for channel in range(3):
            assert torch.corrcoef(torch.stack([latents[:, channel].flatten(), coarse[:, channel].flatten()]))[0, 1] > 0.9999
