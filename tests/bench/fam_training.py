"""Q4, the paper's own result: base, forward only, reverse only and both, on the demo model as a whole.

The plan, written before the runs (figures of an earlier, smaller plan stand in the help page, labelled):

The base first. The shipped weights are trained on for 6,000 steps of 256 images: 100 steps of warm-up to 5e-4, a cosine
down to 1e-4 at 70 % of the steps, then level; AdamW (0.9, 0.99), weight decay 0.01, gradients clipped to norm 1, bf16, a
moving average of 0.995. FD of the average is taken at seven points; at a plateau the level part's points differ by no
more than ordinary training of the later runs moves them. The rate stays at 1e-4 from there on, optimizer and average are
gone on with, so that `base` is nothing but more of the same, as in the paper, where no rate falls to zero.

The runs: from that state 2,000 steps of 128 images, 1:1 of base and refinement phase as published, a map every 100 steps
from 64 samples of the average. The four arms of a seed share the base phase and every draw of images, noise, times and
dropped labels, and differ in the refinement alone:
    base      ordinary training all along
    forward   eps + 0.01 M            (published best lambda)
    reverse   K, V (1 + 0.025 M)      (published best lambda)
    both      the two together
Seeds 0 to 4. Highlighter: trained once on 3,000 training images and 3,000 samples of the base, 12 epochs; its held-out
accuracy and its warnings are stated: near 50 % its map carries nothing.
Judged: 5,000 samples of the average (20 Euler steps, CFG 1, classes in turn, as for maps and highlighter), the same noise in
all arms of a seed. FD in the 128 features of the bench's own classifier against the 10,000 test images, precision and recall by 3
nearest neighbours against 5,000 of them, the share the classifier recognises as what was asked, the highlighter's verdict.
Reported: FD(arm) / FD(base) of the sums over seeds; its 95 % interval over seeds (Student's t on the logarithms of the
seeds' ratios) and over pictures (leaving one of 16 blocks of samples out). Success: the interval over seeds of
`both` lies below 1. Published ratios: 0.948, 0.940, 0.931.
Sweeps, seeds 0 to 2, one thing changed: lambda 0.0025, 0.005, 0.05, 0.1 of the reverse part alone and of the forward part alone;
a map every 50, 250 and 500 steps; split 1:4 and 4:1.
If nothing is gained, why: `both` with the map made even (same mean), rolled by half the picture, or inverted (same mean) tells
whether its content matters; forward 0.1 with an even map whether a strong forward part does more than shift the noise's
mean, forward -0.1 whether the other sign harms as much; FD's part from the features' means, and the mean brightness beside
the test images' (100 samples of the shipped weights were brighter by 0.07), whether a gain is a shift of brightness. For the
same end every run is judged a second time, on samples whose start is noise on the mean training image instead of noise
alone: that alone took FD of 300 samples of the shipped weights (ten steps) from 93.1 to 72.8.

Each job leaves one file, so that the bench can be stopped and gone on with, and many workers can share a GPU. With --minutes
no job begins after that time. A first call on an H200 shared with about ten other training processes got as far as a base of
1,583 steps (FD 80.8 -> 61.3 and still falling) and the highlighter in 6 minutes: a captured step of 256 images took 80 ms
there. The GPU should be its own. --base takes a base that an earlier call trained, --only some of the runs.

The size `small`, the whole plan on a processor, written before its runs too: 16x16 pictures (means of 2x2), a network of the
demo model's kind with 0.36 million weights, and a schedule that ends in noise alone ("zsnr"), as the paper's nearly does, so
that no brightness is lost at the start. It begins with fresh weights: 5,000 steps of 64 to a plateau (peak 2e-3), level at 1e-4
from 70 % on. Runs of 800 steps of 64, a map every 50, 2,000 samples of ten Euler steps; seeds 0 to 2, sweeps on seed 0. There reverse
0.1 gained more than 0.025; so, written after that and before their runs: reverse 0.1 on seeds 1 and 2, 0.2 and 0.4 on all three, and
0.1 with an even map: if that gains as much, where the flaws lie plays no part. It did, and so, written after that: who has learned
under strengthened attention and draws without is drawing with weakened attention. So the base, trained ordinarily, draws with K and V
less by 0.045 (0.1 times the mean of the maps) and by 0.15.

The size `cpu`, for one question on a processor, also written before its runs: the shipped weights are the base, 120 steps of
32 images at a level 1e-4 (moments from zero), a map every 30 steps, 400 samples of ten Euler steps. `forward 0.1` had the only
gain that an earlier plan showed (0.928, one seed). If it is a shift of brightness, forward -0.1 harms as much, an even map
does the same, and the change lies in FD's part from the means. (It did: see the help page.)
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..harness.pack import ROOT
from .data import load_fashion_mnist
from .fam_training_plan import SIZES, VARIANTS, Size, jobs_of
from .fam_training_runs import Worker
from .fam_training_tables import Results, tables
from .job_queue import JobQueue


def read_options(options: list[str], cuda: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py bench fam_training", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="gpu" if cuda else "cpu", help="(default: gpu where there is CUDA)")
    parser.add_argument("--workers", type=int, default=8 if cuda else 0, help="processes side by side; 0: this one alone (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--anew", action="store_true", help="throw away what an earlier call left under --output")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help="of the arms and sweeps, beside the base: "
                        + ", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+",
                        help="instead of the size's own; sweeps run on those of them that the size gives to sweeps")
    parser.add_argument("--base", type=Path,
                        help="a base that an earlier call trained (its `base weights.safetensors`), which is not trained again")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # a worker's
    return parser.parse_args(options)


def run(pack, output: Path, data: Path | None, minutes: float | None = None, options: list[str] = ()) -> dict:
    asked = read_options(list(options), torch.cuda.is_available())
    asked.minutes = 1e6 if minutes is None else minutes
    folder, size = output / "fam_training" / asked.size, size_of(asked)
    if asked.until is not None:
        work(pack, folder, data, asked, asked.until)
        raise SystemExit(0)
    if asked.anew:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * asked.minutes
    JobQueue(folder, [], until).forget_the_last_call()
    if asked.workers:
        load_fashion_mnist(data)  # parsed once: workers find it in the cache
        start_workers(output, data, ["--minutes", str(asked.minutes), *options], asked.workers, until)
    else:
        work(pack, folder, data, asked, until)
    results = Results(folder, size)
    figures = {"size": asked.size, "settings": vars_of(size), "workers": asked.workers,
               "left": [job.name for job in jobs_of(size, asked.only) if job.name not in results.rows]} | results.summary()
    print(tables(figures), flush=True)
    return figures


def size_of(asked: argparse.Namespace) -> Size:
    size = SIZES[asked.size]
    if asked.seeds is None:
        return size
    return replace(size, seeds=tuple(asked.seeds), sweep_seeds=tuple(seed for seed in asked.seeds if seed in size.sweep_seeds))


def vars_of(size) -> dict:
    return {name: getattr(size, name) for name in size.__dataclass_fields__}


def work(pack, folder: Path, data: Path | None, asked: argparse.Namespace, until: float) -> None:
    """Be a worker."""
    with torch.inference_mode(False):
        Worker(pack.nodes.demo.model, folder, data, size_of(asked), until, asked.minutes, not asked.eager, asked.only, asked.base).work()


def start_workers(output: Path, data: Path | None, options: list[str], count: int, until: float) -> None:
    """Start workers and wait for their end. The threads of all together are the machine's."""
    command = [sys.executable, ROOT / "tests" / "bench" / "run.py", "fam_training", "--output", output, *options, "--until", str(until)]
    if data is not None:
        command += ["--data", data]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    started = [subprocess.Popen(list(map(str, command)), env=environment) for _ in range(count)]
    try:
        while any([process.poll() is None for process in started]):  # asks all: one that ended is seen by the others
            time.sleep(0.5)
        codes = [process.returncode for process in started]
    finally:
        for process in started:
            process.terminate()
    if any(codes):
        print(f"Workers ended with {codes}", flush=True)
