"""Temporal alignment guidance (arXiv 2510.11057): mathematics only, no ComfyUI.

In the variance-preserving form u = alpha * x0 + sqrt(v) * eps, v = 1 - abar, D the model's clean estimate:
    score                s = (alpha * D - u) / v
    time-linked score    TLS(u, t) = grad_u log p(t | u)
    guided score         s + omega_t * TLS, omega_t = omega * v                                          (Eq. 7)
so that in terms of the clean estimate D' = D + omega_t * (v / alpha) * TLS.
"""

from collections.abc import Callable

import torch

from .levels import LOG_SNR_RANGE, ONE, Step
from .posterior import Posterior, column

MODES = ("relative", "score", "shift")

LARGEST_CORRECTION = 0.5
"""No mode moves the clean estimate by more than this times the distance from it to the sample (RMS): whatever the
direction, at least half of every denoising step remains."""

MINUS_HALF = torch.tensor(-0.5)


def closed_form(u: torch.Tensor, denoised: torch.Tensor, step: Step, posterior: Posterior) -> torch.Tensor:
    """TLS(u, t_i) = sum_k gamma_k (grad log p_i - grad log p_k), Theorem 3.3, with one clean estimate for every level:
    grad log p_k(u) = (alpha_k * D - u) / v_k. Needs no gradient and no further model call.
    """
    (precision, signal), own = posterior.precision_and_signal(), step.v.reciprocal()
    of_u, of_denoised = precision - own, torch.addcmul(signal, step.alpha, own, value=-1.0)
    return torch.addcmul(column(of_u, u) * u, column(of_denoised, u), denoised, value=-1.0)


def published_gradient(u: torch.Tensor, level: torch.Tensor, judge: Callable, levels: torch.Tensor) -> torch.Tensor:
    """TLS(u, t_i) as published: the gradient of the predictor's log-probability of the step's own class.

    Args:
        judge: u -> logits (B, K), with gradients. levels: (K,) log-SNR of the classes.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = u.detach().clone().requires_grad_(True)
        nearest = (levels.to(u.device)[None] - level.to(levels.dtype)[:, None].clone()).abs().argmin(dim=1)
        chosen = judge(leaf).log_softmax(dim=1).gather(1, nearest[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, leaf)
    return gradient.nan_to_num()


def level_of(step: Step, surplus: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample u of this step's level that has kept so much of its signal, and whose log-SNR has fallen by the surplus.

    It is no variance-preserving sample of its level: where noise was added to it, that has less signal, and near pure noise,
    where all variances are nearly 1, far less.

    Returns:
        Its level, (B,), and the factor (B,) that makes it variance-preserving again.
    """
    fallen = torch.minimum(step.level, (step.level - surplus).clamp_min(LOG_SNR_RANGE[0]))
    return fallen, torch.rsqrt(ONE + step.v * torch.expm1(surplus)) / kept  # alpha^2 + v * exp(surplus)


def length(x: torch.Tensor) -> torch.Tensor:
    """The root of the sum of squares of each sample, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def limited(correction: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The correction, shrunk where it is longer than `size` (B,); zero where it is not finite."""
    correction = correction.nan_to_num(0.0, 0.0, 0.0)
    return correction * column((size / length(correction).clamp_min(1e-30)).clamp(max=1.0), correction)


def relative_correction(tls: torch.Tensor, reach: torch.Tensor, strength: float, gap: torch.Tensor) -> torch.Tensor:
    """A step along the TLS whose length is strength * (1 - exp(-gap / 2)) times `reach`, at most half of `reach`: with noise added
    alone, exp(-gap / 2) is sqrt(v / v of the sample).

    Args:
        reach: (B,) length of D - x in the model's own form. gap: (B,) the surplus, by which the log-SNR has fallen.
    """
    size = (torch.expm1(MINUS_HALF * gap) * -strength).clamp(max=LARGEST_CORRECTION) * reach
    tls = tls.nan_to_num(0.0, 0.0, 0.0)
    return tls * column(size / length(tls).clamp_min(1e-30), tls)


def step_omega(omega: float, step: Step) -> torch.Tensor:
    """The published schedule, (B,): omega_t = omega * (1 - abar_t)."""
    return omega * step.v


def score_correction(tls: torch.Tensor, reach: torch.Tensor, omega: float, step: Step) -> torch.Tensor:
    """What Eq. 7 adds to the clean estimate: omega_t * (v / alpha) * TLS, limited to half of `reach`."""
    factor = step_omega(omega, step) * step.v / step.alpha.clamp_min(1e-6)
    return limited(column(factor, tls) * tls, LARGEST_CORRECTION * reach)


def shift(tls: torch.Tensor, omega: float, step: Step) -> torch.Tensor:
    """What Algorithm 1 adds to u: omega_t * TLS, limited to half of the noise."""
    return limited(column(step_omega(omega, step), tls) * tls, LARGEST_CORRECTION * (step.v * tls[0].numel()).sqrt())
