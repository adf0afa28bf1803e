"""What guidance asks of a model, and what comes back. Knows nothing of ComfyUI: the model is a function."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Answer(NamedTuple):
    """What the model says of a sample.

    denoised: the clean estimate (B, ...) for the sampler, guided by a scale or by other patches. anchor: the one that is the
    mean of the clean images behind the sample, (B, ...) float32: under classifier-free guidance the conditional prediction
    alone. The guided one is no such mean, it lies beyond: seen from it every sample has too much noise. guided:
    (B,) bool, whether the two differ; told where a trained predictor asks for it.
    """

    denoised: torch.Tensor
    anchor: torch.Tensor
    guided: torch.Tensor | None = None


Ask = Callable[[torch.Tensor, torch.Tensor], Answer]
"""Asks the model: u (B, ...) at levels (B,) log-SNR."""
