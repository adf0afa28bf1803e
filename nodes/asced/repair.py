"""One repair of a run: whether it is kept, where it falls back, and what is drawn once more."""

from dataclasses import dataclass

import torch

from ...kernels.fill import fill_from_surroundings
from ...kernels.regions import count_in_region, grow_from, label_regions
from ...kernels.seams import border_jump
from ..latents import FrameLayout
from .estimate import Estimate

BETTER = 0.75
"""A repair is kept if the step across its border is below this share of what it was. On attractor traps of the develop
split (Fashion-MNIST, CIFAR-10; EPS) it halves the sound samples that are redrawn and the harm, and costs no repair."""

REDRAWS, REDRAW_DOWN_TO = 4, 0.8
"""A region is drawn again at most so often, and as long as the answer that shows it fell back is of this noise ratio b / a or
above. Of 113 attractor traps of wide_traps.py, told the place, 102 were repaired without, 103 with 2, 108 with 4; found by an
earlier detector 92 without, 99 with 4, but 95 down to 0.6 and 86 down to 0.4: little noise hides too little."""


@dataclass
class Repair:
    """A repair that the run was restarted with.

    x, denoised: the sampler's tensors (B, ...) before it, None once another has followed. The rest is (F, H, W) bool: regions, what was found; mask, what was
    renoised; sure, where the detector has no doubt, None if it cannot tell. artifact: the frames of D before it. falling: what
    of it fell back by the model's last answer, and that answer in frames; None where nothing is to be drawn again.
    settled: no more answers need be looked at.
    """

    layout: FrameLayout
    x: torch.Tensor | None
    denoised: torch.Tensor | None
    regions: torch.Tensor
    mask: torch.Tensor
    sure: torch.Tensor | None
    artifact: torch.Tensor
    verified: bool = False
    settled: bool = False
    redraws: int = 0
    falling: tuple[torch.Tensor, torch.Tensor] | None = None

    def verify(self, estimate: Estimate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Judge the repair by the model's first answer to it, and put back the samples for which it gained nothing.

        A sample is put back if the model draws something else in its regions, but their borders show no less clearly
        than before. One that answers with what was there before is left: it may take the next steps to escape.

        Args:
            estimate: the repaired x and the model's estimate of it, as the sampler has them.

        Returns:
            None if every sample is kept; else where the repair was put back, (F, H, W) bool, and x and clean estimate with
            the samples as they were before it, bit for bit. The estimate needs no model call: the samples of a batch do
            not touch each other.
        """
        self.verified = True
        denoised = self.layout.frames(estimate.denoised)
        after = border_jump(denoised, self.mask)
        before = torch.maximum(*(border_jump(self.artifact, mask) for mask in (self.mask, self.regions)))
        frames = (-1, self.layout.frames_per_sample)
        undone = after.unflatten(0, frames).sum(1) > BETTER * before.unflatten(0, frames).sum(1)
        undone &= ~self.fallen_back(denoised).flatten(1).any(dim=1).unflatten(0, frames).any(dim=1)
        if not bool(undone.any()):
            return None
        where = self.mask & undone.repeat_interleave(self.layout.frames_per_sample)[:, None, None]
        self.mask = self.mask & ~where

        def put_back(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return torch.where(undone.view(-1, *[1] * (new.ndim - 1)), old.to(new.dtype), new)

        return where, put_back(self.x, estimate.x), put_back(self.denoised, estimate.denoised)

    def look_back(self, estimate: Estimate) -> None:
        """See by an answer of the model, as the sampler has it, which regions are to be drawn again, if the detector can tell."""
        self.falling = None
        if self.redraws == REDRAWS or estimate.ratio < REDRAW_DOWN_TO or self.sure is None or not bool(self.sure.any()):
            self.settled = True
            return
        denoised = self.layout.frames(estimate.denoised)
        again = self.to_draw_again(denoised)
        if bool(again.any()):
            self.falling = again, denoised

    def to_draw_again(self, denoised: torch.Tensor) -> torch.Tensor:
        """The regions, by a clean estimate (F, C, H, W), that fell back and of which the detector was sure, (F, H, W) bool; all that
        fell back if it cannot tell. What it doubted and what comes back is more often sound."""
        back = self.fallen_back(denoised)
        return back if self.sure is None else grow_from(self.sure, back)

    def fallen_back(self, denoised: torch.Tensor) -> torch.Tensor:
        """What of the repair has become again what it was, by a clean estimate (F, C, H, W): (F, H, W) bool."""
        return fallen_back(denoised.float(), self.artifact.float(), self.mask)


def fallen_back(denoised: torch.Tensor, artifact: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The regions of a mask (F, H, W) of which more than half has come back to the artifact.

    A pixel has come back if it is less than half as far from the artifact as the artifact was from the smooth
    continuation of its surroundings. denoised, artifact: (F, C, H, W) float32.
    """
    distance = (artifact - fill_from_surroundings(artifact, mask)).square().sum(dim=1)
    back = (denoised - artifact).square().sum(dim=1) < 0.25 * distance
    labels = label_regions(mask)
    return mask & (2 * count_in_region(labels, back & mask) > count_in_region(labels, mask))
