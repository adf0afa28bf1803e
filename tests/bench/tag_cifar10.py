"""Q3 on CIFAR-10: a class-conditional model of ours, trained here, then the tables of noise at every step and of few steps.

    python dev.py bench tag_cifar10 --cifar10 ZIP [--minutes 4.5]

The demo model's network, twice as wide, by the demo model's training, in batches of 256 for so many minutes: it is
planned to end in time, and the figures say how many steps that were. For a GPU. Without one the same script runs at a tiny
size, which shows that it works and nothing else. Training goes on where it was stopped. ZIP may hold a part of the images.
"""

import json
import time
import types
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..exact.images import cifar10
from ..harness.cache import cache_folder
from .cifar_classifier import EPOCHS, trained_cifar_classifier
from .classifier import accuracy
from .demo_quality import save_sheet
from .distances import Judge
from .tag_demo import FEW_STEPS, NOISES, STEPS, Comparison, DemoRuns, Sizes
from .train_demo import TRAINING
from .train_demo import train as train_model
from .train_time_predictor import new as new_predictor
from .train_time_predictor import train as train_predictor


@dataclass(frozen=True)
class Size:
    """images: of the training set, None for all. width: channels of the model's first level. steps: of its training, None
    for as many as fit into `minutes`. pairs: see tag_demo.
    """

    images: int | None
    width: int
    batch: int
    steps: int | None
    minutes: float | None
    predictor_steps: int
    classifier_width: int
    classifier_epochs: int
    pairs: Sizes


FULL = Size(
    images=None, width=64, batch=256, steps=None, minutes=4.5, predictor_steps=3000, classifier_width=64,
    classifier_epochs=EPOCHS, pairs=Sizes(batch=512, calm=2048, steady=2048, few=2048, others=2048, measured=512),
)
TINY = Size(
    images=640, width=32, batch=16, steps=2, minutes=None, predictor_steps=4, classifier_width=8, classifier_epochs=1,
    pairs=Sizes(batch=16, calm=16, steady=16, few=16, others=16, measured=4),
)
SHOWN = 40
"""Samples of the picture that shows what the model draws, ten classes in turn."""


def load(archive: Path, size: Size, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    return cifar10(archive, split, size.images, cache=None if size is TINY else cache_folder() / "data")


def trained(demo_model, images, labels, size: Size, output: Path, device: torch.device):
    """(the model as a ModelPatcher, what its training says of itself)."""
    config = demo_model.UNET_CONFIG | {"model_channels": size.width}
    like_the_demo = types.SimpleNamespace(
        DemoConfig=demo_model.DemoConfig, UNET_CONFIG=config, LABELS=demo_model.LABELS, class_token=demo_model.class_token
    )
    output.mkdir(parents=True, exist_ok=True)
    weights = train_model(like_the_demo, images, labels, output, size.steps, 0, device, size.batch, size.minutes)
    parameters = sum(weight.numel() for weight in weights.values())
    told = json.loads((output / TRAINING).read_text()) | {"parameters": parameters}
    return demo_model.build_demo_model(weights, config), told


def run(pack, output, data, cifar: Path | None, minutes: float | None = None, size: Size | None = None) -> dict:
    if cifar is None:
        print("Skipped: pass --cifar10 ZIP, a zip of CIFAR-10 as JPEG files SPLIT/CLASS/NAME.jpg.", flush=True)
        return {"skipped": "no --cifar10"}
    import comfy.model_management
    from artifact_guard.nodes.tag.training import TrainingData

    demo_model, device = pack.nodes.demo.model, comfy.model_management.get_torch_device()
    if size is None:
        size = FULL if device.type == "cuda" else TINY
    if minutes is not None and size.steps is None:
        size = replace(size, minutes=minutes)
    if size.pairs is TINY.pairs:
        print("A tiny model on few images. Its figures say nothing about CIFAR-10.", flush=True)
    seconds, begun = {}, time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - begun - sum(seconds.values()), 1)
        print(f"{name}: {seconds[name]} s", flush=True)

    (images, labels), test = load(cifar, size, "train"), load(cifar, size, "test")
    lap("images read")
    classifier = trained_cifar_classifier(
        images, labels, output / "cifar10-classifier", device, size.classifier_width, size.classifier_epochs)
    told = {"size": asdict(size), "train_images": len(images), "classifier_accuracy": accuracy(classifier, *test)}
    lap("classifier")
    model, told["training"] = trained(demo_model, images, labels, size, output / f"cifar10-{size.width}", device)
    print(told, flush=True)
    lap("model")
    frames = TrainingData(images)
    predictor = train_predictor(new_predictor(model, frames, 0), frames, size.predictor_steps, 0, device)
    lap("predictor")
    runs = DemoRuns(demo_model, size.pairs, model)
    shown = runs(model, noise=0.0, steps=STEPS, count=min(SHOWN, size.pairs.calm // 10 * 10))
    save_sheet(shown, 10, output / "tag_cifar10.png")
    compare = Comparison(runs, Judge(classifier, test[0], runs.labels), (images, labels), predictor)
    cases = {"training-free (default)": {}, "predictor": {"predictor": predictor}}
    for steps in FEW_STEPS:
        compare(f"{steps} steps", cases, noise=0.0, steps=steps, count=size.pairs.of_steps(steps))
    for noise in NOISES:
        compare(f"noise {noise}", cases, noise=noise, steps=STEPS, count=size.pairs.of_noise(noise))
    floors = {count: compare.judge.floor(count) for count in sorted({size.pairs.calm, size.pairs.few, size.pairs.steady})}
    lap("comparison")
    return told | {"seconds": seconds, "floors": floors, "cases": compare.figures}
