"""Q3 on CIFAR-10: a class-conditional model of ours, trained here, then the tables of noise at every step and of few steps.

    python dev.py bench tag_cifar10 --cifar10 ZIP

The demo model's network, three times as wide, by the demo model's training. For a GPU, and never run at full size so
far: none was at hand. Without one the same script runs at a tiny size, which shows that it works and nothing else.
Training goes on where it was stopped.
"""

import types
from dataclasses import dataclass
from pathlib import Path

import torch

from ..exact.images import cifar10
from ..harness.cache import cache_folder
from .classifier import predict, trained_classifier
from .distances import Judge
from .tag_demo import FEW_STEPS, NOISES, STEPS, Comparison, DemoRuns
from .train_demo import train as train_model
from .train_time_predictor import new as new_predictor
from .train_time_predictor import train as train_predictor


@dataclass(frozen=True)
class Size:
    """images: of the training set. width: channels of the first level. steps: of the model's and the predictor's training."""

    images: int | None
    width: int
    steps: int
    predictor_steps: int
    pairs: int


FULL = Size(images=None, width=96, steps=40_000, predictor_steps=3000, pairs=512)
TINY = Size(images=640, width=32, steps=2, predictor_steps=4, pairs=16)


def load(archive: Path, size: Size, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    return cifar10(archive, split, size.images, cache=None if size is TINY else cache_folder() / "data")


def trained(demo_model, images, labels, size: Size, output: Path, device: torch.device):
    """The model as a ModelPatcher, trained for size.steps steps."""
    config = demo_model.UNET_CONFIG | {"model_channels": size.width}
    like_the_demo = types.SimpleNamespace(
        DemoConfig=demo_model.DemoConfig, UNET_CONFIG=config, LABELS=demo_model.LABELS, class_token=demo_model.class_token
    )
    output.mkdir(parents=True, exist_ok=True)
    weights = train_model(like_the_demo, images, labels, output, size.steps, 0, device)
    return demo_model.build_demo_model(weights, config)


def run(pack, output, data, cifar: Path | None, size: Size | None = None) -> dict:
    if cifar is None:
        print("Skipped: pass --cifar10 ZIP, a zip of CIFAR-10 as JPEG files SPLIT/CLASS/NAME.jpg.", flush=True)
        return {"skipped": "no --cifar10"}
    import comfy.model_management
    from artifact_guard.nodes.tag.training import TrainingData

    demo_model, device = pack.nodes.demo.model, comfy.model_management.get_torch_device()
    if size is None:
        size = FULL if device.type == "cuda" else TINY
    if size is TINY:
        print("No GPU: a tiny model on few images. Its figures say nothing about CIFAR-10.", flush=True)
    (images, labels), test = load(cifar, size, "train"), load(cifar, size, "test")
    model = trained(demo_model, images, labels, size, output / f"cifar10-{size.width}", device)
    frames = TrainingData(images)
    predictor = train_predictor(new_predictor(model, frames, 0), frames, size.predictor_steps, 0, device)
    classifier = trained_classifier(images, labels, output / f"cifar10-classifier-{len(images)}")
    runs = DemoRuns(demo_model, model)
    judge = Judge(classifier, test[0], runs.labels)
    compare = Comparison(runs, judge, (images, labels), predictor)
    cases = {"training-free (default)": {}, "predictor": {"predictor": predictor}}
    for steps in FEW_STEPS:
        compare(f"{steps} steps", cases, noise=0.0, steps=steps, count=size.pairs)
    for noise in NOISES:
        compare(f"noise {noise}", cases, noise=noise, steps=STEPS, count=size.pairs)
    accuracy = (predict(classifier, test[0]) == test[1]).float().mean().item()
    return {"size": vars(size), "classifier_accuracy": round(accuracy, 4), "floor": judge.floor(size.pairs)} | compare.figures
