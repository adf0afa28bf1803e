"""One guided estimate: asks the model, measures, corrects. Knows nothing of ComfyUI: the model is a function."""

from collections.abc import Callable

import torch

from .alignment import (
    closed_form, length, level_of, relative_correction, score_correction, shift, step_omega,
)
from .answer import Ask
from .energy import Disturbance, EnergyEstimator
from .levels import Step
from .network_estimator import NetworkEstimator
from .posterior import Measured, Posterior, column
from .settings import TagSettings


Gradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""u (B, ...), levels (B,), omega_t (B,) -> the published time-linked score (B, ...)."""


class Steering:
    """Temporal alignment guidance of one run, call by call.

    Args:
        estimator: at which level a sample lies.
        gradient: the published estimate of the time-linked score; None without a predictor.
    """

    def __init__(self, settings: TagSettings, estimator: EnergyEstimator | NetworkEstimator, gradient: Gradient | None = None):
        self.settings = settings
        self.estimator = estimator
        self.gradient = gradient
        self.may_ask_elsewhere = True

    def estimate(
        self, ask: Ask, x: torch.Tensor, u: torch.Tensor, level: torch.Tensor, active: bool = True
    ) -> tuple[torch.Tensor, Posterior]:
        """The clean estimate (B, ...) for the sampler, and where the sample was found to lie.

        Args:
            x: the sample in the model's own form; u: the same in variance-preserving form, fp32.
            level: (B,) log-SNR of the step.
            active: False measures only, as strength 0 does.
        """
        step = Step.at(level)
        before = self.estimator.before(u, step)
        if not active or self.settings.strength == 0:
            answer, measured, correction = ask(u, level), None, None
        else:
            guide = {"relative": self._relative, "score": self._score, "shift": self._shift}[self.settings.mode]
            answer, measured, correction = guide(ask, x, u, step, before)
        if measured is None:
            measured = self.estimator.after(u, step, answer.anchor)
        self.estimator.keep(answer)
        return corrected(answer.denoised, correction), measured.posterior

    def _time_linked_score(self, u, anchor, step: Step, measured: Measured | None, omega: float) -> torch.Tensor:
        if self.settings.estimate == "published gradient":
            return self.gradient(u, step.level, step_omega(omega, step))
        return closed_form(u, anchor, step, measured.posterior)

    def _relative(self, ask: Ask, x, u, step: Step, before: Measured | Disturbance | None):
        """Asks the model at the level the sample really has, and corrects in proportion to the gap.

        Asking there is not in the paper: a network that is told too little noise takes the surplus for detail, and no
        correction of its estimate brings back what it then mixes up. At strength 1 and above the level is wholly the
        sample's.
        """
        asked, asked_at = u, step.level
        if self.settings.ask_at == "sample's level" and self.may_ask_elsewhere and before is not None:
            surplus, kept = before.surplus, before.kept
            if self.settings.strength < 1:
                surplus, kept = self.settings.strength * surplus, kept.pow(self.settings.strength)
            asked_at, factor = level_of(step, surplus, kept)
            asked = u * column(factor, u)
        answer = ask(asked, asked_at)
        measured = self.estimator.after(u, step, answer.anchor)
        tls = self._time_linked_score(u, answer.anchor, step, measured, 1.0)
        reach = length(answer.denoised.float() - x.float())
        return answer, measured, relative_correction(tls, reach, self.settings.strength, measured.surplus)

    def _score(self, ask: Ask, x, u, step: Step, before: Measured | Disturbance | None):
        """The paper's score guidance, Eq. 7."""
        answer = ask(u, step.level)
        measured = self.estimator.after(u, step, answer.anchor)
        tls = self._time_linked_score(u, answer.anchor, step, measured, self.settings.strength)
        reach = length(answer.denoised.float() - x.float())
        return answer, measured, score_correction(tls, reach, self.settings.strength, step)

    def _shift(self, ask: Ask, x, u, step: Step, before: Measured | Disturbance | None):
        """The paper's Algorithm 1, as far as a MODEL patch can: the model's estimate at the shifted sample. The sampler
        goes on from its own x. The closed form needs an estimate first, which is one more model call.
        """
        measured, anchor = before, None
        if self.settings.estimate == "closed form":
            anchor = ask(u, step.level).anchor
            measured = self.estimator.after(u, step, anchor)
        tls = self._time_linked_score(u, anchor, step, measured, self.settings.strength)
        return ask(u + shift(tls, self.settings.strength, step), step.level), measured, None


def corrected(denoised: torch.Tensor, correction: torch.Tensor | None) -> torch.Tensor:
    """The estimate for the sampler with what guidance adds to it, (B, ...) float32."""
    return denoised if correction is None else (denoised.float() + correction).to(denoised.dtype)
