"""What the guard sees of one run: compares clean estimates inside the window, decides once a round, repairs, verifies."""

import functools
from collections import deque
from dataclasses import replace

import torch

from ...kernels.regions import grow_from
from ...kernels.score_dynamics import change_maps
from ..latents import FrameLayout
from .corrector import (
    UNIT_GAMMA,
    UNIT_PUSH,
    clip_change,
    draw_noise_seed,
    repair_mask,
    score_clipping,
    state_replacement,
    surroundings,
    targeted,
)
from .detector import Detector, Findings, keep_regions
from .estimate import Estimate
from .learned import LearnedDetector
from .options import AscedOptions, GuardSettings
from .published import CleanEstimateDetector, WeightedScoreDetector
from .repair import Repair
from .report import RunRecord

SAME_STEP = 1e-4
"""Two noise ratios closer than this, relatively, are the same step (an adaptive solver reports rejected ones)."""

ADAPTIVE_LEAP = 1.5
"""dpm_adaptive was seen to go from b / a 1.9 to 0.7 in one step."""


def detector_class(options: AscedOptions) -> type[Detector]:
    classes = {
        "clean estimate": CleanEstimateDetector,
        "weighted score": WeightedScoreDetector,
        "score dynamics": LearnedDetector,
    }
    return classes[options.detector]


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
        self.round = self.draws = 0
        self.of_sample = detector_class(settings.options).of_sample
        self.previous: Estimate | None = None
        self.repair: Repair | None = None
        self.earlier: list[Repair] = []
        self.sure: torch.Tensor | None = None
        self.window = record.window
        self.detector: Detector | None = None
        self._begin_round()

    def _begin_round(self) -> None:
        options = self.settings.options
        travel = None if self.detector is None else self.detector.travel
        self.detector = detector_class(options)(options, self.settings.sensitivity, min(self.layout.size), travel)
        self._forget_window()

    def _forget_window(self) -> None:
        self.entered = False
        self.before_window: torch.Tensor | None = None
        self.clipped: torch.Tensor | None = None
        self.recent: deque[torch.Tensor] = deque(maxlen=self.settings.options.reverse_step)

    def give_up(self, reason: str) -> None:
        """Stop watching this run and say why in the report."""
        self.done = True
        self.record.refuse(reason)

    def forget(self) -> None:
        """Do not compare the next estimate with the last one: the sample was replaced in between."""
        self.previous = None

    def look(self, estimate: Estimate, steps_left: int, adaptive: bool = False) -> torch.Tensor | None:
        """Look at one step; gives the repaired sampler tensor if the run is to be restarted from it, else None.

        Args:
            estimate: x and clean estimate as the sampler has them, and the step's coefficients.
            steps_left: steps of the schedule that begin after this one, the last sigma included.
            adaptive: the sampler chooses its own steps. The next one may leap over the rest of the run, so that the
                round ends a little before the planned step rather than far behind it.
        """
        now = estimate._replace(x=self.layout.frames(estimate.x), denoised=self.layout.frames(estimate.denoised))
        previous, self.previous = self.previous, now if self.of_sample else now._replace(x=None)
        if previous is not None:
            if abs(previous.b * now.a - now.b * previous.a) <= SAME_STEP * now.b * previous.a:
                return None
            mean, largest = change_maps(now.denoised, previous.denoised)
            self.record.add_speed(now.ratio, previous.position - now.position, mean)
        inside = not self.decided and now.ratio <= self.record.ratios[self.window.detect_from] * (1 + SAME_STEP)
        if inside:
            self._compare(previous, now)
        if previous is not None and not self.decided:
            self.detector.accompany(largest)
        if not inside:
            return None
        last = self.record.ratios[self.window.correct_at] * (ADAPTIVE_LEAP if adaptive else 1 + SAME_STEP)
        if now.ratio > last:
            return None
        repaired, regions, mask = self._decide(now, steps_left)
        if repaired is None:
            return None
        repaired = self.layout.with_frames(estimate.x, repaired)
        if self.repair is not None:
            self.earlier.append(replace(self.repair, x=None, denoised=None))
        self.repair = Repair(
            self.layout, estimate.x, estimate.denoised, regions & mask, mask, self.sure, now.denoised
        )
        return repaired

    def _compare(self, previous: Estimate | None, now: Estimate) -> None:
        """Take one estimate of the window into account, and keep of it what the correction will need."""
        correction = self.settings.options.correction
        if not self.entered:
            self.entered = True
            if correction == "state replacement":
                self.before_window = now.denoised.float()
            elif correction == "score clipping":
                self.clipped = now.denoised.float()
        elif previous is not None:
            self.detector.observe(previous, now, self.valid)
            if correction == "score clipping":
                limit = self.detector.change_limit(previous, now, self.valid)
                limit = torch.full_like(now.denoised[:, 0, 0, 0], torch.inf, dtype=torch.float32) if limit is None else limit
                self.clipped = clip_change(self.clipped, previous, now, limit)
        if correction == "targeted":
            self.recent.append(now.denoised)

    def _decide(self, now: Estimate, steps_left: int) -> tuple[torch.Tensor | None, ...]:
        """End the round: record the regions. Gives the repaired frames, the regions and where the frames were renoised,
        or None three times if there is nothing to repair."""
        findings, again = self._findings(now)
        repaired, mask = None, None
        if findings is not None:
            self.record.add_findings(findings)
            self.sure = findings.sure
            if findings.suspected and self.settings.mode == "correct":
                mask = repair_mask(findings.regions, self.allowed, self.settings.options)
                mask = mask if again is None else mask | again
        if mask is not None and bool(mask.any()):
            if steps_left < 2:
                self.record.note("Regions were found too late in the run to be repaired.")
            else:
                doubted = self._doubted(findings, mask)
                repaired = self._repaired(now, mask, doubted, findings.before)
                self.record.add_repair(mask, doubted)
        self._plan_next_round()
        if repaired is None:
            return None, None, None
        regions = findings.regions
        if again is not None:
            regions = functools.reduce(torch.logical_or, (again & repair.regions for repair in self._repairs()), regions)
        return repaired, regions, mask

    def _repairs(self) -> list[Repair]:
        """All repairs so far; the first round has none."""
        return self.earlier if self.repair is None else [*self.earlier, self.repair]

    def _findings(self, now: Estimate) -> tuple[Findings | None, torch.Tensor | None]:
        """What the round's detector found; in later rounds that outside of what was repaired, which moves because it was. With it
        what of the repairs fell back and is to be drawn again, (F, H, W) bool, None in the first round: their masks, which reach
        as far beyond the regions as a repair is to."""
        findings, repairs = self.detector.findings(self.layout.frames_per_sample), self._repairs()
        if not repairs:
            return findings, None
        again = functools.reduce(torch.logical_or, (repair.to_draw_again(now.denoised) for repair in repairs))
        if findings is None:  # the sample was renoised at every step, so that none could be compared
            nothing = torch.zeros(again.shape, device=again.device)
            return Findings(torch.zeros_like(again), nothing, nothing, suspected=True), again
        likely, sure = (None if marked is None else marked | again for marked in (findings.likely, findings.sure))
        repaired = functools.reduce(torch.logical_or, (repair.mask for repair in repairs))
        regions = keep_regions(findings.regions & ~repaired, self.settings.options)
        return findings._replace(regions=regions, suspected=True, likely=likely, sure=sure), again

    def _doubted(self, findings: Findings, mask: torch.Tensor) -> torch.Tensor | None:
        """The regions of a mask that are renoised from before their onset; None if the correction or the detector knows no doubt."""
        if self.settings.options.correction != "surroundings" or findings.likely is None or findings.before is None:
            return None
        return mask & ~grow_from(findings.likely, mask)

    def _repaired(
        self, now: Estimate, mask: torch.Tensor, doubted: torch.Tensor | None = None, before: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The frames (F, C, H, W) renoised inside the mask, as the chosen correction does it. before: see Findings."""
        correction, strength = self.settings.options.correction, self.settings.strength
        seed = draw_noise_seed(self.seed, self.settings.options.noise_seed, self.draws)
        self.draws += 1
        if correction == "state replacement":
            return state_replacement(now, self.before_window, mask, seed)
        if correction == "score clipping":
            return score_clipping(now, self.clipped, mask)
        if correction == "targeted":
            return targeted(now, self.recent[0].float(), mask, UNIT_GAMMA * strength, seed)
        return surroundings(now, mask, UNIT_PUSH * strength, seed, doubted, before)

    def _plan_next_round(self) -> None:
        """Watch the steps that follow if another round is wanted and two steps remain after it; else keep no more of them."""
        self.round += 1
        self.decided = True
        following = self.window.following(len(self.record.ratios))
        if self.round < self.settings.options.rounds and following is not None:
            self.window, self.decided = following, False
            self._begin_round()
        else:
            self.detector = None
            self._forget_window()
            self.record.settle()

    def judge(self, estimate: Estimate) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Judge a repair by an answer of the model to it, as the sampler has it; see Repair.

        Returns:
            None if it goes on; else x and clean estimate with some samples put back as they were before the repair.
        """
        repair = self.repair
        if not repair.verified:
            put_back = repair.verify(estimate)
            if put_back is not None:
                self.record.undo(put_back[0])
                return put_back[1:]
        if self.settings.options.correction == "surroundings":
            repair.look_back(estimate)
        else:
            repair.settled = True
        return None

    def redraw(self, x: torch.Tensor, a: float, b: float) -> torch.Tensor:
        """The sampler's tensor at the step a, b, about to be given to the model, with what fell back renoised once more."""
        repair = self.repair
        (mask, denoised), repair.falling = repair.falling, None
        repair.redraws += 1
        frames = self.layout.frames(x)
        self.record.add_redraw()
        return self.layout.with_frames(x, self._repaired(Estimate(frames, denoised, a, b), mask))

    def finish(self) -> None:
        """The run is over: what became of the repairs, by its last estimate."""
        if self.previous is not None and self.repair is not None:
            back = (repair.fallen_back(self.previous.denoised) for repair in self._repairs())
            self.record.fallen_back = functools.reduce(torch.logical_or, back)

