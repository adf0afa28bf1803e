"""Flaw noise: FAM's forward process, eps + strength * M (arXiv 2512.08774), around any NOISE object."""

import math

import torch

from ..latents import FrameLayout, soft_mask_to_frames


TEMPORAL_RATIOS = (4, 6, 8)
"""Image frames a latent frame of the video models there are: Wan, HunyuanVideo and CogVideoX; Mochi; LTX-Video and Cosmos."""


def add_map(noise: torch.Tensor, flaw_map: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise of a latent plus strength times the map, the same on every channel.

    Args:
        noise: (B, C, [T,] H, W). flaw_map: MASK (M, h, w) at image size, 0..1 (what is beyond is cut off), M one, the batch, all
            frames of the latent, or of the image.

    Raises:
        ValueError: NaN in the map, a map that does not fit the latent, or a strength that is no number.
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength is {strength}; a number is wanted, such as 0.01.")
    layout = FrameLayout.of([noise.shape])
    if layout is None:
        raise ValueError(f"flaw_map: the latent has no image part (its shape is {tuple(noise.shape)}), so no map fits it.")
    maps = soft_mask_to_frames(flaw_map.clamp(0, 1), layout, "flaw_map", likely_ratio(len(flaw_map), layout)).to(noise)
    return layout.with_frames(noise, layout.frames(noise) + strength * maps[:, None])


def likely_ratio(count: int, layout: FrameLayout) -> int | None:
    """Image frames that one latent frame after the first must stand for, if so many masks are one an image frame: a NOISE does not
    know the model. None if no model has it so."""
    later, of_each = layout.frames_per_sample - 1, count // layout.batch - 1
    return next((ratio for ratio in TEMPORAL_RATIOS if count % layout.batch == 0 and of_each == ratio * later > 0), None)


class FlawNoise:
    """A NOISE: what the wrapped one gives, amplified where the map is high. Adds no randomness of its own."""

    def __init__(self, noise, flaw_map: torch.Tensor, strength: float):
        self.noise, self.flaw_map, self.strength = noise, flaw_map, strength
        self.seed = noise.seed

    def generate_noise(self, input_latent: dict):
        """Noise for a LATENT; that of the wrapped object, bit for bit, at strength 0."""
        noise = self.noise.generate_noise(input_latent)
        if self.strength == 0:
            return noise
        if not getattr(noise, "is_nested", False):
            return add_map(noise, self.flaw_map, self.strength)
        parts = list(noise.unbind())
        layout = FrameLayout.of([part.shape for part in parts])
        if layout is not None:
            parts[layout.part] = add_map(parts[layout.part], self.flaw_map, self.strength)
        return type(noise)(parts)
