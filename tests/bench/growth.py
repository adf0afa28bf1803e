"""P9: how the cost of each method grows with latent area, batch, steps and frames: linear, if it is well made.

Without a model: the guard and TAG look at estimates of a run in which nothing is found, the attention patch scales the keys
and values of one layer. Each line is one quantity doubled several times; `exponent` is the slope of log time over log
quantity (1 = linear; below 1 where fixed costs rule).
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from .timing import in_turns, on_gpu

REPEATS = 7
CHANNELS = 16
"""Of a key and of a value in the attention patch's layer: none of these takes 32 MiB, from where on Linux gives a tensor new pages each
time, which on a CPU takes longer than filling them (seen with 64)."""

BASE = {"side": 64, "batch": 2, "steps": 25, "frames": 1}
LINES = {
    "latent area": [{"side": side} for side in (64, 96, 128, 192, 256)],
    "batch": [{"batch": batch} for batch in (1, 2, 4, 8, 16)],
    "steps": [{"steps": steps} for steps in (13, 25, 50, 100)],
    "frames": [{"frames": frames, "batch": 1} for frames in (5, 11, 21, 41, 81)],
}


def quantity(change: dict) -> int:
    return change["side"] ** 2 if "side" in change else next(iter(change.values()))


def shape_of(side: int, batch: int, frames: int) -> tuple[int, ...]:
    return (batch, 4, side, side) if frames == 1 else (batch, 4, frames, side, side)


def steps_of(shape: tuple[int, ...], steps: int, device: torch.device) -> tuple[list[float], Callable]:
    """The noise ratios b / a of a run in which a picture emerges, and a function that gives its clean estimate at each."""
    picture = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)
    ratios = [math.exp(math.log(14.0) + n / steps * math.log(0.03 / 14.0)) for n in range(steps)]
    return ratios, lambda ratio: picture / (1 + ratio) + 0.01 * noise


def watch_run(side: int, batch: int, steps: int, frames: int, device: torch.device):
    """A function that watches one run of such latents from its first to its last step."""
    from artifact_guard.nodes.asced.estimate import Estimate
    from artifact_guard.nodes.asced.options import GuardSettings
    from artifact_guard.nodes.asced.report import RunRecord
    from artifact_guard.nodes.asced.watch import Watch, detector_class
    from artifact_guard.nodes.asced.window import plan_window
    from artifact_guard.nodes.latents import FrameLayout

    shape = shape_of(side, batch, frames)
    ratios, estimate = steps_of(shape, steps, device)
    settings = GuardSettings(sensitivity=0.01)
    kind = detector_class(settings.options)

    def run(_):
        record = RunRecord(settings, FrameLayout.of([shape]), None)
        record.plan(plan_window(ratios, "auto", 0, 0, kind.auto_window, kind.lead), ratios)
        watch = Watch(settings, record, None, None, 0)
        for step, ratio in enumerate(ratios):
            denoised = estimate(ratio)
            assert watch.look(Estimate(denoised, denoised, 1.0, ratio), steps - step) is None

    return run


def align_run(side: int, batch: int, steps: int, frames: int, device: torch.device):
    """A function that guides one run of such latents, training-free."""
    from artifact_guard.nodes.tag.answer import Answer
    from artifact_guard.nodes.tag.energy import EnergyEstimator
    from artifact_guard.nodes.tag.levels import alpha_and_variance
    from artifact_guard.nodes.tag.settings import TagSettings
    from artifact_guard.nodes.tag.steering import Steering

    shape = shape_of(side, batch, frames)
    ratios, estimate = steps_of(shape, steps, device)
    levels = [torch.full((batch,), -2.0 * math.log(ratio), device=device) for ratio in ratios]
    start = torch.randn(shape, generator=torch.Generator(device).manual_seed(2), device=device)

    def run(_):
        steering = Steering(TagSettings(), EnergyEstimator())
        for ratio, level in zip(ratios, levels):
            denoised = estimate(ratio)
            alpha, v = alpha_and_variance(-2.0 * torch.tensor(math.log(ratio)))
            u = torch.add(denoised * alpha.item(), start, alpha=v.sqrt().item())
            told, _ = steering.estimate(lambda *asked: Answer(denoised, denoised), u, u, level)
            assert told.shape == shape

    return run


def attend_run(side: int, batch: int, steps: int, frames: int, device: torch.device):
    """A function that scales keys and values of CHANNELS channels, one token a latent pixel, in one layer at every step."""
    from artifact_guard.nodes.fam.attention import AttentionSettings, FlawAttention
    from artifact_guard.nodes.fam.calls import Call
    from artifact_guard.nodes.fam.families import UNET
    from artifact_guard.nodes.fam.token_maps import CallView

    shape = shape_of(side, batch, frames)
    flaw_map = torch.rand(1, 8 * side, 8 * side, generator=torch.Generator().manual_seed(0))
    key, value = torch.randn(2, batch, frames * side**2, CHANNELS, device=device)

    def run(_):
        patch = FlawAttention(flaw_map, UNET, AttentionSettings(), None, None, None)
        for _ in range(steps):
            call = Call(shape, CallView(batch), None)
            patch.scale(key, value, patch.amount(call, None, key), 0, axis=1)

    return run


METHODS = {"guard": watch_run, "TAG": align_run, "flaw attention patch": attend_run}


def run(pack, output: Path, data: Path | None) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpu() else "cpu")
    figures = {}
    for method, run_of in METHODS.items():
        for line, changes in LINES.items():
            cases = {str(quantity(change)): run_of(**(BASE | change), device=device) for change in changes}
            seconds = {int(name): told["seconds"] for name, told in in_turns(cases, REPEATS).items()}
            logs = torch.tensor([[math.log(q), math.log(s)] for q, s in seconds.items()])
            centred = logs - logs.mean(dim=0)
            slope = (centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum()
            figures[f"{method}, {line}"] = {"seconds": seconds, "exponent": round(slope.item(), 3)}
            del cases
    torch.set_num_threads(threads)
    return figures
