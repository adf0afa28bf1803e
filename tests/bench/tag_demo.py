"""Q3, second part: guidance on the demo model, a trained network. Runs go in pairs: same noise, with and without it.

Distances to the test images of Fashion-MNIST are those of distances.py, in the 128 features of the bench's own
classifier, with paired intervals; `floor` is what as many real images have. The classifier's log-probability of the
class that was asked for stands beside them.
"""

import time
from dataclasses import asdict, dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ..harness.cache import cache_folder
from .classifier import accuracy, trained_classifier
from .data import load_fashion_mnist
from .distances import Judge
from .tag_runs import PREDICTOR, guided, noisy_euler

NOISES = (0.0, 0.05, 0.1, 0.2, 0.3)
STEPS = 20
FEW_STEPS = (1, 3, 5, 10)
CFG, CFG_NOISES = 2.5, (0.0, 0.1, 0.3)
HARD_NOISE = 0.2

DEFAULT = {"training-free (default)": {}, "predictor": {"predictor": PREDICTOR}}
OTHERS = {
    "predictor, model asked at the step's level": {"predictor": PREDICTOR, "ask_at": "step's level"},
    "training-free, model asked at the step's level": {"ask_at": "step's level"},
    "score, omega 5, closed form, predictor": {"predictor": PREDICTOR, "mode": "score", "strength": 5.0},
    "score, omega 5, published gradient": {
        "predictor": PREDICTOR, "mode": "score", "strength": 5.0, "estimate": "published gradient"},
    "shift, omega 0.2, published gradient": {
        "predictor": PREDICTOR, "mode": "shift", "strength": 0.2, "estimate": "published gradient"},
    "poor predictor (50 steps)": {"predictor": "poor"},
    "poor predictor, score, omega 5, published gradient": {
        "predictor": "poor", "mode": "score", "strength": 5.0, "estimate": "published gradient"},
}


@dataclass(frozen=True)
class Sizes:
    """Pairs of runs in each case, and how many are sampled at once.

    calm: without noise. steady: 10 and 20 steps. few: fewer steps. others: each form that is not the default, and
    classifier-free guidance. measured: runs in which the bare model's time gap is measured.
    """

    batch: int
    calm: int
    steady: int
    few: int
    others: int
    measured: int

    @classmethod
    def here(cls) -> "Sizes":
        """A GPU takes about as long for 512 of these small pictures as for one."""
        return ON_GPU if comfy.model_management.get_torch_device().type == "cuda" else ON_CPU

    def of_steps(self, steps: int) -> int:
        return self.few if steps < 10 else self.steady

    def of_noise(self, noise: float) -> int:
        return self.steady if noise else self.calm


ON_CPU = Sizes(batch=64, calm=128, steady=128, few=512, others=64, measured=32)
ON_GPU = Sizes(batch=512, calm=4096, steady=2048, few=2048, others=2048, measured=512)


class DemoRuns:
    """Samples of the demo model, or of another that was trained like it, ten classes in turn."""

    def __init__(self, demo_model, sizes: Sizes, model=None):
        self.sizes = sizes
        self.model = model or demo_model.load_demo_model()[0]
        self.labels = torch.arange(max(sizes.calm, sizes.steady, sizes.few, sizes.others)) % len(demo_model.LABELS)
        self.tokens = torch.cat([demo_model.class_token(int(label)) for label in self.labels])
        self.nothing = demo_model.class_token(None)

    def __call__(self, model, noise: float, steps: int, cfg: float = 1.0, count: int | None = None) -> torch.Tensor:
        """(count, 3, 32, 32) in [-1, 1] on the CPU; the same noise whatever the model."""
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
        parts = []
        with torch.inference_mode():
            for number, tokens in enumerate(self.tokens[:count].split(self.sizes.batch)):
                latent = torch.zeros(len(tokens), 3, 32, 32)
                parts.append(comfy.sample.sample_custom(
                    model, comfy.sample.prepare_noise(latent, number), cfg, noisy_euler(noise, 77 + number), sigmas,
                    [[tokens, {}]], [[self.nothing, {}]], latent, disable_pbar=True, seed=number))
        return torch.cat(parts).float().cpu().clamp(-1, 1)


class Comparison:
    """Runs cases in pairs and keeps their figures. `predictor` measures the bare model's time gap."""

    def __init__(self, runs, judge: Judge, train: tuple, predictor=PREDICTOR):
        self.runs, self.judge, self.train, self.predictor, self.figures = runs, judge, train, predictor, {}

    def __call__(self, name: str, cases: dict, **sampling) -> None:
        begun, bare = time.perf_counter(), self.runs(self.runs.model, **sampling)
        measured, report = guided(self.runs.model, self.train, self.predictor, strength=0.0)
        self.runs(measured, **(sampling | {"count": self.runs.sizes.measured}))
        distances = self.judge.distances(bare)
        rows = {"off": self.judge.told(bare, distances) | {
            "pairs": len(bare), "time_gap_by_predictor": mean_gap(report), "noise_left": noise_left(bare)}}
        for case, settings in cases.items():
            model, report = guided(self.runs.model, self.train, **settings)
            samples = self.runs(model, **sampling)
            rows[case] = self.judge.compared(bare, distances, samples) | {
                "time_gap": mean_gap(report), "noise_left": noise_left(samples)}
        self.figures[name] = rows
        print(f"{name} ({time.perf_counter() - begun:.0f} s)", *rows.items(), sep="\n  ", flush=True)


def noise_left(images: torch.Tensor) -> float:
    """RMS distance from black of the two outermost rows: real images are black there, what is seen is noise."""
    return round((images[..., :2, :] + 1).square().mean().sqrt().item(), 3)


def mean_gap(report) -> float:
    return round(sum(record.time_gap() for record in report.runs) / len(report.runs), 1)


def run(pack, output, data) -> dict:
    train, test = load_fashion_mnist(data)
    sizes, device = Sizes.here(), comfy.model_management.get_torch_device()
    runs = DemoRuns(pack.nodes.demo.model, sizes)
    classifier = trained_classifier(*train, cache_folder() / "data", device=device)
    judge = Judge(classifier, test[0], runs.labels)
    compare = Comparison(runs, judge, train)
    for steps in FEW_STEPS:
        compare(f"{steps} steps", DEFAULT, noise=0.0, steps=steps, count=sizes.of_steps(steps))
    for noise in NOISES:
        compare(f"noise {noise}", DEFAULT, noise=noise, steps=STEPS, count=sizes.of_noise(noise))
    for noise in CFG_NOISES:
        compare(f"CFG {CFG}, noise {noise}", DEFAULT, noise=noise, steps=STEPS, cfg=CFG, count=sizes.others)
    compare(f"noise {HARD_NOISE}, other forms", OTHERS, noise=HARD_NOISE, steps=STEPS, count=sizes.others)
    counts = sorted({sizes.calm, sizes.steady, sizes.few, sizes.others})
    return {"pairs": asdict(sizes), "steps": STEPS, "classifier_accuracy": accuracy(classifier, *test),
            "floors": {count: judge.floor(count) for count in counts}, "cases": compare.figures}
