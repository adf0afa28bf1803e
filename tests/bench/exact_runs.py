"""What the benchmarks on the exact denoiser share: its data sets, trapped batches, and guarded runs of them."""

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from ..exact.images import as_latents, cifar10, shape_images
from ..exact.model import Trajectory, sample
from ..exact.trap_families import make_traps, one_per_sample
from .data import load_fashion_mnist

SIZE = 32
BATCH = 32
STEPS = 25


def data_sets(data: Path | None, cifar: Path | None = None, count: int = 1200) -> dict[str, torch.Tensor]:
    """Images (count, C, 32, 32) of each data set by name: drawn by code, Fashion-MNIST, and CIFAR-10 if its zip is given.

    The detector's constants were chosen on shapes of another seed, on training images of CIFAR-10 (these are its test
    images), and, after a first try had failed here, on other images of Fashion-MNIST.
    """
    fashion = load_fashion_mnist(data)[0][0]
    spread = torch.linspace(0, len(fashion) - 1, count).long()
    sets = {"shapes": shape_images(count, SIZE, seed=7), "fashion-mnist": fashion[spread]}
    if cifar is not None:
        sets["cifar-10"] = cifar10(cifar, "test", count)[0]
    return sets


def latent_sets(cifar: Path | None = None, count: int = 1200) -> dict[str, torch.Tensor]:
    """Made-up latents (count, C, 32, 32) of pictures of 64x64, by name: of drawn ones, of CIFAR-10's if its zip is given."""
    pictures = {"shapes": shape_images(count, 2 * SIZE, seed=7)}
    if cifar is not None:
        pictures["cifar-10"] = F.interpolate(cifar10(cifar, "test", count)[0], 2 * SIZE, mode="bicubic").clamp(-1, 1)
    return {
        f"{name}, latents of {channels} channels": as_latents(images, channels, seed=channels)
        for name, images in pictures.items() for channels in (4, 12)
    }


@dataclass
class Run:
    """One batch sampled under a guard: result x0, every step's clean estimate (S, B, C, H, W), the guard's record."""

    result: torch.Tensor
    estimates: torch.Tensor
    record: object


def trapped_batch(kind: str, split: str, seed: int, images: torch.Tensor, **settings) -> tuple[list, torch.Tensor]:
    """Traps for a batch, one a sample, and the truth (B, H, W)."""
    traps = make_traps(kind, split, seed, (SIZE, SIZE), BATCH, channels=images.shape[1], textures=images, **settings)
    truth = torch.cat([trap.mask for trap in traps])
    return one_per_sample(traps), truth


def guarded_run(pack, model, settings, seed: int, steps: int = STEPS, **sampling) -> Run:
    """Sample a batch of the exact model under a guard with these settings."""
    guarded, report = pack.nodes.asced.guard.guard_model(model, settings)
    trajectory = Trajectory()
    shape = (BATCH, model.model.latent_format.latent_channels, SIZE, SIZE)
    with torch.inference_mode():
        result = sample(guarded, steps=steps, seed=seed, latent=shape, callback=trajectory, **sampling)
    return Run(result, trajectory.stack(), report.find({"samples": result}))


FIXED_END = 3.1
"""Noise ratio b / a of the published correction step, t / T = 0.48 to 0.52 of a linear-beta schedule."""


def hand_made_rule(pack):
    """A context in which the default detector goes without its network: the rule of dynamics.py alone."""
    return mock.patch.object(pack.nodes.asced.watch, "LearnedDetector", pack.nodes.asced.dynamics.DynamicsDetector)


def fixed_window(pack):
    """A context in which the default detector's window ends where the paper's does, instead of where it is best for it."""
    detector = pack.nodes.asced.dynamics.DynamicsDetector
    return mock.patch.object(detector, "auto_window", (detector.auto_window[0], FIXED_END))
