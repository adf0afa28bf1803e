"""What the guard sees of one run: compares clean estimates inside the window, decides once a round, repairs."""

from collections import deque

import torch

from ..latents import FrameLayout
from .corrector import UNIT_GAMMA, clip_change, draw_noise_seed, repair_mask, score_clipping, state_replacement, targeted
from .detector import Estimate, keep_regions, make_detector
from .options import GuardSettings
from .report import RunRecord

SAME_STEP = 1e-4
"""Two noise ratios closer than this, relatively, are the same step (an adaptive solver reports rejected ones)."""


class Watch:
    """Watches one run of a sampler, step by step, as frames (F, C, H, W).

    Args:
        settings: the guard's settings.
        record: where everything that is found, done and measured goes.
        region: (F, H, W) bool, where repair is allowed; None for everywhere.
        valid: (F, H, W) bool, where the sampler changes the latent at all (inpainting); None for everywhere.
        seed: the run's own seed.
    """

    def __init__(
        self, settings: GuardSettings, record: RunRecord, region: torch.Tensor | None, valid: torch.Tensor | None, seed: int
    ):
        self.settings = settings
        self.record = record
        self.layout: FrameLayout = record.layout
        self.allowed = region if valid is None else valid if region is None else region & valid
        self.valid = valid
        self.seed = seed
        self.done = False
        self.decided = False
        self.round = 0
        self.previous: Estimate | None = None
        self.window = record.window
        self._begin_round()

    def _begin_round(self) -> None:
        options = self.settings.options
        self.detector = make_detector(options, self.settings.k, min(self.layout.size))
        self.abnormal: torch.Tensor | None = None
        self.before_window: torch.Tensor | None = None
        self.clipped: torch.Tensor | None = None
        self.recent: deque[torch.Tensor] = deque(maxlen=options.reverse_step)

    def give_up(self, reason: str) -> None:
        """Stop watching this run and say why in the report."""
        self.done = True
        self.record.refuse(reason)

    def forget(self) -> None:
        """Do not compare the next estimate with the last one: the sample was replaced in between."""
        self.previous = None

    def look(self, estimate: Estimate, steps_left: int) -> torch.Tensor | None:
        """Look at one step; gives the repaired sampler tensor if the run is to be restarted from it, else None.

        Args:
            estimate: x and clean estimate as the sampler has them, and the step's coefficients.
            steps_left: steps of the schedule that begin after this one, the last sigma included.
        """
        now = estimate._replace(x=self.layout.frames(estimate.x), denoised=self.layout.frames(estimate.denoised))
        ratio = now.b / now.a if now.a > 0 else float("inf")
        previous, self.previous = self.previous, now
        if previous is not None:
            if abs(previous.b * now.a - now.b * previous.a) <= SAME_STEP * now.b * previous.a:
                return None
            self.record.add_speed(ratio, (now.denoised.float() - previous.denoised.float()).abs().mean(dim=1))
        if self.decided or ratio > self.record.ratios[self.window.detect_from] * (1 + SAME_STEP):
            return None
        self._compare(previous, now)
        if ratio > self.record.ratios[self.window.correct_at] * (1 + SAME_STEP):
            return None
        repaired = self._decide(now, steps_left)
        return None if repaired is None else self.layout.with_frames(estimate.x, repaired)

    def _compare(self, previous: Estimate | None, now: Estimate) -> None:
        """Take one estimate of the window into account."""
        if self.before_window is None:
            self.before_window = self.clipped = now.denoised.float()
            self.abnormal = torch.zeros_like(now.denoised[:, 0], dtype=torch.bool)
        elif previous is not None:
            judged = self.detector.judge(previous, now, self.valid)
            limit = torch.full_like(now.denoised[:, 0, 0, 0], torch.inf, dtype=torch.float32)
            if judged is not None:
                abnormal, limit = judged
                self.abnormal = self.abnormal | abnormal
            if self.settings.options.correction == "score clipping":
                self.clipped = clip_change(self.clipped, previous, now, limit)
        self.recent.append(now.denoised)

    def _decide(self, now: Estimate, steps_left: int) -> torch.Tensor | None:
        """End the round: record the regions and, if there is something to repair, give the repaired frames."""
        self.decided = True
        options = self.settings.options
        regions = keep_regions(self.abnormal, options)
        self.record.add_regions(regions)
        if self.settings.mode == "detect only":
            return None
        mask = repair_mask(regions, self.allowed, options)
        if not bool(mask.any()):
            return None
        if steps_left < 2:
            self.record.note("Regions were found too late in the run to be repaired.")
            return None
        repaired = self._repair(now, mask)
        self.record.add_repair(mask)
        self._plan_next_round()
        return repaired

    def _repair(self, now: Estimate, mask: torch.Tensor) -> torch.Tensor:
        options = self.settings.options
        seed = draw_noise_seed(self.seed, options.noise_seed, self.round)
        if options.correction == "state replacement":
            return state_replacement(now, self.before_window, mask, seed)
        if options.correction == "score clipping":
            return score_clipping(now, self.clipped, mask)
        return targeted(now, self.recent[0].float(), mask, UNIT_GAMMA * self.settings.strength, seed)

    def _plan_next_round(self) -> None:
        """Watch the steps that follow the repair if another round is wanted and two steps remain after it."""
        self.round += 1
        following = self.window.following(len(self.record.ratios))
        if self.round < self.settings.options.rounds and following is not None:
            self.window, self.decided = following, False
            self._begin_round()
