"""Images with planted flaws for FAM: where they are wrong is known, pixel by pixel.

The regions and patterns are those of tests/exact/trap_families.py, in grey, since Fashion-MNIST is grey and a coloured
flaw would be told by its colour alone. A flawed image is another image than any sound one of its set, so that a
highlighter cannot compare the two.
"""

import torch

from ..exact.trap_families import make_traps

AMPLITUDES = (0.4, 0.8)
"""Of the [-1, 1] image: the range for which the detection benchmark sets its goals."""

VISIBLE, SMALLEST = 0.5, 0.025
"""A flaw is something a person would notice: it changes its region by this much (RMS, of the same range) and fills this
share of the image, 5x5 of 32x32 pixels. Garbage that is black on black, or a speck, is drawn anew and stronger."""


def plant_flaws(images: torch.Tensor, split: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image with one region spoilt: half of them by a pattern on top, half replaced by garbage altogether.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        split: "develop" or "held out": shapes and patterns of the two have nothing in common.

    Returns:
        flawed images (N, 3, H, W), masks (N, H, W) bool.
    """
    size, count = tuple(images.shape[-2:]), len(images)
    random = torch.Generator().manual_seed(seed)
    amplitudes = AMPLITUDES[0] + (AMPLITUDES[1] - AMPLITUDES[0]) * torch.rand(count, generator=random)
    textures = images[torch.randperm(count, generator=random)[:64], :1]
    flawed, masks = [], []
    for index, (image, amplitude) in enumerate(zip(images, amplitudes.tolist())):
        kind = "attractor" if index % 2 else "scripted"
        number, change, area = seed * 100_003 + index, 0.0, 0.0
        while change < VISIBLE or area < SMALLEST:
            (trap,) = make_traps(kind, split, number, size, 1, 1, amplitude, textures=textures)
            garbage = trap.pattern[0] if kind == "attractor" else image + amplitude * trap.pattern[0]
            spoilt = torch.where(trap.mask, garbage, image).clamp(-1, 1)
            change = (spoilt - image)[:, trap.mask[0]].square().mean().sqrt().item()
            area = trap.mask.float().mean().item()
            number, amplitude = number + 50_000_017, 1.1 * amplitude
        flawed.append(spoilt)
        masks.append(trap.mask[0])
    return torch.stack(flawed), torch.stack(masks)


def as_image(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] as an IMAGE (N, H, W, 3) in 0..1."""
    return ((images + 1) / 2).clamp(0, 1).movedim(1, -1)
