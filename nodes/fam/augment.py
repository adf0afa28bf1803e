"""Augmentation that hides trivial cues: a highlighter must not tell the classes by file format, scale or colour.

Every image of a batch, whichever its class, is mirrored, cropped, scaled down and up again, recoloured, compressed as
JPEG and given a little noise, each by amounts of its own. What differs between the classes only in these respects is
then no longer a way to tell them apart.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SMALLEST_CROP = 0.9
SMALLEST_SCALE = 0.6
JPEG_QUALITIES = (50, 96)
COLOUR = 0.25
NOISE = 0.02
RESIZE_MODES = ("bilinear", "bicubic", "area", "nearest")


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch of images (B, 3, H, W) in 0..1, each changed by random amounts from `generator`; same shape and range."""
    images = crop_and_mirror(images, generator)
    images = recolour(images, generator)
    images = torch.stack([compress(rescale(image, generator), generator) for image in images])
    amount = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + amount * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def crop_and_mirror(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random part of each image, at least 90 % of its sides, brought back to size; half of them mirrored."""
    count = len(images)
    scale = 1 - (1 - SMALLEST_CROP) * torch.rand(count, generator=generator)
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)[:, None]
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def recolour(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and the balance of the channels, each changed by up to a quarter."""
    def factor(channels: int, amount: float) -> torch.Tensor:
        return 1 + amount * (2 * torch.rand(len(images), channels, 1, 1, generator=generator) - 1)

    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * factor(1, COLOUR)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    images = middle * factor(1, COLOUR) + (images - middle) * factor(1, COLOUR)
    return (images * factor(3, COLOUR / 2)).clamp(0, 1)


def rescale(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images scaled down to 60 % at least and up again, by a random method. image: (3, H, W)."""
    chance, scale = torch.rand(2, generator=generator).tolist()
    modes = torch.randint(len(RESIZE_MODES), (2,), generator=generator).tolist()
    if chance < 0.5:
        return image
    height, width = image.shape[-2:]
    scale = SMALLEST_SCALE + (1 - SMALLEST_SCALE) * scale
    small = F.interpolate(image[None], size=(round(height * scale), round(width * scale)), mode=RESIZE_MODES[modes[0]])
    return F.interpolate(small, size=(height, width), mode=RESIZE_MODES[modes[1]])[0].clamp(0, 1)


def compress(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images through JPEG of a random quality. image: (3, H, W) in 0..1."""
    chance = torch.rand(1, generator=generator).item()
    quality = torch.randint(*JPEG_QUALITIES, (1,), generator=generator).item()
    return jpeg(image, quality) if chance < 0.5 else image


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """An image (3, H, W) in 0..1 as it comes out of a JPEG file of this quality."""
    pixels = (image.clamp(0, 1).movedim(0, -1) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).movedim(-1, 0).float() / 255
