"""The flaws of a model as it is: a batch of samples, decoded, judged by the highlighter, and their mean map (mFAM)."""

from dataclasses import dataclass

import torch

import comfy.sample

from .grad_cam import flaw_map
from .highlighter import FlawHighlighter
from .vae import decode

SAMPLER, SCHEDULER = "euler", "simple"

PICTURES = ("concat_latent_image", "concat_mask", "reference_latents")
"""Entries of a conditioning that are pictures (an edit's reference, an inpainting model's masked image), one for each latent."""


@dataclass
class FlawBatch:
    """images: IMAGE (B, H, W, C). maps: MASK (B, H, W). probabilities: (B,), of being generated."""

    images: torch.Tensor
    maps: torch.Tensor
    probabilities: torch.Tensor

    @property
    def mean_map(self) -> torch.Tensor:
        """mFAM, the mean over the batch, (1, H, W) in 0..1."""
        return self.maps.mean(dim=0, keepdim=True)


def with_pictures(negative: list, condition: list) -> list:
    """The negative prompt beside the pictures of a condition: of an edit or an inpainting, both are told the same ones."""
    pictures = {name: condition[0][1][name] for name in PICTURES if condition[0][1].get(name) is not None}
    return [[tokens, more | pictures] for tokens, more in negative]


@dataclass
class FlawSampling:
    """How the batch is sampled: what a person would set at a KSampler.

    conditions: the prompts of the training images, each a CONDITIONING of one entry; the batch draws among them.
    shape: of one latent, without the batch axis, in the form a LATENT has it.
    """

    vae: object
    highlighter: FlawHighlighter
    conditions: list
    negative: list
    shape: tuple[int, ...]
    images: int = 8
    steps: int = 20
    cfg: float = 4.0
    scheduler: str = SCHEDULER

    def samples(self, model, seed: int) -> torch.Tensor:
        """A batch of latents from the model as it is, (images, C, [T,] H, W) on the CPU, prompt by prompt."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.conditions), (self.images,), generator=generator)
        parts = []
        for index in chosen.unique().tolist():
            latent = torch.zeros(int((chosen == index).sum()), *self.shape)
            number = (seed + 1 + index) % (1 << 63)
            parts.append(comfy.sample.sample(
                model, comfy.sample.prepare_noise(latent, number), self.steps, self.cfg, SAMPLER, self.scheduler,
                self.conditions[index], with_pictures(self.negative, self.conditions[index]), latent, disable_pbar=True, seed=number,
            ).float().cpu())
        return torch.cat(parts)

    def judge_samples(self, samples: torch.Tensor) -> FlawBatch:
        """Decode latents and judge the images. No gradient is kept: a VAE that ComfyUI loaded would not let one through."""
        with torch.no_grad():
            images = decode(self.vae, samples).float().cpu()
        return self.judge(images)

    def judge(self, images: torch.Tensor) -> FlawBatch:
        """The maps and probabilities of images."""
        return FlawBatch(images, *flaw_map(self.highlighter, images))
