"""Q1: detection of scripted traps on the exact denoiser, the guard's detectors against the published rule.

All see the same trajectories in the same window, 25 Euler steps, traps of the held-out families. Reported per
parameterization and data set: pixel F1 by amplitude, share of trapped and clean images judged rightly, share of clean
pixels flagged.
"""

from pathlib import Path

import torch

from ..exact.model import exact_model
from ..quality.published import detect
from .exact_runs import data_sets, guarded_run, trapped_batch

AMPLITUDES = (0.2, 0.4, 0.8)
SEEDS = (0, 1, 2)


class Score:
    """Pixels and images judged rightly and wrongly."""

    def __init__(self):
        self.hit = self.false = self.missed = self.images_right = self.images = 0

    def add(self, found: torch.Tensor, truth: torch.Tensor) -> None:
        self.hit += int((found & truth).sum())
        self.false += int((found & ~truth).sum())
        self.missed += int((~found & truth).sum())
        self.images_right += int((found.flatten(1).any(1) == truth.flatten(1).any(1)).sum())
        self.images += len(found)

    @property
    def f1(self) -> float:
        return 2 * self.hit / max(1, 2 * self.hit + self.false + self.missed)


def rules(pack) -> dict:
    """Name -> function of a guarded run that gives its masks (B, H, W), the run watched by that rule's guard."""
    options = pack.nodes.asced.options
    return {
        name: options.GuardSettings(mode="detect only", options=options.AscedOptions(detector=name))
        for name in options.DETECTORS
    }


def published_masks(run) -> torch.Tensor:
    """Masks by the independent reference, without a floor under the blur: on 32x32 the floor of one pixel harms it."""
    window = run.record.window
    estimates = run.estimates[window.detect_from:window.correct_at + 1].float()
    return torch.from_numpy(detect(estimates.numpy(), least_blur=0.0))


def run(pack, output: Path, data: Path | None) -> dict:
    figures = {}
    for data_name, images in data_sets(data).items():
        for parameterization in ("eps", "flow"):
            scores: dict = {}

            def judge(model, truth, seed, case):
                for name, settings in rules(pack).items():
                    watched = guarded_run(pack, model, settings, seed)
                    scores.setdefault((name, case), Score()).add(watched.record.regions, truth)
                scores.setdefault(("published (numpy)", case), Score()).add(published_masks(watched), truth)

            for seed in SEEDS:
                for amplitude in AMPLITUDES:
                    traps, truth = trapped_batch("scripted", "held out", seed, images, amplitude=amplitude)
                    judge(exact_model(images, parameterization, traps=traps), truth, seed, amplitude)
                judge(exact_model(images, parameterization), torch.zeros_like(truth), seed, "clean")
            for (name, case), score in scores.items():
                row = figures.setdefault(f"{data_name}, {parameterization}, {name}", {})
                if case == "clean":
                    row["clean_pixels_flagged"] = score.false / (score.images * truth[0].numel())
                    row["clean_images_flagged"] = 1 - score.images_right / score.images
                else:
                    row[f"f1_at_{case}"] = score.f1
    return figures
