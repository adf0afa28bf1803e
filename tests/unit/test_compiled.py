"""Models compiled by core's TorchCompileModel, and the three methods on them."""

import threading

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from artifact_guard.nodes.asced.guard import guard_model
from artifact_guard.nodes.asced.options import GuardSettings
from artifact_guard.nodes.compiled import as_written
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.tag.guidance import guide_model
from artifact_guard.nodes.tag.settings import TagSettings
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel

from tests.small_models import sample, small_model


def half_map(model, left: bool):
    height, width = (8 * side for side in model.size)
    mask = torch.zeros(1, height, width)
    mask[:, :, : width // 2] = 1.0
    return mask if left else 1 - mask


@pytest.fixture(scope="module")
def compiled():
    """A small Flux and its compiled form, which has run once, without any patch, on this very latent.

    Traced and run by torch's own operations: how a graph is turned into machine code does not matter here. As core's
    node does it, the tracer is told to leave transformer_options alone.
    """
    small, original = small_model("flux"), torch.compile

    def traced(model, **settings):
        def unguarded(entries):
            return ["transformer_options" not in entry.name for entry in entries]

        return original(model, backend="eager", options={"guard_filter_fn": unguarded})

    model = small.model.clone()
    torch.compile = traced
    try:
        set_torch_compile_wrapper(model, backend="eager")
    finally:
        torch.compile = original
    with torch.inference_mode():
        assert torch.equal(sample(small, model, cfg=1.0), sample(small, cfg=1.0))
    return small, model


def test_the_stance_of_the_process_outlives_no_thread():
    """Two runs that overlap, as on two GPUs: the one that came first leaves first."""
    compiled, (inside, left) = [], (threading.Event(), threading.Event())

    def first():
        with as_written():
            inside.set()
            second_in.wait(10)
        left.set()

    second_in, thread = threading.Event(), threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with as_written():
        second_in.set()
        left.wait(10)
        assert torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph)(torch.ones(2)).sum() == 4
        assert not compiled
    thread.join()
    torch.compile(lambda x: x + 2, backend=lambda graph, _: compiled.append(graph) or graph)(torch.ones(2))
    assert len(compiled) == 1


def test_attention_patch_acts_on_a_compiled_model(compiled):
    """With one map and then another, also where only the second half of the run is patched."""
    small, model = compiled
    bare = sample(small, cfg=1.0)
    for left, settings in ((True, {}), (False, {}), (True, {"start_percent": 0.5})):
        patch = half_map(small, left), AttentionSettings(0.5, **settings)
        wanted = sample(small, patch_attention(small.model, *patch), cfg=1.0)
        assert not torch.equal(wanted, bare)
        assert torch.equal(sample(small, patch_attention(model, *patch), cfg=1.0), wanted)
    assert torch.equal(sample(small, model, cfg=1.0), bare), "the patch outlived its run"


@pytest.mark.parametrize("method", ["guard", "guidance"])
def test_guard_and_guidance_act_on_a_compiled_model(compiled, method):
    small, model = compiled

    def patched(on):
        return guard_model(on, GuardSettings(sensitivity=10.0))[0] if method == "guard" else guide_model(on, TagSettings())[0]

    assert torch.equal(sample(small, patched(model), cfg=1.0, steps=8), sample(small, patched(small.model), cfg=1.0, steps=8))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["inductor", "cudagraphs"])
def test_methods_act_on_models_compiled_for_the_gpu(backend):
    """Core's own node and its backends: to rounding what the model gives that is not compiled."""
    small = small_model("flux")
    device = comfy.model_management.get_torch_device()
    plain = comfy.model_patcher.ModelPatcher(small.model.model, load_device=device, offload_device=torch.device("cpu"))
    compiled = TorchCompileModel.execute(plain, backend)[0]
    patches = {
        "bare": lambda on: on,
        "guard": lambda on: guard_model(on, GuardSettings(sensitivity=0.01))[0],
        "guidance": lambda on: guide_model(on, TagSettings(strength=0.0))[0],
        "attention": lambda on: patch_attention(on, half_map(small, True), AttentionSettings(0.5))
    }
    for name, patched in patches.items():
        wanted, result = (sample(small, patched(on), cfg=1.0) for on in (plain, compiled))
        torch.testing.assert_close(result, wanted, rtol=1e-2, atol=1e-2, msg=lambda text: f"{name}: {text}")
