"""The estimate of a trained predictor of where samples lie."""

from collections.abc import Callable

import torch

from .answer import Answer
from .energy import Disturbance, EnergyEstimator
from .levels import Step
from .posterior import Measured, Posterior, averaged_terms


class NetworkEstimator:
    """p(level | u) is the network's; of its surplus and that of the energies (energy.py) the larger counts.

    Of samples whose answers were guided, by a scale or another patch, the energies' surplus alone counts: the network knows samples
    as the model draws them without, and takes what guidance does to one for noise.

    Args:
        judge: u (B, ...) -> logits (B, K).
        levels: (K,) log-SNR of the classes.
        guided: whether the first answer of the run will be, as far as that is known: a run may begin in the middle of another.
    """

    def __init__(
        self, judge: Callable[[torch.Tensor], torch.Tensor], levels: torch.Tensor, energy: EnergyEstimator, guided: bool = False
    ):
        self.judge, self.levels, self.energy = judge, levels, energy
        self.terms: torch.Tensor | None = None
        self.guided: bool | torch.Tensor = guided
        self._known: tuple[torch.Tensor, Measured] | None = None

    def _told(self, u: torch.Tensor, step: Step) -> Measured:
        """What the network says by itself, which it is asked once a sample."""
        if self._known is None or self._known[0] is not u:
            gamma = self.judge(u).float().nan_to_num().softmax(dim=1)
            if self.terms is None:
                self.terms = averaged_terms(self.levels.to(u.device)[None])
            posterior = Posterior.of(self.levels.to(u.device).expand(len(u), -1), gamma, self.terms)
            surplus = posterior.surplus(step.level)
            self._known = (u, Measured(posterior, surplus, torch.ones_like(surplus)))
        return self._known[1]

    def _beside(self, u: torch.Tensor, step: Step, found: Disturbance | None) -> Measured:
        """What the network says, beside what the energies found."""
        told = self._told(u, step)
        known = torch.zeros_like(told.surplus) if found is None else found.surplus
        surplus = torch.maximum(told.surplus, known)
        if self.guided is not False:
            surplus = known if self.guided is True else torch.where(self.guided, known, surplus)
        return Measured(told.posterior, surplus, told.kept if found is None else found.kept)

    def before(self, u: torch.Tensor, step: Step) -> Measured:
        """What is known before the model is asked."""
        return self._beside(u, step, self.energy.before(u, step))

    def after(self, u: torch.Tensor, step: Step, anchor: torch.Tensor) -> Measured:
        """The same: the network needs no estimate of the model's."""
        return self.before(u, step)

    def keep(self, answer: Answer) -> None:
        if answer.guided is not None and self.guided is not True:  # a sample that was guided once stays so
            self.guided = answer.guided if self.guided is False else self.guided | answer.guided
        self._known = None
        self.energy.keep(answer)
