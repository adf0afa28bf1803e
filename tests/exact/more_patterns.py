"""Six patterns of planted traps beyond those of wide_traps.py, none of the held-out split's: for runs that fell (trap_runs.py)."""

import math

import torch
import torch.nn.functional as F

from .wide_traps import PATTERNS, Draw, axes, colour, noise


def _textured(draw: Draw, channels: int, height: int, width: int) -> torch.Tensor:
    """What a small random network makes of smooth noise."""
    sigma = draw.uniform(1.0, 2.5)
    x = noise(draw, 8, height, width, sigma, sigma)[None]
    for _ in range(draw.choice([2, 3])):
        k = draw.choice([1, 3, 3, 5])
        x = F.conv2d(F.pad(x, (k // 2,) * 4, mode="circular"), draw.normal(8, 8, k, k))
        x = torch.tanh(draw.uniform(0.5, 3.0) * (x / x.std() + 0.3 * draw.normal(1, 8, 1, 1)))
    x = F.conv2d(x, draw.normal(channels, 8, 1, 1))[0]
    return x / x.std().clamp_min(1e-3) + 0.3 * colour(draw, channels)


def _labyrinth(draw: Draw, channels: int, height: int, width: int) -> torch.Tensor:
    """Winding walls of one width, as reactions that diffuse leave them: noise of one band of frequencies, sharpened."""
    sigma = draw.uniform(0.7, 1.6)
    x = draw.normal(1, 1, height + 32, width + 32)
    x = _blurred(x, sigma) - _blurred(x, 1.6 * sigma)
    x = torch.tanh(draw.uniform(1.0, 4.0) * x / x.std())[0, 0, 16:-16, 16:-16]
    return colour(draw, channels) * x + 0.3 * colour(draw, channels)


def _blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    line = torch.exp(-0.5 * (torch.arange(-16.0, 17.0) / sigma) ** 2)
    line = line / line.sum()
    return F.conv2d(F.conv2d(F.pad(x, (16,) * 4, mode="circular"), line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))


def _scribbles(draw: Draw, channels: int, height: int, width: int) -> torch.Tensor:
    """Strokes of a pen that wanders."""
    y, x = axes(height, width)
    picture = torch.zeros(channels, height, width)
    for _ in range(draw.choice(range(4, 12))):
        at = torch.tensor([draw.uniform(0, height), draw.uniform(0, width)])
        way, ink, thick = draw.uniform(0, 6.28), colour(draw, channels), draw.uniform(0.6, 1.6)
        for _ in range(30):
            way += draw.uniform(-0.6, 0.6)
            at = at + 1.2 * torch.tensor([math.sin(way), math.cos(way)])
            picture = torch.where(torch.hypot(y - at[0] % height, x - at[1] % width) < thick, ink, picture)
    return picture + 0.3 * colour(draw, channels)


def _glyphs(draw: Draw, channels: int, height: int, width: int) -> torch.Tensor:
    """Rows of small signs."""
    side, gap = draw.choice([3, 4, 5]), draw.choice([1, 2])
    cell = side + gap
    down, across = -(-height // cell), -(-width // cell)
    cells = (torch.rand(down, across, side, side, generator=draw.random) < 0.5).float()
    cells = F.pad(cells, (0, gap, 0, gap)).permute(0, 2, 1, 3).reshape(down * cell, across * cell)[:height, :width]
    return colour(draw, channels) * cells + 0.5 * colour(draw, channels)


def _quilt(draw: Draw, channels: int, height: int, width: int) -> torch.Tensor:
    """Patches, each with a shade of its own."""
    tile = draw.choice(range(3, 9))
    down, across = -(-height // tile), -(-width // tile)
    y, x = torch.meshgrid(torch.linspace(-1, 1, tile), torch.linspace(-1, 1, tile), indexing="ij")
    shades = (draw.normal(channels, down, across, 1, 1) for _ in range(3))
    patch = next(shades) * x + next(shades) * y + 0.5 * next(shades)
    return patch.permute(0, 1, 3, 2, 4).reshape(channels, down * tile, across * tile)[:, :height, :width]


def _crumpled(draw: Draw, channels: int, height: int, width: int) -> torch.Tensor:
    """Folds of all sizes."""
    x = sum(s * noise(draw, channels, height, width, s, s).abs() for s in (0.6, 1.2, 2.4))
    return draw.choice([-1.0, 1.0]) * (x - x.mean()) / x.std() + 0.5 * colour(draw, channels)


MORE_PATTERNS = PATTERNS | {
    "textured": _textured, "labyrinth": _labyrinth, "scribbles": _scribbles, "glyphs": _glyphs, "quilt": _quilt, "crumpled": _crumpled,
}
