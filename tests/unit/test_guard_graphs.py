"""The guard in graphs that people build: samplers of other packs, leftover noise, scheduled hooks, many rounds."""

import copy

import comfy.hooks
import comfy.samplers
import nodes as core_nodes
import pytest
import torch
from artifact_guard.nodes.asced import repair
from artifact_guard.nodes.asced.report import RunRecord
from artifact_guard.nodes.latents import FrameLayout

from tests.exact.model import conditioning
from tests.unit.guard_support import (
    CHANNELS, ELSEWHERE, HEIGHT, SQUARE, STEPS, WIDTH, Run, empty, guard, ksampler, same, trapped_model,
)


def test_a_region_that_comes_back_is_no_larger_for_it(monkeypatch):
    """Renoised in every round as far beyond it as in the first; what was found in the first is what is reported."""
    monkeypatch.setattr(repair, "REDRAWS", 0)
    records = []
    for rounds in (1, 3):
        guarded, report = guard(trapped_model(), options={"rounds": rounds})
        ksampler(guarded, steps=25)
        records.append(report.runs[0])
    one, three = records
    assert (one.restarts, three.restarts) == (1, 3)
    assert same(one.regions, three.regions) and same(one.repaired, three.repaired) and one.repaired.sum() > one.regions.sum() > 0


def test_what_a_later_round_puts_back_leaves_the_earlier_repair():
    """The sample is then as the earlier repair left it, and the report says so; so does where that one was renoised from."""
    square, both = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.bool)
    square[(0, *SQUARE)] = both[(0, *SQUARE)] = both[(0, *ELSEWHERE)] = True
    _, report = guard(trapped_model())
    record = RunRecord(report.settings, FrameLayout.of([(1, CHANNELS, HEIGHT, WIDTH)]), None)
    record.add_repair(square, square)
    record.add_repair(both, torch.zeros_like(both))
    record.undo(both)
    record.close(torch.zeros(1, CHANNELS, HEIGHT, WIDTH))
    assert same(record.repaired, square) and same(record.doubted, square) and same(record.undone, both & ~square)


def test_what_is_renoised_again_after_it_was_put_back_is_repaired():
    """The last word on a place is that of its last round; what that one did not reach stays undone."""
    square, both = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.bool)
    square[(0, *SQUARE)] = both[(0, *SQUARE)] = both[(0, *ELSEWHERE)] = True
    _, report = guard(trapped_model())
    record = RunRecord(report.settings, FrameLayout.of([(1, CHANNELS, HEIGHT, WIDTH)]), None)
    record.add_repair(both, None)
    record.undo(both)
    record.add_repair(square, None)
    record.close(torch.zeros(1, CHANNELS, HEIGHT, WIDTH))
    assert same(record.repaired, square) and same(record.undone, both & ~square)


def at_lower_sigma(amount, asked):
    """A sampler that tells its model less noise than its sample has, so that more detail is drawn; `asked` gets the samples."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        def told(x, sigma, **more):
            asked.append((x.clone(), sigma.clone()))
            return model(x, sigma * (1 - amount) if sigma.max() > 0.2 else sigma, **more)

        euler = comfy.samplers.sampler_object("euler").sampler_function
        return euler(told, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)

    return sample


@pytest.mark.parametrize("amount", [0.1, 0.4])
@pytest.mark.parametrize("kept", [False, True])
def test_a_sampler_that_tells_the_model_another_sigma_goes_on_at_its_own(amount, kept):
    """After a repair it goes on at the step where it was, so that samples without an artifact are as in the bare run."""
    bare, guarded_asked, model = [], [], trapped_model()
    without = Run(model, at_lower_sigma(amount, bare)).start()
    guarded, report = guard(model, options={"keep_unguarded": kept})
    run = Run(guarded, at_lower_sigma(amount, guarded_asked)).start()
    assert report.runs[0].restarts == 1 and report.runs[0].repaired[1][SQUARE].all()
    schedule = [float(sigma.max()) for _, sigma in bare]
    assert all(min(abs(float(sigma.max()) - other) for other in schedule) < 1e-3 for _, sigma in guarded_asked)
    assert torch.allclose(run.output[[0, 2]], without.output[[0, 2]], atol=1e-4)


@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2", "euler"])
@pytest.mark.parametrize("sigmas", [(14.6, 9, 6, 4, 3, 2, 1.5, 0.9, 0.0), (14.6, 9, 6, 4, 3, 2, 1.5, 0.9, 0.3)])
def test_a_redraw_leaves_every_sampler_steps_to_take(sampler, sigmas):
    """A trap that is drawn again at every step: samples without one are as without the guard."""
    model, sigmas = trapped_model(), torch.tensor(sigmas)
    bare = Run(model, sampler, sigmas=sigmas.clone()).start()
    guarded, report = guard(model)
    run = Run(guarded, sampler, sigmas=sigmas.clone()).start()
    assert report.runs[0].redraws > 0
    assert (run.output - bare.output)[[0, 2]].abs().max() < (0.05 if sampler.startswith("uni_pc") else 1e-5)


def test_samplers_that_ask_the_model_in_their_own_way():
    """By position; through a copy of what they were given; after the first report; and past the guard, which says so."""
    euler = comfy.samplers.sampler_object("euler").sampler_function

    def by_position(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def ask(x, sigma, **more):
            return model(x, sigma, more["denoise_mask"], more["model_options"], more["seed"])

        return euler(ask, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    def by_copy(model, x, sigmas, **more):
        return euler(copy.copy(model), x, sigmas, **more)

    def reporting_first(model, x, sigmas, callback=None, **more):
        callback({"x": x, "i": 0, "sigma": sigmas[0], "denoised": x})
        return euler(model, x, sigmas, callback=callback, **more)

    def past(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def ask(x, sigma, denoise_mask=None, **more):
            return model.inner_model(x, sigma, **more)

        return euler(ask, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    for sampler, reason in ((by_position, None), (reporting_first, None), (by_copy, "past the guard"), (past, "past the guard")):
        guarded, report = guard(trapped_model())
        Run(guarded, sampler).start()
        (record,) = report.runs
        assert record.reason is None and record.restarts == 1 if reason is None else reason in record.reason, sampler.__name__


def test_an_unguarded_result_is_not_kept_where_hooks_go_by_keyframes():
    """ComfyUI goes through keyframes once: the repaired leg after a whole unguarded one would have the last of them."""
    group, hook = comfy.hooks.HookGroup(), comfy.hooks.WeightHook()
    hook.weights, hook.need_weight_init = {}, False
    for percent, strength in ((0.0, 1.0), (0.75, 0.0)):
        hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=percent))
    group.add(hook)
    guarded, report = guard(trapped_model(), options={"keep_unguarded": True})
    positive = [[text, {**more, "hooks": group}] for text, more in conditioning()]
    with torch.inference_mode():
        core_nodes.KSampler().sample(guarded, 4, STEPS, 1.0, "euler", "simple", positive, conditioning(), empty(), 1.0)
    (record,) = report.runs
    assert record.restarts == 1 and record.unguarded is None and "keyframes" in record.why_not_kept
