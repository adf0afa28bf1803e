"""Seeded generators of planted traps, in two families that share no shape, no pattern and no seed.

`develop` is for working on detectors. `held out` is FROZEN: it was written before any detector, no constant, shape or
pattern of it may change, and no threshold may be chosen by looking at its results.

| split    | shapes                            | patterns                                 |
| -------- | --------------------------------- | ---------------------------------------- |
| develop  | square, disc, strip               | flat colour, checker, smooth noise       |
| held out | blob, tilted ellipse, slanted bar | grain, texture of another image, stripes |
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from .images import shape_images
from .traps import AttractorTrap, ScriptedTrap

SPLITS = ("develop", "held out")
AREA = (0.01, 0.12)          # share of the image
AMPLITUDES = (0.2, 0.8)      # of the [-1, 1] image; log-uniform
JUMP = (3.5, 7.0)            # b/a of the first jump: |delta D| of exact 32x32 runs is largest at b/a 4-9
SECOND_JUMP = 1.3            # the second jump comes at b/a smaller by this factor: the next step of 25
RELEASE = (2.0, 4.0)         # the freeze ends when b/a has fallen by this factor since the last jump
MOTION = (0.1, 0.4)          # share of the normal motion kept while frozen


def make_traps(kind, split, seed, size, count, channels=3, amplitude=None, weight=0.5, textures=None):
    """`count` traps of `kind` (scripted or attractor), masks (1, H, W) and patterns (1, C, H, W), size = (H, W).

    amplitude None draws one for each trap from AMPLITUDES. An attractor's garbage is a random colour plus amplitude
    times the pattern, clamped to [-1, 1]; `weight` is its pi. textures (N, C, H, W): images to copy from, else shapes.
    """
    random = torch.Generator().manual_seed(2 * seed + SPLITS.index(split))
    if textures is None:
        textures = shape_images(16, max(size), channels, seed=_choice(random, 10 ** 6))[..., :size[0], :size[1]]
    make = {"scripted": _scripted, "attractor": _attractor}[kind]
    return [make(random, split, size, channels, amplitude, weight, textures) for _ in range(count)]


def one_per_sample(traps):
    """Traps for one batch: trap j alone on sample j of len(traps). Equal attractors come as one, which runs faster."""
    first = traps[0]
    if first.kind == "attractor" and all((t.weight, t.width) == (first.weight, first.width) for t in traps):
        return [replace(first, mask=torch.cat([t.mask for t in traps]), pattern=torch.cat([t.pattern for t in traps]))]
    alone = torch.eye(len(traps), dtype=torch.bool)[:, :, None, None]
    return [replace(trap, mask=trap.mask & chosen) for trap, chosen in zip(traps, alone)]


def _scripted(random, split, size, channels, amplitude, weight, textures):
    mask = _mask(random, split, size)
    pattern = _pattern(random, split, mask, channels, textures)
    first = _log_uniform(random, *JUMP)
    at = (first,) if _uniform(random) < 0.5 else (first, first / SECOND_JUMP)
    return ScriptedTrap(mask, pattern, amplitude or _log_uniform(random, *AMPLITUDES), at,
                        motion=_uniform(random, *MOTION), release=at[-1] / _log_uniform(random, *RELEASE))


def _attractor(random, split, size, channels, amplitude, weight, textures):
    mask = _mask(random, split, size)
    pattern = _pattern(random, split, mask, channels, textures)
    colour = _uniform(random, -0.5, 0.5, 1, channels, 1, 1)
    garbage = colour + (amplitude or _log_uniform(random, *AMPLITUDES)) * pattern
    return AttractorTrap(mask, garbage.clamp(-1.0, 1.0), weight)


def _mask(random, split, size):
    """(1, H, W) bool: the pixels nearest the centre in the shape's own metric, as many as the area asks for."""
    height, width = size
    area = _log_uniform(random, *AREA) * height * width
    side = math.sqrt(area)
    cy, cx = (0.5 * n + (n - side) * (_uniform(random) - 0.5) for n in size)
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - cy, torch.arange(width) + 0.5 - cx, indexing="ij")
    turn = _uniform(random, 0.2, math.pi / 2 - 0.2) + math.pi / 2 * (_uniform(random) < 0.5)
    u, v = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    if _uniform(random) < 0.5:
        y, x = x, y
    noise = _smooth_noise(random, (1, 1, height, width), side / 4.0)[0, 0]
    distance = {
        "develop": [torch.maximum(y.abs(), x.abs()), torch.hypot(y, x), torch.maximum(4.0 * y.abs(), x.abs())],
        "held out": [torch.hypot(y, x) + 0.25 * side * noise, torch.hypot(2.0 * u, v),
                     torch.maximum(4.0 * u.abs(), v.abs())],
    }[split][_choice(random, 3)]
    return (distance <= distance.flatten().kthvalue(max(4, round(area))).values)[None]


def _pattern(random, split, mask, channels, textures):
    """(1, C, H, W), RMS 1 inside the mask."""
    shape = (1, channels, *mask.shape[1:])
    colour = torch.randn(1, channels, 1, 1, generator=random)
    y, x = torch.meshgrid(*(torch.arange(n) for n in mask.shape[1:]), indexing="ij")
    period = 2 + _choice(random, 3)
    turn = _uniform(random, 0.0, math.pi)
    texture = textures[_choice(random, len(textures))][None]
    texture = texture - texture.mean((2, 3), keepdim=True)
    grain = torch.randn(1, 1, *shape[2:], generator=random) + torch.randn(shape, generator=random)
    wave = 2.0 * math.pi * (math.cos(turn) * x + math.sin(turn) * y) / (period + 1)
    pattern = {
        "develop": [colour.expand(shape), colour * (1.0 - 2.0 * ((y // period + x // period) % 2)),
                    _smooth_noise(random, shape, 2.0)],
        "held out": [grain, texture, colour * torch.sin(wave)],
    }[split][_choice(random, 3)]
    return pattern / pattern[:, :, mask[0]].square().mean().sqrt().clamp_min(1e-3)


def _smooth_noise(random, shape, sigma):
    """Gaussian noise blurred by sigma pixels, RMS about 1."""
    radius = max(1, round(3.0 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 0.3)) ** 2)
    noise = torch.randn(shape[0] * shape[1], 1, shape[2] + 2 * radius, shape[3] + 2 * radius, generator=random)
    noise = F.conv2d(F.conv2d(noise, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    return noise.reshape(shape) / line.square().sum()


def _uniform(random, low=0.0, high=1.0, *shape):
    value = low + (high - low) * torch.rand(shape or 1, generator=random)
    return value if shape else value.item()


def _log_uniform(random, low, high):
    return low * (high / low) ** _uniform(random)


def _choice(random, n):
    return int(torch.randint(n, (), generator=random))
