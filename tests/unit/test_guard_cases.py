"""The guard beside what people do: image to image, inpainting, video, two stages, rounds, corrections, reports."""

import gc
import json
import math
import weakref
from unittest import mock

import comfy.nested_tensor
import comfy.utils
import nodes as core_nodes
import pytest
import torch
from artifact_guard.nodes.asced import corrector, learned, repair
from artifact_guard.nodes.asced import guard as guard_module
from artifact_guard.nodes.asced.detector import Findings
from artifact_guard.nodes.asced.estimate import Estimate
from artifact_guard.nodes.asced.options import AscedOptions, GuardSettings
from artifact_guard.nodes.asced.schema import ASCEDKSampler, ASCEDReport, ASCEDUnguarded
from artifact_guard.nodes.asced.watch import Watch
from artifact_guard.nodes.asced.window import Window, plan_window
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.latents import FrameLayout
from comfy.patcher_extension import WrappersMP

from tests.exact.model import conditioning, exact_model
from tests.exact.traps import ScriptedTrap
from tests.unit.guard_support import (
    BATCH, CHANNELS, ELSEWHERE, HEIGHT, SQUARE, STEPS, TRAP_AT, WIDTH, Run, empty, found, guard, images, ksampler, same,
    trap, trapped_model,
)


def test_image_to_image():
    """denoise 0.35 starts below every preset noise level: the window follows, and repair works."""
    model, latent = trapped_model(at=0.9), {"samples": images(BATCH)}
    guarded, report = guard(model)
    bare, output = (ksampler(m, latent=latent, denoise=0.35) for m in (model, guarded))
    (record,) = report.runs
    assert record.ratios[0] < 1.5 and found(record) == [False, True, False] and record.restarts == 1
    assert not same(output[1], bare[1])


def test_inpainting_judges_and_changes_the_masked_part_only():
    """What the inpainting mask keeps is neither judged, nor counted for the threshold, nor changed."""
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 8:, 2:] = 1.0  # the second trap lies in the part that is kept
    model, latent = exact_model(images(), traps=[trap([1]), trap([0, 1, 2], ELSEWHERE)]), {"samples": images(BATCH)}
    guarded, report = guard(model, sensitivity=1.0)
    bare, output = (ksampler(m, latent=latent | {"noise_mask": mask}) for m in (model, guarded))
    (record,) = report.runs
    assert found(record) == [False, True, False] and record.restarts == 1 and record.regions[1].sum() < 80
    kept = (mask == 0)[:, None].expand_as(output)
    torch.testing.assert_close(output[kept], latent["samples"][kept])
    assert not (record.regions & (mask == 0)).any()
    assert torch.equal(output[kept], bare[kept]) and not (record.repaired & (mask == 0)).any()


def test_video():
    """Every frame of a 5-D latent is judged, and the frames found are repaired, those of the batch-mate untouched."""
    video = torch.stack([images(), images().flip(-1), images().flip(-2)], dim=2)
    pattern = torch.ones(1, CHANNELS, 1, HEIGHT, WIDTH).repeat(1, 1, 3, 1, 1)
    pattern[:, :, 1] = 0.0  # the middle frame freezes without a jump: it may be found
    planted = ScriptedTrap(trap([1], batch=2).mask, pattern, 10.0, (TRAP_AT,))
    guarded, report = guard(exact_model(video, "flow", traps=[planted]))
    run = Run(guarded, latent={"samples": torch.zeros(2, CHANNELS, 3, HEIGHT, WIDTH)}).start()
    (record,) = report.runs
    assert found(record)[:4] == [False, False, False, True] and found(record)[5]
    mask = record.repaired.view(2, 1, 3, HEIGHT, WIDTH).expand(run.output.shape)
    assert torch.equal(run.state_before(1) != run.legs[1].x, mask)
    assert record.artifact_mask().shape == (6, HEIGHT, WIDTH)
    frames = [(image["sample"], image["frame"]) for image in record.summary()["images"]]
    assert frames == [(sample, frame) for sample in (0, 1) for frame in (0, 1, 2)]


def test_nested_latents():
    """Of an image packed with audio the image part is judged and repaired; the audio enters the restart as it was."""
    def packed(image, audio):
        return comfy.utils.pack_latents([image, audio])

    audio = torch.randn(len(images()), 2, 7, generator=torch.Generator().manual_seed(0))
    data, shapes = packed(images(), audio)
    mask = packed(trap([1]).mask[:, None].expand(-1, CHANNELS, -1, -1), torch.zeros(BATCH, 2, 7, dtype=torch.bool))[0]
    model = exact_model(data, traps=[ScriptedTrap(mask, torch.ones(1, 1, data.shape[-1]), 10.0, (TRAP_AT,))])
    guarded, report = guard(model, sensitivity=0.8)
    nested = comfy.nested_tensor.NestedTensor([empty()["samples"], torch.zeros(BATCH, 2, 7)])
    run = Run(guarded, latent={"samples": nested}).start()
    (record,) = report.runs
    assert found(record) == [False, True, False]
    repaired = record.repaired[:, None].expand(-1, CHANNELS, -1, -1)
    wanted = packed(repaired, torch.zeros(BATCH, 2, 7, dtype=torch.bool))[0]
    assert torch.equal(run.state_before(1) != run.legs[1].x, wanted)
    assert [part.shape[1:] for part in run.output.unbind()] == [shape[1:] for shape in shapes]
    assert report.find({"samples": run.output}) is record


def test_two_stages_are_two_runs():
    """KSamplerAdvanced in two stages: the report keeps both runs and finds each by its output; idle, no bit changes."""
    def stages(model):
        common = (model,), (5, STEPS, 1.0, "euler", "simple", conditioning(), conditioning())
        node = core_nodes.KSamplerAdvanced()
        with torch.inference_mode():
            (half,) = node.sample(*common[0], "enable", *common[1], empty(), 0, 6, "enable")
            (whole,) = node.sample(*common[0], "disable", *common[1], half, 6, 10000, "disable")
        return half, whole

    model = trapped_model()
    guarded, report = guard(model)
    half, whole = stages(guarded)
    first, second = report.runs
    assert report.find(half) is first and report.find(whole) is second
    assert all(json.dumps(record.summary(), allow_nan=False) for record in report.runs)
    assert first.restarts == 1 and found(first) == [False, True, False]
    assert second.restarts == 1 and found(second) == [False, True, False], "the trap springs anew there, at the first call"
    assert len(first.ratios) == len(second.ratios) == 6 and second.reason is None
    idle = stages(guard(model, sensitivity=0.01)[0])
    assert all(same(*(part["samples"] for part in pair)) for pair in zip(idle, stages(model)))


def test_a_wrapper_that_samples_twice():
    """Another pack's wrapper runs the sampling twice: two runs, each guarded once and with a record of its own."""
    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    model = trapped_model()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "another pack", twice)
    guarded, report = guard(model)
    run = Run(guarded).start()
    assert [(record.restarts, record.model_calls) for record in report.runs] == 2 * [(1, STEPS + 1)]
    assert len(run.inputs) == 2 * (STEPS + 1)


@pytest.mark.parametrize("at", [3.5, 2.5])
def test_second_round(at, monkeypatch):
    """rounds 2 looks at all steps from the first repair to the second, and repairs what goes wrong there."""
    monkeypatch.setattr(repair, "REDRAWS", 0)
    model = exact_model(images(), traps=[trap([1]), trap([2], ELSEWHERE, at=at)])
    guarded, report = guard(model, options={"rounds": 2})
    run = Run(guarded).start()
    (record,) = report.runs
    assert record.restarts == 2 and len(run.legs) == 3 and len(run.inputs) == STEPS + 2
    changed = run.state_before(2) != run.legs[2].x
    assert changed[2][(..., *ELSEWHERE)].all() and not changed[2][..., 12:].any() and not changed[0].any()
    assert len({leg.seed for leg in run.legs}) == 3


@pytest.mark.parametrize("detector", ["clean estimate", "weighted score"])
def test_what_is_found_does_not_depend_on_the_correction(detector):
    """Near the threshold too, every correction is given the same regions."""
    masks = []
    for correction in ("targeted", "state replacement", "score clipping"):
        options = {"detector": detector, "correction": correction}
        model = trapped_model(at=4.5, amplitude=3.0)
        guarded, report = guard(model, mode="detect only", sensitivity=1.0, options=options)
        ksampler(guarded)
        masks.append(report.runs[0].regions)
    assert masks[0].any() and all(torch.equal(masks[0], mask) for mask in masks)


@pytest.mark.parametrize("detector", ["clean estimate", "weighted score"])
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_corrections(detector, kind):
    """Every correction finds the same regions and changes these alone; what they put there is what they say.

    The trap adds 40 to D: `targeted` starts from that, `state replacement` and enough `reverse_step` from before it,
    clipping leaves less of it than there was, and `surroundings` goes a tenth as far to the other side."""
    level, masks = {}, []
    for name, options in {
        "targeted": {"correction": "targeted"}, "earlier": {"correction": "targeted", "reverse_step": 3},
        "surroundings": {"correction": "surroundings"}, "replaced": {"correction": "state replacement"},
        "clipped": {"correction": "score clipping"},
    }.items():
        manual = {"window": "manual", "detect_from": 0.0, "correct_at": 0.2}
        model = trapped_model(kind, amplitude=40.0)
        guarded, report = guard(model, **manual, options={"detector": detector, **options})
        run = Run(guarded).start()
        (record,) = report.runs
        assert found(record) == [False, True, False] and record.restarts == 1 and record.reason is None
        changed = run.state_before(1) != run.legs[1].x
        assert changed.any() and not (changed & ~record.repaired[:, None]).any()
        signal = 1.0 if kind == "eps" else 1.0 - run.legs[1].sigmas[0].item()
        level[name] = run.legs[1].x[1][(..., *SQUARE)].mean().item() / signal
        level["before"] = run.state_before(1)[1][(..., *SQUARE)].mean().item() / signal
        masks.append(record.regions)
    assert all(torch.equal(masks[0], mask) for mask in masks)
    assert level["surroundings"] == pytest.approx(-4, abs=1)
    assert level["targeted"] > 30 and max(abs(level["earlier"]), abs(level["replaced"])) < 5
    assert level["clipped"] < level["before"] - 10


def test_the_report_finds_the_run_of_a_latent():
    """Among several runs the right one, in half precision too; a changed latent gets the newest, with a note."""
    model = trapped_model()
    guarded, report = guard(model)
    with pytest.raises(ValueError, match="not sampled yet"):
        report.find({"samples": torch.full((BATCH, CHANNELS, HEIGHT, WIDTH), 0.123)})
    outputs = [ksampler(guarded, seed=seed) for seed in (1, 2, 3)]
    for output, record in zip(outputs, report.runs):
        assert report.find({"samples": output}) is record and report.find({"samples": output.half()}) is record
    newest = report.find({"samples": outputs[0] + 1.0})
    assert "not the guarded sampler's own output" in newest.notes[-1] and newest.seconds == report.runs[-1].seconds
    assert not report.runs[-1].notes
    anew = guard(model)[1]  # as after the guard's output was thrown out of ComfyUI's cache
    assert anew.find({"samples": outputs[1]}) is report.runs[1]
    with pytest.raises(ValueError, match="not sampled yet"):
        guard(model, sensitivity=0.21)[1].find({"samples": outputs[1]})


def test_sampler_and_report_nodes():
    """KSampler (ASCED) is guard and KSampler in one, and ASCED Report says what was found, done and spent."""
    model, settings = trapped_model(), ("correct", 1.0, 1.0)
    with torch.inference_mode():
        latent, mask, report = ASCEDKSampler.execute(
            model, 4, STEPS, 1.0, "euler", "simple", conditioning(), conditioning(), empty(), 1.0, *settings).result
        seen, overlay, curves, fraction, summary = ASCEDReport.execute(report, latent).result
    assert same(latent["samples"], ksampler(guard(model, options={"max_area": 0.15})[0]))
    summary = json.loads(summary)
    assert same(mask, seen) and mask.shape == (BATCH, HEIGHT, WIDTH)
    assert mask[1][SQUARE].all() and not mask[[0, 2]].any()
    assert overlay.shape[0] == BATCH and curves.shape[0] == 1 and fraction == pytest.approx(mask.mean().item())
    assert (summary["status"], summary["restarts"], summary["model_calls"]) == ("guarded", 1, STEPS + 1)
    assert [image["verdict"] for image in summary["images"]] == ["clean", "artifacts", "clean"]
    (region,) = summary["images"][1]["regions"]
    assert region["area"] * HEIGHT * WIDTH == pytest.approx(mask[1].sum().item())
    assert summary["images"][1]["repaired_fraction"] > region["area"]


def demo_run(sampler="euler", scheduler="simple", steps=4, denoise=1.0, **latent):
    """What ASCEDKSampler gives on the demo model, and the summary of its run."""
    prompt = [[class_token(1), {}]]
    with torch.inference_mode():
        given = {"samples": torch.zeros(2, 3, 32, 32), **latent}
        latent, mask, report = ASCEDKSampler.execute(
            load_demo_model()[0], 3, steps, 1.0, sampler, scheduler, prompt, prompt, given, denoise, "correct", 1.0, 1.0
        ).result
        return given, latent, mask, json.loads(ASCEDReport.execute(report, latent).result[-1])


@pytest.mark.parametrize("sampler, scheduler, steps", [
    ("lcm", "simple", 4), ("euler", "sgm_uniform", 4), ("euler", "simple", 5), ("euler", "beta", 6), ("dpmpp_2m", "simple", 3),
])
def test_few_steps_are_reported(sampler, scheduler, steps):
    """As distilled models are sampled: where the run ends before its last phase, the summary has null for that."""
    described = demo_run(sampler, scheduler, steps)[-1]["images"]
    phases = [image["phases"] for image in described if image["phases"] is not None]
    assert len(described) == 2 and all({type(value) for value in of.values()} <= {float, type(None)} for of in phases)


def test_a_sample_that_does_not_move_has_no_phases():
    """A noise mask that keeps one picture of the batch as it is, as image to video keeps the first frame."""
    mask = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    still, moving = demo_run(steps=12, noise_mask=mask)[-1]["images"]
    assert still["phases"] is None and moving["phases"] is not None


def test_a_run_of_no_steps():
    """KSampler (ASCED) at denoise 0 gives what KSampler gives, and says that there was nothing to guard."""
    given, latent, mask, summary = demo_run(denoise=0.0)
    assert torch.equal(latent["samples"], given["samples"]) and mask.shape[0] == 2 and not mask.any()
    assert summary["reason"] == "a run of 0 steps has nothing to guard"
    guarded, report = guard(trapped_model())
    output = ksampler(guarded, denoise=0.0)
    with pytest.raises(ValueError, match="A run without steps .denoise 0"):
        ASCEDReport.execute(report, {"samples": output})


def test_what_a_restart_leaves_behind_is_let_go():
    """The exception that ends a leg does not keep the sampler's tensors until the garbage collector comes."""
    legs, estimates = [], []

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        legs.append(len(sigmas))
        for step in range(len(sigmas) - 1):
            denoised = model(x, sigmas[step] * x.new_ones(len(x)), **extra_args)
            estimates.append(weakref.ref(denoised))
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
            x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
        return x

    guarded, _ = guard(trapped_model())
    gc.collect()
    gc.disable()
    try:
        Run(guarded, euler).start()
        alive = [number for number, estimate in enumerate(estimates) if estimate() is not None]
    finally:
        gc.enable()
    assert len(legs) > 1 and alive == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("keep", [(True, False), (False, True), (True, True)])
def test_the_unguarded_result_where_guards_stack(order, keep):
    """What both repair is what they repair without keep_unguarded; the unguarded result is not kept, which is said."""
    model = exact_model(images(), "flow", traps=[trap([1]), trap([0], ELSEWHERE, at=0.9)])
    windows = [{"detect_from": 0.1, "correct_at": 0.4}, {"detect_from": 0.5, "correct_at": 0.7}]

    def run(keep):
        guarded, reports = model, {}
        for number in order:
            options = {"detector": "clean estimate", "correction": "targeted", "keep_unguarded": keep[number]}
            guarded, reports[number] = guard(guarded, window="manual", options=options, **windows[number])
        return {"samples": Run(guarded).start().output}, reports

    plain, kept = run((False, False)), run(keep)
    assert same(plain[0]["samples"], kept[0]["samples"])
    assert all(reports[number].runs[0].restarts == 1 for _, reports in (plain, kept) for number in (0, 1))
    for number in (0, 1):
        if keep[number]:
            with pytest.raises(ValueError, match="not kept: another guard on the same model"):
                ASCEDUnguarded.execute(kept[1][number], kept[0])
            assert "keep_unguarded has no effect" in kept[1][number].runs[0].summary()["notes"][0]


@pytest.mark.parametrize("first", [True, False])
def test_a_guard_that_only_looks_does_not_stand_in_the_way(first):
    """It restarts nothing: the other guard keeps the unguarded result."""
    model = trapped_model()
    looking, keeping = {"mode": "detect only"}, {"options": {"keep_unguarded": True}}
    guarded, inner = guard(model, **(looking if first else keeping))
    guarded, outer = guard(guarded, **(keeping if first else looking))
    latent = {"samples": ksampler(guarded)}
    unguarded = ASCEDUnguarded.execute(outer if first else inner, latent).result[0]["samples"]
    assert same(unguarded, ksampler(model)) and not same(unguarded, latent["samples"])


def test_onset_in_pure_noise_is_step_0():
    model = exact_model(images(), "flow", traps=[trap([1], at=60.0, amplitude=40.0)])
    guarded, report = guard(model, window="manual", detect_from=0.0, correct_at=0.4, options={"detector": "clean estimate"})
    Run(guarded).start()
    described = report.runs[0].summary()["images"][1]["regions"]
    assert {"step": 0, "noise_ratio": None} in [region["onset"] for region in described]


def test_a_region_a_frame_of_a_decoded_video():
    """9 masks of 9 image frames for 3 latent frames: repair is allowed in the last frame alone."""
    video = torch.stack([images(), images().flip(-1), images().flip(-2)], dim=2)
    planted = ScriptedTrap(trap([0], batch=1).mask, torch.ones(1, CHANNELS, 3, HEIGHT, WIDTH), 10.0, (TRAP_AT,))
    model = exact_model(video, traps=[planted])
    model.model.latent_format.temporal_downscale_ratio = 4
    region = torch.zeros(9, HEIGHT, WIDTH)
    region[5:] = 1
    guarded, report = guard(model, region=region)
    ksampler(guarded, latent={"samples": torch.zeros(1, CHANNELS, 3, HEIGHT, WIDTH)})
    (record,) = report.runs
    assert found(record)[2] and record.repaired.flatten(1).any(1).tolist() == [False, False, True]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "uni_pc", "euler_cfg_pp"])
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_unguarded_result_is_kept_on_request(sampler, kind):
    """keep_unguarded gives what the bare model gives, bit for bit, beside the repaired result, which stays the same."""
    model = trapped_model(kind)
    guarded, report = guard(model, options={"keep_unguarded": True})
    output, plain = ksampler(guarded, sampler), ksampler(guard(model)[0], sampler)
    latent = {"samples": output}
    unguarded = ASCEDUnguarded.execute(report, latent).result[0]["samples"]
    assert same(unguarded, ksampler(model, sampler)) and same(output, plain) and not same(output, unguarded)
    assert same(ksampler(model, sampler), unguarded), "another run of the model is not disturbed"


def test_a_run_that_is_interrupted_before_its_repair_is_let_go(monkeypatch):
    """With keep_unguarded the run goes on to its end before it is repaired. Stopped there, nothing of it waits for the garbage
    collector."""
    runs = []

    class Noted(guard_module.GuardedRun):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            runs.append(weakref.ref(self))

    def stop(number, x, ask):
        if number == STEPS - 1:
            assert runs[0]().waiting is not None, "a repair waits"
            raise KeyboardInterrupt
        return ask()

    monkeypatch.setattr(guard_module, "GuardedRun", Noted)
    run = Run(guard(trapped_model(), options={"keep_unguarded": True})[0], model_call=stop)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            run.start()
        run.legs.clear()
        assert runs[0]() is None
    finally:
        gc.enable()


def test_the_unguarded_result_of_a_run_without_repairs():
    """Nothing repaired: the latent itself. Repaired and not kept: an error that says which switch to turn."""
    guarded, report = guard(exact_model(images()))
    latent = {"samples": ksampler(guarded)}
    assert ASCEDUnguarded.execute(report, latent).result[0] is latent
    guarded, report = guard(trapped_model())
    with pytest.raises(ValueError, match="keep_unguarded is on"):
        ASCEDUnguarded.execute(report, {"samples": ksampler(guarded)})


def put_back_run(sampler, worse, **options):
    """A guarded run of the trapped model in which the borders of samples `worse` show no less after their repair.

    The scripted trap answers with the same again whatever the repair; here it counts as something else."""
    model = trapped_model(rows=(0, 1))
    guarded, report = guard(model, options=options)
    calls = []

    def jump(x, mask):
        calls.append(1)
        after = len(calls) == 1
        return torch.tensor([0.1 if after and i not in worse else 1.0 for i in range(BATCH)], device=x.device)

    with mock.patch.object(repair, "border_jump", jump), \
            mock.patch.object(repair, "fallen_back", lambda denoised, artifact, mask: torch.zeros_like(mask)):
        run = Run(guarded, sampler).start()
    return model, run, report.runs[0]


def test_a_repair_that_is_answered_with_the_same_again_is_left():
    """A scripted trap draws the same whatever is given to it: nothing is put back, and the report says what came of it."""
    guarded, report = guard(trapped_model())
    run = Run(guarded).start()
    (record,) = report.runs
    assert not record.undone.any() and record.fallen_back[1][SQUARE].all()


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "uni_pc", "res_multistep", "lcm"])
def test_what_falls_back_is_drawn_again_at_the_next_steps(sampler, monkeypatch):
    """The model is asked about the redrawn sample in place of the one it would have been asked about: no call more, and every
    step is reported once. Outside the repair, batch-mates included, it is that sample; no noise is used twice."""
    model = trapped_model()
    guarded, report = guard(model)
    run = Run(guarded, sampler).start()
    (record,) = report.runs
    assert 1 < record.redraws == len(run.legs) - 2 <= repair.REDRAWS and record.restarts == 1
    assert record.model_calls == len(run.inputs) == STEPS + 1
    assert [len(leg.reported) for leg in run.legs[1:-1]] == record.redraws * [1]
    assert [len(leg.sigmas) for leg in run.legs[1:]] == [len(run.legs[1].sigmas) - n for n in range(record.redraws + 1)]
    assert len({leg.seed for leg in run.legs}) == len(run.legs)
    mask = record.repaired[:, None].expand_as(run.output)
    inside = [leg.x[mask] for leg in run.legs[1:]]
    assert all(not torch.equal(one, other) for one, other in zip(inside, inside[1:]))

    monkeypatch.setattr(repair, "REDRAWS", 0)
    plain = Run(guard(model)[0], sampler).start()
    followed, redrawn = plain.inputs[plain.legs[1].first_input + 1], run.legs[2].x
    assert torch.equal(redrawn[~mask], followed[~mask]) and not (redrawn == followed)[mask].any()
    assert len(plain.legs) == 2


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpm_adaptive", "heunpp2"])
def test_redraws_with_several_calls_a_step(sampler):
    """Redrawn only at the sigmas of the schedule: never more than one call beyond the bare run's, the adaptive one aside."""
    model = trapped_model()
    guarded, report = guard(model)
    run = Run(guarded, sampler).start()
    extra = len(run.inputs) - len(Run(model, sampler).start().inputs)
    assert run.output.isfinite().all() and (extra <= 1 or sampler == "dpm_adaptive")
    assert sampler == "dpm_adaptive" or report.runs[0].redraws > 0


@pytest.mark.parametrize(("likely", "source", "wanted"), [(0.0, "surroundings", -4.0), (math.inf, "before its onset", 0.0)])
def test_what_a_region_is_renoised_from(likely, source, wanted, monkeypatch):
    """The trap adds 40 to D. A likely region goes a tenth as far to the other side of what surrounds it; a doubted one
    is as it was before it sprang. The report says which."""
    monkeypatch.setattr(learned, "LIKELY", likely)
    monkeypatch.setattr(corrector, "draw_noise", lambda shape, *_: torch.zeros(shape))
    guarded, report = guard(trapped_model(amplitude=40.0))
    run = Run(guarded).start()
    (record,) = report.runs
    assert found(record) == [False, True, False]
    assert run.legs[1].x[1][(..., *SQUARE)].mean().item() == pytest.approx(wanted, abs=1)
    assert [region["renoised_from"] for region in record.summary()["images"][1]["regions"]] == [source]


def test_doubt_is_the_same_in_all_frames_of_a_video():
    marked = torch.zeros(6, HEIGHT, WIDTH, dtype=torch.bool)
    marked[(1, *SQUARE)] = marked[(5, *ELSEWHERE)] = True
    spread = learned.in_every_frame(marked, 3)
    assert spread[(slice(0, 3), *SQUARE)].all() and spread[(slice(3, 6), *ELSEWHERE)].all()
    assert spread.sum() == 3 * marked.sum() and torch.equal(learned.in_every_frame(marked, 1), marked)


def test_doubt_is_by_region():
    """Two regions, one of them with a likely pixel: each is renoised from its own source, and what is around them is left."""
    random = torch.Generator().manual_seed(0)
    now, before = (torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=random) for _ in range(2))
    mask, likely = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[(0, *SQUARE)] = mask[(0, *ELSEWHERE)] = True
    likely[0, SQUARE[0].start, SQUARE[1].start] = True
    score, estimate = torch.zeros(1, HEIGHT, WIDTH), Estimate(now, now, 1.0, 2.0)
    watch = Watch(GuardSettings(), mock.MagicMock(layout=FrameLayout.of([now.shape])), None, None, 0)
    doubted = watch._doubted(Findings(mask, score, score, True, likely, before=before), mask)
    assert doubted[(0, *ELSEWHERE)].all() and not doubted[(0, *SQUARE)].any()
    renoised = watch._repaired(estimate, mask, doubted, before)
    noise = corrector.draw_noise(now.shape, corrector.draw_noise_seed(0, 0, 0), now.device)
    torch.testing.assert_close(renoised[(..., *ELSEWHERE)], (before + 2.0 * noise)[(..., *ELSEWHERE)])
    wanted = corrector.surroundings(estimate, mask & ~doubted, corrector.UNIT_PUSH, corrector.draw_noise_seed(0, 0, 0))
    torch.testing.assert_close(renoised[(..., *SQUARE)], wanted[(..., *SQUARE)])
    assert torch.equal(renoised[:, :, ~mask[0]], now[:, :, ~mask[0]])


@pytest.mark.parametrize("settings", [
    {"correction": "targeted"}, {"detector": "clean estimate", "correction": "surroundings"},
])
def test_only_the_packs_own_repairs_are_drawn_again(settings):
    """The published forms stay what they are, and a detector that is never sure has nothing drawn again."""
    guarded, report = guard(trapped_model(), options=settings)
    run = Run(guarded).start()
    assert len(run.legs) == 2 and report.runs[0].redraws == 0 and report.runs[0].restarts == 1


def test_what_the_detector_doubts_is_not_drawn_again():
    """Two regions fall back: the one with a sure pixel is drawn again, the other left; neither late in the run."""
    random = torch.Generator().manual_seed(0)
    artifact = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=random)
    mask, sure = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[(0, *SQUARE)] = mask[(0, *ELSEWHERE)] = True
    sure[0, SQUARE[0].start, SQUARE[1].start] = True
    layout = FrameLayout.of([artifact.shape])
    fixed = repair.Repair(layout, artifact, artifact, mask, mask, sure, artifact)
    fixed.look_back(Estimate(artifact, artifact, 1.0, 1.2))
    assert fixed.falling[0][(0, *SQUARE)].all() and not fixed.falling[0][(0, *ELSEWHERE)].any()
    fixed.look_back(Estimate(artifact, artifact, 1.0, repair.REDRAW_DOWN_TO / 1.01))
    assert fixed.falling is None and fixed.settled
    fixed.look_back(Estimate(artifact, artifact + 10.0, 1.0, 1.2))
    assert fixed.falling is None


def test_later_rounds_look_beside_what_was_repaired():
    """What was repaired moves because it was: found anew it does not count, unless it fell back and is to be drawn again."""
    square, elsewhere, first, again, of_first = torch.zeros(5, 1, HEIGHT, WIDTH, dtype=torch.bool)
    square[(0, *SQUARE)] = elsewhere[(0, *ELSEWHERE)] = True
    first[0, 0] = again[0, -1, -1] = of_first[0, 0, 0] = True
    score = torch.zeros(1, HEIGHT, WIDTH)
    later_round = mock.Mock()
    later_round.detector.findings.return_value = Findings(square | elsewhere | first, score, score, True)
    later_round.settings.options = AscedOptions()
    repairs = later_round._repairs.return_value = [mock.Mock(mask=first), mock.Mock(mask=square)]
    repairs[0].to_draw_again.return_value, repairs[1].to_draw_again.return_value = of_first, again
    findings, redrawn = Watch._findings(later_round, mock.Mock())
    assert torch.equal(findings.regions, elsewhere) and torch.equal(redrawn, again | of_first)
    later_round.settings.options = AscedOptions(min_area=0.1)
    assert not Watch._findings(later_round, mock.Mock())[0].regions.any(), "a sliver beside a repair is no region"
    repairs[0].fallen_back.return_value, repairs[1].fallen_back.return_value = of_first, again
    Watch.finish(later_round)
    assert torch.equal(later_round.record.fallen_back, again | of_first)


def test_window_of_a_run_that_enters_late():
    """To b / a 1.6, but for a quarter of the steps and three of them at least; a whole run is not watched longer for that."""
    fall = [2.0 * 0.93**n for n in range(24)]
    assert plan_window(fall, "auto", 0.0, 0.0, (8.0, 1.6), 2) == Window(0, 6)
    assert plan_window(fall[::4], "auto", 0.0, 0.0, (8.0, 1.6), 2) == Window(0, 3)
    assert plan_window([6.0 * 0.9**n for n in range(24)], "auto", 0.0, 0.0, (8.0, 1.6), 2) == Window(0, 12)
    assert plan_window([14.0, 2.0, 0.5, 0.1, 0.03], "auto", 0.0, 0.0, (8.0, 1.6), 2).correct_at == 2


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_a_repair_that_gained_nothing_is_put_back(sampler):
    """The samples made no better go on as they were, bit for bit, the others repaired; all for one model call."""
    model, run, record = put_back_run(sampler, worse={1})
    bare = Run(model, sampler).start()
    first, second, third = run.legs
    assert same(third.x[0], second.x[0]) and same(third.x[2], second.x[2])
    assert same(third.x[1], run.state_before(1)[1]) and not same(second.x[1], third.x[1])
    assert len(run.inputs) == len(bare.inputs) + 1 == record.model_calls
    assert record.undone[1].any() and not record.repaired[1].any() and record.repaired[0].any()
    if sampler == "euler":
        assert same(run.output[1], bare.output[1]) and not same(run.output[0], bare.output[0])
    outcomes = [region["outcome"] for image in record.summary()["images"] for region in image["regions"]]
    assert any("undone" in outcome for outcome in outcomes)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_repairs_are_put_back_beside_a_kept_unguarded_run(sampler):
    """The unguarded run ends before a repair is judged: the same samples are put back, and the result is the same."""
    _, run, record = put_back_run(sampler, worse={1})
    _, keeping, kept = put_back_run(sampler, worse={1}, keep_unguarded=True)
    assert same(keeping.output, run.output) and same(kept.undone, record.undone) and kept.undone.any()
    assert kept.unguarded is not None


def test_all_repairs_put_back_is_the_bare_run():
    """Every repair undone: an Euler run ends as if there had been no guard."""
    model, run, record = put_back_run("euler", worse={0, 1})
    assert same(run.output, Run(model, "euler").start().output) and not record.repaired.any()
