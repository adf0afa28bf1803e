"""Temporal alignment guidance (arXiv 2510.11057): mathematics only, no ComfyUI.

In the variance-preserving form u = alpha * x0 + sqrt(v) * eps, v = 1 - abar, D the model's clean estimate:
    score                s = (alpha * D - u) / v
    time-linked score    TLS(u, t) = grad_u log p(t | u)
    guided score         s + omega_t * TLS, omega_t = omega * v                                          (Eq. 7)
so that in terms of the clean estimate D' = D + omega_t * (v / alpha) * TLS.
"""

from collections.abc import Callable

import torch

from .levels import LOG_SNR_RANGE, alpha_and_variance
from .posterior import Posterior, column

MODES = ("relative", "score", "shift")

LARGEST_CORRECTION = 0.5
"""No mode moves the clean estimate by more than this times the distance from it to the sample (RMS): whatever the
direction, at least half of every denoising step remains."""


def closed_form(u: torch.Tensor, denoised: torch.Tensor, level: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """TLS(u, t_i) = sum_k gamma_k (grad log p_i - grad log p_k), Theorem 3.3, with one clean estimate for every level:
    grad log p_k(u) = (alpha_k * D - u) / v_k. Needs no gradient and no further model call.

    Args:
        level: (B,) log-SNR of the step, t_i.
    """
    snr = level.exp()
    of_u = posterior.means[:, 0] - (1.0 + snr)  # 1 / v = 1 + snr, alpha / v = sqrt(snr * (1 + snr))
    of_denoised = torch.addcmul(snr, snr, snr).sqrt() - posterior.means[:, 4]
    return torch.addcmul(column(of_u, u) * u, column(of_denoised, u), denoised)


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


def level_of(level: torch.Tensor, surplus: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample u of this level that has kept so much of its signal, and whose log-SNR has fallen by the surplus.

    It is no variance-preserving sample of its level: where noise was added to it, that has less signal, and near pure noise,
    where all variances are nearly 1, far less.

    Returns:
        Its level, (B,), and the factor (B,) that makes it variance-preserving again.
    """
    fallen = torch.minimum(level, (level - surplus).clamp_min(LOG_SNR_RANGE[0]))
    return fallen, torch.rsqrt(1.0 + torch.sigmoid(-level) * torch.expm1(surplus)) / kept  # alpha^2 + v * exp(surplus)


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1) / x[0].numel() ** 0.5


def limited(correction: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The correction, shrunk where its RMS exceeds `size` (B,); zero where it is not finite."""
    correction = correction.nan_to_num(0.0, 0.0, 0.0)
    return correction * column((size / root_mean_square(correction).clamp_min(1e-30)).clamp(max=1.0), correction)


def relative_correction(tls: torch.Tensor, reach: torch.Tensor, strength: float, gap: torch.Tensor) -> torch.Tensor:
    """A step along the TLS whose RMS is strength * (1 - exp(-gap / 2)) times `reach`, at most half of `reach`: with noise added
    alone, exp(-gap / 2) is sqrt(v / v of the sample).

    Args:
        reach: (B,) RMS(D - x) in the model's own form. gap: (B,) the surplus, by which the log-SNR has fallen.
    """
    size = (-strength * torch.expm1(-0.5 * gap)).clamp(max=LARGEST_CORRECTION) * reach
    tls = tls.nan_to_num(0.0, 0.0, 0.0)
    return tls * column(size / root_mean_square(tls).clamp_min(1e-30), tls)


def step_omega(omega: float, level: torch.Tensor) -> torch.Tensor:
    """The published schedule, (B,): omega_t = omega * (1 - abar_t)."""
    return omega * alpha_and_variance(level)[1]


def score_correction(tls: torch.Tensor, reach: torch.Tensor, omega: float, level: torch.Tensor) -> torch.Tensor:
    """What Eq. 7 adds to the clean estimate: omega_t * (v / alpha) * TLS, limited to half of `reach`."""
    alpha, v = alpha_and_variance(level)
    factor = step_omega(omega, level) * v / alpha.clamp_min(1e-6)
    return limited(column(factor, tls) * tls, LARGEST_CORRECTION * reach)


def shift(tls: torch.Tensor, omega: float, level: torch.Tensor) -> torch.Tensor:
    """What Algorithm 1 adds to u: omega_t * TLS, limited to half of the noise."""
    _, v = alpha_and_variance(level)
    return limited(column(step_omega(omega, level), tls) * tls, LARGEST_CORRECTION * v.sqrt())
