"""Detectors: which pixels change abnormally between two steps of a run (ASCED, section 3.2 and released code)."""

from typing import NamedTuple

import torch

from ...kernels.regions import filter_regions
from ...kernels.robust_threshold import robust_threshold
from ...kernels.score_dynamics import change_speed
from ..latents import pixels
from .options import AscedOptions

SMALLEST_SIGNAL = 1e-3
"""Below this coefficient a the weighted score D - x / a is all rounding (flow models at sigma 1): it is not used."""


class Estimate(NamedTuple):
    """What one step of a run shows: the noisy sample, the model's clean estimate of it, and x = a * x0 + b * eps."""

    x: torch.Tensor
    denoised: torch.Tensor
    a: float
    b: float


class CleanEstimateDetector:
    """The rule of the released code: a pixel is abnormal where d_t = blur(|D_t - D_(t-1)|) is an outlier.

    Threshold: median + k * 1.4826 * MAD over all pixels and channels of one frame, k = 3 as published. A pixel is
    abnormal if its largest channel exceeds it. Departures: raw floats instead of 8-bit images, no blur across the
    channels, and entries outside `valid` (an inpainting mask) do not count towards median and MAD.
    """

    def __init__(self, k: float, blur: float):
        self.k = k
        self.blur = blur

    def change(self, previous: Estimate, current: Estimate) -> torch.Tensor | None:
        """Smoothed change between two estimates, (F, C, H, W) float32, or None where it cannot be told."""
        return change_speed(current.denoised, previous.denoised, self.blur)

    def threshold(self, change: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Threshold of each frame, (F,), from its own change (F, C, H, W). To be asked once for each step."""
        return robust_threshold(change, self.k, None if valid is None else valid[:, None])

    def judge(
        self, previous: Estimate, current: Estimate, valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Abnormal pixels of each frame, (F, H, W) bool, and the threshold they exceed, (F,).

        A pixel whose value is NaN is not abnormal. None: the step tells nothing.
        """
        change = self.change(previous, current)
        if change is None:
            return None
        threshold = self.threshold(change, valid)
        abnormal = change.amax(dim=1) > threshold[:, None, None]
        return (abnormal if valid is None else abnormal & valid), threshold


class WeightedScoreDetector(CleanEstimateDetector):
    """The rule of the paper (Eq. 4): |change of w(t) * s(x_t, t)| > tau, with w * s = D - x / a.

    tau = max(MAD of the change, mean magnitude in the bank). Departures, each because the printed form cannot be used
    as it stands: the MAD is scaled to a standard deviation and by k, since one bare MAD flags half of all pixels; the
    bank holds the changes of the window so far, since against the scores themselves, whose size is that of the noise,
    nothing is ever abnormal; and the change is smoothed as in the released code, since in stochastic samplers most of
    it is fresh noise.
    """

    def __init__(self, k: float, blur: float):
        super().__init__(k, blur)
        self.bank_sum = 0.0
        self.bank_count = 0

    def change(self, previous: Estimate, current: Estimate) -> torch.Tensor | None:
        if min(previous.a, current.a) < SMALLEST_SIGNAL:
            return None
        scores = [estimate.denoised.float() - estimate.x.float() / estimate.a for estimate in (previous, current)]
        return change_speed(scores[1], scores[0], self.blur)

    def threshold(self, change: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        weight = torch.ones_like(change) if valid is None else valid[:, None].expand_as(change).float()
        self.bank_sum = self.bank_sum + (change * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
        self.bank_count += 1
        return torch.maximum(super().threshold(change, valid), self.bank_sum / self.bank_count)


DETECTOR_CLASSES = {"clean estimate": CleanEstimateDetector, "weighted score": WeightedScoreDetector}


def make_detector(options: AscedOptions, k: float, shorter_side: int) -> CleanEstimateDetector:
    """The detector chosen in the options, its blur scaled to the latent; one for each run, since it may keep a bank."""
    return DETECTOR_CLASSES[options.detector](k, blur_sigma(options, shorter_side))


def blur_sigma(options: AscedOptions, shorter_side: int) -> float:
    """Standard deviation of the blur in latent pixels: at least one pixel, unless it is switched off with 0."""
    return max(1.0, options.blur * shorter_side) if options.blur > 0 else 0.0


def keep_regions(abnormal: torch.Tensor, options: AscedOptions) -> torch.Tensor:
    """Of the pixels abnormal at any step of the window, (F, H, W), those in regions of credible area and width."""
    height, width = abnormal.shape[-2:]
    area = height * width
    min_width = pixels(options.min_width, min(height, width), 1) | 1  # odd, so that the eroding square has a centre
    return filter_regions(abnormal, options.min_area * area, options.max_area * area, min_width)
