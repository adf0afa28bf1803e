"""Images, spoilt images and highlighters for the tests of FAM's highlighter."""

import torch
from artifact_guard.nodes.fam import session
from artifact_guard.nodes.fam.backbones import new_network
from artifact_guard.nodes.fam.highlighter import FlawHighlighter, HighlighterSettings
from artifact_guard.nodes.fam.training import TrainingSettings

from tests.exact.images import shape_images


SQUARE = (slice(None), slice(8, 16), slice(8, 16))
"""Of images (B, H, W, C): what the judge below calls flawed where it is bright."""


def by_brightness(highlighter, image):
    """Stands in for `flaw_map`: the map is a fixed square, the probability the mean brightness inside it."""
    maps = torch.zeros(image.shape[:3])
    maps[SQUARE] = 1
    return maps, image[SQUARE].mean(dim=(1, 2, 3)).clamp(0, 1)


def flawed(batch=2, value=1.0):
    """A latent of the demo model: black images with a square of this value in the range -1 to 1."""
    samples = torch.full((batch, 3, 32, 32), -1.0)
    samples[:, :, 8:16, 8:16] = value
    return {"samples": samples}


def images(count=16, size=32, seed=0):
    """IMAGE (count, size, size, 3) of figures."""
    return (shape_images(count, size, 3, seed).movedim(1, -1) + 1) / 2


def spoil(image, size=10, seed=3):
    """Images with a grid of black and white pixels somewhere, and where (B, H, W)."""
    image, where = image.clone(), torch.zeros(image.shape[:3], dtype=torch.bool)
    random = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for index in range(len(image)):
        top, left = torch.randint(image.shape[1] - size, (2,), generator=random).tolist()
        image[index, top : top + size, left : left + size] = ((x // 2 + y // 2) % 2)[..., None].float()
        where[index, top : top + size, left : left + size] = True
    return image, where


def settings(epochs=1, batch_size=8, rate=2e-5, size=32, seed=0, backbone="small"):
    return TrainingSettings(epochs, batch_size, rate, size, seed, backbone)


def highlighter(backbone="small", size=32, seed=0):
    return FlawHighlighter(new_network(backbone, seed), HighlighterSettings(backbone, size))


def train_on_grids():
    """(highlighter, training) of a run that has learned to see the grids of `spoil`; ten seconds, made once."""
    if not LEARNED:
        real, generated = images(120, seed=1), spoil(images(120, seed=2))[0]
        with torch.inference_mode():
            LEARNED.append(session.train_highlighter(real, generated, settings(epochs=14, batch_size=16, size=48)))
    return LEARNED[0]


LEARNED: list = []
