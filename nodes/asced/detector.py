"""What all detectors have in common: they see the estimates of a window one by one and say which regions are abnormal."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from ...kernels.regions import filter_regions
from ..latents import pixels
from .estimate import Estimate
from .options import AscedOptions

NEVER = 0.0
"""Onset of a pixel that was never abnormal."""


class Findings(NamedTuple):
    """What a window showed, each (F, H, W): regions (bool), the largest score of each pixel (1 = the limit), and the
    noise ratio b / a of the step at which it began to be abnormal (NEVER where it was not).

    suspected: whether any pixel passed its limit. It is the one thing that the host has to wait for; where it is False
    there are no regions, and nobody need look for them.
    likely, sure: where the detector thinks it right, and where it has no doubt, bool; None if it cannot tell.
    before: the clean estimate (F, C, H, W) in which each pixel was as it was before its strongest change; None if it was not kept.
    """

    regions: torch.Tensor
    peak: torch.Tensor
    onset: torch.Tensor
    suspected: bool
    likely: torch.Tensor | None = None
    sure: torch.Tensor | None = None
    before: torch.Tensor | None = None


class Detector(ABC):
    """Base of the detectors; one is made for each round of a run.

    Args:
        options: the guard's finer settings.
        travel: (F, H, W), how far each pixel of the clean estimate went in the run before, if it is known.

    auto_window: the noise ratios b / a between which it looks, if the user does not say; lead: how many steps before
    the first of them it has to have seen; of_sample: whether it looks at the noisy sample too, and not at D alone.
    """

    auto_window: tuple[float, float]
    lead = 1
    of_sample = False

    def __init__(self, options: AscedOptions, travel: torch.Tensor | None):
        self.options = options
        self.travel = travel
        self.peak: torch.Tensor | None = None
        self.onset: torch.Tensor | None = None

    def accompany(self, change: torch.Tensor) -> None:
        """Told how far D went between every two steps, the largest channel (F, H, W): before the window too, and after
        the steps were observed."""

    @abstractmethod
    def observe(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> None:
        """Compare the estimates of two steps that follow each other. valid: (F, H, W) bool, the pixels that count."""

    @abstractmethod
    def change_limit(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> torch.Tensor | None:
        """The largest change of D between the two steps that is not abnormal, (F,), for score clipping; None: any."""

    def findings(self, frames_per_sample: int = 1) -> Findings | None:
        """The regions of the window so far; None if nothing could be compared."""
        if self.peak is None:
            return None
        abnormal = self.onset > NEVER
        suspected = bool(abnormal.any())
        regions = keep_regions(abnormal, self.options) if suspected else abnormal
        return Findings(regions, self.peak, self.onset, suspected)


def keep_regions(abnormal: torch.Tensor, options: AscedOptions) -> torch.Tensor:
    """Of the abnormal pixels (F, H, W), those in regions of credible area and width."""
    height, width = abnormal.shape[-2:]
    area = height * width
    min_width = pixels(options.min_width, min(height, width), 1) | 1  # odd, so that the eroding square has a centre
    return filter_regions(abnormal, options.min_area * area, options.max_area * area, min_width)
