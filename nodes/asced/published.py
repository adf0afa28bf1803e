"""The published detectors: which pixels change abnormally between two steps (ASCED, section 3.2 and released code)."""

import math
from typing import NamedTuple

import torch

from ...kernels.robust_threshold import robust_threshold
from ...kernels.score_dynamics import change_speed
from .detector import NEVER, Detector, Findings
from .estimate import Estimate
from .options import AscedOptions
from .waiting import how_many_together

SMALLEST_SIGNAL = 1e-3
"""Below this coefficient a the weighted score D - x / a is all rounding (flow models at sigma 1): it is not used."""

PUBLISHED_K = 3.0
"""Robust standard deviations above the median that a change has to exceed to be abnormal, at sensitivity 1."""


def blur_sigma(options: AscedOptions, shorter_side: int) -> float:
    """Standard deviation of the blur in latent pixels: at least one pixel, unless it is switched off with 0."""
    return max(1.0, options.blur * shorter_side) if options.blur > 0 else 0.0


class Compared(NamedTuple):
    """Of one step: its clean estimate D, what is compared of it (F, C, H, W), None where it cannot be told, and b / a."""

    denoised: torch.Tensor
    values: torch.Tensor | None
    ratio: float


class CleanEstimateDetector(Detector):
    """The rule of the released code: a pixel is abnormal where d_t = blur(|D_t - D_(t-1)|) is an outlier.

    Threshold: median + k * 1.4826 * MAD over all pixels and channels of one frame, k = 3 as published. A pixel is
    abnormal if its largest channel exceeds it. Departures: raw floats instead of 8-bit images, no blur across the
    channels, and entries outside `valid` (an inpainting mask) do not count towards median and MAD.

    Changes wait until a few can be judged together (waiting.py).
    """

    auto_window = (6.0, 3.1)
    one_by_one = False

    def __init__(
        self, options: AscedOptions, sensitivity: float, shorter_side: int, travel: torch.Tensor | None = None
    ):
        super().__init__(options, travel)
        self.k = PUBLISHED_K / sensitivity
        self.blur = blur_sigma(options, shorter_side)
        self.limit: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.waiting: list[Compared] = []

    def observe(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> None:
        self.valid, self.limit = valid, None
        if not self.waiting or self.waiting[-1].denoised is not previous.denoised:
            self.judge()
            self.waiting = [Compared(previous.denoised, self.quantity(previous), previous.ratio)]
        self.waiting.append(Compared(current.denoised, self.quantity(current), current.ratio))
        if self.one_by_one or len(self.waiting) > how_many_together(current.denoised):
            self.judge()

    def change_limit(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> torch.Tensor | None:
        self.judge()
        return self.limit

    def findings(self, frames_per_sample: int = 1) -> Findings | None:
        self.judge()
        return super().findings(frames_per_sample)

    def take(self, score: torch.Tensor, began: torch.Tensor) -> None:
        """Take in a comparison, both (F, H, W): score, 1 = the limit; where it makes a pixel abnormal the noise ratio at which
        that began, else NEVER. The noise ratio falls, so that of two beginnings the larger is the earlier one: measured on a
        CPU, 2.4 us a frame of 128 x 128 instead of 23 for keeping the first."""
        self.peak = score if self.peak is None else torch.maximum(self.peak, score)
        self.onset = began if self.onset is None else torch.maximum(self.onset, began)

    def quantity(self, estimate: Estimate) -> torch.Tensor | None:
        """What is compared between steps, (F, C, H, W), or None where it cannot be told."""
        return estimate.denoised

    def threshold(self, change: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Threshold of each frame, (F,), from its own change (F, C, H, W). To be asked once for each step."""
        return robust_threshold(change, self.k, None if valid is None else valid[:, None])

    def judge(self) -> None:
        """Judge all changes that wait. Score: the largest channel in units of the threshold. NaN is not abnormal."""
        told, self.waiting = [x for x in self.waiting if x.values is not None], self.waiting[-1:]
        steps = len(told) - 1
        if steps < 1:
            return
        valid = self.valid if self.valid is None or steps == 1 else self.valid.repeat(steps, 1, 1)
        change = change_speed(*after_and_before([x.values for x in told]), self.blur)
        threshold, largest = self.threshold(change, valid), change.amax(dim=1)
        limit = threshold[:, None, None]
        began = torch.gt(largest, limit, out=torch.empty_like(largest))
        if valid is not None:
            began *= valid
        for before, abnormal in zip(told, began.chunk(steps)):
            to_onset(abnormal, before.ratio)
        score = largest.div_(limit)
        self.take(*(x if steps == 1 else x.unflatten(0, (steps, -1)).amax(dim=0) for x in (score, began)))
        self.limit = threshold.chunk(steps)[-1]


def to_onset(abnormal: torch.Tensor, ratio: float) -> None:
    """Where `abnormal` is 1 it becomes the noise ratio, which may be inf; where it is 0 it is NEVER. Measured on a CPU with 131,072
    pixels: comparing into floats and this 40 us, comparing into bool and torch.where 630."""
    abnormal *= ratio
    if math.isinf(ratio):
        abnormal.nan_to_num_(nan=NEVER, posinf=ratio)


def after_and_before(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the values (F, C, H, W) of several steps all but the first and all but the last, each as one batch."""
    if len(values) == 2:
        return values[1], values[0]
    joined, frames = torch.cat(values), len(values[0])
    return joined[frames:], joined[:-frames]


class WeightedScoreDetector(CleanEstimateDetector):
    """The rule of the paper (Eq. 4): |change of w(t) * s(x_t, t)| > tau, with w * s = D - x / a.

    tau = max(MAD of the change, mean magnitude in the bank). Departures, each because the printed form cannot be used
    as it stands: the MAD is scaled to a standard deviation and by k, since one bare MAD flags half of all pixels; the
    bank holds the changes of the window so far, since against the scores themselves, whose size is that of the noise,
    nothing is ever abnormal; and the change is smoothed as in the released code, since in stochastic samplers most of
    it is fresh noise. So each change is judged after the one before it, by itself.
    """

    one_by_one = True
    of_sample = True

    def __init__(
        self, options: AscedOptions, sensitivity: float, shorter_side: int, travel: torch.Tensor | None = None
    ):
        super().__init__(options, sensitivity, shorter_side, travel)
        self.bank_sum = 0.0
        self.bank_count = 0

    def quantity(self, estimate: Estimate) -> torch.Tensor | None:
        if estimate.a < SMALLEST_SIGNAL:
            return None
        return estimate.denoised.float() - estimate.x.float() / estimate.a

    def threshold(self, change: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        weight = torch.ones_like(change) if valid is None else valid[:, None].expand_as(change).float()
        self.bank_sum = self.bank_sum + (change * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
        self.bank_count += 1
        return torch.maximum(super().threshold(change, valid), self.bank_sum / self.bank_count)
