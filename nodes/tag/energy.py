"""The training-free estimate of a sample's noise level: the energy that is left when its clean image is taken away.

All in the variance-preserving form u = alpha * x0 + sqrt(v) * eps; samples (B, C, H, W) or (B, C, T, H, W), judged each
by itself.
"""

from typing import NamedTuple

import torch

from .answer import Answer
from .course import Course
from .levels import LOG_SNR_RANGE, Step, alpha_and_variance
from .posterior import Measured, Posterior, beyond_chance, mean_product, mean_square, terms_of

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
        alpha, v = alpha_and_variance(coarse[None])
        self.of_coarse = alpha, alpha.square(), v.reciprocal(), v.log()
        half = 4.0 * (2.0 / max(dimensions, 1.0)) ** 0.5 / torch.sigmoid(coarse)
        half = half.clamp_min(2.0 * (LOG_SNR_RANGE[1] - noisiest) / (COARSE - 1))
        around = torch.linspace(-1.0, 1.0, NODES, device=device)
        levels = (coarse[:, None] + half[:, None] * around).clamp(noisiest, LOG_SNR_RANGE[1])
        alpha, v = alpha_and_variance(levels)
        self.of_fine = torch.stack([levels, alpha, v.reciprocal(), v.log()], dim=1)

    def posterior(self, of_u: torch.Tensor, across: torch.Tensor, of_anchor: torch.Tensor) -> Posterior:
        """p(level | u) from the mean squares of u and of the anchor and from the mean of their product, each (B,).

        log p(u | level) = -n/2 (ln v + |u - alpha * anchor|^2 / (n v)) + const, every level equally likely before.
        """
        means = of_u[:, None], across[:, None], of_anchor[:, None]
        chosen = self.of_fine[minus_log_likelihood(*means, *self.of_coarse).argmin(dim=1)]
        levels, alpha, precision, log_v = chosen.unbind(1)
        unlikely = minus_log_likelihood(*means, alpha, alpha.square(), precision, log_v)
        gamma = (unlikely * (-0.5 * self.dimensions)).nan_to_num(-1e30).softmax(dim=1)
        return Posterior.of(levels, gamma, terms_of(alpha, precision, log_v))


def minus_log_likelihood(of_u, across, of_anchor, alpha, alpha_squared, precision, log_v) -> torch.Tensor:
    """ln v + |u - alpha * anchor|^2 / (n v) (B, K), of means (B, 1) and of terms of levels (B or 1, K)."""
    energy = torch.addcmul(torch.addcmul(of_u, alpha, across, value=-2.0), alpha_squared, of_anchor)
    return torch.addcmul(log_v, energy.clamp_min(0.0), precision)


class Samples(NamedTuple):
    """What the estimates of one step share: the run's sample u and, beside it, the one of its course (course.py), (B, ...)
    each; leeway: the course's, square: the mean square of u, (B,) each; weight, dimensions: as in EnergyEstimator.
    """

    u: torch.Tensor
    course: torch.Tensor
    leeway: torch.Tensor
    square: torch.Tensor
    step: Step
    weight: torch.Tensor | None
    dimensions: float


class Remainder(NamedTuple):
    """What remains of samples when the part of them that is an anchor is taken away, each (B,).

    across, of_anchor: means of u * anchor and of anchor^2. energy: mean square of the rest. surplus: how far the log-SNR
    has fallen, and kept: as in Measured, both beyond what chance explains.
    """

    across: torch.Tensor
    of_anchor: torch.Tensor
    energy: torch.Tensor
    surplus: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, samples: Samples, anchor: torch.Tensor, of_anchor: torch.Tensor) -> "Remainder":
        """From the mean square of the anchor.

        The part of a sample that is the anchor is found by regression, at most the whole of it; the rest is noise. Lost is
        what the course has more of the one, beyond its leeway; surplus noise what it has less of the other. Chance in
        that is what both do not share: 2 / n in ln of each energy, of two that correlate by r 4 (1 - r^2) / n in their ratio.
        """
        (alpha, v), n, weight = samples.step[1:], samples.dimensions, samples.weight
        both, whole = torch.stack([samples.u, samples.course]), (alpha * of_anchor).clamp_min(1e-12)
        products = mean_product(both, anchor, weight, dims=anchor.ndim)
        parts = alpha * (products / whole).clamp(0.0, 1.0)
        rest = torch.addcmul(both, parts.reshape(*parts.shape, *[1] * (anchor.ndim - 1)), anchor.float(), value=-1.0)
        (across, due), (energy, expected) = products, mean_square(rest, weight, dims=anchor.ndim).clamp_min(1e-12)
        shared = mean_product(rest[0], rest[1], weight)
        alone = (1.0 - shared.square() / (energy * expected)).clamp_min(0.0)
        lost = (due - across) / whole - samples.leeway
        kept = 1.0 - beyond_chance(lost, v / (alpha * whole * n)).clamp_max(0.9)
        surplus = torch.sub(beyond_chance((energy / expected).log(), alone * (4.0 / n)), kept.log(), alpha=2.0)
        return cls(across, of_anchor, energy, surplus, kept)


def noisier_of(one: Remainder, other: Remainder) -> Remainder:
    """For each sample the means of the one with more energy, the larger surplus and the smaller signal."""
    chosen = one.energy >= other.energy
    means = (torch.where(chosen, mine, yours) for mine, yours in zip(one[:3], other[:3]))
    return Remainder(*means, torch.maximum(one.surplus, other.surplus), torch.minimum(one.kept, other.kept))


def energy_posterior(
    u: torch.Tensor, anchor: torch.Tensor, weight: torch.Tensor | None = None, noisiest: float = LOG_SNR_RANGE[0]
) -> Posterior:
    """p(level | u) if u is alpha * anchor + noise: from the energy that remains when the anchor is taken away.

    Args:
        anchor: (B, ...), a clean estimate. weight: which positions count, as in mean_square.
        noisiest: the lowest log-SNR that a sample can have.
    """
    share = 1.0 if weight is None else float(weight.float().mean())
    grid = EnergyGrid(noisiest, u[0].numel() * share, u.device)
    return grid.posterior(mean_square(u, weight), mean_product(u, anchor, weight), mean_square(anchor, weight))


class EnergyEstimator:
    """The training-free estimate: the noise that a sample has is what remains when its clean image is taken away.

    Two clean estimates can stand for that image. The model's own at this step: right while the noise hides details, but
    late in a run a network takes surplus noise for detail. And the one of the step before: a sampler makes each sample
    from it, so whatever was added on the way shows, at any noise level; it asks nothing of the model and is known
    before the model is asked. The larger of both counts.

    What remains says two things. The posterior over levels takes u for a variance-preserving sample of some level, as the
    time-linked score needs it. The surplus takes it for a sample of the step's level that was given noise or has lost
    signal: near pure noise, where all levels have nearly the same variance, only that tells how much. It is told beside
    the course of the run: a start has a little too much noise by chance, a run from pure noise begins without any
    signal, and large steps leave that behind what the model sees by then. None of it was done to the sample.

    Args:
        weight: which positions count, as in mean_square.
        noisiest: the lowest log-SNR of the model's schedule. Nothing has more noise than pure noise: chance in it, at the
            first step of a run, is no surplus.
    """

    def __init__(self, weight: torch.Tensor | None = None, noisiest: float = LOG_SNR_RANGE[0]):
        self.weight, self.noisiest = weight, noisiest
        self.share = 1.0 if weight is None else float(weight.float().mean())
        self.grid: EnergyGrid | None = None
        self.previous: torch.Tensor | None = None
        self.course = Course()
        self._squares: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._samples: Samples | None = None
        self._before: Remainder | None = None

    def _square(self, anchor: torch.Tensor) -> torch.Tensor:
        """mean_square of an estimate, taken once while it is used."""
        for known, value in self._squares:
            if known is anchor:
                return value
        self._squares.append((anchor, mean_square(anchor, self.weight)))
        return self._squares[-1][1]

    def _begin(self, u: torch.Tensor, level: torch.Tensor) -> None:
        if self._samples is None:
            step = Step.at(level)
            self.course.go_to(step, u)
            dimensions = max(u[0].numel() * self.share, 1.0)
            square = mean_square(u, self.weight)
            self._samples = Samples(u, self.course.u, self.course.leeway, square, step, self.weight, dimensions)

    def _remainder(self, anchor: torch.Tensor) -> Remainder:
        return Remainder.of(self._samples, anchor, self._square(anchor))

    def before(self, u: torch.Tensor, level: torch.Tensor) -> Remainder | None:
        """What is known before the model is asked; None at the first step."""
        self._begin(u, level)
        if self.previous is None or self.previous.shape != u.shape:
            return None
        if self._before is None:
            self._before = self._remainder(self.previous)
        return self._before

    def found(self, u: torch.Tensor, level: torch.Tensor, denoised: torch.Tensor) -> Remainder:
        """With the model's estimate at this step, (B, ...), taken into account. At the first step there is no surplus: nothing
        was added yet.
        """
        before, now = self.before(u, level), self._remainder(denoised)
        return now if before is None else noisier_of(before, now)

    def after(self, u: torch.Tensor, level: torch.Tensor, denoised: torch.Tensor) -> Measured:
        """The same, with the posterior over levels."""
        found = self.found(u, level, denoised)
        if self.grid is None or self.grid.dimensions != self._samples.dimensions:
            self.grid = EnergyGrid(self.noisiest, self._samples.dimensions, u.device)
        return Measured(self.grid.posterior(self._samples.square, found.across, found.of_anchor), found.surplus, found.kept)

    def keep(self, answer: Answer) -> None:
        """What the model answered at this step, before any correction: the course goes on with the estimate for the sampler, and
        the anchor stands for the image at the next step.
        """
        last, step = self.course.denoised, self._samples.step
        change = torch.ones_like(step.v)
        if last is not None:
            moved = mean_product(answer.denoised - last, answer.anchor, self.weight)
            change = (moved / self._square(answer.anchor).clamp_min(1e-12)).abs()
        self.course.keep(step, answer.denoised, change)
        self.previous, self._before, self._samples = answer.anchor, None, None
        self._squares = [known for known in self._squares if known[0] is answer.anchor]
