"""P1 and P4 where a model's time scatters by more than they ask: what the guard and TAG take themselves, with a model that costs nothing.

25 steps of Euler, nothing found. Milliseconds a step beyond the bare run's, in turns with it: by the clock on a GPU, else in
processor time of one thread. Latents of 16x16, so that hardly anything is calculated: what is left is what the host of a GPU
does, which is all that a run waits for where the host is the slower of the two. With them how many kernels a run at 512x512
starts on a GPU, Triton's forms included. A share is that of the least times in a step of SD 1.5 on the H200 of results/h200, whose
host took 42 ms for it.

Without a GPU also P1's other case, the demo model on a processor: the same with its latents, as shares of its own steps.
"""

from pathlib import Path
from unittest import mock

import torch

from .full_models import costless, costless_sd15
from .speed import CPU_BATCH, CPU_STEPS, STEPS, patched, sampler_run
from .starts import starts_of
from .timing import differences, on_gpu, seconds_in_turns

REPEATS, OF_THE_MODEL = 101, 9
STEP_OF_H200 = 42.1
"""Milliseconds."""

CASES = ("off", "guard, nothing found", "guard by the published rule, nothing found", "TAG", "TAG, measured only")
"""Of those of `speed`. The rest ask the network for something."""


def own(model, latent: torch.Tensor, prompt, steps: int, step: float) -> dict:
    """The table of a model that costs nothing. step: milliseconds of one that shares are told of."""
    cases = {
        name: lambda seed, m=m: sampler_run(m, latent, prompt, steps, seed)
        for name, m in patched(model, latent).items() if name in CASES
    }
    return {
        name: {
            "milliseconds_a_step": round(told["median"] / steps, 3),
            "interval_95": [round(end / steps, 3) for end in told["interval_95"]],
            "least_milliseconds_a_step": round(told["least"] / steps, 3),
            "share_of_a_step": round(told["least"] / steps / step, 4),
        }
        for name, told in differences(cases, REPEATS, "off").items() if name != "off"
    }


def run(pack, output: Path, data: Path | None) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    full = costless_sd15()
    prompt, small, of_512 = full.conditioning(), torch.zeros(1, full.channels, 16, 16), torch.zeros(1, full.channels, *full.sizes[0])
    with mock.patch.object(pack.nodes.asced.waiting, "ONE_BY_ONE", ()):  # as on a GPU
        table = own(full.model, small, prompt, STEPS, STEP_OF_H200)
    started = {
        name: sum(starts_of(lambda m=m: sampler_run(m, of_512, prompt, STEPS, 0))[0].values())
        for name, m in patched(full.model, of_512).items() if name in CASES
    }
    for name, row in table.items():
        row["kernels_started"] = started[name] - started["off"]
    figures = {"clock": "wall" if on_gpu() else "processor time", f"{full.name}, 16x16 latents, {STEPS} steps": table}
    if not on_gpu():
        demo = pack.nodes.demo.model
        model, prompt, latent = demo.load_demo_model()[0], [[demo.class_token(1), {}]], torch.zeros(CPU_BATCH, 3, 32, 32)
        bare = seconds_in_turns({"off": lambda seed: sampler_run(model, latent, prompt, CPU_STEPS, seed)}, OF_THE_MODEL)["off"]
        step = 1e3 * min(bare) / CPU_STEPS
        figures["least_milliseconds_of_a_step_of_the_demo_model"] = round(step, 3)
        figures[f"demo model's latents, batch {CPU_BATCH}, {CPU_STEPS} steps"] = own(costless(model), latent, prompt, CPU_STEPS, step)
    torch.set_num_threads(threads)
    return figures
