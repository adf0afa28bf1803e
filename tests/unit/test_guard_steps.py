"""Where a sampler is, known without asking the device: the steps of all samplers; and masks on CPU and GPU."""

from unittest import mock

import comfy.samplers
import pytest
import torch
from artifact_guard.kernels.dispatch import choose
from artifact_guard.kernels.robust_threshold import sample_quantile
from artifact_guard.kernels.score_dynamics import change_maps
from artifact_guard.nodes.asced.guard import GuardedRun
from artifact_guard.nodes.asced.options import AscedOptions
from artifact_guard.nodes.asced.probe import keeps_to_schedule
from artifact_guard.nodes.asced.watch import Watch, detector_class

from tests.unit.guard_support import BATCH, HEIGHT, KINDS, WIDTH, guard, ksampler, trapped_model

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

    guarded, report = guard(trapped_model(kind), sensitivity=1.0)
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


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize("detector", ["score dynamics", "clean estimate", "weighted score"])
def test_same_mask_on_cpu_and_gpu(detector, scale, masked):
    """The same estimates give the same mask on both, pixels within rounding of a threshold aside: they are counted.

    Also of latents so large that the Triton forms are chosen, and where only a part of them counts.
    """
    guarded, report = guard(trapped_model(), options={"detector": detector}, sensitivity=1.0)
    seen, look = [], Watch.look

    def noted(watch, estimate, *arguments, **keywords):
        seen.append(estimate)
        return look(watch, estimate, *arguments, **keywords)

    with mock.patch.object(Watch, "look", noted):
        ksampler(guarded)
    kind, record, masks = detector_class(AscedOptions(detector=detector)), report.runs[0], []
    settings, window = record.settings, record.window
    counts = torch.rand(BATCH, scale * HEIGHT, scale * WIDTH, generator=torch.Generator().manual_seed(0)) < 0.9
    for device in ("cpu", "cuda"):
        def larger(x):
            return x.to(device).repeat_interleave(scale, -1).repeat_interleave(scale, -2)

        judge = kind(settings.options, settings.sensitivity, scale * min(HEIGHT, WIDTH))
        steps = [e._replace(x=larger(e.x), denoised=larger(e.denoised)) for e in seen[: window.correct_at + 1]]
        if device == "cuda" and scale > 1:
            assert choose("sample_quantile", [steps[0].denoised[:, 0]], size_of=sample_quantile.size_of).backend == "triton"
        for number, (before, after) in enumerate(zip(steps, steps[1:])):
            if number >= window.detect_from:
                judge.observe(before, after, counts.to(device) if masked else None)
            judge.accompany(change_maps(after.denoised, before.denoised)[1])
        masks.append(judge.findings().regions.cpu())
    differing = int((masks[0] ^ masks[1]).sum())
    assert masks[0].any() and differing <= 2, f"{differing} pixels of {masks[0].numel()} differ"
