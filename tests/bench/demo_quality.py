"""How good the demo model is: does a classifier see the class that was asked for, how long does it take, a sheet."""

import time
from pathlib import Path

import torch
from PIL import Image

from ..harness.cache import cache_folder
from .classifier import predict, trained_classifier
from .data import load_fashion_mnist

STEPS, CFG, SAMPLES_PER_CLASS = 20, 2.5, 50


def sample_classes(demo_model, per_class: int, seed: int, sampler: str = "euler") -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of every class through core's own KSampler: images (N, 3, 32, 32) in [-1, 1], labels (N,)."""
    import nodes as core

    model, _ = demo_model.load_demo_model()
    images, labels = [], []
    for label in range(len(demo_model.LABELS)):
        positive, negative = ([[demo_model.class_token(c), {}]] for c in (label, None))
        latent = {"samples": torch.zeros(per_class, 3, 32, 32)}
        (out,) = core.common_ksampler(
            model, seed + label, STEPS, CFG, sampler, "normal", positive, negative, latent, disable_noise=False
        )
        images.append(out["samples"].float().cpu())
        labels.append(torch.full((per_class,), label))
    return torch.cat(images), torch.cat(labels)


def save_sheet(images: torch.Tensor, columns: int, path: Path, scale: int = 2) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one PNG, `columns` a row."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    sheet = torch.cat(rows, dim=1).movedim(0, -1)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(path)


def run(pack, output: Path, data: Path | None) -> dict:
    demo_model = pack.nodes.demo.model
    train, test = load_fashion_mnist(data)
    classifier = trained_classifier(*train, cache_folder() / "data")
    accuracy = (predict(classifier, test[0]) == test[1]).float().mean().item()
    with torch.inference_mode():
        start = time.perf_counter()
        sample_classes(demo_model, per_class=16, seed=1000)
        seconds = (time.perf_counter() - start) / len(demo_model.LABELS)
        images, labels = sample_classes(demo_model, SAMPLES_PER_CLASS, seed=0)
    named = (predict(classifier, images) == labels).float()
    save_sheet(images.unflatten(0, (10, -1))[:, :12].flatten(0, 1), 12, output / "demo_samples.png")
    return {
        "classifier_accuracy_on_test_images": accuracy,
        "samples_named_as_asked": named.mean().item(),
        "named_as_asked_by_class": {
            name: named[labels == i].mean().item() for i, name in enumerate(demo_model.LABELS)
        },
        "seconds_per_batch_of_16": seconds,
        "steps": STEPS, "cfg": CFG, "samples": len(images),
    }
