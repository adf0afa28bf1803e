"""A model's own form of a sample, x = a * x0 + b * eps, and the variance-preserving one, u; and sigmas of levels."""

import torch

from .levels import DEEPEST, Line, Schedule, coefficients, log_snr, signal_and_noise
from .posterior import column


class Process:
    """The forward process of one model, on the sampler's device.

    Everything is read off the model's noise_scaling and percent_to_sigma, so that it holds for EPS, V, EDM and flow.
    """

    def __init__(self, model_sampling, schedule: Schedule, device: torch.device):
        self.model_sampling = model_sampling
        levels, sigmas = (values.flip(0).float().to(device) for values in (schedule.log_snr, schedule.sigmas))
        self.log_sigma = Line(levels, sigmas.log())
        self.largest = sigmas[:1]
        self.units: tuple[torch.Tensor, torch.Tensor] | None = None

    def level_and_scale(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log-SNR, and sqrt(a^2 + b^2), x = scale * u, each (B,), at sigmas (B,)."""
        both = self._coefficients(sigma)
        return log_snr(both, DEEPEST), torch.linalg.vector_norm(both, dim=1)

    def scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """sqrt(a^2 + b^2) alone."""
        return torch.linalg.vector_norm(self._coefficients(sigma), dim=1)

    def _coefficients(self, sigma: torch.Tensor) -> torch.Tensor:
        if self.units is None or len(self.units[0]) != len(sigma):
            self.units = signal_and_noise(sigma)
        return coefficients(self.model_sampling, sigma, self.units)

    def vp(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """u = x / sqrt(a^2 + b^2), float32."""
        x = x.float()
        return x / column(scale, x)

    def noisier(self, sigma: torch.Tensor, own: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The sigmas (B,) of levels at or above the noise of sigma; sigma itself, bit for bit, where nothing is above.

        Args:
            own: (B,) level of sigma.

        The table's sigma is taken relative to its own value at the step, so that its grain leaves no trace there.
        """
        asked, here = self.log_sigma(torch.cat([level, own])).chunk(2)
        ratio = torch.exp(asked - here).clamp_min(1.0)
        return torch.minimum(sigma * ratio, torch.maximum(sigma, self.largest))
