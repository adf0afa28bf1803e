"""The training-free estimate of a sample's noise level: the energy that is left when its clean image is taken away.

All in the variance-preserving form u = alpha * x0 + sqrt(v) * eps; samples (B, C, H, W) or (B, C, T, H, W), judged each
by itself.
"""

from typing import NamedTuple

import torch

from .answer import Answer
from .course import FEWEST, Course
from .levels import LOG_SNR_RANGE, ONE, Step
from .posterior import Measured, Posterior, averaged_terms, beyond_chance, column, inner, inner_of_each

STRICT = 17.0
"""By so many times its variance more a share of signal has to be beyond chance where a sample and its course have no noise in
common, as after the steps of a stochastic sampler. Of very few values nothing at all would then be seen: there it is left out."""

TINY = 1e-12
"""Keeps an energy from being divided by where it is 0."""

COARSE, NODES = 128, 49
"""Levels among which the likeliest is looked for, and levels around it at which an energy's posterior is kept."""


class EnergyGrid:
    """The levels among which an energy's posterior is looked for, and all that it needs of them, made once a run.

    Found on a coarse grid over all levels, kept on a fine one around the coarse level that was found, as wide as four of its
    standard deviations, sqrt(2 / n) in ln v. Tables hold what both need, since each operation is a launch on a GPU; but of
    the fine levels, which are many, no more than four terms.

    Args:
        noisiest: the lowest log-SNR that a sample can have.
        dimensions: n, how many values of a sample count, of each sample (B,) or one for all (1,).
    """

    def __init__(self, noisiest: float, dimensions: torch.Tensor, device: torch.device):
        self.minus_half_of_them = dimensions[:, None] * -0.5
        coarse = torch.linspace(noisiest, LOG_SNR_RANGE[1], COARSE, device=device)
        self.of_coarse = averaged_terms(coarse[None]).unbind(1)
        half = 4.0 * (2.0 / dimensions[:, None]).sqrt() / torch.sigmoid(coarse)
        half = half.clamp_min(2.0 * (LOG_SNR_RANGE[1] - noisiest) / (COARSE - 1))
        around = torch.linspace(-1.0, 1.0, NODES, device=device)
        levels = (coarse[:, None] + half[..., None] * around).clamp(noisiest, LOG_SNR_RANGE[1]).flatten(0, 1)
        self.of_fine = torch.cat([levels[:, None], averaged_terms(levels)], dim=1)
        self.starts = torch.arange(len(dimensions), device=device) * COARSE

    def posterior(self, across: torch.Tensor, away: torch.Tensor) -> Posterior:
        """p(level | u) from the means of u * anchor and of (u - anchor)^2, each (B, 1), or (A, B, 1) of A anchors.

        log p(u | level) = -n/2 (ln v + |u - alpha * anchor|^2 / (n v)) + const, every level equally likely before.
        """
        coarse = minus_log_likelihood(across, away, *self.of_coarse).argmin(dim=-1)
        fine = self.of_fine[coarse if len(self.starts) == 1 else coarse + self.starts]
        levels, *terms = fine.unbind(-2)
        unlikely = minus_log_likelihood(across, away, *terms)
        return Posterior.of(levels, (unlikely * self.minus_half_of_them).softmax(dim=-1), fine[..., 1:, :])


def minus_log_likelihood(across, away, share, precision, log_v) -> torch.Tensor:
    """ln v + |u - alpha * anchor|^2 / (n v) (..., K) less the mean square of the anchor, of means (..., 1) and averaged_terms.

    With v = (1 - alpha) (1 + alpha) that is ln v + |u - anchor|^2 / (n v) + 2 u * anchor / (n (1 + alpha)): late in a run, where v
    is small, so is the first of them, and no digits are lost.
    """
    return torch.addcmul(torch.addcmul(log_v, away, precision), across, share, value=2.0)


class Counted(NamedTuple):
    """How many values of a sample count, n: of every sample (B,), or one for all (1,); 4 / n alike; whether samples have many
    values, those that do not count included; enough, (B,): 0 for samples of which a mask leaves so few that nothing can be told,
    None without a mask."""

    values: torch.Tensor
    four_over: torch.Tensor
    many: bool
    enough: torch.Tensor | None

    @classmethod
    def of(cls, u: torch.Tensor, weight: torch.Tensor | None) -> "Counted":
        """Of samples u (B, ...) and the weight of their positions."""
        if weight is None:
            values = torch.full((1,), float(u[0].numel()), device=u.device)
        else:
            values = weight.float().expand(u.shape).flatten(1).sum(dim=1).clamp_min(1.0)
        many = u[0].numel() >= FEWEST
        enough = None if weight is None or not many else (values >= FEWEST).to(u.dtype)
        return cls(values, 4.0 / values, many, enough)


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
        weight: torch.Tensor | None, counted: "Counted",
    ) -> "Disturbance":
        """Of the run's samples u beside its course, when the part of both that is an anchor is taken away.

        The part of a sample that is the anchor is found by regression, at most the whole of it; the rest is noise. Lost is
        what the course has more of the one, beyond its leeway, up to the whole of it; surplus noise what it has less of the
        other, or less than the schedule's if that is more. Samples of very few values have shares beyond the whole by chance, and
        nothing would be seen of them: they are let have them. Chance in that is what both do not share: 2 / n in ln of the energy of
        each rest, of two that correlate by r, 4 (1 - r^2) / n in their ratio.

        Args:
            of_anchor: (B,), its energy. weight: as in EnergyEstimator. counted: n.
        """
        both, whole = torch.stack([u, course.u]), step.alpha * of_anchor
        shares = inner(both, anchor, weight) / whole
        rest = torch.addcmul(both, column(shares.clamp(0.0, 1.0) * step.alpha, anchor), anchor, value=-1.0)
        own, of_course = inner_of_each(rest, weight).clamp_min(TINY).unbind(0)
        common = inner(*rest.unbind(0), weight)
        apart = (ONE - (common / own) * (common / of_course)).clamp_min(0.0)  # 1 - r^2
        has, had = shares.unbind(0)
        if counted.many:
            had = had.clamp_max(1.0)
        lost = (had - has - course.leeway).clamp_max(1.0)
        grown = torch.log(own / torch.maximum(of_course, step.v * counted.values))
        of_lost = step.v / (whole * step.alpha)
        if counted.many:
            of_lost = torch.addcmul(of_lost, of_lost, apart, value=STRICT)
        gaps, chance = torch.stack([lost, grown]), torch.stack([of_lost, apart * counted.four_over])
        lost, grown = beyond_chance(gaps, chance).unbind(0)
        if counted.enough is not None:
            lost, grown = lost * counted.enough, grown * counted.enough
        kept = ONE - lost.clamp_max(0.9)
        return cls(torch.sub(grown, kept.log(), alpha=2.0), kept)


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
        weight: which positions count, as in posterior.inner.
        noisiest: the lowest log-SNR of the model's schedule. Nothing has more noise than pure noise: chance in it, at the
            first step of a run, is no surplus.
    """

    def __init__(self, weight: torch.Tensor | None = None, noisiest: float = LOG_SNR_RANGE[0]):
        self.weight, self.noisiest = weight, noisiest
        self.counted: Counted | None = None
        self.grid: EnergyGrid | None = None
        self.anchor: torch.Tensor | None = None
        self.of_anchor: torch.Tensor | None = None
        self.course = Course()
        self._step: Step | None = None
        self._before: Disturbance | None = None

    def before(self, u: torch.Tensor, step: Step) -> Disturbance | None:
        """What is known before the model is asked; None at the first step: nothing was added yet."""
        if self._step is None:
            self._step = step
            self.course.go_to(step, u, self.weight)
            if self.anchor is None or self.anchor.shape != u.shape:
                self.counted, self.grid = Counted.of(u, self.weight), None
            else:
                self._before = Disturbance.of(u, self.course, step, self.anchor, self.of_anchor, self.weight, self.counted)
        return self._before

    def after(self, u: torch.Tensor, step: Step, anchor: torch.Tensor) -> Measured:
        """The same, with the posterior over levels; the model's estimate at this step is the anchor (B, ...)."""
        before = self.before(u, step)
        if self.grid is None:
            self.grid = EnergyGrid(self.noisiest, self.counted.values, u.device)
        anchors = torch.stack([anchor] if before is None else [self.anchor, anchor])
        sums = torch.stack([inner(anchors, u, self.weight), inner_of_each(u - anchors, self.weight)])
        across, away = (sums / self.counted.values)[..., None].unbind(0)
        posterior = self.grid.posterior(across, away).noisiest()
        if before is None:
            return Measured(posterior, torch.zeros_like(step.level), torch.ones_like(step.level))
        return Measured(posterior, *before)

    def keep(self, answer: Answer) -> None:
        """What the model answered at this step, before any correction: the course goes on with the estimate for the sampler, and
        the anchor stands for the image at the next step.
        """
        last, self.of_anchor = self.course.denoised, inner(answer.anchor, answer.anchor, self.weight).clamp_min(TINY)
        change = None
        if last is not None:
            change = (inner(answer.denoised - last, answer.anchor, self.weight) / self.of_anchor).abs()
        self.course.keep(self._step, answer.denoised, change)
        self.anchor, self._step, self._before = answer.anchor, None, None
