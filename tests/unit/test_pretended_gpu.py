"""Whole runs on a GPU that is not there (tests/pretended_gpu.py): nothing on the wrong device, no wait that was not promised."""

import contextlib
import functools
import sys
from unittest import mock

import comfy.model_management
import pytest
import torch
from artifact_guard.kernels import cells, local_net, robust_threshold, score_dynamics
from artifact_guard.nodes.asced import guard as guard_module
from artifact_guard.nodes.asced import repair, waiting
from artifact_guard.nodes.asced.learned import trap_net
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.fam import refine
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.tag.guidance import guide_model
from artifact_guard.nodes.tag.settings import TagSettings

from tests.exact.model import exact_model
from tests.pretended_gpu import GPU, MixedDevices, PretendedGpu
from tests.small_models import reachable, sample, shallow_sd15, small_model
from tests.unit.fam_support import by_brightness, flawed
from tests.unit.guard_support import SQUARE, empty, found, guard, images, ksampler, trap
from tests.unit.tag_support import fresh_predictor

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real one"),
    pytest.mark.skipif(sys.platform != "linux", reason="torch's place for a GPU's guard is known by its name in Linux's libc10.so"),
]

FOUND = {"findings", "_decide", "verify", "look_back", "draw_noise", "label_regions", "_redraw", "_rest_of_schedule",
         "coefficients_of_all"}
"""Where a guard waits, and only when it has found something; but for `findings`, which asks whether it has."""

ONCE = "learned.py"
"""The network's weights are brought to a GPU once a process."""


@functools.lru_cache
def pictures():
    return images()


def clean(kind="eps"):
    return exact_model(pictures(), kind)


def trapped():
    return exact_model(pictures(), traps=[trap([1])])


@pytest.fixture(autouse=True)
def nothing_kept():
    """Weights that were brought to a pretended GPU go with it."""
    trap_net.cache_clear()
    yield
    trap_net.cache_clear()


@contextlib.contextmanager
def as_gpus_do(apple: bool):
    """The CPU takes the branches for GPUs, so that it rounds alike. apple: both take those for Apple's."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (robust_threshold, "NUMPY_DEVICES", ()), (score_dynamics, "PRODUCT_DEVICES", ()), (waiting, "ONE_BY_ONE", ()),
            (local_net, "DOUBLE_DEVICES", () if apple else ("cpu", "cuda")), (cells, "EQUAL_CELLS", ("cuda",) if apple else ()),
            (comfy.model_management, "device_supports_non_blocking", lambda device: not apple),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


class Both:
    """One run on the CPU and one on a pretended GPU.

    make: () -> model. patch: model -> (patched model, report). run: patched model -> samples.
    waits: where the pack waited between the first model call and the last. not_on_apple: see PretendedGpu.
    """

    def __init__(self, make, patch, run=ksampler, apple=False):
        with as_gpus_do(apple):
            patched, self.there = patch(make())
            self.expected = run(patched)
            with PretendedGpu() as gpu:
                patched, self.report = patch(gpu.take(make()))
                self.calls = []

                def call_model(apply_model, call):
                    self.calls.append(len(gpu.waits))
                    return apply_model(call["input"], call["timestep"], **call["c"])

                patched.set_model_unet_function_wrapper(call_model)
                self.output = run(patched)
        self.waits, self.not_on_apple = gpu.waits[self.calls[0] : self.calls[-1]], gpu.not_on_apple
        torch.testing.assert_close(self.output, self.expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_device_is_seen():
    """As torch on a GPU: a number may be on the CPU where values meet one by one, and nothing else."""
    with PretendedGpu():
        x, here = torch.ones(2, 3, device=GPU), torch.ones(2, 3)
        assert ((x * torch.tensor(2.0)).cpu() == 2).all() and torch.tensor([1.0], device=GPU).device == GPU
        for wrong in (lambda: x + here, lambda: torch.cat([x, here]), lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
                      lambda: here * x.sum(), lambda: x.gather(1, here.long()), lambda: here.add_(x)):
            with pytest.raises(MixedDevices):
                wrong()
        assert torch.equal(here.copy_(2 * x), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("detector, masked", [
    ("score dynamics", False), ("score dynamics", True), ("clean estimate", True), ("weighted score", False),
])
def test_quiet_run_waits_once(detector, masked):
    """Nothing found: one number is read, also of inpainting and with a region where repair is allowed."""
    latent = empty(noise_mask=torch.cat([torch.zeros(1, 6, 24), torch.ones(1, 14, 24)], dim=1)) if masked else None
    region, sensitivity = torch.ones(1, 20, 24) if masked else None, 0.01 if detector != "score dynamics" else 1.0
    run = Both(
        clean, lambda model: guard(model, region, {"detector": detector}, sensitivity=sensitivity),
        lambda model: ksampler(model, latent=latent),
    )
    waits = [place for place in run.waits if not place.startswith(ONCE)]
    assert not any(found(run.report.runs[0])) and len(waits) == 1 and "findings: _local_scalar_dense" in waits[0], run.waits


def test_waits_are_seen():
    """The check above can fail: a sampler whose sigmas have to be read shows one more read a step."""
    with mock.patch.object(guard_module, "keeps_to_schedule", lambda *_: False):
        run = Both(clean, lambda model: guard(model, options={"detector": "clean estimate"}, sensitivity=0.01))
    assert len(run.waits) > 10


@pytest.mark.parametrize("detector", ["score dynamics", "clean estimate"])
def test_found_and_repaired(detector, monkeypatch):
    """What is found is what a CPU finds, and the repaired picture the same; the host waits in the repair's own places alone."""
    monkeypatch.setattr(repair, "REDRAWS", 1)
    run = Both(trapped, lambda model: guard(model, options={"detector": detector}))
    record, expected = run.report.runs[0], run.there.runs[0]
    assert record.restarts and record.regions[1][SQUARE].all() and torch.equal(record.regions, expected.regions)
    assert {place.split()[1].rstrip(":") for place in run.waits if not place.startswith(ONCE)} <= FOUND, run.waits


def test_apples_gpus_are_asked_for_what_they_have():
    """No float64, no cells of unequal sizes, and no copy that is not waited for."""
    run = Both(trapped, lambda model: guard(model, options={"correction": "targeted"}), apple=True)
    assert run.report.runs[0].restarts and run.not_on_apple == []


@pytest.mark.parametrize("kind, settings", [
    ("eps", {}), ("flow", {"mode": "shift", "strength": 0.2}), ("eps", {"predictor": "a trained one"}),
], ids=str)
def test_guidance_never_waits(kind, settings):
    """Not asked of the published gradient: torch's autograd goes to no GPU that is not there."""
    predictor = fresh_predictor(clean(kind), size=20) if "predictor" in settings else None
    run = Both(
        lambda: clean(kind), lambda model: guide_model(model, TagSettings(**settings), predictor),
        lambda model: ksampler(model, steps=4),
    )
    torch.testing.assert_close(run.report.runs[0].estimates, run.there.runs[0].estimates)
    assert run.waits == [] and run.not_on_apple == []


FAMILIES = {"sd15": shallow_sd15, "flux": functools.partial(small_model, "flux"), "wan": functools.partial(small_model, "wan")}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_attention_patch(make):
    """The map is brought to the model's grids on the host, once each."""
    small = make()
    reachable(small)
    mask = torch.zeros(1, *(8 * side for side in small.size))
    mask[:, :40] = 1.0
    run = Both(
        lambda: make().model, lambda model: (patch_attention(model, mask, AttentionSettings(0.5)), None),
        lambda model: sample(small, model, steps=2),
    )
    assert all("amount: copied there" in place for place in run.waits) and len(run.waits) <= 4, run.waits


def test_refining_of_latents_that_are_on_a_gpu(monkeypatch):
    """As with --gpu-only: maps and probabilities are on the CPU; the latent comes back to where it was."""
    monkeypatch.setattr(refine, "flaw_map", by_brightness)
    model, vae = load_demo_model()
    latent, prompt = flawed(), [[class_token(1), {}]]
    settings = refine.RefineSettings(1, 3, 1.0, "euler", "normal", 0.6)
    with torch.inference_mode():
        expected = refine.Refiner(model, vae, None, prompt, prompt, latent, settings).run()[0]["samples"]
        with PretendedGpu():
            there = {"samples": latent["samples"].to(GPU)}
            result = refine.Refiner(model, vae, None, prompt, prompt, there, settings).run()[0]["samples"]
            assert result.device == GPU
            torch.testing.assert_close(result.cpu(), expected)
