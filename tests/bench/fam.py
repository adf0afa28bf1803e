"""Q4: the flaw highlighter on planted flaws and on the demo model's samples, and refining judged by a second opinion.

The shipped highlighter is judged on test images that no highlighter has seen, with flaws of the kind it was trained on
and with shapes and patterns it was not. Refining takes sound images with planted flaws as latents of the demo model.
Whether a flaw is gone is asked of a second highlighter (other half of the training images, other seed, and no part in the
refining), and of the sound image: how far the picture is from it inside the flaw.

The first 2,100 test images in the order of seed 7, and flaws of seeds 7 and 8, were looked at while earlier highlighters
were made. The figures are of the images after them and of a seed of flaws nobody has used.
"""

from pathlib import Path

import torch

from ..harness.cache import cache_folder
from .data import load_fashion_mnist
from .demo_quality import sample_classes
from .fam_flaws import as_image, plant_flaws
from .fam_refining import refine_flaws
from .train_highlighter import SHIPPED, second_opinion

JUDGED, PAIRS, REFINED = 1000, 200, 100
LOOKED_AT = 2100
ORDER_SEED, FLAW_SEED = 7, 2_026_112


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


def judge_flaws(highlighter, images: torch.Tensor, split: str, clean: torch.Tensor, seed: int) -> dict:
    """Detection and localisation on images with flaws of one split."""
    from artifact_guard.nodes.fam.grad_cam import flaw_map

    flawed, masks = plant_flaws(images, split, seed)
    maps, probabilities = flaw_map(highlighter, as_image(flawed))
    found = probabilities >= 0.5
    return {
        "auc": area_under_curve(clean, probabilities),
        "accuracy": ((found.float().mean() + (clean < 0.5).float().mean()) / 2).item(),
        **localisation(maps, masks),
        "pointing_where_found": localisation(maps[found], masks[found])["pointing"],
    }


def follow_cues(highlighter, sound: torch.Tensor, spoilt: torch.Tensor, seed: int) -> dict:
    """The spurious-cue check on images that the highlighter was not trained on."""
    from artifact_guard.nodes.fam.highlighter import fit_images
    from artifact_guard.nodes.fam.spurious import check_cues

    flawed, _ = plant_flaws(spoilt, "develop", seed)
    judged = fit_images(as_image(torch.cat([sound, flawed])), highlighter.settings)
    classes = torch.tensor([0] * len(sound) + [1] * len(flawed))
    cues = check_cues(highlighter.network, judged, classes, torch.device("cpu"))
    return {
        "followed": {cue.part: {"share": cue.followed, "pairs": cue.pairs} for cue in cues},
        "passed": not any(cue.spurious for cue in cues),
    }


def shipped_highlighter():
    """The one that comes with the demo model."""
    from artifact_guard.nodes.fam.highlighter import KIND, FlawHighlighter
    from artifact_guard.nodes.model_files import read_model_file

    return FlawHighlighter.from_state(*read_model_file(str(SHIPPED), SHIPPED.name, KIND))


def run(pack, output: Path, data: Path | None) -> dict:
    from artifact_guard.nodes.demo import model as demo_model

    (train_images, _), (test_images, test_labels) = load_fashion_mnist(data)
    highlighter, second = shipped_highlighter(), second_opinion(train_images, cache_folder() / "data")
    order = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(ORDER_SEED))[LOOKED_AT:]
    sound, spoilt, refined = order[: 2 * JUDGED + REFINED].split([JUDGED, JUDGED, REFINED])
    sound, spoilt, labels = test_images[sound], test_images[spoilt], test_labels[refined]
    clean = highlighter.generated_probability(as_image(sound))
    figures = {
        "planted_flaws_of_the_trained_kind": judge_flaws(highlighter, spoilt, "develop", clean, FLAW_SEED),
        "planted_flaws_of_another_kind": judge_flaws(highlighter, spoilt, "held out", clean, FLAW_SEED),
        "spurious_cues": follow_cues(highlighter, sound[:PAIRS], spoilt[:PAIRS], FLAW_SEED),
    }
    with torch.inference_mode():
        samples, _ = sample_classes(demo_model, per_class=20, seed=300)
    figures["auc_on_demo_samples"] = area_under_curve(clean, highlighter.generated_probability(as_image(samples)))
    of_second = second.generated_probability(as_image(sound))
    figures["second_opinion"] = judge_flaws(second, spoilt, "develop", of_second, FLAW_SEED)
    figures["refine"] = refine_flaws(highlighter, second, test_images[refined], labels, FLAW_SEED + 1, output)
    return figures
