"""Q3, second part: guidance on the demo model, a trained network. Runs go in pairs: same noise, with and without it.

Distances are Frechet distances (FD) between samples and the test images of Fashion-MNIST, in the 128 features of the
bench's own classifier. The interval of a ratio is a bootstrap over pairs; `floor` is the FD of as many real images.
The classifier's log-probability of the class that was asked for stands beside it.
"""

import comfy.sample
import comfy.samplers
import torch

from ..harness.cache import cache_folder
from .classifier import trained_classifier
from .data import load_fashion_mnist
from .tag_runs import PREDICTOR, Features, guided, noisy_euler

NOISES = (0.0, 0.05, 0.1, 0.2, 0.3)
STEPS, COUNT, BATCH = 20, 64, 64
FEW_STEPS = (1, 3, 5, 10)
CFG, CFG_NOISE = 2.5, 0.1
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


class DemoRuns:
    """Samples of the demo model, COUNT a case, ten classes in turn."""

    def __init__(self, demo_model):
        self.model, _ = demo_model.load_demo_model()
        self.labels = torch.arange(COUNT) % len(demo_model.LABELS)
        self.tokens = torch.cat([demo_model.class_token(int(label)) for label in self.labels])
        self.nothing = demo_model.class_token(None)

    def __call__(self, model, noise: float, steps: int, cfg: float = 1.0) -> torch.Tensor:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
        parts = []
        with torch.inference_mode():
            for number, tokens in enumerate(self.tokens.split(BATCH)):
                latent = torch.zeros(len(tokens), 3, 32, 32)
                parts.append(comfy.sample.sample_custom(
                    model, comfy.sample.prepare_noise(latent, number), cfg, noisy_euler(noise), sigmas,
                    [[tokens, {}]], [[self.nothing, {}]], latent, disable_pbar=True, seed=number))
        return torch.cat(parts).clamp(-1, 1)


def run(pack, output, data) -> dict:
    train, test = load_fashion_mnist(data)
    runs = DemoRuns(pack.nodes.demo.model)
    judge = Features(trained_classifier(*train, cache_folder() / "data"), test[0], runs.labels)
    figures = {"samples": COUNT, "steps": STEPS, "floor": round(judge.floor(COUNT), 1)}

    def compare(name: str, cases: dict, **sampling) -> None:
        bare = runs(runs.model, **sampling)
        rows = {"off": judge.told(bare)}
        for case, settings in cases.items():
            model, report = guided(runs.model, train, **settings)
            rows[case] = judge.compared(bare, runs(model, **sampling))
            rows[case]["time_gap"] = round(sum(r.time_gap() for r in report.runs) / len(report.runs), 1)
        figures[name] = rows
        print(name, rows, flush=True)

    for noise in NOISES:
        compare(f"noise {noise}", DEFAULT | (OTHERS if noise == HARD_NOISE else {}), noise=noise, steps=STEPS)
    for steps in FEW_STEPS:
        compare(f"{steps} steps", DEFAULT, noise=0.0, steps=steps)
    compare(f"CFG {CFG}, noise {CFG_NOISE}", DEFAULT, noise=CFG_NOISE, steps=STEPS, cfg=CFG)
    return figures
