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
        self._here: torch.Tensor | None = None
        self._calls: list[tuple[torch.Tensor, torch.Tensor]] = []  # alpha and v (2, B), u and D (2, B, ...); the newest last

    def go_to(self, step: Step, u: torch.Tensor) -> None:
        """On to this step; to the first one, where it begins at u (B, ...)."""
        self._here = torch.stack([step.alpha, step.v])
        if not self._calls or self._calls[-1][1].shape[1:] != u.shape:
            self._calls, self.u = [], u
            return
        terms, pair = self._calls[-1]
        if len(self._calls) == 2:
            falls, (earlier_terms, earlier_pair) = step.v < terms[1], self._calls[0]
            terms, pair = torch.where(falls, terms, earlier_terms), torch.where(column(falls, u) > 0, pair, earlier_pair)
        (alpha, v), (course, denoised) = terms, pair
        left = (step.v / v).sqrt()
        along = torch.addcmul(column(left, u) * course, column(step.alpha - left * alpha, u), denoised)
        self.u = torch.where(column(step.v < v, u) > 0, along, u)

    def keep(self, denoised: torch.Tensor) -> None:
        """The clean estimate (B, ...) at this step, uncorrected."""
        self._calls = [*self._calls[-1:], (self._here, torch.stack([self.u, denoised.float()]))]
