"""Where a step lies, in units that hold for every model: x = a * x0 + b * eps, and the noise ratio b / a."""

import math

import torch

ROUNDING = 1e-5
"""A share of a sigma below which two are the same: schedules are float32, what percent_to_sigma gives is not."""


def coefficients(model_sampling, sigma: torch.Tensor | float) -> tuple[float, float]:
    """Coefficients (a, b) of the forward process x = a * x0 + b * eps at `sigma`, read off the model itself."""
    return coefficients_of_all(model_sampling, torch.as_tensor(sigma).reshape(1))[0]


def coefficients_of_all(model_sampling, sigmas: torch.Tensor) -> list[tuple[float, float]]:
    """`coefficients` at each of many sigmas (N,), in one go.

    EPS, V and EDM models give (1, sigma), flow models (1 - sigma, sigma), scaled flows what their noise_scale makes
    of it. Nothing about the model's family or schedule is assumed.
    """
    sigmas = sigmas.cpu().double()  # one after the other: Metal has no float64, not even on the way
    zero, one = torch.zeros(len(sigmas), 1, dtype=torch.float64), torch.ones(len(sigmas), 1, dtype=torch.float64)
    a = model_sampling.noise_scaling(sigmas, zero.clone(), one.clone())
    b = model_sampling.noise_scaling(sigmas, one.clone(), zero.clone())
    return list(zip(a[:, 0].tolist(), b[:, 0].tolist()))


def ratio_of(a: float, b: float) -> float:
    """Noise ratio b / a: noise against signal, 0 for a clean sample, inf for pure noise."""
    return b / a if a > 0 else math.inf


def between(sigma: float, start: float, end: float) -> bool:
    """Whether a step at sigma lies in the range from the sigma `start` to the lower sigma `end`; one at `start` does, one at `end` does
    not, so that ranges that follow each other share no step."""
    return end * (1.0 + ROUNDING) < sigma <= start * (1.0 + ROUNDING)
