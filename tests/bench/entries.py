"""How runs begin that do not begin from nothing, or change a part of the picture only.

Image to image, inpainting, and a sampler that goes on where another one left off.
"""

import math
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..exact.traps import AttractorTrap, ScriptedTrap
from ..exact.wide_traps import JUMP

FIRST, LAST = 0.93, 0.4
"""Scripted traps spring between these parts of the window of a late run, on the way from its last noise ratio to its first."""


@dataclass(frozen=True)
class Entry:
    """latent (B, C, H, W), denoise and noise_mask (B, 1, H, W) as sample() takes them; the step at which a guard comes in."""

    latent: torch.Tensor
    denoise: float = 1.0
    noise_mask: torch.Tensor | None = None
    first: int = 0

    @property
    def kind(self) -> str:
        if self.noise_mask is not None:
            return "inpainting"
        return "second sampler" if self.first else "image to image" if self.latent.any() else "whole"


def drawn_entry(draw: random.Random, images: torch.Tensor, count: int, number: int, traps: list) -> Entry:
    """How a batch of runs begins: from pictures, and half of them redraw a part only.

    Image to image starts from pictures of the data set as they are, blurred as upscaling leaves them, or roughly painted;
    inpainting, most often from pure noise, redraws in each sample a rectangle of its own, around its trap if it has one.
    """
    latent = images[starts(len(images), count, number)]
    kind = draw.choice(["as it is", "as it is", "blurred", "rough"])
    if kind != "as it is":
        small = F.avg_pool2d(latent, draw.choice([2, 4]))
        if kind == "rough":
            small = (4 * small).round() / 4
        latent = F.interpolate(small, latent.shape[-2:], mode="bilinear" if kind == "blurred" else "nearest")
    if draw.random() < 0.5:
        return Entry(latent, 0.4 + 0.55 * draw.random())
    size = latent.shape[-2:]
    masks = torch.stack([_rectangle(draw, size, traps[k].mask[0] if traps else None) for k in range(count)])[:, None]
    if draw.random() < 0.3:
        masks = F.avg_pool2d(masks, 5, stride=1, padding=2, count_include_pad=False)
    return Entry(latent, draw.choice([1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.65, 0.5]), masks)


def handed_over(draw: random.Random, latent: torch.Tensor, ratios: list[float]) -> Entry:
    """A run from nothing of whose second part alone, from a noise ratio of 1.5 to 8 on, a guard sees anything."""
    target = 1.5 * (8.0 / 1.5) ** draw.random()
    return Entry(latent, first=min(sum(ratio > target for ratio in ratios), len(ratios) - 5))


def starts(images: int, count: int, number: int) -> torch.Tensor:
    """Which of so many images batch `number` starts from, (count,)."""
    return torch.randint(images, (count,), generator=torch.Generator().manual_seed(number))


def _rectangle(draw: random.Random, size: torch.Size, around: torch.Tensor | None) -> torch.Tensor:
    """(H, W) float: a rectangle of 6 to 70 % of the frame, about a pixel of the mask `around` or any."""
    area = 0.06 * (0.7 / 0.06) ** draw.random() * size[0] * size[1]
    aspect = 2.0 ** (2 * draw.random() - 1)
    sides = [min(n, round(side)) for n, side in zip(size, (math.sqrt(area * aspect), math.sqrt(area / aspect)))]
    place = draw.choice((torch.ones(size) if around is None else around).nonzero().tolist())
    corner = [min(max(0, at - draw.randrange(side)), n - side) for at, side, n in zip(place, sides, size)]
    mask = torch.zeros(size)
    mask[corner[0] : corner[0] + sides[0], corner[1] : corner[1] + sides[1]] = 1.0
    return mask


def within(trap: ScriptedTrap | AttractorTrap, start: float, end: float) -> ScriptedTrap | AttractorTrap:
    """A trap that springs between the noise ratios `start` and `end`, if it is one that does so at set ones."""
    if isinstance(trap, AttractorTrap):
        return trap
    length = math.log(start / end)
    scale = (FIRST - LAST) * length / math.log(JUMP[1] / JUMP[0])

    def moved(ratio):
        return end * math.exp(LAST * length + scale * math.log(ratio / JUMP[0]))

    return replace(trap, at=tuple(moved(ratio) for ratio in trap.at), release=moved(trap.release))
