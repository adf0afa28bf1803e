"""Where a run would be if nothing disturbed it."""

import torch

from .levels import Step
from .posterior import column


class Course:
    """The course of a run: the same start, and at every step DDIM's (Euler's) way towards the estimate that the sampler was given,

        u' = sqrt(v' / v) * u + (alpha' - sqrt(v' / v) * alpha) * D.

    What lies beside it was done by something else: a disturbance, the noise that an ancestral sampler adds, the higher order of
    another one. Where the noise rises from one call to the next, as in samplers that step back, the signal stays as it was.

    Its sample is `u`, (B, ...) float32.
    """

    def __init__(self):
        self.u: torch.Tensor | None = None
        self._last: Step | None = None
        self._given: torch.Tensor | None = None

    def go_to(self, step: Step, u: torch.Tensor) -> None:
        """On to the next step, or to the first one, where it begins at u."""
        if self._given is None or self._given.shape != u.shape:
            self.u = u
        else:
            last = self._last
            left = torch.minimum((step.v / last.v).sqrt(), step.alpha / last.alpha)
            self.u = torch.addcmul(column(left, u) * self.u, column(step.alpha - left * last.alpha, u), self._given.float())
        self._last, self._given = step, None

    def keep(self, given: torch.Tensor) -> None:
        """The clean estimate (B, ...) that the sampler was given at this step."""
        self._given = given
