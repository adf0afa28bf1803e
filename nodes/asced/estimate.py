"""What one step of a run shows of it."""

import math
from typing import NamedTuple

import torch

from ..coordinates import ratio_of


class Estimate(NamedTuple):
    """The noisy sample (None where nobody asks for it any more), the model's clean estimate of it (both (F, C, H, W)
    frames), and x = a * x0 + b * eps."""

    x: torch.Tensor | None
    denoised: torch.Tensor
    a: float
    b: float

    @property
    def ratio(self) -> float:
        """Noise ratio b / a: inf for pure noise."""
        return ratio_of(self.a, self.b)

    @property
    def position(self) -> float:
        """ln(b / a), half the negative log-SNR: the place in the schedule that all models share."""
        return math.log(self.ratio) if self.ratio > 0 else -math.inf
