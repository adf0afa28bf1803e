"""What a flaw-aware training run is told: the node's widgets, and the few constants that are not widgets."""

import math
from dataclasses import dataclass

import torch

from .phases import Phases

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EMA_DECAY = 0.99
"""Of a LoRA's weights: the last hundred steps or so. A run of a few steps averages fewer, see `decay_at`."""
STEP_PRIME = 1_000_003


@dataclass(frozen=True)
class FlawAwareSettings:
    """Raises ValueError for values that cannot work.

    attention_strength, noise_strength: lambda of the reverse and of the forward part; 0 leaves a part out.
    """

    steps: int
    base_fraction: float = 0.5
    map_every: int = 100
    attention_strength: float = 0.025
    noise_strength: float = 0.01
    learning_rate: float = 5e-4
    batch_size: int = 1
    seed: int = 0
    training_dtype: str = "bf16"
    gradient_checkpointing: bool = True
    ema_decay: float = EMA_DECAY
    clip: float = math.inf

    def __post_init__(self):
        for name in ("steps", "map_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a whole number of 1 or more is wanted.")
        if not 0 <= self.base_fraction <= 1:
            raise ValueError(f"base_fraction is {self.base_fraction}; a value from 0 (no base phase) to 1 (nothing else) is wanted.")
        for name in ("attention_strength", "noise_strength"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; 0 (off) or more is wanted, such as 0.025.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; a value above 0 is wanted, such as 5e-4.")
        if self.training_dtype not in DTYPES:
            raise ValueError(f"training_dtype is {self.training_dtype!r}; one of {', '.join(DTYPES)} is wanted.")

    @property
    def phases(self) -> Phases:
        return Phases.of(self.steps, self.base_fraction, self.map_every)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What is calculated in: `training_dtype`, but float32 where the device has no arithmetic for bfloat16."""
        return torch.float32 if emulates_bfloat16(device) else DTYPES[self.training_dtype]


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is made of float32 there: on processors without AVX-512 or SVE.

    Measured on a Zen 3, one thread: a convolution of 64 channels, 4 x 32 x 32, 341 ms instead of 8, a linear layer 23
    instead of 4.
    """
    return device.type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))


def step_seed(seed: int, step: int) -> int:
    """The seed of everything that one step draws: a function of the run's seed and the step alone."""
    return (seed * STEP_PRIME + step) % (1 << 63)


def decay_at(step: int, decay: float) -> float:
    """How much of the moving average stays at this step: less at the start, so that a short run has one too."""
    return min(decay, (1 + step) / (10 + step))
