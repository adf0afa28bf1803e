"""What the guard promises its users, on the exact denoiser through ComfyUI's own nodes, over samplers and models."""

import comfy.model_management
import nodes as core_nodes
import pytest
import torch
from artifact_guard.nodes.asced import corrector
from comfy_extras import nodes_custom_sampler as custom

from tests.exact.model import conditioning, exact_model, sample
from tests.unit.guard_support import (
    BATCH, ELSEWHERE, HEIGHT, KINDS, SAMPLERS, SQUARE, STEPS, WIDTH, Run, content, empty, found, guard, images,
    ksampler, open_bars, same, trap, trapped_model,
)

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
each_kind = pytest.mark.parametrize("kind", KINDS)
ADAPTIVE_EXTRA_CALLS = 24  # dpm_adaptive begins again with a small first step, and steps as the new content needs


@each_sampler
@each_kind
def test_nothing_found_changes_no_bit_and_costs_no_call(sampler, kind):
    """Nothing abnormal enough, or leave only to look: result and number of model calls are those of the bare model."""
    model = trapped_model(kind)

    def sampled(patcher):
        model.model.forget_calls()
        return ksampler(patcher, sampler), model.model.calls

    bare, calls = sampled(model)
    for settings, sees in [({"sensitivity": 0.01}, False), ({"mode": "detect only"}, True)]:
        guarded, report = guard(model, **settings)
        output, guarded_calls = sampled(guarded)
        (record,) = report.runs
        assert same(output, bare) and calls == guarded_calls == record.model_calls
        assert record.reason is None and record.restarts == 0 and not record.repaired.any()
        assert found(record) == [False, sees, False]


@each_sampler
@each_kind
def test_a_repair_is_new_inside_the_mask_and_bit_equal_outside(sampler, kind):
    """The first leg is the bare run; the restart's input differs from the last one in the dilated mask and only there,

    batch-mates included; the model sees just that; the rest of the schedule is run; one more call."""
    adaptive, model = sampler == "dpm_adaptive", trapped_model(kind)
    bare = Run(model, sampler).start()
    guarded, report = guard(model)
    run = Run(guarded, sampler).start()
    (record,) = report.runs
    first, second = run.legs[:2]
    before, mask = run.state_before(1, adaptive), record.repaired[:, None].expand_as(second.x)
    assert found(record) == [False, True, False] and record.regions[1][SQUARE].float().mean() > 0.9
    assert not (record.regions & ~record.repaired).any() and record.repaired.sum() > record.regions.sum()
    assert torch.equal(before != second.x, mask)
    assert all(same(*pair) for pair in zip(run.inputs[: second.first_input], bare.inputs))
    if sampler == "uni_pc":  # divides what it is given by sqrt(1 + sigma^2), and multiplies again for the model
        torch.testing.assert_close(run.inputs[second.first_input], second.x, rtol=1e-6, atol=1e-6)
    else:
        assert same(run.inputs[second.first_input], second.x)
    assert torch.equal(second.sigmas[adaptive:], first.sigmas[-len(second.sigmas) :][adaptive:])
    extra = len(run.inputs) - len(bare.inputs)
    assert extra <= ADAPTIVE_EXTRA_CALLS if adaptive else extra == 1
    assert record.restarts == 1 and record.model_calls == len(run.inputs)
    assert not same(run.output[1], bare.output[1])


@each_sampler
def test_same_seed_same_result_and_noise_seed_varies_the_repair_only(sampler):
    """A second run, and a second guard, give every bit again; noise_seed changes the repair inside the mask alone."""
    model = trapped_model()
    guarded, report = guard(model)
    run, again, anew = (Run(patcher, sampler).start() for patcher in (guarded, guarded, guard(model)[0]))
    assert same(run.output, again.output) and same(run.output, anew.output)
    other = Run(guard(model, options={"noise_seed": 1})[0], sampler).start()
    mask = report.runs[0].repaired[:, None].expand_as(run.output)
    assert torch.equal(run.legs[1].x != other.legs[1].x, mask)
    if sampler != "lcm":  # lcm keeps nothing of its state, and an exact model then finds back to the same image
        assert not same(run.output, other.output)
    assert run.legs[1].seed == other.legs[1].seed != run.legs[0].seed


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1000])
def test_every_seed_that_core_takes(seed):
    """The noise of restart and repair is drawn from seeds that generators accept, up to the end of the seed widget."""
    for sampler in ("euler_ancestral", "dpmpp_2m_sde"):
        guarded, report = guard(trapped_model(), options={"noise_seed": seed})
        assert ksampler(guarded, sampler, seed=seed).isfinite().all() and report.runs[0].restarts == 1


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc", "ipndm", "deis"])
@pytest.mark.parametrize("detector", ["clean estimate", "weighted score"])
def test_a_sample_is_judged_the_same_alone_and_in_a_batch(sampler, detector):
    """Its mask does not depend on its batch-mates, those with an artifact included."""
    settings = {"mode": "detect only", "sensitivity": 1.0, "options": {"detector": detector}}
    guarded, report = guard(trapped_model(), **settings)
    ksampler(guarded, sampler)
    together = report.runs[0].regions
    assert together[1].any() and len({m.sum().item() for m in together}) == BATCH
    for index in range(BATCH):
        guarded, report = guard(trapped_model(rows=[0] if index == 1 else [], batch=1), **settings)
        ksampler(guarded, sampler, empty(1, batch_index=[index]))
        assert torch.equal(report.runs[0].regions[0], together[index])


def test_repair_stays_within_region():
    """What is found outside `region` is reported, not repaired; with nothing inside, no bit changes."""
    model = exact_model(images(), traps=[trap([1]), trap([1, 2], ELSEWHERE)])
    region = torch.zeros(1, 2 * HEIGHT, 2 * WIDTH)
    region[..., 2 * 12 :] = 1.0  # a mask at twice the latent's size: from column 12 on
    guarded, report = guard(model, region=region)
    run = Run(guarded).start()
    (record,) = report.runs
    assert found(record) == [False, True, True]
    assert record.regions[1][SQUARE].any() and record.regions[1][ELSEWHERE].any()
    changed = run.state_before(1) != run.legs[1].x
    assert torch.equal(changed, record.repaired[:, None].expand_as(changed)) and changed[1][(..., *SQUARE)].all()
    assert not changed[..., :12].any() and not changed[[0, 2]].any()
    guarded, report = guard(model, region=torch.stack([torch.ones(HEIGHT, WIDTH), *torch.zeros(2, HEIGHT, WIDTH)]))
    assert same(ksampler(guarded), ksampler(model)) and report.runs[0].regions.any() and not report.runs[0].restarts


def test_strength_0_is_no_patch_at_all():
    """No wrapper, no option differs from the input model's, and the report says that the guard is off."""
    model = trapped_model()
    guarded, report = guard(model, strength=0.0)
    assert guarded is not model and guarded.wrappers == model.wrappers
    assert content(guarded.model_options) == content(model.model_options)
    output = ksampler(guarded)
    assert same(output, ksampler(model))
    summary = report.find({"samples": output}).summary()
    assert summary["status"] == "not guarded" and "off" in summary["reason"] and len(summary["images"]) == BATCH


@pytest.fixture
def noise_seeds(monkeypatch):
    """The seeds of the noise of all repairs, as they are drawn."""
    seeds, draw_noise = [], corrector.draw_noise
    monkeypatch.setattr(corrector, "draw_noise", lambda shape, seed, device: (seeds.append(seed), draw_noise(shape, seed, device))[1])
    return seeds


def test_legs_with_one_seed_repair_with_noise_of_their_own(noise_seeds):
    """KSampler (Advanced) twice, as people wire it: both have the same noise_seed. A leg from pure noise is a run like any other."""
    advanced, both = core_nodes.KSamplerAdvanced(), (conditioning(), conditioning())
    guarded, report = guard(exact_model(images(), traps=[trap([1]), trap([1], at=1.2)]))
    with torch.inference_mode():
        (half,) = advanced.sample(guarded, "enable", 5, 16, 1.0, "euler", "simple", *both, empty(), 0, 10, "enable")
        advanced.sample(guarded, "disable", 5, 16, 1.0, "euler", "simple", *both, half, 10, 10000, "disable")
        first = list(noise_seeds)
        core_nodes.KSampler().sample(guarded, 5, 16, 1.0, "euler", "simple", *both, empty())
    assert [record.restarts for record in report.runs][:2] == [1, 1] and len(set(first)) == 2
    assert noise_seeds[2] == first[0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_guards_work_and_neither_loops(order, noise_seeds):
    """Guards on one model with windows one after the other: each repairs what it sees, once, with noise of its own,

    and the steps they report go on from the one to the other."""
    model = exact_model(images(), traps=[trap([1]), trap([1], ELSEWHERE, at=2.5)])
    windows = [{"detect_from": 0.0, "correct_at": 0.25}, {"detect_from": 0.34, "correct_at": 0.5}]
    guarded, reports, steps = model, {}, []
    for number in order:
        guarded, reports[number] = guard(guarded, window="manual", **windows[number])
    run = Run(guarded, "euler_ancestral").start()
    for number, square in enumerate([SQUARE, ELSEWHERE]):
        (record,) = reports[number].runs
        assert record.restarts == 1 and record.regions[1][square].any() and found(record) == [False, True, False]
    assert len(run.legs) == 3 and len(run.inputs) == STEPS + 2
    assert len(set(noise_seeds)) == 2, "a repair draws the noise of another once more"
    latent = empty()["samples"]
    sample(guarded, "euler_ancestral", "simple", STEPS, latent=latent, callback=lambda i, *_: steps.append(i))
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11]
    assert len({leg.seed for leg in run.legs}) == 3, "a leg draws the noise of another once more"


def test_equal_guards_stack():
    """The same guard twice: both find it, one call more for each."""
    guarded, first = guard(trapped_model())
    guarded, second = guard(guarded)
    run = Run(guarded).start()
    assert [report.runs[0].restarts for report in (first, second)] == [1, 1] and len(run.inputs) == STEPS + 2


LABELS = [conditioning(1), conditioning(0), conditioning()]
GUIDERS = {
    "cfg": lambda model: custom.CFGGuider.execute(model, *LABELS[:2], 4.0)[0],
    "dual": lambda model: custom.DualCFGGuider.execute(model, *LABELS, 3.0, 2.0, "regular")[0],
}


@pytest.mark.parametrize("guider", GUIDERS.values(), ids=GUIDERS)
def test_guiders(guider):
    """With guidance the model is asked for two or three conditions at once; the promises are the same."""
    model = exact_model(images(6), labels=[0, 0, 0, 1, 1, 1], traps=[trap([1])])
    bare = Run(model, "dpmpp_2m", guider=guider, seed=3).start()
    guarded, report = guard(model)
    run = Run(guarded, "dpmpp_2m", guider=guider, seed=3).start()
    (record,) = report.runs
    assert found(record) == [False, True, False] and len(run.inputs) == len(bare.inputs) + 1
    mask = record.repaired[:, None].expand_as(run.output)
    assert torch.equal(run.state_before(1)[:BATCH] != run.legs[1].x, mask)
    idle = Run(guard(model, sensitivity=0.01)[0], "dpmpp_2m", guider=guider, seed=3).start()
    assert same(idle.output, bare.output) and len(idle.inputs) == len(bare.inputs)


@pytest.mark.parametrize("end", ["whole", "error", "interrupt"])
@pytest.mark.parametrize("at_call", [2, 6])
def test_nothing_is_left_behind(end, at_call):
    """After a run, an error or an interruption, before the repair or after it: model options, guider and sampler are

    the same objects with the same content, no progress bar is open, and the next run is as ever."""
    errors = {"error": RuntimeError, "interrupt": comfy.model_management.InterruptProcessingException}

    def failing(number, x, ask):
        if number == at_call and end in errors:
            raise errors[end]("planned")
        return ask()

    model = trapped_model()
    guarded, report = guard(model)
    run = Run(guarded, model_call=failing)
    kept = [model.model_options, guarded.model_options, run.guider.model_options, vars(run.sampler)]
    before = [content(options) for options in kept]
    if end == "whole":
        run.start()
    else:
        with pytest.raises(errors[end], match="planned"):
            run.start()
    assert kept[2] is run.guider.model_options and [content(options) for options in kept] == before
    assert open_bars() == 0
    assert len(report.runs) == (end == "whole")
    at_call, run.legs = None, []
    run.start()
    assert len(run.legs) >= 2 and same(run.output, Run(guard(model)[0]).start().output)


@each_sampler
def test_progress_goes_on_over_a_restart(sampler):
    """Steps reported never go back, never leave the bar, and end at the last; the first leg's bar is closed."""
    guarded, report = guard(trapped_model())
    steps = []
    sample(guarded, sampler, "simple", STEPS, latent=empty()["samples"], callback=lambda i, *_: steps.append(i))
    assert report.runs[0].restarts == 1
    if sampler == "dpm_adaptive":  # counts the tries it makes, which are not the schedule's steps
        assert steps[0] == 0 and len(steps) > report.runs[0].window.correct_at
    else:
        assert steps == sorted(steps) and steps[-1] == STEPS - 1 and len(steps) <= STEPS + 1
    run = Run(guarded, sampler).start()
    assert len(run.legs) >= 2 and not any(leg.open_bars for leg in run.legs) and open_bars() == 0


def test_uni_pc_leaves_the_schedule_as_in_one_leg():
    """uni_pc writes 0.001 into the last sigma, which ComfyUI reads afterwards; the restart has the clean schedule."""
    bare, run = Run(trapped_model(), "uni_pc").start(), Run(guard(trapped_model())[0], "uni_pc").start()
    assert same(run.sigmas, bare.sigmas)
    assert len(run.legs) >= 2 and all(leg.sigmas[-1] == 0 for leg in run.legs)
