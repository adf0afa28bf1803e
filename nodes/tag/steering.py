"""One guided estimate: asks the model, measures, corrects. Knows nothing of ComfyUI: the model is a function."""

from collections.abc import Callable

import torch

from .alignment import (
    Ask, closed_form, relative_correction, root_mean_square, sample_level, score_correction, shift, step_omega, surplus,
)
from .energy import EnergyEstimator
from .posterior import NetworkEstimator, Posterior
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
        before = self.estimator.before(u, level)
        if not active or self.settings.strength == 0:
            denoised = ask(u, level)
            anchor, posterior = denoised.float(), None
        else:
            guide = {"relative": self._relative, "score": self._score, "shift": self._shift}[self.settings.mode]
            denoised, anchor, posterior = guide(ask, x, u, level, before)
        if posterior is None:
            posterior = self.estimator.after(u, level, anchor)
        self.estimator.keep(anchor)
        return denoised, posterior

    def _time_linked_score(self, u, denoised, level, posterior: Posterior, omega: float) -> torch.Tensor:
        if self.settings.estimate == "published gradient":
            return self.gradient(u, level, step_omega(omega, level))
        return closed_form(u, denoised, level, posterior)

    def _relative(self, ask: Ask, x, u, level, before: Posterior | None):
        """Asks the model at the level the sample really has, and corrects in proportion to the gap.

        Asking there is not in the paper: a network that is told too little noise takes the surplus for detail, and no
        correction of its estimate brings back what it then mixes up. At strength 1 and above the level is wholly the
        sample's.
        """
        asked_at = level
        if self.settings.ask_at == "sample's level" and self.may_ask_elsewhere:
            asked_at = sample_level(before, level, self.settings.strength)
        denoised = ask(u, asked_at)
        estimate = denoised.float()
        posterior = self.estimator.after(u, level, estimate)
        tls = self._time_linked_score(u, estimate, level, posterior, 1.0)
        reach = root_mean_square(estimate - x.float())
        correction = relative_correction(tls, reach, self.settings.strength, surplus(posterior, level))
        return (estimate + correction).to(denoised.dtype), estimate, posterior

    def _score(self, ask: Ask, x, u, level, before: Posterior | None):
        """The paper's score guidance, Eq. 7."""
        denoised = ask(u, level)
        estimate = denoised.float()
        posterior = self.estimator.after(u, level, estimate)
        tls = self._time_linked_score(u, estimate, level, posterior, self.settings.strength)
        reach = root_mean_square(estimate - x.float())
        correction = score_correction(tls, reach, self.settings.strength, level)
        return (estimate + correction).to(denoised.dtype), estimate, posterior

    def _shift(self, ask: Ask, x, u, level, before: Posterior | None):
        """The paper's Algorithm 1, as far as a MODEL patch can: the model's estimate at the shifted sample. The sampler
        goes on from its own x. The closed form needs an estimate first, which is one more model call.
        """
        posterior, estimate = before, None
        if self.settings.estimate == "closed form":
            estimate = ask(u, level).float()
            posterior = self.estimator.after(u, level, estimate)
        tls = self._time_linked_score(u, estimate, level, posterior, self.settings.strength)
        denoised = ask(u + shift(tls, self.settings.strength, level), level)
        return denoised, denoised.float(), posterior
