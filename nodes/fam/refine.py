"""Refining: renoise the flawed regions of an image, resample them with the attention patch on, keep what got better."""

import logging
import math
from dataclasses import dataclass

import torch

import comfy.sample
import comfy.utils
import latent_preview

from ..latents import FrameLayout, check_latent, soft_mask_to_frames, temporal_ratio
from .attention import AttentionSettings, patch_attention
from .families import family_of
from .flaw_regions import fill_regions, soften
from .grad_cam import flaw_map
from .highlighter import FlawHighlighter
from .noise import add_map
from .vae import check_vae, decode

STARTS = ("surroundings", "image")
"""What a region is redrawn from: the smooth continuation of what surrounds it, or the flawed image itself."""
FLAWED = 0.5
"""An image that the highlighter calls generated with less than this probability is left as it is."""


@dataclass(frozen=True)
class RefineSettings:
    """What the node sets, in the words of core's KSampler where it has them. Raises ValueError."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 0.35
    rounds: int = 1
    attention_strength: float = 0.025
    noise_strength: float = 0.0
    threshold: float = 0.5
    start_from: str = STARTS[0]
    grow: float = 0.03

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; a whole number of 1 or more is wanted.")
        for name, lowest in (("cfg", -math.inf), ("attention_strength", 0.0), ("noise_strength", -math.inf)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= lowest):
                raise ValueError(f"{name} is {value}; a number{' of 0 or more' if lowest == 0 else ''} is wanted.")
        if not 0 < self.denoise <= 1:
            raise ValueError(f"denoise is {self.denoise}; more than 0 (which would change nothing) and at most 1 is wanted.")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; at least 1 is wanted.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; a value from 0 (excluded) to 1 is wanted.")
        if self.start_from not in STARTS:
            raise ValueError(f"start_from is {self.start_from!r}; one of {', '.join(map(repr, STARTS))} is wanted.")
        if not 0 <= self.grow <= 0.5:
            raise ValueError(f"grow is {self.grow}; a fraction of the shorter side from 0 to 0.5 is wanted.")


class Refiner:
    """One refinement: the sample as it is, the maps and probabilities the highlighter gives it, and what was tried."""

    def __init__(self, model, vae, highlighter: FlawHighlighter, positive, negative, latent: dict, settings: RefineSettings):
        self.model, self.vae, self.highlighter, self.settings = model, vae, highlighter, settings
        self.positive, self.negative, self.latent = positive, negative, latent
        samples = latent["samples"]
        if getattr(samples, "is_nested", False):
            raise ValueError("latent: a latent of video and sound together cannot be refined. Separate the video part first.")
        self.format = model.get_model_object("latent_format")
        self.device = samples.device  # with --gpu-only not the CPU, where maps and probabilities are
        self.samples = comfy.sample.fix_empty_latent_channels(model, samples).cpu()
        check_latent(self.samples, self.format, nested=False)
        self.layout = FrameLayout.of([self.samples.shape])
        if self.layout is None:
            raise ValueError(f"latent: it has no image part (its shape is {tuple(samples.shape)}), so there is nothing to refine.")
        axes, mask = getattr(self.format, "latent_dimensions", 2), latent.get("noise_mask")
        if self.samples.ndim != axes + 2:
            raise ValueError(
                f"latent: it has {self.samples.ndim - 2} axes after the channels and this model's have {axes}: it is of another model's "
                "format. Encode the images with the model's own VAE."
            )
        if mask is not None and not torch.isfinite(mask).all():
            raise ValueError("latent: its noise mask holds NaN or infinite values, so where to redraw is not known. Make the mask again.")
        check_vae(model, vae)
        self.temporal_ratio = temporal_ratio(self.format)
        self.attention, self.unpatched = AttentionSettings(settings.attention_strength), None
        try:
            if self.attention.strength:
                family_of(model.get_model_object("diffusion_model"))
        except ValueError as reason:
            self.attention, self.unpatched = AttentionSettings(0.0), str(reason)
            logging.warning("Artifact Guard: refining goes on without the attention patch. %s", reason)
        images = decode(vae, self.samples)
        if not torch.isfinite(images).all():
            raise ValueError("vae: it gives NaN or infinite values for this latent. Decode in fp32 (start ComfyUI with --fp32-vae).")
        self.maps, self.probabilities = self.judge(images)
        self.report = [{"sample": i, "before": p, "rounds": []} for i, p in enumerate(self.probabilities.tolist())]

    def judge(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the decoded frames of all samples: their maps, and the probability of each sample, the mean over its frames."""
        maps, probabilities = flaw_map(self.highlighter, images)
        return maps, probabilities.unflatten(0, (self.layout.batch, -1)).mean(dim=1)

    def regions(self) -> torch.Tensor:
        """Where each sample is to be redrawn, (B, 1, [T,] H, W) in 0..1; nowhere in samples that are judged sound."""
        maps = soft_mask_to_frames(self.maps, self.layout, "flaw_map", self.temporal_ratio)
        regions = soften(maps, self.settings.threshold, self.settings.grow).unflatten(0, (self.layout.batch, -1))
        regions = regions * (self.probabilities >= FLAWED).view(-1, 1, 1, 1)
        regions = regions[:, None] if self.samples.ndim == 5 else regions
        mask = self.latent.get("noise_mask")
        if mask is not None:
            shape = (*self.samples.shape[:1], 1, *self.samples.shape[2:])
            count = mask[..., 0, 0].numel()
            if self.samples.ndim == 5 and mask.ndim < 5 and count == len(self.samples) != self.samples.shape[2]:
                mask = mask.reshape(-1, 1, 1, *mask.shape[-2:])  # one for each sample, which core takes for one video's frames
            regions = regions * comfy.utils.reshape_mask(mask, shape)[:, :1].to(regions)
        return regions

    def resample(self, regions: torch.Tensor, number: int) -> torch.Tensor:
        """The sample with its regions drawn anew; everything else keeps every bit."""
        settings, seed = self.settings, (self.settings.seed + number) % (1 << 64)
        model = patch_attention(self.model, self.maps, self.attention)
        noise = comfy.sample.prepare_noise(self.samples, seed, self.latent.get("batch_index"))
        if settings.noise_strength:
            maps = soft_mask_to_frames(self.maps, self.layout, "flaw_map", self.temporal_ratio)
            noise = add_map(noise, maps, settings.noise_strength)
        start = self.samples
        if settings.start_from == "surroundings":
            start = fill_regions(start, regions, self.layout)
        redrawn = comfy.sample.sample(
            model, noise, settings.steps, settings.cfg, settings.sampler_name, settings.scheduler, self.positive,
            self.negative, start, denoise=settings.denoise, noise_mask=regions, seed=seed,
            callback=latent_preview.prepare_callback(model, settings.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )
        return torch.where(regions > 0, redrawn.to(self.samples), self.samples)

    def round(self, number: int) -> bool:
        """One round; gives False if there was nothing to redraw."""
        regions = self.regions()
        if not regions.any():
            return False
        redrawn = self.resample(regions, number)
        sampled = redrawn.flatten(1).isfinite().all(dim=1)
        redrawn = torch.where(sampled.view(-1, *[1] * (redrawn.ndim - 1)), redrawn, self.samples)
        images = decode(self.vae, redrawn)
        decoded = images.unflatten(0, (self.layout.batch, -1)).flatten(1).isfinite().all(dim=1).cpu()
        whole = sampled & decoded
        maps, probabilities = self.judge(images.nan_to_num(0.0, 0.0, 0.0))
        better = (probabilities < self.probabilities) & whole
        for entry, probability, kept, numbers, was_sampled, region in zip(
            self.report, probabilities.tolist(), better.tolist(), whole.tolist(), sampled.tolist(), regions
        ):
            if region.any():
                told = {"probability": probability if numbers else None, "kept": kept}
                told["region"] = round((region > 0).float().mean().item(), 4)
                if not numbers:
                    told["note"] = f"undone: the {'VAE' if was_sampled else 'sampler'} gave NaN or infinite values for this one"
                entry["rounds"].append(told)
        self.samples = torch.where(better.view(-1, *[1] * (redrawn.ndim - 1)), redrawn, self.samples)
        frames = better.repeat_interleave(len(maps) // len(better))
        self.maps = torch.where(frames[:, None, None], maps, self.maps)
        self.probabilities = torch.where(better, probabilities, self.probabilities)
        return True

    def run(self) -> tuple[dict, torch.Tensor, dict]:
        """All rounds: the LATENT, its maps (MASK), and the report."""
        for number in range(self.settings.rounds):
            if not self.round(number):
                break
        for entry, probability in zip(self.report, self.probabilities.tolist()):
            entry["after"] = probability
            if not entry["rounds"]:
                within = " inside the noise mask" if self.latent.get("noise_mask") is not None else ""
                why = f"judged sound (below {FLAWED})" if entry["before"] < FLAWED else f"its map reaches the threshold nowhere{within}"
                entry["note"] = f"left as it is: {why}"
        report = {"images": self.report} | ({"note": self.unpatched} if self.unpatched else {})
        return {**self.latent, "samples": self.samples.to(self.device)}, self.maps, report
