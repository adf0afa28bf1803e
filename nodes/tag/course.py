"""Where a run would be if nothing disturbed it."""

import torch

from .levels import Step
from .posterior import column, inner


FEWEST = 128
"""Values of a sample from which on its turns are looked at: of a point in a plane any two directions explain everything."""

SMALLEST = 1e-30
"""Keeps an energy from being divided by where it is 0."""


def beside(x: torch.Tensor, one: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
    """x (B, ...) without the part that is a sum of multiples of one or two others, sample by sample."""
    of_one = inner(one, one, weight).clamp_min(SMALLEST)
    if other is None:
        return torch.addcmul(x, column(inner(x, one, weight) / of_one, x), one, value=-1.0)
    both = torch.stack([x, other])
    both = torch.addcmul(both, column(inner(both, one, weight) / of_one, x), one, value=-1.0)  # what `one` does not tell of each
    x, other = both.unbind(0)
    across, of_other = inner(both, other, weight).unbind(0)
    return torch.addcmul(x, column(across / of_other.clamp_min(SMALLEST), x), other, value=-1.0)


class Course:
    """The course of a run: the same start, and at every step DDIM's (Euler's) way towards the model's estimate D for the sampler,

        u' = sqrt(v' / v) * u + (alpha' - sqrt(v' / v) * alpha) * D.

    What lies beside it was done by something else: a disturbance, the correction of one, the noise that an ancestral sampler
    adds. A method of higher order adds multiples of the last differences of D, its turns: whatever of the sample beside the
    course is a multiple of the last two is taken as the course's own. The way begins at the last call that had more noise: Heun's method asks twice at
    a level, the second time anew from the step before. Two calls are kept; where neither had more noise, as when a sampler
    goes far back, the course begins again at the sample.

    A method of higher order reckons with how D changes, and may have less of it in its sample than the course by about as
    much as D changed from one call to the next; at the start it may have none of it. `leeway` adds that up.

    u: the course's sample, (B, ...) float32. turn: the last difference of D, in bfloat16, for the next step. leeway: (B,), in shares of D's length. denoised: D of the last call.
    """

    def __init__(self):
        self.u: torch.Tensor | None = None
        self.leeway: torch.Tensor | None = None
        self.denoised: torch.Tensor | None = None
        self.turn: torch.Tensor | None = None
        self._calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # terms (4, B), u and D of each

    def go_to(self, step: Step, u: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """On to this step; to the first one, where it begins at u (B, ...). weight: which positions count, as in posterior.inner."""
        if self._calls and self._calls[-1][1].shape != u.shape:
            self._calls = []
        if not self._calls:
            self.u, self.leeway, self.denoised, self.turn = u, torch.ones_like(step.v), None, None
            return
        each = (-1, *[1] * (u.ndim - 1))
        terms, course, denoised = self._calls[-1]
        turn, before = None, self.turn
        if len(self._calls) == 2:  # the earlier one is let go of here: while the model is asked, one is kept
            earlier = self._calls.pop(0)
            if u[0].numel() >= FEWEST:
                turn = denoised - earlier[2]
                self.turn = turn.bfloat16()
            falls = step.v < terms[1]
            terms, falls = torch.where(falls, terms, earlier[0]), falls.reshape(each)
            course, denoised = torch.where(falls, course, earlier[1]), torch.where(falls, denoised, earlier[2])
        alpha, v, leeway, change = terms.unbind(0)
        left = (step.v / v).sqrt()
        moved = step.alpha - left * alpha
        along = torch.addcmul(column(left, u) * course, column(moved, u), denoised)
        if turn is not None:
            along = u - beside(u - along, turn, None if before is None else before.float(), weight)
        self.u = torch.where((step.v < v).reshape(each), along, u)
        self.leeway = torch.lerp(leeway, change, (moved / step.alpha).clamp_min(0.0))

    def keep(self, step: Step, denoised: torch.Tensor, change: torch.Tensor | None) -> None:
        """The clean estimate (B, ...) at this step, uncorrected, and how much it has changed, (B,): wholly at the first."""
        self.denoised = denoised.float()
        change = self.leeway if change is None else change
        self._calls = [*self._calls[-1:], (torch.stack([step.alpha, step.v, self.leeway, change]), self.u, self.denoised)]
