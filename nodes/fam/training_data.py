"""What a flaw-aware run learns from: clean latents in the model's own space, and the prompt of each."""

import functools
import hashlib
from dataclasses import dataclass

import torch


@dataclass
class Draw:
    """What one step draws: which latents, the noise on them, and the time of each in 0..1 of the model's schedule."""

    indices: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    conditions: torch.Tensor


@dataclass
class LatentData:
    """Args:
        latents: (N, C, [T,] H, W), already through process_latent_in.
        conditions: CONDITIONINGs of one entry each: one for all latents, or several, `which` (N,) saying whose is whose.
        dropout: (chance, condition) that takes the place of a latent's own, for classifier-free guidance.
    """

    latents: torch.Tensor
    conditions: list
    which: torch.Tensor
    dropout: tuple[float, int] = (0.0, 0)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short name of these very latents."""
        return hashlib.sha256(self.latents.contiguous().numpy().tobytes()).hexdigest()[:16]

    def draw(self, batch: int, seed: int) -> Draw:
        """One step's draw; it depends on the seed alone. No latent comes twice before all came once."""
        generator = torch.Generator().manual_seed(seed)
        count, rounds = len(self.latents), -(-batch // len(self.latents))
        indices = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch]
        noise = torch.randn((batch, *self.latents.shape[1:]), generator=generator)
        times = torch.rand(batch, generator=generator)
        dropped = torch.rand(batch, generator=generator) < self.dropout[0]
        conditions = torch.where(dropped, self.dropout[1], self.which[indices])
        return Draw(indices, noise, times, conditions)
