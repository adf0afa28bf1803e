"""The published detectors: which pixels change abnormally between two steps (ASCED, section 3.2 and released code)."""

import torch

from ...kernels.robust_threshold import robust_threshold
from ...kernels.score_dynamics import change_speed
from .detector import Detector
from .estimate import Estimate
from .options import AscedOptions

SMALLEST_SIGNAL = 1e-3
"""Below this coefficient a the weighted score D - x / a is all rounding (flow models at sigma 1): it is not used."""

PUBLISHED_K = 3.0
"""Robust standard deviations above the median that a change has to exceed to be abnormal, at sensitivity 1."""


def blur_sigma(options: AscedOptions, shorter_side: int) -> float:
    """Standard deviation of the blur in latent pixels: at least one pixel, unless it is switched off with 0."""
    return max(1.0, options.blur * shorter_side) if options.blur > 0 else 0.0


class CleanEstimateDetector(Detector):
    """The rule of the released code: a pixel is abnormal where d_t = blur(|D_t - D_(t-1)|) is an outlier.

    Threshold: median + k * 1.4826 * MAD over all pixels and channels of one frame, k = 3 as published. A pixel is
    abnormal if its largest channel exceeds it. Departures: raw floats instead of 8-bit images, no blur across the
    channels, and entries outside `valid` (an inpainting mask) do not count towards median and MAD.
    """

    auto_window = (6.0, 3.1)

    def __init__(
        self, options: AscedOptions, sensitivity: float, shorter_side: int, travel: torch.Tensor | None = None
    ):
        super().__init__(options, travel)
        self.k = PUBLISHED_K / sensitivity
        self.blur = blur_sigma(options, shorter_side)
        self.limit: torch.Tensor | None = None

    def observe(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> None:
        judged = self.judge(previous, current, valid)
        self.limit = None
        if judged is not None:
            abnormal, self.limit, score = judged
            self.take(score, abnormal, previous.ratio)

    def change_limit(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> torch.Tensor | None:
        return self.limit

    def change(self, previous: Estimate, current: Estimate) -> torch.Tensor | None:
        """Smoothed change between two estimates, (F, C, H, W) float32, or None where it cannot be told."""
        return change_speed(current.denoised, previous.denoised, self.blur)

    def threshold(self, change: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Threshold of each frame, (F,), from its own change (F, C, H, W). To be asked once for each step."""
        return robust_threshold(change, self.k, None if valid is None else valid[:, None])

    def judge(
        self, previous: Estimate, current: Estimate, valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Abnormal pixels (F, H, W) bool, the threshold they exceed (F,), and the change in units of it (F, H, W).

        A pixel whose value is NaN is not abnormal. None: the step tells nothing.
        """
        change = self.change(previous, current)
        if change is None:
            return None
        threshold = self.threshold(change, valid)
        largest, limit = change.amax(dim=1), threshold[:, None, None]
        abnormal = largest > limit
        return (abnormal if valid is None else abnormal & valid), threshold, largest / limit


class WeightedScoreDetector(CleanEstimateDetector):
    """The rule of the paper (Eq. 4): |change of w(t) * s(x_t, t)| > tau, with w * s = D - x / a.

    tau = max(MAD of the change, mean magnitude in the bank). Departures, each because the printed form cannot be used
    as it stands: the MAD is scaled to a standard deviation and by k, since one bare MAD flags half of all pixels; the
    bank holds the changes of the window so far, since against the scores themselves, whose size is that of the noise,
    nothing is ever abnormal; and the change is smoothed as in the released code, since in stochastic samplers most of
    it is fresh noise.
    """

    def __init__(
        self, options: AscedOptions, sensitivity: float, shorter_side: int, travel: torch.Tensor | None = None
    ):
        super().__init__(options, sensitivity, shorter_side, travel)
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
