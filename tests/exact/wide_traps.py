"""Planted traps of many shapes and patterns, from which the default detector's network learns.

Twelve shapes and fourteen patterns, those of the develop split of trap_families.py among them, none of its held-out
split: no blob, no tilted ellipse, no slanted bar, no grain, no texture of another image, no stripes. Ranges are a little
wider than there. Every trap tells its shape and pattern, so that a fit can be tried on kinds that it has not seen.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .traps import AttractorTrap, ScriptedTrap

AREA = (0.008, 0.14)         # share of the image
AMPLITUDES = (0.15, 1.0)     # of the [-1, 1] image; log-uniform
JUMP = (3.2, 8.0)            # b/a of the first jump
SECOND_JUMP = 1.3            # the second jump comes at b/a smaller by this factor
RELEASE = (1.8, 4.5)         # the freeze ends when b/a has fallen by this factor since the last jump
MOTION = (0.05, 0.45)        # share of the normal motion kept while frozen


@dataclass(frozen=True)
class WideTrap:
    """A trap and of what kind it is."""

    trap: ScriptedTrap | AttractorTrap
    shape: str
    pattern: str


class Draw:
    """Numbers from one generator."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)

    def uniform(self, low=0.0, high=1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.random).item()

    def log_uniform(self, low, high) -> float:
        return low * (high / low) ** self.uniform()

    def choice(self, options):
        options = list(options)
        return options[int(torch.randint(len(options), (), generator=self.random))]

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)


def wide_traps(
    kind, seed, size, count, channels=3, unit=1.0, amplitude=None, weight=0.5, patterns=None
) -> list[WideTrap]:
    """`count` traps of `kind` (scripted or attractor), masks (1, H, W) and patterns (1, C, H, W), size = (H, W).

    unit: what a 1 of the [-1, 1] image is in these data, as for latents of variance 1 about 2. amplitude None draws one
    for each trap; an attractor's garbage is a random colour plus amplitude times the pattern, clamped to the unit. patterns: name ->
    how it is drawn, PATTERNS if None.
    """
    draw, patterns = Draw(seed), patterns or PATTERNS
    return [
        _trap(draw, kind, size, channels, unit, amplitude or draw.log_uniform(*AMPLITUDES), weight, patterns) for _ in range(count)
    ]


def _trap(draw, kind, size, channels, unit, amplitude, weight, patterns) -> WideTrap:
    shape, pattern_name = draw.choice(SHAPES), draw.choice(patterns)
    mask = _mask(draw, SHAPES[shape], size)
    pattern = patterns[pattern_name](draw, channels, *size)[None]
    pattern = unit * pattern / pattern[:, :, mask[0]].square().mean().sqrt().clamp_min(1e-3)
    if kind == "attractor":
        colour = unit * (torch.rand(1, channels, 1, 1, generator=draw.random) - 0.5)
        trap = AttractorTrap(mask, (colour + amplitude * pattern).clamp(-unit, unit), weight)
    else:
        first = draw.log_uniform(*JUMP)
        at = (first,) if draw.uniform() < 0.5 else (first, first / SECOND_JUMP)
        motion, release = draw.uniform(*MOTION), at[-1] / draw.log_uniform(*RELEASE)
        trap = ScriptedTrap(mask, pattern, amplitude, at, motion=motion, release=release)
    return WideTrap(trap, shape, pattern_name)


def _mask(draw, metric, size) -> torch.Tensor:
    """(1, H, W) bool: the pixels nearest the centre in the shape's own metric, as many as the area asks for."""
    height, width = size
    area = draw.log_uniform(*AREA) * height * width
    side = math.sqrt(area)
    cy, cx = (0.5 * n + (n - side) * (draw.uniform() - 0.5) for n in size)
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - cy, torch.arange(width) + 0.5 - cx, indexing="ij")
    if draw.uniform() < 0.5:
        y, x = x, y
    distance = metric(draw, y / side, x / side)
    return (distance <= distance.flatten().kthvalue(max(4, round(area))).values)[None]


def _turned(draw, y, x):
    turn = draw.uniform(0.0, 2.0 * math.pi)
    return math.cos(turn) * y - math.sin(turn) * x, math.cos(turn) * x + math.sin(turn) * y


def _corners(y, x, angles, reach):
    """The metric of the polygon whose sides face these angles at these distances."""
    return torch.stack([(math.cos(a) * x + math.sin(a) * y) / r for a, r in zip(angles, reach)]).amax(0)


def _triangle(draw, y, x):
    y, x = _turned(draw, y, x)
    return _corners(y, x, [0.0, 2.1, 4.2], [1.0, 1.0, draw.uniform(0.7, 1.4)])


def _polygon(draw, y, x):
    sides = draw.choice(range(4, 8))
    angles = [2.0 * math.pi * (k + draw.uniform(-0.3, 0.3)) / sides for k in range(sides)]
    return _corners(*_turned(draw, y, x), angles, [draw.uniform(0.6, 1.4) for _ in angles])


def _cross(draw, y, x):
    thin = draw.uniform(2.0, 4.0)
    return torch.minimum(torch.maximum(thin * y.abs(), x.abs()), torch.maximum(y.abs(), thin * x.abs()))


def _corner(draw, y, x):
    """An L: a square without one quarter."""
    return torch.maximum(y.abs(), x.abs()) + 10.0 * ((y > 0) & (x > 0))


def _half_disc(draw, y, x):
    y, x = _turned(draw, y, x)
    return torch.hypot(y, x) + 10.0 * (y < 0)


def _two_discs(draw, y, x):
    y, x = _turned(draw, y, x)
    apart = draw.uniform(0.5, 0.9)
    return torch.minimum(torch.hypot(y, x - apart), draw.uniform(1.0, 1.5) * torch.hypot(y, x + apart))


def _rounded(draw, y, x):
    aspect = draw.uniform(1.3, 2.5)
    return ((aspect * y) ** 4 + x ** 4) ** 0.25


SHAPES = {
    "square": lambda draw, y, x: torch.maximum(y.abs(), x.abs()),
    "disc": lambda draw, y, x: torch.hypot(y, x),
    "strip": lambda draw, y, x: torch.maximum(4.0 * y.abs(), x.abs()),
    "diamond": lambda draw, y, x: y.abs() + x.abs(),
    "ring": lambda draw, y, x: (torch.hypot(y, x) - 0.7).abs(),
    "triangle": _triangle, "polygon": _polygon, "cross": _cross, "corner": _corner, "half disc": _half_disc,
    "two discs": _two_discs, "rounded": _rounded,
}


def colour(draw, channels):
    return draw.normal(channels, 1, 1)


def axes(height, width):
    return torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")


def noise(draw, channels, height, width, sigma_y, sigma_x):
    """(C, H, W): Gaussian noise blurred by these many pixels."""
    x = draw.normal(channels, 1, height + 32, width + 32)
    for sigma, view in ((sigma_y, (1, 1, -1, 1)), (sigma_x, (1, 1, 1, -1))):
        line = torch.exp(-0.5 * (torch.arange(-16.0, 17.0) / sigma) ** 2).view(view)
        x = F.conv2d(x, line / line.square().sum().sqrt())
    return x[:, 0]


def _smooth(draw, channels, height, width):
    sigma = draw.log_uniform(0.7, 4.0)
    return noise(draw, channels, height, width, sigma, sigma) + draw.uniform(0.0, 1.0) * colour(draw, channels)


def _smear(draw, channels, height, width):
    """Streaks along one axis."""
    long, short = draw.uniform(4.0, 8.0), draw.uniform(0.5, 1.2)
    return noise(draw, channels, height, width, *((long, short) if draw.uniform() < 0.5 else (short, long)))


def _islands(draw, channels, height, width):
    sigma = draw.uniform(1.0, 3.0)
    return colour(draw, channels) * noise(draw, 1, height, width, sigma, sigma).sign() + 0.5 * colour(draw, channels)


def _flat(draw, channels, height, width):
    return colour(draw, channels).expand(channels, height, width)


def _checker(draw, channels, height, width):
    y, x = axes(height, width)
    period = draw.choice(range(1, 5))
    return colour(draw, channels) * (1.0 - 2.0 * ((y // period + x // period) % 2))


def _ramp(draw, channels, height, width):
    y, x = axes(height, width)
    turn = draw.uniform(0.0, 2.0 * math.pi)
    along = (math.cos(turn) * x + math.sin(turn) * y) / max(height, width)
    return colour(draw, channels) + draw.uniform(2.0, 6.0) * colour(draw, channels) * along


def _bump(draw, channels, height, width):
    """A spot that fades."""
    y, x = axes(height, width)
    radius = torch.hypot(y - draw.uniform(0, height), x - draw.uniform(0, width))
    return colour(draw, channels) * torch.exp(-0.5 * (radius / draw.uniform(2.0, 8.0)) ** 2) + 0.5 * colour(draw, channels)


def _dots(draw, channels, height, width):
    y, x = axes(height, width)
    period = draw.choice(range(3, 7))
    dots = ((y % period) < (period + 1) // 2) & ((x % period) < (period + 1) // 2)
    return colour(draw, channels) * dots + 0.3 * colour(draw, channels)


def _mosaic(draw, channels, height, width):
    tile = draw.choice(range(2, 6))
    tiles = draw.normal(channels, -(-height // tile), -(-width // tile))
    return tiles.repeat_interleave(tile, 1).repeat_interleave(tile, 2)[:, :height, :width]


def _cells(draw, channels, height, width):
    """Voronoi cells of random points, each of one colour."""
    count = draw.choice(range(12, 80))
    places = torch.rand(count, 2, generator=draw.random) * torch.tensor([height, width])
    y, x = axes(height, width)
    nearest = torch.cdist(torch.stack([y, x], -1).reshape(-1, 2).float(), places).argmin(1)
    return draw.normal(channels, count)[:, nearest].reshape(channels, height, width)


def _leaves(draw, channels, height, width):
    """Dead leaves, discs of all sizes one over the other: what photographs are like in their edges and even parts."""
    y, x = axes(height, width)
    picture = _flat(draw, channels, height, width).clone()
    for _ in range(150):
        radius = draw.log_uniform(1.0, 12.0)
        inside = torch.hypot(y - draw.uniform(0, height), x - draw.uniform(0, width)) < radius
        picture = torch.where(inside, colour(draw, channels), picture)
    return picture


def _pink(draw, channels, height, width):
    """Noise of all scales, its amplitude falling with the frequency as in photographs; more alike across the channels."""
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    weight = (frequency + 0.5 / max(height, width)) ** -draw.uniform(0.7, 1.5)
    noise = draw.normal(1, height, width) + draw.uniform(0.0, 0.7) * draw.normal(channels, height, width)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * weight).real
    return noise / noise.std() + 0.3 * colour(draw, channels)


def _specks(draw, channels, height, width):
    """Single pixels here and there."""
    struck = torch.rand(1, height, width, generator=draw.random) < draw.uniform(0.05, 0.3)
    return struck * draw.normal(channels, height, width) + 0.3 * colour(draw, channels)


def _mixed(draw, channels, height, width):
    """Two others, one over the other."""
    one, other = (PATTERNS[draw.choice(SINGLE)](draw, channels, height, width) for _ in range(2))
    return one / one.std().clamp_min(0.3) + draw.uniform(0.3, 1.0) * other / other.std().clamp_min(0.3)


PATTERNS = {
    "flat": _flat, "checker": _checker, "smooth": _smooth, "smear": _smear, "islands": _islands, "ramp": _ramp,
    "bump": _bump, "dots": _dots, "mosaic": _mosaic, "cells": _cells,
    "leaves": _leaves, "pink": _pink, "specks": _specks, "mixed": _mixed,
}
SINGLE = [name for name in PATTERNS if name != "mixed"]
