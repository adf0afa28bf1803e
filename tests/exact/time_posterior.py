"""What the exact denoiser knows about time: p(t | u) and the time-linked score (TAG, arXiv 2510.11057).

u is in the variance-preserving form, u = sqrt(abar)*x0 + sqrt(1 - abar)*eps, and time is an index into a grid of noise
levels given as sigma = b/a = sqrt((1 - abar)/abar), as the paper's predictor phi(u) sees it.
"""

import torch

from .denoiser import vp_coefficients


def log_time_posterior(denoiser, u, sigmas, log_prior=None):
    """log p(t_k | u) over the grid `sigmas` (T,), (B, T). `log_prior` (T,) up to a constant; None: uniform."""
    densities = torch.stack([_density(denoiser, row, sigmas)[0] for row in denoiser.flatten(u)])
    if log_prior is not None:
        densities = densities + log_prior
    return densities.log_softmax(1)


def time_linked_score(denoiser, u, sigmas, index, log_prior=None):
    """TLS(u, t_i) = grad_u log p(t_i | u) = sum_k gamma_k (grad log p_i - grad log p_k), gamma = p(t_k | u).

    Theorem 3.3. `index` is a number or (B,). As grad log p_k = (a_k sum_j w_kj x_j - u) / v_k, the sum over the grid
    is taken on the weights before the images are touched: one (T x N) by (N x dims) product is never formed.
    """
    index = torch.as_tensor(index).expand(len(u))
    a, b = (value.to(u.device) for value in vp_coefficients(sigmas))
    v = denoiser.variance(a, b)
    rows = []
    for row, i in zip(denoiser.flatten(u), index):
        log_density, weights = _density(denoiser, row, sigmas)
        gamma = (log_density if log_prior is None else log_density + log_prior).softmax(0)
        coefficients = -gamma
        coefficients[i] += 1.0
        coefficients = coefficients / v
        rows.append((coefficients * a) @ weights @ denoiser.flat - coefficients.sum() * row)
    return torch.stack(rows).reshape(u.shape)


def _density(denoiser, row, sigmas):
    """log p_k(u) (T,) and the component weights w_kj (T, N) of one u (dims,) at every noise level of the grid."""
    a, b = (value.to(row.device)[:, None] for value in vp_coefficients(sigmas))
    v = denoiser.variance(a, b)
    distances = row.square().sum() - 2.0 * a * (denoiser.flat @ row) + a ** 2 * denoiser.norms
    logits = -distances / (2.0 * v)
    constant = -0.5 * row.numel() * torch.log(2.0 * torch.pi * v[:, 0])
    return logits.logsumexp(1) + constant, logits.softmax(1)
