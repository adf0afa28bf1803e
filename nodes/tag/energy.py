"""The training-free estimate of a sample's noise level: the energy that is left when its clean image is taken away.

All in the variance-preserving form u = alpha * x0 + sqrt(v) * eps; samples (B, C, H, W) or (B, C, T, H, W), judged each
by itself.
"""

from typing import NamedTuple

import torch

from .answer import Answer
from .course import FEWEST, Course
from .levels import LOG_SNR_RANGE, Step, alpha_and_variance
from .posterior import Measured, Posterior, beyond_chance, mean_product, mean_square, terms_of

STRICT = 17.0
"""By so many times its variance more a share of signal has to be beyond chance where a sample and its course have no noise in
common, as after the steps of a stochastic sampler. Of very few values nothing at all would then be seen: there it is left out."""

COARSE, NODES = 128, 49
"""Levels among which the likeliest is looked for, and levels around it at which an energy's posterior is kept."""


class EnergyGrid:
    """The levels among which an energy's posterior is looked for, and all that it needs of them, made once a run.

    Found on a coarse grid over all levels, kept on a fine one around the coarse level that was found, as wide as four of its
    standard deviations, sqrt(2 / n) in ln v. Tables hold what both need, since each operation is a launch on a GPU; but of
    the fine levels, which are many, no more than four terms.

    Args:
        noisiest: the lowest log-SNR that a sample can have.
        dimensions: n, how many values of a sample count.
    """

    def __init__(self, noisiest: float, dimensions: float, device: torch.device):
        self.dimensions = dimensions
        coarse = torch.linspace(noisiest, LOG_SNR_RANGE[1], COARSE, device=device)
        self.of_coarse = terms_of_energy(coarse[None])[1:]
        half = 4.0 * (2.0 / max(dimensions, 1.0)) ** 0.5 / torch.sigmoid(coarse)
        half = half.clamp_min(2.0 * (LOG_SNR_RANGE[1] - noisiest) / (COARSE - 1))
        around = torch.linspace(-1.0, 1.0, NODES, device=device)
        levels = (coarse[:, None] + half[:, None] * around).clamp(noisiest, LOG_SNR_RANGE[1])
        self.of_fine = torch.stack(terms_of_energy(levels), dim=1)

    def posterior(self, across: torch.Tensor, away: torch.Tensor) -> Posterior:
        """p(level | u) from the means of u * anchor and of (u - anchor)^2, each (B,).

        log p(u | level) = -n/2 (ln v + |u - alpha * anchor|^2 / (n v)) + const, every level equally likely before.
        """
        means = across[:, None], away[:, None]
        chosen = self.of_fine[minus_log_likelihood(*means, *self.of_coarse).argmin(dim=1)]
        levels, share, precision, log_v = chosen.unbind(1)
        unlikely = minus_log_likelihood(*means, share, precision, log_v)
        gamma = (unlikely * (-0.5 * self.dimensions)).nan_to_num(-1e30).softmax(dim=1)
        return Posterior.of(levels, gamma, terms_of(precision - share, precision, log_v))


def terms_of_energy(levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """levels, 1 / (1 + alpha), 1 / v and ln v."""
    alpha, v = alpha_and_variance(levels)
    return levels, (1.0 + alpha).reciprocal(), v.reciprocal(), v.log()


def minus_log_likelihood(across, away, share, precision, log_v) -> torch.Tensor:
    """ln v + |u - alpha * anchor|^2 / (n v) (B, K) less the mean square of the anchor, of means (B, 1) and terms (B or 1, K).

    With v = (1 - alpha) (1 + alpha) that is ln v + |u - anchor|^2 / (n v) + 2 u * anchor / (n (1 + alpha)): late in a run, where v
    is small, so is the first of them, and no digits are lost.
    """
    return torch.addcmul(torch.addcmul(log_v, away, precision), across, share, value=2.0)


class Disturbance(NamedTuple):
    """What was done to samples, each (B,).

    surplus: by how much the log-SNR has fallen, 0 or more. kept: how much of its signal a sample still has, 1 or less. Both
    beyond what chance explains.
    """

    surplus: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(
        cls, u: torch.Tensor, course: Course, step: Step, anchor: torch.Tensor, of_anchor: torch.Tensor,
        weight: torch.Tensor | None, dimensions: float,
    ) -> "Disturbance":
        """Of the run's samples u beside its course, when the part of both that is an anchor is taken away.

        The part of a sample that is the anchor is found by regression, at most the whole of it; the rest is noise. Lost is
        what the course has more of the one, beyond its leeway, up to the whole of it; surplus noise what it has less of the
        other, or less than the schedule's if that is more. Samples of very few values have shares beyond the whole by chance, and
        nothing would be seen of them: they are let have them. Chance in that is what both do not share: 1 / (2 n) in ln of the RMS of each rest, of two that correlate by r (1 - r^2) / n in
        their ratio.

        Args:
            of_anchor: (B,), its mean square. weight, dimensions: as in EnergyEstimator.
        """
        both, whole = torch.stack([u, course.u]), (step.alpha * of_anchor).clamp_min(1e-12)
        shares = mean_product(both, anchor, weight, dims=anchor.ndim) / whole
        parts = step.alpha * shares.clamp(0.0, 1.0)
        rest = torch.addcmul(both, parts.reshape(*parts.shape, *[1] * (anchor.ndim - 1)), anchor.float(), value=-1.0)
        energies = mean_square(rest, weight, dims=anchor.ndim).clamp_min(1e-12)
        common = mean_product(rest[0], rest[1], weight).square() / energies.prod(dim=0)  # r^2
        many = dimensions >= FEWEST
        had = shares[1].clamp_max(1.0) if many else shares[1]
        lost = (had - shares[0] - course.leeway).clamp_max(1.0)
        gaps = torch.stack([lost, torch.log(energies[0] / torch.maximum(energies[1], step.v)) * 0.5])
        apart = (1.0 - common).clamp_min(0.0)
        chance = torch.stack([(1.0 + (STRICT if many else 0.0) * apart) * step.v / (step.alpha * whole), apart]) / dimensions
        lost, grown = beyond_chance(gaps, chance)
        kept = 1.0 - lost.clamp_max(0.9)
        return cls(2.0 * (grown - kept.log()), kept)


class EnergyEstimator:
    """The training-free estimate: the noise that a sample has is what remains when its clean image is taken away.

    What was done to a sample is told with the estimate of the step before: a sampler makes each sample from it, so whatever
    was added on the way shows, at any noise level; it asks nothing of the model and is known before the model is asked.
    It is told beside the course of the run: a start has a little too much noise by chance, a run from pure noise begins
    without any signal, and large steps leave that behind what the model sees by then. None of it was done to the sample.
    So the surplus takes the sample for one of the step's level that was given noise or has lost signal: near pure noise, where
    all levels have nearly the same variance, only that tells how much.

    The posterior over levels takes it for a variance-preserving sample of some level, as the time-linked score needs it. There
    the model's own estimate at this step can stand for the image too: right while the noise hides details, but late in a
    run a network takes surplus noise for detail. Of the two posteriors the noisier one counts.

    Args:
        weight: which positions count, as in mean_square.
        noisiest: the lowest log-SNR of the model's schedule. Nothing has more noise than pure noise: chance in it, at the
            first step of a run, is no surplus.
    """

    def __init__(self, weight: torch.Tensor | None = None, noisiest: float = LOG_SNR_RANGE[0]):
        self.weight, self.noisiest = weight, noisiest
        self.share = 1.0 if weight is None else float(weight.float().mean())
        self.grid: EnergyGrid | None = None
        self.anchor: torch.Tensor | None = None
        self.of_anchor: torch.Tensor | None = None
        self.course = Course()
        self._step: Step | None = None
        self._before: Disturbance | None = None

    def before(self, u: torch.Tensor, level: torch.Tensor) -> Disturbance | None:
        """What is known before the model is asked; None at the first step: nothing was added yet."""
        if self._step is None:
            self._step = Step.at(level)
            self.course.go_to(self._step, u, self.weight)
            if self.anchor is not None and self.anchor.shape == u.shape:
                self._before = Disturbance.of(
                    u, self.course, self._step, self.anchor, self.of_anchor, self.weight, self._dimensions(u)
                )
        return self._before

    def _dimensions(self, u: torch.Tensor) -> float:
        return max(u[0].numel() * self.share, 1.0)

    def after(self, u: torch.Tensor, level: torch.Tensor, anchor: torch.Tensor) -> Measured:
        """The same, with the posterior over levels; the model's estimate at this step is the anchor (B, ...)."""
        before, dimensions = self.before(u, level), self._dimensions(u)
        if self.grid is None or self.grid.dimensions != dimensions:
            self.grid = EnergyGrid(self.noisiest, dimensions, u.device)
        anchors = torch.stack([anchor] if before is None else [self.anchor, anchor])
        across = mean_product(anchors, u, self.weight, dims=u.ndim).flatten()
        away = mean_square(u - anchors, self.weight, dims=u.ndim).flatten()
        posterior = self.grid.posterior(across, away)
        if before is None:
            return Measured(posterior, torch.zeros_like(level), torch.ones_like(level))
        return Measured(posterior.noisier_half(), *before)

    def keep(self, answer: Answer) -> None:
        """What the model answered at this step, before any correction: the course goes on with the estimate for the sampler, and
        the anchor stands for the image at the next step.
        """
        last, self.of_anchor = self.course.denoised, mean_square(answer.anchor, self.weight)
        change = None
        if last is not None:
            moved = mean_product(answer.denoised - last, answer.anchor, self.weight)
            change = (moved / self.of_anchor.clamp_min(1e-12)).abs()
        self.course.keep(self._step, answer.denoised, change)
        self.anchor, self._step, self._before = answer.anchor, None, None
