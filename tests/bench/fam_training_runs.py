"""The jobs of `fam_training`: the base, the highlighter, and the runs."""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .data import load_fashion_mnist
from .fam_flaws import as_image
from .fam_training_judge import Judge, classes
from .fam_training_plan import SPLITS, VARIANTS, Size, jobs_of
from .fast_demo import FastDemo
from .job_queue import Job, JobQueue

BASE_SEED, HIGHLIGHTER_SEED, POINT_SEED = 700, 900, 800
BASE_SHARE = 0.3
"""Of the time there is, at most, goes into the base's own training."""

CHANGES = {
    "": lambda map: map,
    "uniform": lambda map: torch.full_like(map, map.mean().item()),
    "rolled": lambda map: map.roll((map.shape[1] // 2, map.shape[2] // 2), (1, 2)),
    "inverted": lambda map: (map.amax() - map) * (map.mean() / (map.amax() - map.mean()).clamp_min(1e-6)),
}
"""Of a map (1, H, W), each of the same mean: right, even, in a wrong place, high where it was low."""


def halved(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images (N, 3, S, S) at a side that is S or a half, a quarter ... of it, by means of their pixels."""
    return images if images.shape[-1] == side else F.avg_pool2d(images, images.shape[-1] // side)


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
        import comfy.model_management

        self.demo_model, self.size, self.minutes, self.graph, self.base = demo_model, size, minutes, graph, base
        self.queue = JobQueue(folder, jobs_of(size, only), until)
        self.path = self.queue.path
        (self.images, self.labels), test = (
            (halved(images, size.side), labels) for images, labels in load_fashion_mnist(data)
        )
        self.device = comfy.model_management.get_torch_device()
        self.judge = Judge(self.images, self.labels, test, self.device)
        self.training: FastDemo | None = None
        self.opinion = None

    def work(self) -> None:
        """Do jobs until none is left or the time is over."""
        self.queue.work(self.do)

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
            self.training = FastDemo(self.demo_model, self.images, self.labels, batch, self.graph, self.size.network)
        return self.training

    # The base

    def base_model(self) -> dict:
        """Train on from the shipped weights to the plateau, with FD on the way; or take the base that was given."""
        size = self.size
        save_file({"features": self.judge.real}, self.path("real", "safetensors"))
        self.training = None
        training = self.demo(size.base_batch if self.base is None else size.batch)
        if self.base is not None:
            training.begin_with(load_file(self.base))
        found = {"FD_by_step": [[0, self.fd_now()]], "steps": 0, "batch": training.batch}
        if self.base is None and size.base_steps:
            self.train_base(training, found)
        self.keep_state("base model", training)
        save_file({name: value.half().cpu() for name, value in training.averaged.state_dict().items()},
                  self.path("base weights", "safetensors"))
        samples = training.sample(classes(size.highlighter_images), HIGHLIGHTER_SEED, size.euler)
        save_file({"samples": samples}, self.path("base samples", "safetensors"))
        return found | {
            "cuda_graph": training.graph is not None, "device": str(self.device), "floor": self.judge.fd(self.judge.chosen(size.judged)),
            "classifier_accuracy": self.judge.of_classifier(), "brightness": self.judge.test[0].mean().item(),
            "brightness_of_samples": samples.mean().item(),
        }

    def train_base(self, training: FastDemo, found: dict) -> None:
        """The base's own training; puts what was seen on the way into `found`. The time there is may cut it short; what an earlier
        call reached is gone on from."""
        size, losses = self.size, []

        def train(first: int, end: int, total: int) -> float:
            losses.clear()
            for step in range(first, end):
                loss = training.step(BASE_SEED * 1_000_003 + step, self.base_rate(step, total), size.decay)
                losses.append(loss.clone())
            return torch.stack(losses).mean().item() if losses else math.nan

        so_far = self.path("base model", "progress")
        if so_far.exists():
            found |= json.loads(so_far.read_text())
            training.load(load_file(self.path(f"state base point {len(found['FD_by_step']) - 1}", "safetensors")))
        else:
            begun = time.perf_counter()
            train(0, size.warmup, size.base_steps)
            found["step_seconds"] = (time.perf_counter() - begun) / size.warmup
            found["steps"] = min(size.base_steps, max(2 * size.warmup, int(BASE_SHARE * 60 * self.minutes / found["step_seconds"])))
            found["loss_by_point"] = []
        steps = found["steps"]
        for point in range(len(found["FD_by_step"]), size.points + 1):
            done, end = max(size.warmup, found["FD_by_step"][-1][0]), max(size.warmup, steps * point // size.points)
            found["loss_by_point"].append(train(done, end, steps))
            found["FD_by_step"].append([end, self.fd_now()])
            print(f"base model, step {end} of {steps}: FD {found['FD_by_step'][-1][1]:.2f}", flush=True)
            self.keep_state(f"base point {point}", training)
            so_far.write_text(json.dumps(found))
            self.path(f"state base point {point - 1}", "safetensors").unlink(missing_ok=True)

    def base_rate(self, step: int, steps: int) -> float:
        """Linear warm-up to the peak, a quarter of a cosine's way down to `rate` at 70 % of the steps, then level."""
        size = self.size
        if step < size.warmup:
            return size.peak_rate * (step + 1) / size.warmup
        progress = min(1.0, (step - size.warmup) / max(1.0, 0.7 * steps - size.warmup))
        return size.rate + (size.peak_rate - size.rate) * 0.5 * (1 + math.cos(math.pi * progress))

    def fd_now(self) -> float:
        samples = self.training.sample(classes(self.size.judged), POINT_SEED, self.size.euler)
        return self.judge.fd(self.judge.features(samples))

    def train_highlighter(self) -> dict:
        """Training images against samples of the base; its map's worth is its held-out accuracy."""
        from artifact_guard.nodes.fam.session import train_highlighter
        from artifact_guard.nodes.fam.training import TrainingSettings

        from .train_highlighter import write

        size, generated = self.size, load_file(self.path("base samples", "safetensors"))["samples"]
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(HIGHLIGHTER_SEED))
        real = self.images[chosen[: size.highlighter_images]]
        settings = TrainingSettings(size.highlighter_epochs, 64, 2e-5, size.highlighter_side, 0, "small")

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
            while not self.queue.there("highlighter"):
                if self.queue.there("highlighter", "failed"):
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
        return self.judged(job, training, losses)

    def refined(self, job: Job) -> dict:
        """Another arm, from where its base phase ended."""
        from artifact_guard.nodes.fam.phases import Phases

        variant, size = VARIANTS[job.variant], self.size
        phases = Phases.of(size.steps, variant.base_fraction, variant.map_every or size.map_every)
        split = next((name for name, fraction in SPLITS.items() if fraction == variant.base_fraction), "1:1")
        training, losses, maps = self.go_on(f"{split} {job.seed}"), [], []
        for step in range(phases.base_steps, size.steps):
            if phases.map_due(step) and (variant.attention or variant.noise):
                flaw_map, probability = self.flaw_map(training, job.seed * 1_000_003 + step)
                training.set_map(CHANGES[variant.change](flaw_map), variant.attention, variant.noise)
                told = {"mean": flaw_map.mean().item(), "largest": flaw_map.max().item(), "generated": probability}
                maps.append({"step": step} | told)
            losses.append(self.step(training, job.seed, step).clone())
        return self.judged(job, training, losses, variant.sampled) | {"maps": maps}

    def step(self, training: FastDemo, seed: int, step: int) -> torch.Tensor:
        return training.step(seed * 1_000_003 + step, self.size.rate, self.size.decay)

    def flaw_map(self, training: FastDemo, seed: int) -> tuple[torch.Tensor, float]:
        """mFAM of a batch of the averaged weights, (1, S, S), and how generated it looks."""
        from artifact_guard.nodes.fam.flaw_batch import FlawBatch
        from artifact_guard.nodes.fam.grad_cam import flaw_map

        images = as_image(training.sample(classes(self.size.map_images), seed, self.size.euler))
        batch = FlawBatch(images, *flaw_map(self.highlighter, images, batch=64))
        return batch.mean_map, batch.probabilities.mean().item()

    def judged(self, job: Job, training: FastDemo, losses: list[torch.Tensor], attention: float = 0.0) -> dict:
        """Sample, with K, V (1 + attention), judge, keep the features."""
        loss = torch.stack(losses).cpu()
        if not torch.isfinite(loss).all():
            raise RuntimeError(f"the loss of {job.name} was not a number")
        asked = classes(self.size.judged), job.seed, self.size.euler
        samples = training.sample(*asked, attention=attention)
        features = self.judge.features(samples)
        save_file({"features": features}, self.path(job.name, "safetensors"))
        figures = self.judge.figures(samples, features)
        if self.size.from_mean:
            figures["FD_from_mean"] = self.judge.fd(self.judge.features(training.sample(*asked, from_mean=True, attention=attention)))
        generated = self.highlighter.generated_probability(as_image(samples[:1000]), batch=100)
        return figures | {"judged_generated": generated.mean().item(), "loss": loss[-len(loss) // 5 :].mean().item()}
