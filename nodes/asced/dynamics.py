"""The pack's own detector: bursts that freeze, and regions that still move when the rest of the image has settled.

ASCED (section 3.1) describes an artifact as acceleration of the score followed by deceleration; its rule tests the
speed alone and takes every fast change for an artifact. Here, with s = ln(b / a), the position in the schedule that all
models share, and V_t = (D_t - D_(t-1)) / |s_t - s_(t-1)|, everything compared within one frame at one step:

burst     |s_t - s_(t-1)| * |V_t - (V_(t-1) + V_(t+1)) / 2| in the pixel's largest channel, minus its median over the
          frame, in units of the largest of: its MAD; a tenth of the largest MAD so far, as a settled frame has hardly
          any; and a part of the step's motion (the median of |D_t - D_(t-1)|), since where much moves, it moves
          unevenly. Medians and MAD are those of the active pixels: the ones that have come 0.7 times as far as the 0.8
          quantile since the run began, at least three tenths of all. An even background, which never moves, would
          make everything else an outlier. And a burst has to be 4 times as strong as the frame's strongest one at
          the calmest fifth of its steps: in some pictures large parts decide themselves at every step.
straggler |D_t - D_u| / |s_t - s_u| in the largest channel, u being a step of 1.3 times the noise ratio or more, in
          units of the larger of: 4 times its own 0.85 quantile, as late detail has a heavy tail; and a twentieth of the
          largest median so far. It counts below a noise ratio of 3.2.

Both are divided by the value at which they are called abnormal, so that 1 is the limit. The constants were chosen on
the develop split of tests/exact/trap_families.py (exact denoisers of shapes, CIFAR-10 and Fashion-MNIST, and the demo
model), so that traps are found and few clean runs are flagged; `dev.py bench detection` reports on the held-out split
and other images.
"""

import functools
import math
from dataclasses import dataclass

import torch

from ...kernels.regions import close_square, grow_from, open_square
from ...kernels.robust_threshold import NORMAL_CONSISTENCY, median_and_mad, robust_threshold, sample_quantile
from ...kernels.score_dynamics import bend_map, change_maps, change_speed
from ..latents import pixels
from .detector import NEVER, Detector, Findings, keep_regions
from .estimate import Estimate
from .options import AscedOptions
from .waiting import how_many_together, joined, on_device, times

BURST_LIMIT = 10.0
BURST_MAD_FLOOR = 0.1
BURST_MOTION = 0.18
ACTIVE_TRAVEL, ACTIVE_QUANTILE, ACTIVE_SHARE = 0.7, 0.8, 0.3
BURST_OVER_USUAL, USUAL_QUANTILE, FEW_STEPS = 4.0, 0.2, 4
STRAGGLER_LIMIT = 2.3
STRAGGLER_TAIL, STRAGGLER_QUANTILE = 4.0, 0.85
STRAGGLER_FLOOR = 0.05
STRAGGLER_SPAN = math.log(1.3)
STRAGGLER_RATIO = 3.2

WEAK = 0.5
"""Hysteresis: a region reaches out to the pixels whose score is above this share of the limit."""

THINNEST = 2
"""Lines of one latent pixel are no region: edges that sharpen look like that."""

GAP = 0.02
"""Holes and bays of a region up to twice as wide, of the shorter side, belong to it: there the artifact happens to be what
was drawn anyway. On the develop split pixel F1 rises from 0.950 to 0.955 at amplitude 0.4."""

LEAST_STEP = 0.09
"""Estimates closer than this in ln(b / a) are compared as one step, so that 200 steps show what 25 steps show."""


MOST_MOVES = 255
"""So many moves are told apart by when they began. From b / a 1e4 to 1e-4 there is room for 205."""


@dataclass(frozen=True)
class Move:
    """A change of the clean estimate D (F, C, H, W) over a step: from, to; ln(b / a) where it began and ended; how far each pixel
    had come before it, (F, H, W), if that is known."""

    start: torch.Tensor
    end: torch.Tensor
    began: float
    ended: float
    travel: torch.Tensor | None

    @property
    def length(self) -> float:
        return self.began - self.ended

    def velocity(self) -> torch.Tensor:
        """V_t (F, C, H, W). Taken anew where it is asked for: the estimates are there anyway, and it would be two more."""
        return (self.end - self.start) / self.length


class DynamicsDetector(Detector):
    """See the module. State: the estimates of the moves that wait (waiting.py), up to four more, one at half precision and the
    running maps, whatever the number of steps. The onset of a pixel is where its strongest burst began."""

    auto_window = (8.0, 1.6)
    lead = 2
    weak = WEAK

    def __init__(
        self, options: AscedOptions, sensitivity: float, shorter_side: int, travel: torch.Tensor | None = None
    ):
        super().__init__(options, travel)
        self.sensitivity = sensitivity
        self.thinnest = max(THINNEST, pixels(options.min_width, shorter_side)) if options.min_width > 0 else 1
        self.gap = pixels(GAP, shorter_side, 1)
        self.newest: tuple[float, torch.Tensor] | None = None
        self.past: list[tuple[float, torch.Tensor]] = []
        self.moves: list[Move] = []
        self.judged = self.unseen = 0
        self.valid: torch.Tensor | None = None
        self.straggler: torch.Tensor | None = None
        self.burst: torch.Tensor | None = None
        self.began: list[float] = []
        self.burst_move: torch.Tensor | None = None
        self.before_burst: torch.Tensor | None = None
        self.burst_tops: list[torch.Tensor] = []
        self.largest_mad: torch.Tensor | None = None
        self.largest_motion: torch.Tensor | None = None

    def accompany(self, change: torch.Tensor) -> None:
        """Add up how far each pixel goes."""
        self.travel = change if self.travel is None else self.travel + change

    def observe(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> None:
        if self.newest is None and math.isfinite(previous.position):
            self.newest = (previous.position, previous.denoised.float())
            self.past = [self.newest]
        if self.newest is None or not math.isfinite(current.position):
            return
        position, denoised = self.newest
        if position - current.position < LEAST_STEP:
            return
        self.valid = valid
        self.newest = (current.position, current.denoised.float())
        self.moves.append(Move(denoised, self.newest[1], position, current.position, self.travel))
        self.unseen += 1
        if self.unseen >= how_many_together(current.denoised):
            self.judge()

    def judge(self, last: bool = False) -> None:
        """Judge the moves that wait. The newest has to wait for the one after it, unless it is the last."""
        velocities = [move.velocity() for move in self.moves]
        if self.unseen:
            new, ends = self.moves[-self.unseen :], joined([move.end for move in self.moves[-self.unseen :]])
            self.gather(joined(velocities[-self.unseen :]), ends, new)
            self._stragglers(ends, new)
            self.unseen = 0
        until = len(self.moves) - (0 if last else 1)
        if len(self.moves) > 1 and self.judged < until:
            self._bursts(velocities, self.judged, until)
        self.moves = [] if last else self.moves[-2:]
        self.judged = max(0, len(self.moves) - 1)

    def gather(self, velocity: torch.Tensor, ends: torch.Tensor, moves: list[Move]) -> None:
        """For detectors that look at more: told of every move, V_t and where it led, both (moves x F, C, H, W)."""

    def change_limit(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> torch.Tensor | None:
        """As published, without blur: this detector judges bends of the path and has no limit for one change alone."""
        change = change_speed(current.denoised, previous.denoised, 0.0)
        return robust_threshold(change, 3.0 / self.sensitivity, None if valid is None else valid[:, None])

    def findings(self, frames_per_sample: int = 1) -> Findings | None:
        self.conclude()
        if self.peak is None:
            return None
        regions = self.peak > 1.0
        suspected = bool(regions.any())
        if suspected:
            weak = open_square(self.peak > self.weak, self.thinnest)
            regions = grow_from(support_in_time(regions, frames_per_sample), weak)
            regions = keep_regions(close_square(regions, self.gap), self.options)
        return Findings(regions, self.peak, self.onset, suspected, before=self.before_burst)

    def conclude(self) -> None:
        """The window is over: judge its last change, known from one side only, and bring bursts and stragglers together."""
        last = self.moves[-1] if self.moves else None
        self.judge(last=True)
        scores = [] if self.burst is None else [self.burst / self._usual_burst()]
        scores += [] if self.straggler is None else [self.straggler]
        if scores:
            self.peak = self.sensitivity * functools.reduce(torch.maximum, scores)
            self.onset = torch.where(self.peak > WEAK, math.exp(last.began) if self.burst is None else self.burst_at(), NEVER)

    def burst_at(self) -> torch.Tensor:
        """The noise ratio b / a at which each pixel's strongest burst began, (F, H, W); told by its number, which takes a byte."""
        return on_device(self.began, self.burst_move.device)[self.burst_move.long()]

    def _of_all(self, steps: int) -> torch.Tensor | None:
        """The pixels that count, for the frames of so many steps, (steps x F, H, W) bool; None for all."""
        return self.valid if self.valid is None or steps == 1 else self.valid.repeat(steps, 1, 1)

    def _bursts(self, velocities: list[torch.Tensor], first: int, until: int) -> None:
        """Judge the moves from `first` on, `until` excluded, against those before and after them."""
        moves = self.moves[first:until]
        steps, newest = len(moves), len(velocities) - 1
        before = joined([velocities[i - 1 if i else 1] for i in range(first, until)])
        after = joined([velocities[i + 1 if i < newest else i - 1] for i in range(first, until)])
        velocity = joined(velocities[first:until])
        lengths = [move.length for move in moves]
        bend = times(bend_map(velocity, before, after), lengths)
        travels = [move.travel for move in self.moves[first + 1 : until + 1]]
        travels += [self.travel] * (steps - len(travels))
        active = self._active(travels)
        median, mad = median_and_mad(bend, active)
        mad = NORMAL_CONSISTENCY * mad
        largest_mad, self.largest_mad = running_largest(mad, self.largest_mad, steps)
        motion = times(median_and_mad(velocity.abs_().amax(dim=1), active)[0], lengths)
        unit = torch.maximum(BURST_MAD_FLOOR * largest_mad, BURST_MOTION * motion)
        score = scaled(bend - median[:, None, None], BURST_LIMIT * torch.maximum(unit, mad))
        if self.valid is not None:
            score = score.masked_fill(~self._of_all(steps), 0.0)
        self.burst_tops += score.flatten(1).amax(dim=1).chunk(steps)
        for move, of_move in zip(moves, score.chunk(steps)):
            self._take_burst(of_move, move)

    def _take_burst(self, score: torch.Tensor, move: Move) -> None:
        """Take in what a move scored, (F, H, W)."""
        if self.burst is None:
            self.burst, self.before_burst = score, move.start.half()
            self.burst_move = torch.zeros_like(score, dtype=torch.uint8)
        else:
            stronger = score > self.burst
            self.burst_move = torch.where(stronger, min(len(self.began), MOST_MOVES - 1), self.burst_move)
            self.before_burst = torch.where(stronger[:, None], move.start.half(), self.before_burst)
            self.burst = torch.maximum(self.burst, score)
        if len(self.began) < MOST_MOVES:
            self.began.append(math.exp(move.began))

    def _usual_burst(self) -> torch.Tensor:
        """What a burst of each frame has to exceed, (F, 1, 1): 1, or more where all its steps have strong ones."""
        tops = torch.stack(self.burst_tops)
        if len(tops) < FEW_STEPS:  # a burst shows at the steps beside its own too: no calm one may be left
            return torch.ones_like(tops[0])[:, None, None]
        usual = tops.sort(dim=0).values[int(USUAL_QUANTILE * (len(tops) - 1))]
        return (BURST_OVER_USUAL * usual).clamp(min=1.0)[:, None, None]

    def _active(self, travels: list[torch.Tensor | None]) -> torch.Tensor | None:
        """The pixels that the bursts of some steps are compared with, (steps x F, H, W) bool; None for all.

        travels: how far each pixel had come at each of them, (F, H, W).
        """
        valid = self._of_all(len(travels))
        if travels[0] is None:
            return valid
        travel = joined(travels)
        far, some = (sample_quantile(travel, share, valid) for share in (ACTIVE_QUANTILE, 1 - ACTIVE_SHARE))
        active = travel >= torch.minimum(ACTIVE_TRAVEL * far, some)[:, None, None]
        return active if valid is None else active & valid

    def _stragglers(self, ends: torch.Tensor, moves: list[Move]) -> None:
        """Compare where each move led with the newest estimate that is far enough back; forget what is further."""
        references, rates = [], []
        for move in moves:
            self.past.append((move.ended, move.end))
            far = [i for i, (position, _) in enumerate(self.past) if position - move.ended >= STRAGGLER_SPAN - 1e-6]
            if far:
                self.past = self.past[far[-1] :]
                references.append(self.past[0][1])
                rates.append(1 / (self.past[0][0] - move.ended))
        if not references:
            return
        frames, steps = len(moves[0].end), len(references)  # a move without a reference comes before all that have one
        speed = times(change_maps(ends[-steps * frames :], joined(references))[1], rates)
        motion, self.largest_motion = running_largest(
            sample_quantile(speed, 0.5, self._of_all(steps)), self.largest_motion, steps
        )
        late = sum(move.ended <= math.log(STRAGGLER_RATIO) for move in moves[-steps:])
        if not late:
            return
        speed, motion = speed[-late * frames :], motion[-late * frames :]
        tail = STRAGGLER_TAIL * sample_quantile(speed, STRAGGLER_QUANTILE, self._of_all(late))
        score = scaled(speed, STRAGGLER_LIMIT * torch.maximum(tail, STRAGGLER_FLOOR * motion))
        score = score if late == 1 else score.unflatten(0, (late, frames)).amax(dim=0)
        if self.valid is not None:
            score = score.masked_fill(~self.valid, 0.0)
        self.straggler = score if self.straggler is None else torch.maximum(self.straggler, score)


def running_largest(values: torch.Tensor, so_far: torch.Tensor | None, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each frame's values up to each step, (steps x F,), and up to the last one, (F,), which `so_far` is of the
    steps before; None if there were none."""
    largest = values.view(steps, -1)
    if steps > 1:
        largest = largest.cummax(dim=0).values
    if so_far is not None:
        largest = torch.maximum(largest, so_far)
    return largest.flatten(), largest[-1]


def scaled(signal: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """signal (F, H, W) in units of limit (F,); 0 where the limit is 0, as nothing moved at all."""
    limit = limit[:, None, None]
    return torch.where(limit > 0, signal / limit, 0.0)


def support_in_time(strong: torch.Tensor, frames_per_sample: int) -> torch.Tensor:
    """Strong pixels of each frame and of the frames beside it in the same video: (F, H, W) bool, F = batch x time.

    A region that is strong in one frame is then followed through the next ones as long as it stays weakly visible.
    """
    if frames_per_sample == 1:
        return strong
    strong = strong.unflatten(0, (-1, frames_per_sample))
    supported = strong.clone()
    supported[:, 1:] |= strong[:, :-1]
    supported[:, :-1] |= strong[:, 1:]
    return supported.flatten(0, 1)
