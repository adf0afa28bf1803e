"""The noise levels that a time posterior is over, in log-SNR, and the schedule they were read off.

u is the sample in variance-preserving form, u = alpha * x0 + sqrt(v) * eps with alpha^2 + v = 1 (the paper's x_t,
v = 1 - abar_t). A level is its log-SNR 2 ln(a / b), which every model family shares.
"""

import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch

LOG_SNR_RANGE = (-8.0, 10.0)
"""Levels beyond are left out: v is then within 0.0004 of pure noise, or the noise under 0.7 % of the signal."""

DEEPEST = -20.0
"""Of the levels of a run's own steps, of which many begin with more noise than any grid: how much signal a sample has
there, alpha down to 0.00005, counts for what follows."""

CLASSES = 256
"""Levels of a grid. On Stable Diffusion's schedule they lie 0.049 apart, 2.5 % in the noise's size."""

TIMES = 1000
"""Times are in thousandths of the model's schedule, 0 clean and 1000 pure noise: for Stable Diffusion its timesteps."""


ONE = torch.tensor(1.0)
"""Numbers that every step needs are tensors without a dimension, on the CPU, for all devices. Measured on a CPU: multiplying (1,) by
one takes 2.8 us, by a number of Python's 6.7; and what a step costs is what its operations take to start."""

POINTS = 201
"""Times at which a schedule is read off; between them it is interpolated."""

_READ = weakref.WeakKeyDictionary()
"""Schedules that were read off, by the model's sampling object, each with its ends and its middle: should somebody change
the object, they differ and it is read again."""


@dataclass(frozen=True)
class Schedule:
    """A model's noise over time, float64 on the CPU: `times` (POINTS,) rising from 0 to TIMES, the `sigmas` there, and
    `log_snr`, which falls."""

    times: torch.Tensor
    sigmas: torch.Tensor
    log_snr: torch.Tensor

    @classmethod
    def of(cls, model_sampling) -> "Schedule":
        """Read off the model's own percent_to_sigma and noise_scaling, once: on a GPU it takes longer than a model call.

        Its ends stand for "pure noise" and "no noise" with some models: they are drawn in to sigma_max and sigma_min.
        """
        low, high = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
        ends = (low, high, float(model_sampling.percent_to_sigma(0.5)))
        known = _READ.get(model_sampling)
        if known is not None and known[0] == ends:
            return known[1]
        times = torch.linspace(0.0, TIMES, POINTS, dtype=torch.float64)
        sigmas = [float(model_sampling.percent_to_sigma(1.0 - float(time) / TIMES)) for time in times]
        sigmas = torch.tensor(sigmas, dtype=torch.float64).clamp(low, high)
        read = cls(times, sigmas, log_snr(coefficients(model_sampling, sigmas)))
        _READ[model_sampling] = (ends, read)
        return read

    def time(self, level: torch.Tensor | float) -> torch.Tensor:
        """Times 0..TIMES of log-SNRs; the nearest end beyond the schedule."""
        level = torch.as_tensor(level, dtype=torch.float64).cpu()
        return interpolate(level, self.log_snr.flip(0), self.times.flip(0))

    def level(self, time: torch.Tensor) -> torch.Tensor:
        """log-SNRs of times."""
        return interpolate(time.double().cpu(), self.times, self.log_snr)

    def grid(self, classes: int = CLASSES) -> torch.Tensor:
        """Levels (classes,) float32, evenly spaced in log-SNR over the schedule, from noise to clean."""
        return torch.linspace(float(self.log_snr.min()), float(self.log_snr.max()), classes)


def interpolate(at: torch.Tensor, known: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values (N,) given at `known` (N,), which rise, read linearly at any points; the ends' values beyond them."""
    after = torch.searchsorted(known, at.contiguous()).clamp(1, len(known) - 1)
    low, high = known[after - 1], known[after]
    part = ((at - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)
    return torch.lerp(values[after - 1], values[after], part)


class Line:
    """`interpolate` of one table, prepared once: at most four operations each time it is read."""

    def __init__(self, known: torch.Tensor, values: torch.Tensor):
        low, high = known[:-1], known[1:]
        slope = (values[1:] - values[:-1]) / (high - low).clamp_min(1e-12)
        self.inner, self.parts = known[1:-1].contiguous(), torch.stack([low, values[:-1], slope], dim=1)
        self.ends = known[:1], known[-1:]

    def __call__(self, at: torch.Tensor) -> torch.Tensor:
        low, value, slope = self.parts[torch.searchsorted(self.inner, at)].unbind(1)
        return torch.addcmul(value, slope, torch.clamp(at, *self.ends) - low)


def signal_and_noise(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `coefficients` asks a model with, for as many sigmas (B,): (B, 2) each, a unit of the one and none of the other."""
    signal = torch.zeros(len(sigma), 2, dtype=sigma.dtype, device=sigma.device)
    signal[:, 0] = 1.0
    return signal, 1.0 - signal


def coefficients(model_sampling, sigma: torch.Tensor, units: tuple | None = None) -> torch.Tensor:
    """a and b (B, 2) of x = a * x0 + b * eps at sigmas (B,), in their dtype, read off the model itself.

    units: signal_and_noise, if they are at hand.
    """
    signal, noise = units or signal_and_noise(sigma)
    return model_sampling.noise_scaling(sigma, noise.clone(), signal)


def log_snr(of_both: torch.Tensor, lowest: float = LOG_SNR_RANGE[0]) -> torch.Tensor:
    """2 ln(a / b) (B,) of a and b (B, 2), kept within LOG_SNR_RANGE, or above another lowest one."""
    a, b = of_both.unbind(1)
    return (a / b).square().log().clamp(lowest, LOG_SNR_RANGE[1])


def alpha_and_variance(level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = sqrt(abar) and v = 1 - abar of log-SNRs: abar = sigmoid(log-SNR)."""
    return torch.sigmoid(level).sqrt(), torch.sigmoid(-level)


class Step(NamedTuple):
    """A step's level, and alpha and v of it, each (B,)."""

    level: torch.Tensor
    alpha: torch.Tensor
    v: torch.Tensor

    @classmethod
    def at(cls, level: torch.Tensor) -> "Step":
        return cls(level, *alpha_and_variance(level))
