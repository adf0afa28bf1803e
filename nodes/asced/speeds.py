"""How fast the clean estimate moves at each step of a run, in all and inside the regions that are found only later."""

from dataclasses import dataclass

import torch

from ...kernels.cells import cell_means

CELLS = 16
"""Maps are kept at this size at most. A cell counts inside by the share of it that the regions cover: measured on latents of
64 and 128 pixels, squares of an eighth of a side that move three times as fast as the rest then show as 2.4 to 2.5 times as
fast; cells half as wide, counted inside where a region touches them, gave 2.4 to 2.6. On 32 pixels it is 2.6 instead of 3."""

MAPS = 12
"""At most so many maps wait for the regions. A run of 25 steps has about as many before they are known; of a longer one those
that are closest in ln(b / a), the position that all schedules share, become one."""


@dataclass
class Stretch:
    """Steps of a run that share a map: the mean of theirs, (F, h, w) float16; how many; how far ln(b / a) fell in them."""

    map: torch.Tensor
    steps: int
    length: float

    def joined(self, other: "Stretch") -> "Stretch":
        steps = self.steps + other.steps
        both = (self.map.float() * self.steps + other.map.float() * other.steps) / steps
        return Stretch(both.half(), steps, self.length + other.length)


class Speeds:
    """|Change of the clean estimate| of one run. Nothing here waits for the device.

    Memory: at most MAPS maps at half precision, and for each step its mean speed in each frame; from `settle` on two sums
    more instead of a map, or none if there are no regions. Where a map stands for several steps, inside and outside keep
    their proportion through all of them and each step its own mean.
    """

    def __init__(self):
        self.ratios: list[float] = []
        self.lengths: list[float] = []
        self.means: list[torch.Tensor] = []
        self.stretches: list[Stretch] = []
        self.undivided = False
        self.inside: torch.Tensor | None = None
        self.sums: list[torch.Tensor] = []

    def add(self, ratio: float, length: float, speed: torch.Tensor) -> None:
        """Take in a step: b / a, how far ln(b / a) fell since the one before (inf from pure noise), the change (F, H, W)."""
        size = tuple(min(CELLS, side) for side in speed.shape[-2:])
        small = speed if size == speed.shape[-2:] else cell_means(speed, size)
        self.ratios.append(ratio)
        self.lengths.append(length)
        self.means.append(small.mean(dim=(1, 2)))
        if self.undivided:
            return
        if self.inside is not None:
            self.sums.append(split_sums(small, self.inside))
            return
        self.stretches.append(Stretch(small.half(), 1, length))
        if len(self.stretches) > MAPS:
            pairs = zip(self.stretches, self.stretches[1:])
            at = min(enumerate(pairs), key=lambda pair: pair[1][0].length + pair[1][1].length)[0]
            self.stretches[at : at + 2] = [self.stretches[at].joined(self.stretches[at + 1])]

    def settle(self, regions: torch.Tensor | None) -> None:
        """No more will be found than these regions (F, H, W) bool: of the steps to come two sums are enough. None: not one was."""
        if regions is None:
            self.undivided, self.stretches = True, []
        elif self.stretches:
            self.inside = share_of_cells(regions, self.stretches[0].map)

    def close(self) -> None:
        """The run is over: bring everything to the CPU."""
        self.means, self.sums = ([x.cpu() for x in numbers] for numbers in (self.means, self.sums))
        for stretch in self.stretches:
            stretch.map = stretch.map.cpu()

    def curves(self, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean speed at each step inside and outside the regions (F, H, W) of all frames, each (steps,); NaN without them."""
        if self.undivided:
            outside = torch.stack(self.means).nan_to_num().mean(dim=1)
            return torch.full_like(outside, torch.nan), outside
        inside = share_of_cells(regions, self.stretches[0].map)
        rows = []
        for stretch in self.stretches:
            sums, steps = split_sums(stretch.map, inside), self.means[len(rows) : len(rows) + stretch.steps]
            whole = stretch.map.float().nan_to_num().mean()
            rows += [sums if len(steps) == 1 or whole == 0 else sums * (mean.nan_to_num().mean() / whole) for mean in steps]
        cells = torch.stack([inside.sum(), (1 - inside).sum()])
        return tuple((torch.stack(rows + self.sums) / cells).unbind(dim=1))

    def of_frame(self, frame: int | None) -> list[float]:
        """Mean speed at each step, of one frame or of all."""
        means = torch.stack(self.means)
        return (means.mean(dim=1) if frame is None else means[:, frame]).tolist()


def share_of_cells(regions: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """How much of each cell of a map (F, h, w) the regions (F, H, W) cover, 0 to 1."""
    return cell_means(regions.float(), of.shape[-2:])


def split_sums(speed: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Sums of a map (F, h, w) inside and outside, (2,) float32; NaN counts as 0. inside: share of each cell."""
    values = speed.float().nan_to_num()
    return torch.stack([(values * inside).sum(), (values * (1 - inside)).sum()])
