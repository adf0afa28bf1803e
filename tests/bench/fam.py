"""Q4: the flaw highlighter on planted flaws and on the demo model's samples, and refining judged by a second opinion.

The shipped highlighter is judged on test images that no highlighter has seen, with flaws of the kind it was trained on
and with shapes and patterns it was not. Refining takes sound test images with planted flaws as latents of the demo
model. Whether a flaw is gone is asked of a second highlighter: other half of the training images, other seed, and no
part in the refining.
"""

import time
from pathlib import Path

import torch

from ..harness.cache import cache_folder
from .data import load_fashion_mnist
from .demo_quality import sample_classes, save_sheet
from .fam_flaws import as_image, plant_flaws
from .train_highlighter import SHIPPED, second_opinion

JUDGED = 1000
REFINED = 100
STEPS, CFG, DENOISE, ROUNDS = 20, 2.5, 0.5, 3
SEED = 7


def area_under_curve(negative: torch.Tensor, positive: torch.Tensor) -> float:
    """Chance that a positive scores above a negative, ties half: the area under the ROC curve."""
    above = (positive[:, None] > negative[None]).float() + 0.5 * (positive[:, None] == negative[None]).float()
    return above.mean().item()


def localisation(maps: torch.Tensor, masks: torch.Tensor) -> dict:
    """How well maps (N, H, W) in 0..1 point at masks (N, H, W) bool.

    Pointing: the peak lies in the mask, or at most one pixel beside it. IoU: of the map above one half with the mask.
    """
    near = torch.nn.functional.max_pool2d(masks[:, None].float(), 3, stride=1, padding=1)[:, 0].flatten(1)
    peaks = maps.flatten(1).argmax(dim=1, keepdim=True)
    above = maps > 0.5
    overlap = (above & masks).flatten(1).sum(1) / (above | masks).flatten(1).sum(1)
    return {
        "pointing": near.gather(1, peaks).mean().item(),
        "pointing_without_margin": masks.flatten(1).gather(1, peaks).float().mean().item(),
        "pointing_by_chance": masks.float().mean().item(),
        "iou_at_half": overlap.mean().item(),
    }


def judge_flaws(highlighter, images: torch.Tensor, split: str, clean: torch.Tensor) -> dict:
    """Detection and localisation on images with flaws of one split."""
    from artifact_guard.nodes.fam.grad_cam import flaw_map

    flawed, masks = plant_flaws(images, split, SEED)
    maps, probabilities = flaw_map(highlighter, as_image(flawed))
    found = probabilities >= 0.5
    return {
        "auc": area_under_curve(clean, probabilities),
        "accuracy": ((found.float().mean() + (clean < 0.5).float().mean()) / 2).item(),
        **localisation(maps, masks),
        "pointing_where_found": localisation(maps[found], masks[found])["pointing"],
    }


def refine_flaws(highlighter, second, images, labels, output: Path) -> dict:
    """Refine images with planted flaws by the demo model; the figures are the second opinion's."""
    from artifact_guard.nodes.demo.model import class_token, load_demo_model
    from artifact_guard.nodes.fam.refine import Refiner, RefineSettings

    model, vae = load_demo_model()
    flawed, masks = plant_flaws(images, "develop", SEED + 1)
    refined, negative = [], [[class_token(None), {}]]
    settings = RefineSettings(SEED, STEPS, CFG, "euler", "normal", DENOISE, ROUNDS)
    start = time.perf_counter()
    with torch.inference_mode():
        for label in range(10):
            chosen = labels == label
            latent = {"samples": flawed[chosen]}
            positive = [[class_token(label), {}]]
            latent, _, _ = Refiner(model, vae, highlighter, positive, negative, latent, settings).run()
            refined.append(latent["samples"])
    order = torch.cat([torch.nonzero(labels == label)[:, 0] for label in range(10)])
    flawed, masks, clean, refined = flawed[order], masks[order], images[order], torch.cat(refined)
    before, after, sound = (second.generated_probability(as_image(t)) for t in (flawed, refined, clean))
    own_before, own_after = (highlighter.generated_probability(as_image(t)) for t in (flawed, refined))
    changed = (refined != flawed).flatten(1).any(1)
    inside = masks[:, None].expand_as(clean)
    error = [(t - clean)[inside].square().mean().sqrt().item() for t in (flawed, refined)]
    columns = torch.nn.functional.interpolate(torch.cat([flawed[::10], refined[::10], clean[::10]]), scale_factor=4)
    save_sheet(columns, len(flawed[::10]), output / "fam_refined.png", 1)
    return {
        "images": len(flawed), "seconds": time.perf_counter() - start, "redrawn": changed.float().mean().item(),
        "second_opinion_lowered": (after < before).float().mean().item(),
        "second_opinion_lowered_where_redrawn": (after < before)[changed].float().mean().item(),
        "second_opinion_before": before.mean().item(), "second_opinion_after": after.mean().item(),
        "second_opinion_of_the_sound_images": sound.mean().item(),
        "own_before": own_before.mean().item(), "own_after": own_after.mean().item(),
        "distance_to_sound_image_inside_flaw": {"before": error[0], "after": error[1]},
        "settings": {"steps": STEPS, "cfg": CFG, "denoise": DENOISE, "rounds": ROUNDS, "seed": SEED},
    }


def run(pack, output: Path, data: Path | None) -> dict:
    from artifact_guard.nodes.demo import model as demo_model
    from artifact_guard.nodes.fam.highlighter import KIND, FlawHighlighter, fit_images
    from artifact_guard.nodes.fam.spurious import check_cues
    from artifact_guard.nodes.model_files import read_model_file

    (train_images, _), (test_images, test_labels) = load_fashion_mnist(data)
    highlighter = FlawHighlighter.from_state(*read_model_file(str(SHIPPED), SHIPPED.name, KIND))
    second = second_opinion(train_images, cache_folder() / "data")
    order = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(SEED))
    images, labels = test_images[order], test_labels[order]
    sound, spoilt = images[:JUDGED], images[JUDGED : 2 * JUDGED]
    clean = highlighter.generated_probability(as_image(sound))
    figures = {
        "planted_flaws_of_the_trained_kind": judge_flaws(highlighter, spoilt, "develop", clean),
        "planted_flaws_of_another_kind": judge_flaws(highlighter, spoilt, "held out", clean),
    }
    flawed, _ = plant_flaws(spoilt[:200], "develop", SEED)
    judged = fit_images(as_image(torch.cat([sound[:200], flawed])), highlighter.settings)
    cues = check_cues(highlighter.network, judged, torch.tensor([0] * 200 + [1] * 200), torch.device("cpu"))
    figures["spurious_cues"] = {cue.part: {"followed": cue.followed, "pairs": cue.pairs} for cue in cues}
    figures["spurious_check_passed"] = not any(cue.spurious for cue in cues)
    with torch.inference_mode():
        samples, _ = sample_classes(demo_model, per_class=20, seed=300)
    of_samples = highlighter.generated_probability(as_image(samples))
    figures["auc_on_demo_samples"] = area_under_curve(clean, of_samples)
    half = 2 * JUDGED
    figures["second_opinion"] = judge_flaws(second, spoilt, "develop", second.generated_probability(as_image(sound)))
    figures["refine"] = refine_flaws(
        highlighter, second, images[half : half + REFINED], labels[half : half + REFINED], output
    )
    return figures
