"""Where a run would be if nothing disturbed it."""

import torch

from .levels import Step
from .posterior import column


class Course:
    """The course of a run: the same start, and at every step DDIM's (Euler's) way towards the model's estimate D for the sampler,

        u' = sqrt(v' / v) * u + (alpha' - sqrt(v' / v) * alpha) * D.

    What lies beside it was done by something else: a disturbance, the correction of one, the noise that an ancestral sampler
    adds, the higher order of another one. The way begins at the last call that had more noise: Heun's method asks twice at
    a level, the second time anew from the step before. Two calls are kept; where neither had more noise, as when a sampler
    goes far back, the course begins again at the sample.

    Its sample is `u`, (B, ...) float32.
    """

    def __init__(self):
        self.u: torch.Tensor | None = None
        self._step: Step | None = None
        self._calls: list[tuple[Step, torch.Tensor, torch.Tensor]] = []

    def go_to(self, step: Step, u: torch.Tensor) -> None:
        """On to this step; to the first one, where it begins at u (B, ...)."""
        if self._calls and self._calls[-1][1].shape != u.shape:
            self._calls = []
        if not self._calls:
            self.u = u
        else:
            last, course, denoised = self._calls[-1]
            alpha, v = last.alpha, last.v
            if len(self._calls) == 2:  # the earlier one is let go of here: while the model is asked, one is kept
                earlier, earlier_course, earlier_denoised = self._calls.pop(0)
                falls = step.v < last.v
                alpha, v = torch.where(falls, last.alpha, earlier.alpha), torch.where(falls, last.v, earlier.v)
                falls = column(falls, u) > 0
                course, denoised = torch.where(falls, course, earlier_course), torch.where(falls, denoised, earlier_denoised)
            left = (step.v / v).sqrt()
            along = torch.addcmul(column(left, u) * course, column(step.alpha - left * alpha, u), denoised)
            self.u = torch.where(column(step.v < v, u) > 0, along, u)
        self._step = step

    def keep(self, denoised: torch.Tensor) -> None:
        """The clean estimate (B, ...) at this step, uncorrected."""
        self._calls = [*self._calls[-1:], (self._step, self.u, denoised.float())]
