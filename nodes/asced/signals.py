"""What a window showed of each place of a frame, as maps that mean the same in every latent space, size and schedule.

All are ratios within one frame, over ln(b / a), on a grid whose shorter side has at most 32 cells:

travel 1-6   log of the mean channel's |change of D| between the noise ratios EDGES, over a sixth of its frame's mean
             over all six: how much each place moved, and when
travel       log of how far it has come since the run began, over its frame's mean
burst, straggler, when   the scores of the hand-made rule (dynamics.py), log, and ln(b / a) of the strongest burst
edge 8, 4, 1 log of the mean step between neighbours of D in units of its frame's contrast, at b / a about 8, 4 and at the
             end: what is drawn while its surroundings are still fog has locked in early
broad 8, 1   the same as edge for the step across four pixels of D blurred by 3x3: outlines that fog has softened
detail 4, 1  the same for the difference from the mean of the four neighbours
distance 8, 4   log of |D now - D then|, over a sixth of the frame's mean travel
deviation    |D - its frame's mean| in units of the contrast
coupling     the part of all changes that the four neighbours made too: 1 where a place moves with its surroundings
kept         the share of the cell that the run may not change (inpainting); means over a frame leave it out
began        ln(b / a) where the window began, or that of LATE if that was earlier

A run that enters late, at a noise ratio below LATE (image to image), is seen on a scale of its own: the ratios above are moved
to the same places between where it begins and where its window ends.
"""

import math

import torch
import torch.nn.functional as F

from ...kernels.cells import cell_means
from .waiting import times

GRID = 32
EDGES = (12.0, 8.0, 5.6, 4.0, 2.9, 2.15, 1.5)
THEN = (9.0, 4.5)
"""The structure is looked at in the first estimates at or below these noise ratios."""

LATE = 5.0
LATE_FALL = 1.6
"""The window of a late run is taken to end at EDGES[-1], or where its noise ratio has fallen by this factor."""

NAMES = (
    *(f"travel {i}" for i in range(1, len(EDGES))), "travel", "burst", "straggler", "when", "edge 8", "edge 4", "edge 1",
    "broad 8", "broad 1", "detail 4", "detail 1", "distance 8", "distance 4", "deviation", "coupling", "kept", "began",
)
LEAST = 0.02
TINY = 1e-9


class Signals:
    """Gathers the maps of one window. State: the travel of six spans at half precision, two sums and three estimates, all
    on the grid."""

    def __init__(self):
        self.began = 0.0
        self.edges: tuple[float, ...] = ()
        self.looks: tuple[float, ...] = ()
        self.spans: list[torch.Tensor | float] = [0.0] * (len(EDGES) - 1)
        self.then: dict[float, torch.Tensor] = {}
        self.now: torch.Tensor | None = None
        self.shared: torch.Tensor | float = 0.0
        self.moved: torch.Tensor | float = 0.0
        self.changes = 0

    def add(self, velocity: torch.Tensor, ends: torch.Tensor, places: list[tuple[float, float]]) -> None:
        """Take in V_t of some changes and the estimates they led to, both (changes x F, C, H, W), and where in ln(b / a) each
        began and ended."""
        if not self.changes:
            start = places[0][0]
            self.began = min(start, math.log(LATE))
            self.edges, self.looks = (scaled_to(start, ratios) for ratios in (EDGES, THEN))
        changes = len(places)
        rates = on_grid(velocity.abs().mean(dim=1)).chunk(changes)
        for span, (high, low) in enumerate(zip(self.edges, self.edges[1:])):
            for rate, (start, end) in zip(rates, places):
                shared = min(start, high) - max(end, low)
                if shared > 0:
                    self.spans[span] = (self.spans[span] + rate * shared).half()
        change = times(on_grid(velocity), [start - end for start, end in places])
        for of_change in (change * neighbours(change)).mean(1).chunk(changes):
            self.shared = self.shared + of_change
        for of_change in change.square().mean(1).chunk(changes):
            self.moved = self.moved + of_change
        for now, (_, end) in zip(on_grid(ends).chunk(changes), places):
            for look in self.looks:
                if look not in self.then and end <= look:
                    self.then[look] = now
        self.now = now
        self.changes += changes

    def maps(self, travel, burst, straggler, when, valid: torch.Tensor | None = None) -> torch.Tensor:
        """The maps NAMES, (F, K, h, w) float32. travel, burst, straggler: (F, H, W) at full size; when: noise ratio b / a;
        valid: (F, H, W) bool, what is not kept."""
        share = torch.ones_like(self.now[:, 0]) if valid is None else on_grid(valid.float())
        weight = share / share.mean((1, 2), keepdim=True).clamp(min=TINY)

        def mean(values):
            return (values * weight).mean((-2, -1), keepdim=True)

        spans = torch.stack([span + torch.zeros_like(self.now[:, 0]) for span in self.spans], dim=1)
        scale = mean(spans.sum(dim=1)).clamp(min=TINY) / len(self.spans)
        travel = on_grid(travel)
        moved = [travel / mean(travel).clamp(min=TINY), *(on_grid(score).clamp(min=0.0) for score in (burst, straggler))]
        then = [self.then.get(look, self.now) for look in self.looks]
        away = self.now - (self.now * weight[:, None]).mean((2, 3), keepdim=True)
        contrast = mean(away.square().mean(1)).sqrt().clamp(min=TINY)
        drawn = [edges(x) for x in (*then, self.now)] + [broad_edges(x) for x in (then[0], self.now)]
        drawn += [(x - neighbours(x)).abs().mean(1) for x in (then[1], self.now)]
        drawn = torch.stack(drawn, dim=1) / contrast[:, None]
        come = torch.stack([(self.now - x).abs().mean(1) for x in then], dim=1) / scale[:, None]
        logs = torch.log(torch.cat([spans / scale[:, None], torch.stack(moved, dim=1), drawn, come], dim=1) + LEAST)
        coupling = self.shared / (self.moved + LEAST * mean(self.moved)).clamp(min=TINY**2)
        others = [away.abs().mean(1) / contrast, coupling, 1.0 - share, torch.full_like(share, self.began)]
        first = len(self.spans) + len(moved)
        began = on_grid(when).clamp(1.0, EDGES[0]).log()[:, None]
        return torch.cat([logs[:, :first], began, logs[:, first:], torch.stack(others, dim=1)], dim=1)


def scaled_to(start: float, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """ln of the noise ratios, in a run that begins at ln(b / a) = start below LATE moved to the same places of its window."""
    if start >= math.log(LATE):
        return tuple(math.log(ratio) for ratio in ratios)
    end = min(math.log(EDGES[-1]), start - math.log(LATE_FALL))
    length = (start - end) / math.log(EDGES[0] / EDGES[-1])
    return tuple(end + length * math.log(ratio / EDGES[-1]) for ratio in ratios)


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Cells of the grid for a frame of (height, width) latent pixels."""
    pixels = max(1.0, min(size) / GRID)
    return round(size[0] / pixels), round(size[1] / pixels)


def on_grid(x: torch.Tensor) -> torch.Tensor:
    """x (F, ..., H, W), averaged over the cells of the grid."""
    size = grid_of(x.shape[-2:])
    return x if size == tuple(x.shape[-2:]) else cell_means(x, size)


def edges(x: torch.Tensor) -> torch.Tensor:
    """Mean |step| from each pixel to its up to four neighbours, mean over the channels: (F, C, H, W) gives (F, H, W)."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = (padded.diff(dim=dim).abs().mean(1) for dim in (-1, -2))
    return (across[:, 1:-1, 1:] + across[:, 1:-1, :-1] + down[:, 1:, 1:-1] + down[:, :-1, 1:-1]) / 4


def broad_edges(x: torch.Tensor) -> torch.Tensor:
    """The same across four pixels of x blurred by 3x3, one step along each axis."""
    blurred = F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), 3, stride=1)
    across = (blurred[..., 2:-2, 4:] - blurred[..., 2:-2, :-4]).abs()
    down = (blurred[..., 4:, 2:-2] - blurred[..., :-4, 2:-2]).abs()
    return (across + down).mean(1) / 2


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """Mean of the four neighbours of each pixel, (F, C, H, W)."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]) / 4
