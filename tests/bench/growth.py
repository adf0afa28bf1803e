"""P9: how the cost of watching a run grows with latent area, batch, steps and frames: linear, if it is well made.

A guard's watch looks at estimates of a run in which nothing is found, without a model. Each line is one quantity doubled
several times; `exponent` is the slope of log time over log quantity (1 = linear; below 1 where fixed costs rule).
"""

import math
from pathlib import Path

import torch

from .timing import in_turns, on_gpu

REPEATS = 7
BASE = {"side": 64, "batch": 2, "steps": 25, "frames": 1}
LINES = {
    "latent area": [{"side": side} for side in (64, 96, 128, 192, 256)],
    "batch": [{"batch": batch} for batch in (1, 2, 4, 8, 16)],
    "steps": [{"steps": steps} for steps in (13, 25, 50, 100)],
    "frames": [{"frames": frames, "batch": 1} for frames in (5, 11, 21, 41, 81)],
}


def quantity(change: dict) -> int:
    return change["side"] ** 2 if "side" in change else next(iter(change.values()))


def watch_run(side: int, batch: int, steps: int, frames: int, device: torch.device):
    """A function that watches one run of such latents from its first to its last step."""
    from artifact_guard.nodes.asced.estimate import Estimate
    from artifact_guard.nodes.asced.options import GuardSettings
    from artifact_guard.nodes.asced.report import RunRecord
    from artifact_guard.nodes.asced.watch import Watch, detector_class
    from artifact_guard.nodes.asced.window import plan_window
    from artifact_guard.nodes.latents import FrameLayout

    shape = (batch, 4, side, side) if frames == 1 else (batch, 4, frames, side, side)
    random = torch.Generator(device).manual_seed(0)
    picture = torch.randn(shape, generator=random, device=device)
    noise = torch.randn(shape, generator=random, device=device)
    settings = GuardSettings(sensitivity=0.01)
    ratios = [math.exp(math.log(14.0) + n / steps * math.log(0.03 / 14.0)) for n in range(steps)]
    kind = detector_class(settings.options)

    def run(_):
        record = RunRecord(settings, FrameLayout.of([shape]), None)
        record.plan(plan_window(ratios, "auto", 0, 0, kind.auto_window, kind.lead), ratios)
        watch = Watch(settings, record, None, None, 0)
        for step, ratio in enumerate(ratios):
            denoised = picture / (1 + ratio) + 0.01 * noise
            assert watch.look(Estimate(denoised, denoised, 1.0, ratio), steps - step) is None

    return run


def run(pack, output: Path, data: Path | None) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpu() else "cpu")
    figures = {}
    for line, changes in LINES.items():
        cases = {str(quantity(change)): watch_run(**(BASE | change), device=device) for change in changes}
        seconds = {int(name): told["seconds"] for name, told in in_turns(cases, REPEATS).items()}
        logs = torch.tensor([[math.log(q), math.log(s)] for q, s in seconds.items()])
        centred = logs - logs.mean(dim=0)
        slope = (centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum()
        figures[line] = {"seconds": seconds, "exponent": round(slope.item(), 3)}
    torch.set_num_threads(threads)
    return figures
