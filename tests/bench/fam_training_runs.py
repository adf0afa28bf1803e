"""The jobs of `fam_training`, done one by one by as many workers as are started; each leaves one file and is done once.

A worker claims a job by making its .claim file, waits where only jobs are left that need another's result, and begins
nothing after the deadline.
"""

import functools
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..harness.cache import cache_folder
from .classifier import trained_classifier
from .data import load_fashion_mnist
from .distances import frechet, statistics
from .fam_flaws import as_image
from .fam_training_plan import SPLITS, VARIANTS, Job, Size, jobs_of
from .fast_demo import FastDemo

BASE_SEED, HIGHLIGHTER_SEED, POINT_SEED = 700, 900, 800
NEIGHBOURS = 3
BASE_SHARE = 0.3
"""Of the time there is, at most, goes into the base's own training."""

CHANGES = {
    "": lambda map: map,
    "uniform": lambda map: torch.full_like(map, map.mean().item()),
    "rolled": lambda map: map.roll((map.shape[1] // 2, map.shape[2] // 2), (1, 2)),
    "inverted": lambda map: (map.amax() - map) * (map.mean() / (map.amax() - map.mean()).clamp_min(1e-6)),
}
"""Of a map (1, H, W), each of the same mean: right, even, in a wrong place, high where it was low."""


def classes(count: int) -> torch.Tensor:
    """The classes in turn."""
    return torch.arange(count) % 10


def neighbour_radius(features: torch.Tensor) -> torch.Tensor:
    """Distance of each feature vector (N, C) to its third neighbour."""
    return torch.cdist(features, features).kthvalue(NEIGHBOURS + 1, dim=1).values


def coverage(features: torch.Tensor, of: torch.Tensor) -> float:
    """Share of `features` within the neighbourhood of some vector of `of` (arXiv 1904.06991)."""
    return (torch.cdist(features, of) <= neighbour_radius(of)[None]).any(dim=1).float().mean().item()


class Worker:
    """One worker; several may share a folder.

    Args:
        until: time.time() after which no job is begun. minutes: that were left when the bench began.
        only: variants that are wanted. base: a base model that an earlier call trained (`base weights.safetensors`).
    """

    def __init__(
        self, demo_model, folder: Path, data: Path | None, size: Size, until: float, minutes: float, graph: bool = True,
        only: list[str] | None = None, base: Path | None = None,
    ):
        self.demo_model, self.folder, self.size = demo_model, folder, size
        self.until, self.minutes, self.graph, self.only, self.base = until, minutes, graph, only, base
        (self.images, self.labels), self.test = load_fashion_mnist(data)
        self.training: FastDemo | None = None
        self.opinion = None

    def path(self, name: str, ending: str = "json") -> Path:
        return self.folder / f"{name}.{ending}"

    def work(self) -> None:
        """Do jobs until none is left or the time is over."""
        while time.time() < self.until:
            left = [job for job in jobs_of(self.size, self.only) if not any(self.path(job.name, end).exists() for end in ("json", "failed"))]
            for job in left:
                if any(self.path(name, "failed").exists() for name in job.needs):
                    self.path(job.name, "failed").write_text("What it needs failed.")
                elif self.abandoned(job):
                    self.path(job.name, "failed").write_text("The worker that did it ended.")
            ready = [job for job in left if all(self.path(name).exists() for name in job.needs)]
            if not left:
                return
            if not any(self.claim(job) for job in ready):
                time.sleep(0.3)

    def abandoned(self, job: Job) -> bool:
        """Whether the worker that claimed this job is no more and left nothing."""
        claim = self.path(job.name, "claim")
        worker = claim.read_text() if claim.exists() else ""
        if not worker or self.path(job.name).exists() or sys.platform == "win32":  # there, asking for a process ends it
            return False
        try:
            os.kill(int(worker), 0)
        except ProcessLookupError:
            return not self.path(job.name).exists()
        return False

    def claim(self, job: Job) -> bool:
        """Do a job, unless another worker does it; whether it was done or failed here."""
        try:
            with open(self.path(job.name, "claim"), "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        start = time.perf_counter()
        try:
            row = self.do(job)
        except Exception:
            self.path(job.name, "failed").write_text(traceback.format_exc())
            print(f"{job.name} failed: {traceback.format_exc()}", flush=True)
            return True
        row["seconds"] = round(time.perf_counter() - start, 1)
        partial = self.path(job.name, "partial")
        partial.write_text(json.dumps(row))
        os.replace(partial, self.path(job.name))
        told = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(job.name, {key: value for key, value in told.items() if not isinstance(value, (list, dict))}, flush=True)
        return True

    def do(self, job: Job) -> dict:
        if job.name == "base model":
            return self.base_model()
        if job.name == "highlighter":
            return self.train_highlighter()
        return self.ordinary(job) if job.variant == "base" else self.refined(job)

    def demo(self, batch: int) -> FastDemo:
        """The network in training, with a step for batches of this size; its weights are whatever they were last."""
        if self.training is None or self.training.batch != batch:
            self.training = None
            self.training = FastDemo(self.demo_model, self.images, self.labels, batch, self.graph)
        return self.training

    # The base

    def base_model(self) -> dict:
        """Train on from the shipped weights to the plateau, with FD on the way; or take the base that was given."""
        size = self.size
        real = self.features(self.test[0])
        save_file({"features": real}, self.path("real", "safetensors"))
        self.training = None
        training = self.demo(size.base_batch if self.base is None else size.batch)
        if self.base is not None:
            training.begin_with(load_file(self.base))
        found = {"FD_by_step": [[0, self.fd_now(real)]], "steps": 0, "batch": training.batch}
        if self.base is None and size.base_steps:
            self.train_base(training, real, found)
        self.keep_state("base model", training)
        save_file({name: value.half().cpu() for name, value in training.averaged.state_dict().items()},
                  self.path("base weights", "safetensors"))
        samples = training.sample(classes(size.highlighter_images), HIGHLIGHTER_SEED, size.euler)
        save_file({"samples": samples}, self.path("base samples", "safetensors"))
        return found | {
            "cuda_graph": training.graph is not None, "device": str(self.device), "floor": self.floor(real),
            "classifier_accuracy": (self.told(self.test[0]) == self.test[1]).double().mean().item(),
            "brightness": self.test[0].mean().item(), "brightness_of_samples": samples.mean().item(),
        }

    def train_base(self, training: FastDemo, real: torch.Tensor, found: dict) -> None:
        """The base's own training; puts what was seen on the way into `found`. The time there is may cut it short."""
        size, losses = self.size, []

        def train(first: int, end: int, total: int) -> None:
            for step in range(first, end):
                loss = training.step(BASE_SEED * 1_000_003 + step, self.base_rate(step, total), size.decay)
                losses.append(loss.clone())

        begun, done = time.perf_counter(), size.warmup
        train(0, done, size.base_steps)
        torch.stack(losses).cpu()
        found["step_seconds"] = (time.perf_counter() - begun) / done
        steps = min(size.base_steps, max(2 * done, int(BASE_SHARE * 60 * self.minutes / found["step_seconds"])))
        for point in range(1, size.points + 1):
            end = max(done, steps * point // size.points)
            train(done, end, steps)
            done = end
            found["FD_by_step"].append([done, self.fd_now(real)])
            print(f"base model, step {done} of {steps}: FD {found['FD_by_step'][-1][1]:.2f}", flush=True)
        parts = torch.stack(losses).cpu().tensor_split(size.points)
        found |= {"steps": steps, "loss_by_point": [part.mean().item() for part in parts]}

    def base_rate(self, step: int, steps: int) -> float:
        """Linear warm-up to the peak, a quarter of a cosine's way down to `rate` at 70 % of the steps, then level."""
        size = self.size
        if step < size.warmup:
            return size.peak_rate * (step + 1) / size.warmup
        progress = min(1.0, (step - size.warmup) / max(1.0, 0.7 * steps - size.warmup))
        return size.rate + (size.peak_rate - size.rate) * 0.5 * (1 + math.cos(math.pi * progress))

    def floor(self, real: torch.Tensor) -> float:
        """FD of as many test images as a run is judged by."""
        chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: self.size.judged]
        return frechet(statistics(real[chosen].double()), statistics(real.double()))

    def fd_now(self, real: torch.Tensor) -> float:
        samples = self.training.sample(classes(self.size.judged), POINT_SEED, self.size.euler)
        return frechet(statistics(self.features(samples).double()), statistics(real.double()))

    def train_highlighter(self) -> dict:
        """Training images against samples of the base; its map's worth is its held-out accuracy."""
        from artifact_guard.nodes.fam.session import train_highlighter
        from artifact_guard.nodes.fam.training import TrainingSettings

        from .train_highlighter import write

        size, generated = self.size, load_file(self.path("base samples", "safetensors"))["samples"]
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(HIGHLIGHTER_SEED))
        real = self.images[chosen[: size.highlighter_images]]
        settings = TrainingSettings(size.highlighter_epochs, 64, 2e-5, 64, 0, "small")

        class Silent:
            def __init__(self, training):
                pass

            def __call__(self, done: int, total: int) -> None:
                pass

        threads = torch.get_num_threads()
        if self.device.type == "cuda":  # augmentation is the processor's work, and the others wait for this
            torch.set_num_threads(max(threads, (os.cpu_count() or 1) // 2))
        try:
            highlighter, training = train_highlighter(as_image(real), as_image(generated), settings, progress=Silent)
        finally:
            torch.set_num_threads(threads)
        write(highlighter, self.path("highlighter", "safetensors"))
        return {"accuracy": training.accuracy, "by_epoch": training.accuracies, "warnings": list(highlighter.settings.warnings)}

    @property
    def highlighter(self):
        from artifact_guard.nodes.fam.highlighter import KIND, FlawHighlighter
        from artifact_guard.nodes.model_files import read_model_file

        if self.opinion is None:
            while not self.path("highlighter").exists():
                if self.path("highlighter", "failed").exists():
                    raise RuntimeError("the highlighter's training failed")
                time.sleep(0.3)
            path = self.path("highlighter", "safetensors")
            self.opinion = FlawHighlighter.from_state(*read_model_file(str(path), path.name, KIND))
        return self.opinion

    # The runs

    def keep_state(self, name: str, training: FastDemo) -> None:
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in training.state().items()}
        save_file(tensors, self.path(f"state {name}", "safetensors"))

    def go_on(self, name: str) -> FastDemo:
        training = self.demo(self.size.batch)
        training.load(load_file(self.path(f"state {name}", "safetensors")))
        training.set_map(None)
        return training

    def border(self, fraction: float) -> int:
        """The steps of the base phase."""
        return round(fraction * self.size.steps)

    def ordinary(self, job: Job) -> dict:
        """The arm `base`, which leaves its state where the other arms part from it."""
        training, losses = self.go_on("base model"), []
        borders = {self.border(fraction): name for name, fraction in {"1:1": 0.5, **SPLITS}.items()}
        for step in range(self.size.steps):
            if step in borders and (borders[step] == "1:1" or job.seed in self.size.sweep_seeds):
                self.keep_state(f"{borders[step]} {job.seed}", training)
            losses.append(self.step(training, job.seed, step).clone())
        return self.judge(job, training, losses)

    def refined(self, job: Job) -> dict:
        """Another arm, from where its base phase ended."""
        from artifact_guard.nodes.fam.phases import Phases

        variant, size = VARIANTS[job.variant], self.size
        phases = Phases.of(size.steps, variant.base_fraction, variant.map_every or size.map_every)
        split = next((name for name, fraction in SPLITS.items() if fraction == variant.base_fraction), "1:1")
        training, losses, maps = self.go_on(f"{split} {job.seed}"), [], []
        for step in range(phases.base_steps, size.steps):
            if phases.map_due(step):
                flaw_map, probability = self.flaw_map(training, job.seed * 1_000_003 + step)
                training.set_map(CHANGES[variant.change](flaw_map), variant.attention, variant.noise)
                maps.append({"step": step, "mean": flaw_map.mean().item(), "largest": flaw_map.max().item(), "generated": probability})
            losses.append(self.step(training, job.seed, step).clone())
        return self.judge(job, training, losses) | {"maps": maps}

    def step(self, training: FastDemo, seed: int, step: int) -> torch.Tensor:
        return training.step(seed * 1_000_003 + step, self.size.rate, self.size.decay)

    def flaw_map(self, training: FastDemo, seed: int) -> tuple[torch.Tensor, float]:
        """mFAM of a batch of the averaged weights, (1, 32, 32), and how generated it looks."""
        from artifact_guard.nodes.fam.flaw_batch import FlawBatch
        from artifact_guard.nodes.fam.grad_cam import flaw_map

        images = as_image(training.sample(classes(self.size.map_images), seed, self.size.euler))
        batch = FlawBatch(images, *flaw_map(self.highlighter, images, batch=64))
        return batch.mean_map, batch.probabilities.mean().item()

    @property
    def device(self) -> torch.device:
        import comfy.model_management

        return comfy.model_management.get_torch_device()

    @functools.cached_property
    def classifier(self):
        with torch.enable_grad():
            return trained_classifier(self.images, self.labels, cache_folder() / "data", device=self.device).to(self.device)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The classifier's, (N, 128) float32, on the CPU."""
        return torch.cat([self.classifier.features(part.to(self.device)).cpu() for part in images.split(500)])

    @torch.no_grad()
    def told(self, images: torch.Tensor) -> torch.Tensor:
        """The classes (N,) that the classifier sees."""
        return torch.cat([self.classifier(part.to(self.device)).argmax(dim=1).cpu() for part in images.split(500)])

    @torch.no_grad()
    def judge(self, job: Job, training: FastDemo, losses: list[torch.Tensor]) -> dict:
        """Sample, judge, keep the features."""
        loss = torch.stack(losses).cpu()
        if not torch.isfinite(loss).all():
            raise RuntimeError(f"the loss of {job.name} was not a number")
        count = self.size.judged
        samples = training.sample(classes(count), job.seed, self.size.euler)
        features, real = self.features(samples), load_file(self.path("real", "safetensors"))["features"]
        save_file({"features": features}, self.path(job.name, "safetensors"))
        (mean, _), (real_mean, _) = own, wanted = statistics(features.double()), statistics(real.double())
        chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count]
        near, real_near = features.to(self.device), real[chosen].to(self.device)
        generated = self.highlighter.generated_probability(as_image(samples[:1000]), batch=100)
        return {
            "FD": frechet(own, wanted), "FD_of_means": (mean - real_mean).square().sum().item(),
            "precision": coverage(near, real_near), "recall": coverage(real_near, near),
            "as_asked": (self.told(samples) == classes(count)).double().mean().item(), "brightness": samples.mean().item(),
            "judged_generated": generated.mean().item(), "loss": loss[-len(loss) // 5 :].mean().item(),
        }
