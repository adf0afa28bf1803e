"""Q1 where a run does not begin from nothing: image to image, inpainting, a sampler that goes on where another one left off.

Exact and local denoisers of the benchmarks' data with scripted traps of the held-out families, amplitude 0.4, moved into the
window where that begins late, 25 Euler steps; and the demo model, of which the fit of the default's network saw nothing, with
samplers and steps as people use them. Beside the default the hand-made rule, which its network replaces.
"""

import random
from pathlib import Path

import torch

from ..exact.denoiser import ExactDenoiser
from ..exact.local import LocalDenoiser
from ..exact.trap_families import make_traps, one_per_sample
from .data import load_fashion_mnist
from .detection import HAND_MADE, LOCAL_IMAGES, PARAMETERIZATIONS, SHIFTED, Score, describe, make_model
from .exact_runs import BATCH, SIZE, STEPS, data_sets
from .trap_runs import HANDED, PARTIAL, demo_run, entered, record, standing, watched

AMPLITUDE = 0.4
NUMBERS = (*range(PARTIAL + 400, PARTIAL + 406), HANDED + 400)
"""Seeds of the batches of each data set, parameterization and denoiser; from HANDED on runs that go on."""
DEMO_BATCHES = (*range(1400, 1432), *range(HANDED + 100, HANDED + 108))
"""Half of them clean. Those below were looked at when limits were chosen."""
EULER = {"steps": STEPS, "sampler_name": "euler", "scheduler": "normal"}


def planted_run(images: torch.Tensor, parameterization: str, number: int, trapped: bool, denoiser) -> dict:
    """A batch, with held-out traps or none: what record() gives, and the truth."""
    planted = []
    if trapped:
        size, channels = (SIZE, SIZE), images.shape[1]
        planted = make_traps("scripted", "held out", number, size, BATCH, channels, AMPLITUDE, textures=images)
    bare = make_model(images, parameterization, denoiser=denoiser)
    entry, planted = entered(random.Random(f"{parameterization} {number}"), number, images, planted, bare, EULER)
    traps = one_per_sample(planted) if planted else []
    run = record(make_model(images, parameterization, denoiser=denoiser, traps=traps), number, EULER, entry)
    return run | {"truth": standing(planted, run["valid"])}


def judge(scores: dict, who: str, run: dict) -> None:
    """Add what the default and the hand-made rule make of a batch to their scores."""
    from artifact_guard.nodes.asced.dynamics import DynamicsDetector
    from artifact_guard.nodes.asced.learned import LearnedDetector

    case = "traps" if run["truth"].any() else "clean"
    for rule, detector in (("score dynamics", LearnedDetector), (HAND_MADE, DynamicsDetector)):
        findings = watched(detector, run["estimates"], run["ratios"], run["valid"]).findings()
        found = torch.zeros_like(run["truth"]) if findings is None else findings.regions
        for key in (f"{who}, {run['entry']}, {rule}", f"{who}, all, {rule}"):
            scores.setdefault(key, {"clean": Score(), "traps": Score()})[case].add(found, run["truth"])


def run(pack, output: Path, data: Path | None, cifar: Path | None = None) -> dict:
    scores: dict = {}
    for name, images in data_sets(data, cifar).items():
        few = images[:: len(images) // LOCAL_IMAGES]
        for who, pictures, denoiser in (("exact denoisers", images, ExactDenoiser(images, 0.05)),
                                        ("local denoisers", few, LocalDenoiser(few, 3.5))):
            for parameterization in (*PARAMETERIZATIONS, SHIFTED):
                for number in NUMBERS:
                    for trapped in (False, True):
                        judge(scores, who, planted_run(pictures, parameterization, number, trapped, denoiser))
        print(name, {key: describe(cases) for key, cases in scores.items() if ", all, score" in key}, flush=True)
    photos = load_fashion_mnist(data)[1]
    for number in DEMO_BATCHES:
        judge(scores, "demo model", demo_run(number, pack.nodes.demo.model, photos))
    return {key: describe(cases) for key, cases in scores.items()}
