"""P6: what the methods keep while the model is at work, on the demo model, the smallest there is: 3 % of it are 10 latents."""

import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model

from tests.bench.growth import watch_run
from tests.bench.speed import CPU_BATCH, patched, sampler_run
from tests.bench.timing import on_gpu, peak_bytes

GUARD, PUBLISHED = "guard, nothing found", "guard by the published rule, nothing found"

STEPS = {"off": 4, GUARD: 30, PUBLISHED: 20, "TAG": 4, "flaw attention patch": 4}
"""Of each run. The guard keeps more and more until it decides; what the others keep is there from the second step on."""

LONG, LONGER, NUMBERS = 200, 400, 64
"""Steps of two watched runs, and the bytes that a further step may take: a mean of each frame and two sums. In shorter runs
the detector holds fewer estimates."""


@pytest.fixture(scope="module")
def extra_memory():
    """A function of case and steps: extra memory at the peak, in shares of the model."""
    if on_gpu():
        pytest.skip("counts the tensors of the CPU")
    model, prompt, latent = load_demo_model()[0], [[class_token(1), {}]], torch.zeros(CPU_BATCH, 3, 32, 32)
    cases = patched(model, latent)
    sampler_run(cases[GUARD], latent, prompt, 10, 0)  # weights are loaded once a process

    def peak(name, steps):
        return peak_bytes(lambda: sampler_run(cases[name], latent, prompt, steps, 0))

    off = peak("off", STEPS["off"])
    return lambda name, steps: (peak(name, steps) - off) / model.model_size()


@pytest.mark.parametrize("name", STEPS)
def test_extra_memory_is_3_percent_of_the_model(name, extra_memory):
    assert extra_memory(name, STEPS[name]) <= 0.03


@pytest.mark.skipif(on_gpu(), reason="counts the tensors of the CPU")
def test_watching_takes_no_more_in_longer_runs():
    short, long = (peak_bytes(lambda: watch_run(32, CPU_BATCH, n, 1, torch.device("cpu"))(0)) for n in (LONG, LONGER))
    assert long <= short + NUMBERS * (LONGER - LONG)
