"""Refining judged: images with planted flaws, refined by the demo model, before a second highlighter and the sound images."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F

from .demo_quality import save_sheet
from .fam_flaws import as_image, plant_flaws

SETTINGS = {
    "seed": 7, "steps": 20, "cfg": 2.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5, "rounds": 3,
    "threshold": 0.3,
}
"""The widgets of Refine Flaws, as in the template; the others are left at their defaults."""


def refine(highlighter, flawed: torch.Tensor, labels: torch.Tensor, **settings) -> torch.Tensor:
    """Flawed images (N, 3, 32, 32) in [-1, 1], refined class by class by the demo model."""
    from artifact_guard.nodes.demo.model import class_token, load_demo_model
    from artifact_guard.nodes.fam.refine import Refiner, RefineSettings

    model, vae = load_demo_model()
    refined, negative = flawed.clone(), [[class_token(None), {}]]
    with torch.inference_mode():
        for label in labels.unique().tolist():
            chosen, positive = labels == label, [[class_token(label), {}]]
            latent = {"samples": flawed[chosen]}
            refiner = Refiner(model, vae, highlighter, positive, negative, latent, RefineSettings(**SETTINGS | settings))
            refined[chosen] = refiner.run()[0]["samples"]
    return refined


def error_in_region(images: torch.Tensor, sound: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """RMS distance of each image (N, 3, H, W) to its sound original inside masks (N, H, W), of the [-1, 1] range."""
    squares = (images - sound).square().mean(dim=1)
    return ((squares * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)).sqrt()


def refine_flaws(
    highlighter, second, images: torch.Tensor, labels: torch.Tensor, flaw_seed: int, output: Path, **settings
) -> dict:
    """Plant flaws into images, refine them, and judge the result; a picture of every tenth goes to `output`."""
    flawed, masks = plant_flaws(images, "develop", flaw_seed)
    start = time.process_time()
    refined = refine(highlighter, flawed, labels, **settings)
    seconds = time.process_time() - start
    before, after, sound = (second.generated_probability(as_image(t)) for t in (flawed, refined, images))
    own_before, own_after = (highlighter.generated_probability(as_image(t)) for t in (flawed, refined))
    error, left = (error_in_region(t, images, masks) for t in (flawed, refined))
    changed = (refined != flawed).flatten(1).any(1)
    shown = F.interpolate(torch.cat([t[::10] for t in (flawed, refined, images)]), scale_factor=4)
    save_sheet(shown, len(flawed[::10]), output / "fam_refined.png", 1)
    return {
        "images": len(flawed), "processor_seconds": seconds, "redrawn": changed.float().mean().item(),
        "second_opinion_lowered": (after < before).float().mean().item(),
        "second_opinion_lowered_where_redrawn": (after < before)[changed].float().mean().item(),
        "second_opinion": {"before": before.mean().item(), "after": after.mean().item(), "sound": sound.mean().item()},
        "second_opinion_judges_flawed": {
            name: (p >= 0.5).float().mean().item() for name, p in (("before", before), ("after", after), ("sound", sound))
        },
        "own": {"before": own_before.mean().item(), "after": own_after.mean().item()},
        "error_inside_flaw": {"before": error.mean().item(), "after": left.mean().item()},
        "error_halved": (left < error / 2).float().mean().item(), "error_grew": (left > error).float().mean().item(),
        "settings": SETTINGS | settings,
    }
