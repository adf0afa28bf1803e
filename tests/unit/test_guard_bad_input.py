"""What goes in wrong: each gives a message that a person understands, or a result that is defined."""

import json
import re

import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.asced.schema import ASCEDOptions, ASCEDReport
from artifact_guard.nodes.asced.window import Window, plan_window

from tests.exact.model import exact_model
from tests.unit.guard_support import (
    BATCH, CHANNELS, HEIGHT, WIDTH, Run, empty, found, guard, images, ksampler, same, schedule, trapped_model,
)


def refused(message, latent, **settings):
    """The run raises ValueError with the message, before the model was asked once."""
    model = trapped_model()
    with pytest.raises(ValueError, match=message):
        ksampler(guard(model, **settings)[0], latent=latent)
    assert model.model.calls == 0


def unguarded(model, reason, report_to=None, **run):
    """The run goes on as without the guard, bit for bit, and the report says why; gives the record."""
    guarded, report = guard(model, **(report_to or {}))
    output = Run(guarded, **run).start().output
    assert same(output, Run(model, **run).start().output)
    (record,) = report.runs
    assert re.search(reason, record.reason) and record.restarts == 0 and not record.regions.any()
    mask, overlay, curves, fraction, summary = ASCEDReport.execute(report, {"samples": output}).result
    assert fraction == 0.0 and not mask.any() and overlay.ndim == curves.ndim == 4
    assert {image["verdict"] for image in json.loads(summary)["images"]} <= {"not looked at"}
    assert json.loads(summary)["status"] == "not guarded" and json.loads(summary)["reason"] == record.reason
    return record


# Refused before sampling


def test_latent_of_another_model():
    """Channels that the model does not have: both numbers are named, and what to do."""
    refused("5 channels.*works on 3.*Empty Latent", {"samples": torch.ones(BATCH, 5, HEIGHT, WIDTH)})


def test_a_latent_without_samples():
    refused("latent holds no samples.*batch of 1 or more", {"samples": torch.ones(0, 3, HEIGHT, WIDTH)})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_latent(value):
    """NaN or infinity in the latent: said so, with the usual cause."""
    samples = images(BATCH)
    samples[1, 0, 3, 4] = value
    refused("latent holds NaN or infinite.*VAE in fp16", {"samples": samples})


def test_damaged_nested_latent():
    """The same of a latent with several parts, in any of them."""
    model = exact_model(torch.cat([images().flatten(1), torch.zeros(len(images()), 8)], dim=1)[:, None])
    nested = comfy.nested_tensor.NestedTensor([images(BATCH), torch.full((BATCH, 2, 4), torch.nan)])
    with pytest.raises(ValueError, match="latent holds NaN"):
        Run(guard(model)[0], latent={"samples": nested}).start()


@pytest.mark.parametrize(
    "region, message",
    [
        (torch.ones(1, 64, 64), r"region.*64x64.*24x20"),
        (torch.ones(2, HEIGHT, WIDTH), "region: 2 masks came for 3 samples"),
        (torch.full((1, HEIGHT, WIDTH), torch.nan), "region.*NaN"),
        (torch.ones(1, 1, HEIGHT, WIDTH), "region.*shape"),
        (torch.ones(0, HEIGHT, WIDTH), "region.*shape"),
    ],
)
def test_region_that_does_not_fit(region, message):
    """A mask of another shape, another count, or with NaN: input, what came and what was wanted are named."""
    refused(message, empty(), region=region)


def test_report_used_before_sampling():
    """A report wired past the sampler says what to connect."""
    with pytest.raises(ValueError, match="not sampled yet.*Connect `latent`"):
        ASCEDReport.execute(guard(trapped_model())[1], {"samples": torch.full((1, CHANNELS, HEIGHT, WIDTH), 0.321)})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sensitivity": 0.0}, "sensitivity is 0.0; a value from 0.01 to 10"),
        ({"sensitivity": "1"}, "sensitivity is '1'; a value from 0.01 to 10"),
        ({"sensitivity": float("nan")}, "sensitivity is nan"),
        ({"strength": -0.1}, "strength is -0.1; a value from 0 to 10"),
        ({"strength": float("inf")}, "strength is inf"),
        ({"mode": "repair"}, "mode is 'repair'; one of 'correct', 'detect only'"),
        ({"window": "late"}, "window is 'late'"),
        ({"correct_at": 1.5}, "correct_at is 1.5"),
        ({"window": "manual", "detect_from": 0.4, "correct_at": 0.4}, "detect_from is 0.4 and correct_at 0.4"),
        ({"window": "manual", "detect_from": 0.6, "correct_at": 0.4}, "Lower detect_from or raise correct_at"),
        ({"options": {"rounds": 0}}, "rounds is 0"),
        ({"options": {"min_area": 0.2, "max_area": 0.1}}, "min_area is 0.2 and max_area 0.1"),
        ({"options": {"detector": "eyes"}}, "detector is 'eyes'; one of 'clean estimate'"),
        ({"options": {"correction": "none"}}, "correction is 'none'"),
        ({"options": {"blur": -1.0}}, "blur is -1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    """A workflow file can hold anything: the node names the input, the value and what is wanted."""
    with pytest.raises(ValueError, match=message):
        guard(trapped_model(), **settings)


def test_an_unused_window_may_be_anything_in_range():
    """With window auto the two fractions are not read, so that their order does not matter."""
    guarded, report = guard(trapped_model(), detect_from=0.9, correct_at=0.1)
    ksampler(guarded)
    assert report.runs[0].restarts == 1


# Runs that cannot be guarded


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
@pytest.mark.parametrize("steps", [1, 2])
def test_runs_too_short(sampler, steps):
    """One or two steps leave nothing to compare and repair; three are enough."""
    model = trapped_model()
    reason = f"a run of {steps} steps? is too short.*3 are needed"
    unguarded(model, reason, sampler=sampler, sigmas=schedule(model, steps))
    guarded, report = guard(model, sensitivity=1.0)
    Run(guarded, sampler, sigmas=schedule(model, 3)).start()
    assert report.runs[0].reason is None and report.runs[0].restarts == 1


@pytest.mark.parametrize(
    "detect_from, correct_at, reason",
    [(0.1, 0.95, "correct_at 0.95 is step 11 of 12"), (0.42, 0.43, "change needs two")],
)
def test_manual_window_without_two_model_calls(detect_from, correct_at, reason):
    """A window that holds no change, or leaves no time to redraw: the run goes on unguarded, and the report advises."""
    settings = {"window": "manual", "detect_from": detect_from, "correct_at": correct_at}
    unguarded(trapped_model(), reason, settings)


@pytest.mark.parametrize("steps", [3, 4, 7, 12, 25, 33, 50, 400])
def test_advice_on_windows_works(steps):
    """Who sets what the message says gets a window."""
    ratios = [float(steps - step) for step in range(steps)]
    advice = float(re.search("Set correct_at to ([0-9.]+)", plan_window(ratios, "manual", 0.0, 1.0, (12.0, 1.6)))[1])
    assert isinstance(plan_window(ratios, "manual", 0.0, advice, (12.0, 1.6)), Window)
    advice = float(re.search("Widen it by at least ([0-9.]+)", plan_window(ratios, "manual", 0.0, 0.0, (12.0, 1.6)))[1])
    assert isinstance(plan_window(ratios, "manual", 0.0, advice, (12.0, 1.6)), Window)


def test_rising_schedule():
    """Unsampling runs unguarded."""
    unguarded(trapped_model(), "does not fall", sigmas=schedule(trapped_model())[:-1].flip(0).contiguous())


def test_a_schedule_without_steps_or_numbers():
    sigmas = schedule(exact_model(images()))
    sigmas[3] = torch.nan
    unguarded(exact_model(images()), "values that are no numbers", sigmas=sigmas)
    unguarded(exact_model(images()), "a run of 0 steps", sigmas=schedule(exact_model(images()))[:1])


class OwnSampler(comfy.samplers.Sampler):
    """Euler's method as another pack may write it: a Sampler that is no KSAMPLER."""

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        x = noise * sigmas[0]
        for now, after in zip(sigmas, sigmas[1:]):
            x = x + (x - model_wrap(x, now.expand(len(x)), **extra_args)) / now * (after - now)
        return x


def test_sampler_of_another_kind():
    """It is named in the report, and its run goes on unguarded."""
    model, outputs = trapped_model(), []
    guarded, report = guard(model)
    for patcher in (model, guarded):
        run = Run(patcher)
        run.sampler = OwnSampler()
        outputs.append(run.start().output)
    assert same(*outputs)
    assert "OwnSampler is not of ComfyUI's common kind" in report.find({"samples": outputs[1]}).reason


def test_sampler_that_changes_the_shape():
    """A sampler that enlarges its latent on the way is left alone from there on."""
    def enlarging(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i, (now, after) in enumerate(zip(sigmas, sigmas[1:])):
            if i == 2:
                x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
            denoised = model(x, now * x.new_ones(len(x)), **extra_args)
            callback({"x": x, "i": i, "sigma": now, "sigma_hat": now, "denoised": denoised})
            x = x + (x - denoised) / now * (after - now)
        return x

    def any_size(number, x, ask):
        return ask() if x.shape[-1] == WIDTH else 0.1 * x

    unguarded(trapped_model(), "changes the size of the latent", sampler=enlarging, model_call=any_size)


# Damage on the way


@pytest.mark.parametrize("whole", [True, False], ids=["sample", "pixel"])
@pytest.mark.parametrize("detector", ["clean estimate", "weighted score"])
@pytest.mark.parametrize("correction", ["targeted", "score clipping"])
def test_nan_from_the_model_in_one_sample(whole, detector, correction):
    """A sample that turns NaN is left alone, as without the guard; the others are judged and repaired."""
    def damaging(number, x, ask):
        denoised = ask()
        if number >= 3:  # the step at which is decided
            denoised[0, :, slice(None) if whole else 3] = torch.nan
        return denoised

    model = trapped_model(amplitude=40.0)
    guarded, report = guard(model, options={"detector": detector, "correction": correction})
    run, bare = (Run(m, model_call=damaging).start() for m in (guarded, model))
    (record,) = report.runs
    assert run.output[0].isnan().any() and same(run.output[0], bare.output[0])
    assert found(record) == [False, True, False] and record.restarts == 1
    changed = (run.state_before(1).nan_to_num(7e7) != run.legs[1].x.nan_to_num(7e7)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False] and run.output[1:].isfinite().all()
    summary = json.loads(ASCEDReport.execute(report, {"samples": run.output}).result[4])
    assert [image["verdict"] for image in summary["images"]] == ["clean", "artifacts", "clean"]


def test_options_node_checks_too():
    """A wrong option is refused at its own node, where a person looks for it."""
    defaults = {i.id: i.default for i in ASCEDOptions.GET_SCHEMA().inputs}
    assert ASCEDOptions.execute(**defaults)[0] == type(ASCEDOptions.execute(**defaults)[0])()
    with pytest.raises(ValueError, match="dilate is 0.6"):
        ASCEDOptions.execute(**defaults | {"dilate": 0.6})
