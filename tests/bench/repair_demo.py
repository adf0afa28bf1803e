"""Q2: how freely the demo model draws a region again, by what it is renoised from: there is more than one sound answer.

On an exact denoiser what lies around a region leaves one picture to draw. Here a region of the shapes of `repair`, one in
each of the samples, is redrawn whether or not anything is wrong with it: RMS difference inside it between results with
other noise seeds, and to the picture before; diversity, as in `repair`; and whether a classifier sees what was asked for.
"""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from unittest import mock

import torch

from ..exact.model import sample
from ..exact.trap_families import make_traps
from ..harness.cache import cache_folder
from .classifier import accuracy, trained_classifier
from .data import load_fashion_mnist
from .exact_runs import BATCH, SIZE
from .repair import NOISE_SEEDS, cases, spread

STEPS, CFG, SEEDS = 20, 2.5, range(2)
CORRECTIONS = ("surroundings", "state replacement", "targeted", "surroundings, strength 5")
DOUBTED = "surroundings, all doubted"
"""The default correction of regions that the detector doubts: from before their onset. Sound ones are mostly of these."""


def masks_of(seed: int) -> torch.Tensor:
    """A region in each of the samples, (B, H, W) bool."""
    traps = make_traps("attractor", "held out", seed, (SIZE, SIZE), BATCH, channels=3, textures=torch.zeros(1, 3, SIZE, SIZE))
    return torch.cat([trap.mask for trap in traps])


def redrawn(pack, settings, seed: int, labels: torch.Tensor, doubted: bool = False):
    """Samples of the demo model, and what was renoised: the masks, if the settings repair. doubted: all of them are."""
    demo = pack.nodes.demo.model
    guarded, report = pack.nodes.asced.guard.guard_model(demo.load_demo_model()[0], settings)
    found = masks_of(seed)

    def findings(watch, now):
        seen = watch.detector.findings()
        return seen._replace(regions=found, suspected=True, likely=torch.zeros_like(found) if doubted else None, sure=None), None

    with torch.inference_mode(), mock.patch.object(pack.nodes.asced.watch.Watch, "_findings", findings):
        result = sample(
            guarded, steps=STEPS, cfg=CFG, seed=seed, latent=(BATCH, 3, SIZE, SIZE), negative=[[demo.class_token(None), {}]],
            positive=[[torch.cat([demo.class_token(int(label)) for label in labels]), {}]],
        )
    return result, report.find({"samples": result}).repaired


def run(pack, output: Path, data: Path | None) -> dict:
    classifier = trained_classifier(*load_fashion_mnist(data)[0], cache_folder() / "data")
    labels = torch.arange(BATCH) % len(pack.nodes.demo.model.LABELS)
    sums: dict = {}

    def add(name: str, **figures: float) -> None:
        for key, value in figures.items():
            sums.setdefault(name, {}).setdefault(key, []).append(value)

    for seed in SEEDS:
        bare, _ = redrawn(pack, replace(cases(pack)["default"][0], mode="detect only"), seed, labels)
        add("unguarded", as_asked=accuracy(classifier, bare, labels))
        for correction in (*CORRECTIONS, DOUBTED):
            settings, _ = cases(pack)[f"{correction.removesuffix(', all doubted')}, true masks"]
            results = []
            for noise_seed in range(NOISE_SEEDS):
                other = replace(settings, options=replace(settings.options, noise_seed=noise_seed))
                result, mask = redrawn(pack, other, seed, labels, correction == DOUBTED)
                results.append(result)
                add(correction, as_asked=accuracy(classifier, result, labels), diversity=spread(result) / spread(bare),
                    changed_rms=mean_square(result - bare, mask))
            for one, other in combinations(results, 2):
                add(correction, between_noise_seeds_rms=mean_square(one - other, mask))
    return {name: {key: mean_of(key, values) for key, values in figures.items()} for name, figures in sums.items()}


def mean_square(difference: torch.Tensor, mask: torch.Tensor) -> float:
    """Of (B, C, H, W) inside the mask (B, H, W)."""
    return difference.square().mean(dim=1)[mask].mean().item()


def mean_of(key: str, values: list[float]) -> float:
    """The root of the mean where squares were kept."""
    mean = sum(values) / len(values)
    return round(mean**0.5 if key.endswith("rms") else mean, 4)
