"""Q3 as a whole: every estimate against the exact one, the toy, the demo model, and what it costs (P4).

    python dev.py bench tag          # all figures of TAG's help page, measured anew

On a GPU with many pairs (tag_demo.ON_GPU) and about 3,500 model calls of the demo model; the toy, which is too small for a
GPU, runs beside it in a process of its own, and what costs time is measured when that has ended.
"""

import json
import os
import subprocess
import sys
import time

import comfy.model_management

from ..harness.pack import ROOT
from . import tag_cost, tag_demo, tag_exact, tag_toy

CORES_FOR_TWO = 4
"""A second process is started where there are as many."""


class Beside:
    """A benchmark in a process of its own, without the GPU; `figures` waits for it."""

    def __init__(self, name: str, output):
        self.folder = output / "beside"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{name}.json"
        self.path.unlink(missing_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(CORES_FOR_TWO)}
        command = [sys.executable, ROOT / "tests" / "bench" / "run.py", name, "--output", self.folder]
        with open(self.folder / f"{name}.log", "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def figures(self) -> dict:
        if self.process.wait():
            raise SystemExit(f"It ended with {self.process.returncode}: see {self.folder}")
        return json.loads(self.path.read_text())


def run(pack, output, data) -> dict:
    figures, seconds, begun = {}, {}, time.perf_counter()

    def keep(name: str, measure) -> None:
        start = time.perf_counter()
        figures[name] = measure()
        seconds[name] = round(time.perf_counter() - start)
        print(f"{name}: {seconds[name]} s", flush=True)

    on_gpu = comfy.model_management.get_torch_device().type == "cuda"
    beside = Beside("tag_toy", output) if on_gpu and (os.cpu_count() or 1) >= 2 * CORES_FOR_TWO else None
    keep("exact", lambda: tag_exact.run(pack, output, data))
    keep("demo", lambda: tag_demo.run(pack, output, data))
    keep("toy", beside.figures if beside else lambda: tag_toy.run(pack, output, data))
    keep("cost", lambda: tag_cost.run(pack, output, data))
    seconds["all"] = round(time.perf_counter() - begun)
    return figures | {"seconds": seconds}
