"""Where a sampler is, known without waiting for the device: the steps of all samplers, and what a quiet run asks for."""

import sys
from pathlib import Path
from unittest import mock

import comfy.samplers
import pytest
import torch
from artifact_guard.kernels import robust_threshold
from artifact_guard.kernels.score_dynamics import change_maps, gaussian_weights
from artifact_guard.nodes.asced import guard as guard_module
from artifact_guard.nodes.asced.guard import GuardedRun
from artifact_guard.nodes.asced.options import AscedOptions
from artifact_guard.nodes.asced.probe import keeps_to_schedule
from artifact_guard.nodes.asced.watch import Watch, detector_class
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.exact.model import exact_model
from tests.harness.pack import ROOT
from tests.unit.guard_support import HEIGHT, KINDS, WIDTH, found, guard, images, ksampler, trapped_model

OWN_STEPS = {"dpm_fast", "dpm_adaptive"}
"""Core's samplers that choose their sigmas themselves."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_step_that_is_reckoned_is_the_one_the_model_was_asked_at(sampler, kind):
    """For every sampler that counts as keeping to its schedule, at every step, before and after a restart."""
    seen, place = [], GuardedRun._place

    def noted(run, step, sigma):
        seen.append((step, place(run, step, sigma), place(run, None, sigma)))
        return seen[-1][1]

    guarded, report = guard(trapped_model(kind))
    with mock.patch.object(GuardedRun, "_place", noted):
        ksampler(guarded, sampler)
    reckoned = [step for step, _, _ in seen if step is not None]
    assert bool(reckoned) == (sampler not in OWN_STEPS)
    assert report.runs[0].restarts == 1 or not reckoned
    for step, (sigma, *known), (read, *measured) in seen:
        if step == 0 and kind == "flow":  # SDE samplers: 0.9999 for 1
            assert float(read) == pytest.approx(float(sigma), abs=2e-4)
        else:
            assert torch.equal(sigma, read) and known == measured, (step, sigma, read)


def test_churn_and_foreign_samplers_are_read_off_the_device():
    """A sampler that churns asks the model elsewhere, and what another pack's sampler does nobody knows."""
    euler = comfy.samplers.sampler_object("euler").sampler_function
    assert keeps_to_schedule(euler, {}) and keeps_to_schedule(euler, {"s_churn": 0.0})
    assert not keeps_to_schedule(euler, {"s_churn": 1.0})
    assert not keeps_to_schedule(lambda model, x, sigmas, **_: x, {})


class Waits(TorchDispatchMode):
    """Notes where the pack's own code makes the host wait for a tensor's values."""

    READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique2", "_unique2"}

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if name in self.READS or by_mask:
            self.note()
        return function(*arguments, **(keywords or {}))

    def note(self):
        """Whose code asks: the first that is neither torch's nor this file's."""
        frame = sys._getframe(1)
        while (path := Path(frame.f_code.co_filename)).name == Path(__file__).name or "torch" in path.parts:
            frame = frame.f_back
        if ROOT in path.parents and path.relative_to(ROOT).parts[0] in ("nodes", "kernels"):
            self.places.append(f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}")


class Moves(TorchFunctionMode):
    """Notes what copies a tensor to the host, which on a CPU no operation shows."""

    READS = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in self.READS:
            self.waits.note()
        return function(*arguments, **(keywords or {}))


def waits_of(model):
    """The pack's reads of tensors between a run's first model call and its last."""
    waits, calls = Waits(), []

    def call_model(apply_model, call):
        calls.append(len(waits.places))
        return apply_model(call["input"], call["timestep"], **call["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(call_model)
    with waits, Moves(waits):
        ksampler(model)
    return waits.places[calls[0]:calls[-1]]


@pytest.mark.parametrize("detector", ["score dynamics", "clean estimate", "weighted score"])
def test_quiet_run_waits_once(detector, monkeypatch):
    """Nothing found: between the first and the last model call the guard reads one tensor, at the correction step.

    Medians as on a device: on the CPU numpy makes them.
    """
    monkeypatch.setattr(robust_threshold, "NUMPY_DEVICES", ())
    gaussian_weights(1.0)  # the weights of the blur are made once a process, on the CPU
    sensitivity = 0.01 if detector != "score dynamics" else 1.0
    guarded, report = guard(exact_model(images()), options={"detector": detector}, sensitivity=sensitivity)
    places = waits_of(guarded)
    assert not any(found(report.runs[0])) and len(places) == 1 and places[0].endswith("findings"), places


def test_waits_are_seen():
    """The check above can fail: a sampler whose sigmas have to be read shows one more read a step."""
    guarded, _ = guard(exact_model(images()))
    with mock.patch.object(guard_module, "keeps_to_schedule", lambda *_: False):
        assert len(waits_of(guarded)) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("detector", ["score dynamics", "clean estimate", "weighted score"])
def test_same_mask_on_cpu_and_gpu(detector):
    """The same estimates give the same mask on both, pixels within rounding of a threshold aside: they are counted."""
    guarded, report = guard(trapped_model(), options={"detector": detector}, sensitivity=1.0)
    seen, look = [], Watch.look

    def noted(watch, estimate, *arguments, **keywords):
        seen.append(estimate)
        return look(watch, estimate, *arguments, **keywords)

    with mock.patch.object(Watch, "look", noted):
        ksampler(guarded)
    kind, record, masks = detector_class(AscedOptions(detector=detector)), report.runs[0], []
    settings, window = record.settings, record.window
    for device in ("cpu", "cuda"):
        judge = kind(settings.options, settings.sensitivity, min(HEIGHT, WIDTH))
        steps = [e._replace(x=e.x.to(device), denoised=e.denoised.to(device)) for e in seen[: window.correct_at + 1]]
        for number, (before, after) in enumerate(zip(steps, steps[1:])):
            if number >= window.detect_from:
                judge.observe(before, after, None)
            judge.accompany(change_maps(after.denoised, before.denoised)[1])
        masks.append(judge.findings().regions.cpu())
    differing = int((masks[0] ^ masks[1]).sum())
    assert masks[0].any() and differing <= 2, f"{differing} pixels of {masks[0].numel()} differ"


@pytest.mark.gpu
def test_quiet_run_never_waits_for_the_gpu():
    """CUDA itself reports every wait: with none allowed, all steps but the deciding one pass."""
    waits, look = [], Watch.look

    def strict(watch, *arguments, **keywords):
        decides = watch.record.ratios[watch.window.correct_at] >= arguments[0].ratio and not watch.decided
        torch.cuda.set_sync_debug_mode("default" if decides else "error")
        try:
            return look(watch, *arguments, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(decides)

    guarded, _ = guard(exact_model(images()))
    with mock.patch.object(Watch, "look", strict):
        ksampler(guarded)
    assert sum(waits) == 1 and len(waits) > 8
