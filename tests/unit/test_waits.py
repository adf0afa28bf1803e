"""Nobody waits for the device while nothing is found: what the pack reads of tensors between a run's model calls."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from artifact_guard.kernels import robust_threshold, score_dynamics
from artifact_guard.kernels.score_dynamics import gaussian_weights
from artifact_guard.nodes.asced import guard as guard_module
from artifact_guard.nodes.asced.watch import Watch
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.tag.guidance import guide_model
from artifact_guard.nodes.tag.settings import TagSettings
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.exact.model import exact_model
from tests.harness.pack import ROOT
from tests.small_models import sample, small_model
from tests.unit.guard_support import found, guard, images, ksampler


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


def waits_of(model, run=ksampler):
    """The pack's reads of tensors between a run's first model call and its last."""
    waits, calls = Waits(), []

    def call_model(apply_model, call):
        calls.append(len(waits.places))
        return apply_model(call["input"], call["timestep"], **call["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(call_model)
    with waits, Moves(waits):
        run(model)
    return waits.places[calls[0]:calls[-1]]


@pytest.mark.parametrize("detector", ["score dynamics", "clean estimate", "weighted score"])
def test_quiet_run_waits_once(detector, monkeypatch):
    """Nothing found: between the first and the last model call the guard reads one tensor, at the correction step.

    Medians as on a device: on the CPU numpy makes them.
    """
    monkeypatch.setattr(robust_threshold, "NUMPY_DEVICES", ())
    monkeypatch.setattr(score_dynamics, "PRODUCT_DEVICES", ())
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


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_guidance_never_waits(strength):
    """TAG measures and corrects on the device."""
    guided, report = guide_model(exact_model(images()), TagSettings(strength=strength))
    assert waits_of(guided) == [] and len(report.runs) == 1


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_attention_patch_never_waits(family):
    """The map, which is on the host, is brought to the model's grids there, once each; what is on the device stays."""
    small = small_model(family)
    mask = torch.zeros(1, *(8 * side for side in small.size))
    mask[:, :40] = 1.0
    patched = patch_attention(small.model, mask, AttentionSettings(0.5))
    places = waits_of(patched, lambda model: sample(small, model, steps=8))
    assert all(place.endswith("soft_mask_to_frames") for place in places) and len(places) <= 4, places


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
