"""Where a step lies, in units that hold for every model: x = a * x0 + b * eps, and the noise ratio b / a."""

import math

import torch


def coefficients(model_sampling, sigma: torch.Tensor | float) -> tuple[float, float]:
    """Coefficients (a, b) of the forward process x = a * x0 + b * eps at `sigma`, read off the model itself.

    EPS, V and EDM models give (1, sigma), flow models (1 - sigma, sigma), scaled flows what their noise_scale makes
    of it. Nothing about the model's family or schedule is assumed.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").reshape(1)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    a = model_sampling.noise_scaling(sigma, zero.clone(), one.clone())
    b = model_sampling.noise_scaling(sigma, one.clone(), zero.clone())
    return float(a), float(b)


def ratio_of(a: float, b: float) -> float:
    """Noise ratio b / a: noise against signal, 0 for a clean sample, inf for pure noise."""
    return b / a if a > 0 else math.inf
