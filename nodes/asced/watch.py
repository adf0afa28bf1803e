"""What the guard sees of one run: compares clean estimates inside the window, decides once a round, repairs, verifies."""

from collections import deque
from dataclasses import dataclass

import torch

from ...kernels.fill import fill_from_surroundings
from ...kernels.regions import count_in_region, label_regions
from ...kernels.score_dynamics import change_maps
from ...kernels.seams import border_jump
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
from .detector import Detector, Findings
from .estimate import Estimate
from .learned import LearnedDetector
from .options import AscedOptions, GuardSettings
from .published import CleanEstimateDetector, WeightedScoreDetector
from .report import RunRecord

SAME_STEP = 1e-4
"""Two noise ratios closer than this, relatively, are the same step (an adaptive solver reports rejected ones)."""

ADAPTIVE_LEAP = 1.5
"""dpm_adaptive was seen to go from b / a 1.9 to 0.7 in one step."""

BETTER = 0.75
"""A repair is kept if the step across its border is below this share of what it was. On attractor traps of the develop
split (Fashion-MNIST, CIFAR-10; EPS) it halves the sound samples that are redrawn and the harm, and costs no repair."""


def detector_class(options: AscedOptions) -> type[Detector]:
    classes = {
        "clean estimate": CleanEstimateDetector,
        "weighted score": WeightedScoreDetector,
        "score dynamics": LearnedDetector,
    }
    return classes[options.detector]


@dataclass
class Repair:
    """A repair that the run was restarted with: what was there before it, and where it was renoised.

    x, denoised: the sampler's tensors (B, ...) before the repair; repaired: x after it; regions, mask: (F, H, W) bool,
    what was found and what was renoised; artifact: the frames of D before it.
    """

    x: torch.Tensor
    denoised: torch.Tensor
    repaired: torch.Tensor
    regions: torch.Tensor
    mask: torch.Tensor
    artifact: torch.Tensor
    verified: bool = False


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
        self.of_sample = detector_class(settings.options).of_sample
        self.previous: Estimate | None = None
        self.repair: Repair | None = None
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
        self.repair = Repair(estimate.x, estimate.denoised, repaired, regions & mask, mask, now.denoised)
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
        findings = self._findings(now)
        repaired, mask = None, None
        if findings is not None:
            self.record.add_findings(findings)
            if findings.suspected and self.settings.mode == "correct":
                mask = repair_mask(findings.regions, self.allowed, self.settings.options)
        if mask is not None and bool(mask.any()):
            if steps_left < 2:
                self.record.note("Regions were found too late in the run to be repaired.")
            else:
                repaired = self._repaired(now, mask)
                self.record.add_repair(mask)
        self._plan_next_round()
        return (None, None, None) if repaired is None else (repaired, findings.regions, mask)

    def _findings(self, now: Estimate) -> Findings | None:
        """What the round's detector found; in later rounds also the repaired regions that fell back."""
        findings = self.detector.findings(self.layout.frames_per_sample)
        back = self.fallen_back(now)
        if back is None or findings is None:
            return findings
        return findings._replace(regions=findings.regions | back, suspected=True)

    def _repaired(self, now: Estimate, mask: torch.Tensor) -> torch.Tensor:
        """The frames (F, C, H, W) renoised inside the mask, as the chosen correction does it."""
        correction, strength = self.settings.options.correction, self.settings.strength
        seed = draw_noise_seed(self.seed, self.settings.options.noise_seed, self.round)
        if correction == "state replacement":
            return state_replacement(now, self.before_window, mask, seed)
        if correction == "score clipping":
            return score_clipping(now, self.clipped, mask)
        if correction == "targeted":
            return targeted(now, self.recent[0].float(), mask, UNIT_GAMMA * strength, seed)
        return surroundings(now, mask, UNIT_PUSH * strength, seed)

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

    @property
    def unverified(self) -> torch.Tensor | None:
        """The repaired x that waits for the model's first answer."""
        return None if self.repair is None or self.repair.verified else self.repair.repaired

    def verify(self, estimate: Estimate) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Judge a repair by the model's first answer to it, and put back the samples for which it gained nothing.

        A sample is put back if the model draws something else in its regions, but their borders show no less clearly
        than before. One that answers with what was there before is left: it may take the next steps to escape.

        Args:
            estimate: the repaired x and the model's estimate of it, as the sampler has them.

        Returns:
            None if every sample is kept; else x and clean estimate with the samples put back as they were before the
            repair, bit for bit. The estimate needs no model call: the samples of a batch do not touch each other.
        """
        repair = self.repair
        repair.verified = True
        after = border_jump(self.layout.frames(estimate.denoised), repair.mask)
        before = torch.maximum(*(border_jump(repair.artifact, mask) for mask in (repair.mask, repair.regions)))
        frames = (-1, self.layout.frames_per_sample)
        undone = after.unflatten(0, frames).sum(1) > BETTER * before.unflatten(0, frames).sum(1)
        again = fallen_back(self.layout.frames(estimate.denoised).float(), repair.artifact.float(), repair.mask)
        undone &= ~again.flatten(1).any(dim=1).unflatten(0, frames).any(dim=1)
        if not bool(undone.any()):
            return None
        where = repair.mask & undone.repeat_interleave(self.layout.frames_per_sample)[:, None, None]
        repair.mask = repair.mask & ~where
        self.record.undo(where)

        def put_back(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return torch.where(undone.view(-1, *[1] * (new.ndim - 1)), old.to(new.dtype), new)

        return put_back(repair.x, estimate.x), put_back(repair.denoised, estimate.denoised)

    def fallen_back(self, now: Estimate) -> torch.Tensor | None:
        """Repaired regions that have become again what they were, (F, H, W) bool; None if nothing was repaired."""
        if self.repair is None:
            return None
        return fallen_back(now.denoised.float(), self.repair.artifact.float(), self.repair.mask)

    def finish(self) -> None:
        """The run is over: what became of the repairs, by its last estimate."""
        if self.previous is not None and self.repair is not None:
            self.record.fallen_back = self.fallen_back(self.previous)


def fallen_back(denoised: torch.Tensor, artifact: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The regions of a mask (F, H, W) of which more than half has come back to the artifact.

    A pixel has come back if it is less than half as far from the artifact as the artifact was from the smooth
    continuation of its surroundings. denoised, artifact: (F, C, H, W) float32.
    """
    distance = (artifact - fill_from_surroundings(artifact, mask)).square().sum(dim=1)
    back = (denoised - artifact).square().sum(dim=1) < 0.25 * distance
    labels = label_regions(mask)
    return mask & (2 * count_in_region(labels, back & mask) > count_in_region(labels, mask))
