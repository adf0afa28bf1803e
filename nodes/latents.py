"""Layouts of latents: images, video and nested (video with audio) latents as one list of frames, and masks for them."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import comfy.utils


TEMPORAL_RATIOS = {"Wan21": 4, "HunyuanVideo": 4, "HunyuanVideo15": 4, "Mochi": 6, "LTXV": 8, "Cosmos1CV8x8x8": 8}
"""Image frames that a latent frame of ComfyUI's formats stands for, by the format's class. Releases such as 0.16.3 do not say it themselves."""


@dataclass(frozen=True)
class FrameLayout:
    """How to see a sampler's tensor as frames (F, C, H, W), F = batch x time, and how to get back.

    Nested latents reach a sampler as one flat pack (B, 1, N); the first part with two spatial axes is the one seen,
    the others (audio) are left as they are.
    """

    shapes: tuple[tuple[int, ...], ...]
    part: int

    @classmethod
    def of(cls, shapes) -> "FrameLayout | None":
        """The layout of latents of these shapes; None if no part of them has two spatial axes of 2 pixels or more."""
        shapes = tuple(tuple(s) for s in shapes)
        for part, shape in enumerate(shapes):
            if len(shape) in (4, 5) and min(shape[-2:]) >= 2:
                return cls(shapes, part)
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part that is seen: (B, C, H, W) or (B, C, T, H, W)."""
        return self.shapes[self.part]

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def frames_per_sample(self) -> int:
        return self.shape[2] if len(self.shape) == 5 else 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in latent pixels."""
        return self.shape[-2], self.shape[-1]

    def image(self, x: torch.Tensor) -> torch.Tensor:
        """The part of a sampler's tensor that is seen: (B, C, H, W) or (B, C, T, H, W)."""
        return x if len(self.shapes) == 1 else comfy.utils.unpack_latents(x, list(self.shapes))[self.part]

    def with_image(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The sampler's tensor `x` with that part replaced."""
        if len(self.shapes) == 1:
            return image
        parts = list(comfy.utils.unpack_latents(x, list(self.shapes)))
        parts[self.part] = image
        return comfy.utils.pack_latents(parts)[0]

    def frames(self, x: torch.Tensor) -> torch.Tensor:
        """The frames of a sampler's tensor: (B * T, C, H, W), the frames of one sample one after the other."""
        x = self.image(x)
        if x.ndim == 5:
            x = x.movedim(2, 1).flatten(0, 1)
        return x

    def with_frames(self, x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """The sampler's tensor `x` with its frames (B * T, C, H, W) replaced."""
        if len(self.shape) == 5:
            frames = frames.unflatten(0, (self.batch, self.frames_per_sample)).movedim(1, 2)
        return self.with_image(x, frames.contiguous())


def of_one_shape(picture: tuple[int, int], latent: tuple[int, int]) -> bool:
    """Whether a picture (height, width) has the aspect ratio of a latent, but for a part of a latent pixel."""
    scale = max(side / of_latent for side, of_latent in zip(picture, latent))
    return all(abs(side - scale * of_latent) <= scale for side, of_latent in zip(picture, latent))


def mask_to_frames(mask: torch.Tensor, layout: FrameLayout, name: str, temporal_ratio: int | None = None) -> torch.Tensor:
    """A user's MASK at image size as a boolean mask of every latent frame, (B * T, H, W): more than half covered.

    Args and errors: see `soft_mask_to_frames`.
    """
    return soft_mask_to_frames(mask, layout, name, temporal_ratio) > 0.5


def soft_mask_to_frames(
    mask: torch.Tensor, layout: FrameLayout, name: str, temporal_ratio: int | None = None
) -> torch.Tensor:
    """A user's MASK at image size as a mask of every latent frame, (B * T, H, W) float 0..1: the share that is covered.

    Args:
        mask: (M, h, w) or (h, w), values 0..1, M one, the batch, or the number of all frames.
        name: what the mask is called at the node, for the error.
        temporal_ratio: image frames of a video that one latent frame stands for (the first stands for one). If given,
            M may also be the number of all image frames; those of one latent frame are averaged.

    Raises:
        ValueError: NaN in the mask, an aspect ratio that is not the latent's, or a count that fits neither batch nor
            frames.
    """
    mask = mask.float()
    if mask.ndim == 2:
        mask = mask[None]
    height, width = layout.size
    if mask.ndim != 3 or min(mask.shape) < 1:
        raise ValueError(f"{name}: a MASK of shape (count, height, width) is wanted, {tuple(mask.shape)} came.")
    if not torch.isfinite(mask).all():
        raise ValueError(f"{name}: the mask holds NaN or infinite values. Make it again; values from 0 to 1 are wanted.")
    if not of_one_shape(tuple(mask.shape[1:]), (height, width)):
        raise ValueError(
            f"{name}: a mask of {mask.shape[2]}x{mask.shape[1]} pixels does not have the shape of the latent, which is "
            f"{width}x{height}. Make the mask at the size of the image that is sampled."
        )
    frames = layout.batch * layout.frames_per_sample
    image_frames = 1 + (layout.frames_per_sample - 1) * (temporal_ratio or 1)
    if temporal_ratio and mask.shape[0] == layout.batch * image_frames != frames:
        mask = mask.unflatten(0, (layout.batch, image_frames))
        later = mask[:, 1:].unflatten(1, (-1, temporal_ratio)).mean(dim=2)
        mask = torch.cat([mask[:, :1], later], dim=1).flatten(0, 1)
    if mask.shape[0] not in (1, layout.batch, frames):
        raise ValueError(
            f"{name}: {mask.shape[0]} masks came for {layout.batch} samples of {layout.frames_per_sample} frames. "
            f"Give one mask for all, one a sample, or one a frame."
        )
    mask = F.interpolate(mask[:, None], size=(height, width), mode="area")[:, 0]
    if mask.shape[0] == layout.batch:
        mask = mask.repeat_interleave(layout.frames_per_sample, dim=0)
    return mask.expand(frames, height, width)


def frames_to_mask(frames: torch.Tensor, layout: FrameLayout, latent_format) -> torch.Tensor:
    """A boolean mask of latent frames (B * T, H, W) as a MASK at image size, float 0..1 on the CPU.

    Sizes follow the latent format: every latent pixel becomes a square of its spatial ratio, and of a video the first
    latent frame stands for one image frame, each later one for as many as the temporal ratio says.
    """
    spatial = int(getattr(latent_format, "spacial_downscale_ratio", 1) or 1)
    temporal = temporal_ratio(latent_format)
    mask = frames.float().cpu()
    if layout.frames_per_sample > 1 and temporal > 1:
        mask = mask.unflatten(0, (layout.batch, layout.frames_per_sample))
        mask = torch.cat([mask[:, :1], mask[:, 1:].repeat_interleave(temporal, dim=1)], dim=1).flatten(0, 1)
    return mask.repeat_interleave(spatial, dim=-2).repeat_interleave(spatial, dim=-1)


def temporal_ratio(latent_format) -> int:
    """Image frames of a video that one latent frame after the first stands for."""
    told = getattr(latent_format, "temporal_downscale_ratio", None)
    if told is None:
        told = next((TEMPORAL_RATIOS[kind.__name__] for kind in type(latent_format).__mro__ if kind.__name__ in TEMPORAL_RATIOS), 1)
    return int(told or 1)


def pixels(fraction: float, side: int, minimum: int = 0) -> int:
    """A length given as a fraction of the image's shorter side, in whole latent pixels (halves up), at least `minimum`."""
    return max(minimum, math.floor(fraction * side + 0.5))


def image_channels(latent_format) -> int | None:
    """Channels of a model's images or videos; None if its latent format does not say.

    A format of video with audio may say the larger number of its two streams (MiniMax H3: 32 of the audio, its video has 24). The
    factors of its previews tell, which are one for each channel unless they are for latents of another shape (Flux 2).
    """
    channels, factors = getattr(latent_format, "latent_channels", None), getattr(latent_format, "latent_rgb_factors", None)
    if channels is None or factors is None or getattr(latent_format, "latent_rgb_factors_reshape", None) is not None:
        return channels
    return len(factors)


def check_latent(samples: torch.Tensor, latent_format, nested: bool) -> None:
    """Refuse a latent that the model cannot sample, in words, before sampling starts.

    Args:
        samples: a sampler's tensor, (B, C, ...), or the flat pack of a nested latent, of which the channels are unknown.

    Raises:
        ValueError: no samples in the latent, NaN or infinity, or other channels than the model's latent format has.
    """
    if len(samples) == 0:
        raise ValueError("The latent holds no samples, so there is nothing to sample. Connect one with a batch of 1 or more.")
    if not torch.isfinite(samples).all():
        raise ValueError(
            "The latent holds NaN or infinite values, so no model can sample it. It was damaged before it came here: "
            "a VAE in fp16 or an earlier sampler is the usual cause."
        )
    wanted, came = image_channels(latent_format), samples.shape[1]
    if wanted is not None and not nested and samples.ndim >= 4 and came != wanted:
        raise ValueError(
            f"The latent has {came} channels and this model works on {wanted}. Use the Empty Latent node that belongs "
            f"to the model, or encode the image with the model's own VAE."
        )
