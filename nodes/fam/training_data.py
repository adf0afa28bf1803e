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


LOOKED_AT = 256
"""Entries of a tensor, about, that go into its short name: a model is large."""


def short_name(value) -> str:
    """A short name of nested lists and dicts of numbers, words and tensors; what else is in them does not count."""
    digest = hashlib.sha256()

    def add(part) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{tuple(part.shape)}".encode())
            if type(part) in (torch.Tensor, torch.nn.Parameter):  # quantized weights are classes of their own
                flat = part.detach().flatten()
                digest.update(flat[:: max(1, flat.numel() // LOOKED_AT)].float().cpu().numpy().tobytes())
        elif isinstance(part, dict):
            add([[str(key), part[key]] for key in sorted(part, key=str)])
        elif isinstance(part, (list, tuple)):
            digest.update(b"[")
            for entry in part:
                add(entry)
            digest.update(b"]")
        elif isinstance(part, (str, bool, int, float)):
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()[:16]


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
