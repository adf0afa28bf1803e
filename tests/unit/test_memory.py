"""P6: what the methods keep while the model is at work, on the demo model, the smallest there is: 3 % of it are 10 latents."""

import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model

from tests.bench.speed import CPU_BATCH, patched, sampler_run
from tests.bench.timing import on_gpu, peak_bytes

STEPS = {"off": 4, "guard, nothing found": 20, "guard by the published rule, nothing found": 20, "TAG": 4, "flaw attention patch": 4}
"""Of each run. The guard keeps more and more until it decides; what the others keep is there from the second step on."""


@pytest.mark.skipif(on_gpu(), reason="counts the tensors of the CPU")
def test_extra_memory_is_3_percent_of_the_model():
    model, prompt, latent = load_demo_model()[0], [[class_token(1), {}]], torch.zeros(CPU_BATCH, 3, 32, 32)
    cases = patched(model, latent)
    sampler_run(cases["guard, nothing found"], latent, prompt, 10, 0)  # weights are loaded once a process
    peaks = {name: peak_bytes(lambda: sampler_run(cases[name], latent, prompt, STEPS[name], 0)) for name in STEPS}
    extra = {name: (peak - peaks["off"]) / model.model_size() for name, peak in peaks.items()}
    assert max(extra.values()) <= 0.03, extra
