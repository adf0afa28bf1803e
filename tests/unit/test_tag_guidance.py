"""Guidance as a MODEL patch: what it promises under ComfyUI's own sampling."""

import copy
import json

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import nodes as core_nodes
import pytest
import torch
from artifact_guard.nodes.asced.guard import guard_model
from artifact_guard.nodes.asced.options import GuardSettings
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.latents import FrameLayout
from artifact_guard.nodes.tag import energy
from artifact_guard.nodes.tag.guidance import WRAPPER_KEY
from artifact_guard.nodes.tag.judge import Judge
from artifact_guard.nodes.tag.predictor_files import load_predictor
from artifact_guard.nodes.tag.schema import TAGTimeGap
from comfy.nested_tensor import NestedTensor
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicGuider, RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

from tests.exact.model import conditioning, exact_model
from tests.unit.tag_support import KINDS, SIZE, fresh_predictor, guide, images, model, run, trainer

MODES = ("relative", "score", "shift")
SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm", "dpm_adaptive", "ddim")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_predictor", [False, True])
def test_strength_0_measures_and_changes_no_bit(kind, with_predictor):
    bare = model(kind)
    guided, report = guide(bare, fresh_predictor(bare) if with_predictor else None, strength=0.0)
    assert torch.equal(run(guided), run(bare))
    (record,) = report.runs
    assert record.times.shape == (8, 2) and record.summary()["status"] == "measured only"
    assert record.times.diff(dim=0).max() < 0


@pytest.mark.parametrize("kind", KINDS)
def test_aligned_runs_stay_and_noisy_runs_do_not(kind):
    """relative on the exact denoiser, no predictor: an ordinary run hardly moves, one with noise at each step does."""
    bare = model(kind)
    guided, report = guide(bare)
    apart = (run(guided) - run(bare)).abs().mean().item()
    moved = (run(guided, noise=0.3) - run(bare, noise=0.3)).abs().mean().item()
    assert apart < 0.002 and moved > 5 * apart
    left, seen = guide(bare, strength=0.0)
    run(left, noise=0.3)
    calm, rough = (record.time_gap() for record in report.runs)
    assert seen.runs[0].time_gap() > max(rough, 3 * calm)


@pytest.mark.parametrize("kind", (*KINDS, "demo"))
def test_one_step_from_pure_noise_is_left_alone(kind):
    """Whatever chance made of the noise: nothing has more noise than pure noise. 32 samples, not a bit."""
    bare = load_demo_model()[0] if kind == "demo" else model(kind)
    token = [[torch.zeros(1, 1, 16), {}]]
    options = {"steps": 1, "shape": (32, 3, SIZE, SIZE), "positive": token, "negative": token}
    assert torch.equal(run(guide(bare)[0], **options), run(bare, **options))


@pytest.mark.parametrize("sampler", ["seeds_2", "er_sde", "dpm_2_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "heun", "uni_pc"])
def test_fresh_noise_of_a_sampler_is_no_disturbance(sampler):
    """Near pure noise its product with the estimate is large by chance: that is no lost signal."""
    bare = model()
    torch.manual_seed(0)
    guided = run(guide(bare)[0], sampler=sampler, steps=12)
    torch.manual_seed(0)
    assert (guided - run(bare, sampler=sampler, steps=12)).square().mean().sqrt().item() < 0.02


def zero_terminal_snr():
    """A model of velocities whose first step has no signal at all."""
    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    bare = model("v").clone()
    bare.add_object_patch("model_sampling", Sampling(bare.model.model_config, zsnr=True))
    return bare


CALM = ("euler_ancestral", "heun", "dpm_2_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "res_multistep_ancestral",
        "sa_solver", "uni_pc", "deis")


@pytest.mark.parametrize("kind", ["eps", "edm", "flow", "zero SNR"])
@pytest.mark.parametrize("sampler", CALM)
def test_nothing_is_found_in_undisturbed_runs(kind, sampler, monkeypatch):
    """Schedules that begin far beyond the grid of levels, few steps, high orders, fresh noise: none of it is a disturbance, and
    no correction is taken for one that asks for the next."""
    found, of = [], energy.Disturbance.of.__func__

    def noted(cls, *arguments):
        found.append(of(cls, *arguments))
        return found[-1]

    monkeypatch.setattr(energy.Disturbance, "of", classmethod(noted))
    bare = zero_terminal_snr() if kind == "zero SNR" else model(kind)
    for scheduler, steps in (("karras", 12), ("normal", 20)):
        settings = {"sampler": sampler, "scheduler": scheduler, "steps": steps}
        outputs = []
        for patched in (bare, guide(bare, strength=0.0)[0], guide(bare)[0]):
            found.clear()
            torch.manual_seed(0)
            outputs.append(run(patched, **settings))
            if len(outputs) == 2:
                surplus = torch.stack([each.surplus for each in found])
        assert surplus.mean() < 0.03 and surplus.max() < 0.6, (scheduler, surplus.max())
        assert outputs[2].abs().max() < 1.3 * outputs[0].abs().max().clamp_min(1.0), scheduler


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_undisturbed_euler_runs_stay_but_where_a_predictor_knows_better(trained, cfg):
    """The demo model in ten large steps: without a predictor nothing is found beside the course. A predictor finds what large
    steps cost, but not under classifier-free guidance, which it does not know."""
    bare, _ = load_demo_model()
    guided, _ = guide(bare, load_predictor("demo_fashion_mnist.safetensors") if trained else None)
    token, nothing = [[class_token(3), {}]], [[class_token(None), {}]]
    options = {"shape": (4, 3, 32, 32), "steps": 10, "cfg": cfg, "positive": token, "negative": nothing}
    apart = (run(guided, **options) - run(bare, **options)).abs().max().item()
    assert apart > 0.05 if trained and cfg == 1.0 else apart < 1e-4


@pytest.mark.parametrize("trained", [False, True])
def test_noisy_runs_of_a_trained_network_come_back(trained):
    """The demo model with noise at each step. The outermost pixels of its images are always black, so that what is
    there in a result is what was left of the noise."""
    bare, _ = load_demo_model()
    predictor = load_predictor("demo_fashion_mnist.safetensors") if trained else None
    guided, _ = guide(bare, predictor)
    token = [[class_token(3), {}]]
    options = {"shape": (4, 3, 32, 32), "noise": 0.2, "steps": 10, "positive": token, "negative": token}

    def left(output):
        return (output[..., :2, :] + 1).square().mean().sqrt().item()

    noisy, helped = left(run(bare, **options)), left(run(guided, **options))
    assert noisy > 0.1 and helped < 0.75 * noisy


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_undisturbed_runs_of_a_trained_network_stay(cfg):
    """The demo model, with and without classifier-free guidance: chance in the noise is no reason to ask elsewhere."""
    bare, _ = load_demo_model()
    classes = torch.cat([class_token(label) for label in range(0, 8, 2)])
    tokens = {"positive": [[classes, {}]], "negative": [[class_token(None), {}]]}
    options = {"shape": (4, 3, 32, 32), "steps": 16, "cfg": cfg} | tokens
    apart = (run(guide(bare)[0], **options) - run(bare, **options)).square().mean().sqrt()
    assert apart < 0.06


@pytest.mark.parametrize("patch", ["cfg", "post-cfg function", "guider of its own"])
def test_what_guidance_adds_is_not_taken_for_noise(patch, monkeypatch):
    """Asked of a sample right on its step's manifold: the gap is that of the conditional prediction, whatever a scale or
    another patch makes of it. Only of a guider that says nothing of a conditional prediction is the whole one taken."""
    bare, cfg = model("eps", labels=torch.arange(12) % 2), 8.0 if patch == "cfg" else 1.0
    if patch == "post-cfg function":
        bare = bare.clone()
        bare.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 3.0)
    guided, report = guide(bare, strength=0.0)
    random = torch.Generator().manual_seed(1)
    noised = images()[0:4:2] + 1.5 * torch.randn(2, 3, SIZE, SIZE, generator=random)

    def once(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        return model_k(noised, x.new_full((2,), 1.5), **extra_args)

    def plain(model, x, sigma, uncond, cond, cond_scale, model_options={}, seed=None):
        return 3.0 * comfy.samplers.calc_cond_batch(model, [cond], x, sigma, model_options)[0]

    if patch == "guider of its own":
        monkeypatch.setattr(comfy.samplers, "sampling_function", plain)
    run(guided, comfy.samplers.KSAMPLER(once), cfg=cfg, positive=conditioning(0), negative=conditioning(1))
    gap = report.runs[0].time_gap()
    assert (gap > 100) if patch == "guider of its own" else (gap < 30), gap


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [1.0, 200.0])
def test_bounded_with_a_useless_predictor(kind, mode, strength):
    """An untrained predictor, the published gradient and the closed form, at the slider's end: finite and not huge."""
    bare = model(kind)
    for estimate in ("closed form", "published gradient"):
        guided, _ = guide(bare, fresh_predictor(bare), mode=mode, strength=strength, estimate=estimate)
        output = run(guided)
        assert output.isfinite().all() and output.abs().max() < 30
    guided, _ = guide(bare, mode=mode, strength=strength)
    assert run(guided, noise=0.3).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_bounded_at_the_ends_of_the_schedule(kind, mode):
    """Asked at pure noise (a flow's sigma of 1), at sigma_min and at nearly nothing, with far too much noise in the
    sample: the estimate stays within half the distance to the sample of the bare model's, at any strength."""
    bare = model(kind)
    low, high = (float(getattr(bare.get_model_object("model_sampling"), f"sigma_{end}")) for end in ("min", "max"))

    def estimates(patcher):
        told = []

        def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
            for sigma in (high, 1e-6, low, high, low):
                random = torch.Generator().manual_seed(1)
                sample = (images()[:2] + max(3.0, sigma) * torch.randn(x.shape, generator=random)).to(x)
                told.append((sample, model_k(sample, x.new_full((len(x),), sigma), **extra_args)))
            return x

        run(patcher, comfy.samplers.KSAMPLER(sample))
        return told

    without = estimates(bare)
    for predictor in (None, fresh_predictor(bare)):
        for strength in (0.01, 1.0, 200.0):
            guided, report = guide(bare, predictor, mode=mode, strength=strength, ask_at="step's level")
            for (x, one), (_, other) in zip(without, estimates(guided)):
                assert other.isfinite().all()
                if mode != "shift":  # which asks the model elsewhere
                    assert (other - one).square().mean().sqrt() <= 0.51 * (one - x).square().mean().sqrt()
            assert report.runs[0].gaps().isfinite().all()


def test_nan_in_the_latent_is_refused_before_sampling():
    guided, report = guide(model("eps"))
    with pytest.raises(ValueError, match="NaN or infinite values"):
        run(guided, latent=torch.full((2, 3, SIZE, SIZE), float("nan")))
    assert not report.runs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_and_an_aligned_run_is_left_alone(sampler):
    bare = model("eps")
    guided, report = guide(bare)
    plain, output = run(bare, sampler), run(guided, sampler)
    assert output.isfinite().all() and report.runs[0].times.numel()
    if sampler != "lcm":  # draws all its noise anew at each step: a rounding error chooses between the twelve images
        assert (output - plain).abs().mean() < 0.12


@pytest.mark.parametrize("mode, estimate, per_step", [
    ("relative", "closed form", 1), ("score", "closed form", 1), ("shift", "closed form", 2),
    ("shift", "published gradient", 1), ("score", "published gradient", 1),
])
def test_model_calls(mode, estimate, per_step):
    """No further model call, but for shift in closed form."""
    bare = model("eps")
    guided, _ = guide(bare, fresh_predictor(bare), mode=mode, estimate=estimate)
    bare.model.forget_calls()
    run(guided)
    assert bare.model.calls == 8 * per_step


def test_outside_the_percentages_nothing_is_guided():
    bare = model("eps")
    guided, report = guide(bare, start_percent=0.999, end_percent=1.0)
    assert torch.equal(run(guided, noise=0.3), run(bare, noise=0.3))
    assert report.runs[0].times.shape == (8, 2)
    whole, _ = guide(bare, end_percent=0.9)
    assert not torch.equal(run(whole, noise=0.3), run(bare, noise=0.3))


@pytest.mark.parametrize("shape", [(2, 3, 4, 16, 16), (1, 3, 17, 23), (3, 1, 16, 16), (1, 16, 9, 16)])
def test_shapes(shape):
    """Video, odd sizes, one and sixteen channels; predictors too."""
    frames = torch.rand(6, *shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    bare = exact_model(frames, "flow")
    for predictor in (None, fresh_predictor(bare)):
        guided, report = guide(bare, predictor)
        assert run(guided, shape=shape, noise=0.2).shape == shape and report.runs[0].times.shape == (8, shape[0])


def test_samples_of_a_batch_are_judged_each_by_itself():
    """One sample is disturbed: the other's result is that of an undisturbed run."""
    bare = model("eps")
    guided, _ = guide(bare)

    def disturbing(rows):
        def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
            for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
                denoised = model_k(x, sigma * x.new_ones(len(x)), **extra_args)
                x = denoised + (after / sigma) * (x - denoised)
                if i == 4:
                    x[rows] += 2.0 * torch.randn(x[rows].shape, generator=torch.Generator().manual_seed(5)).to(x)
            return x
        return comfy.samplers.KSAMPLER(sample)

    outputs = [run(guided, disturbing(rows)) for rows in ([], [1])]
    assert torch.allclose(outputs[0][0], outputs[1][0], atol=1e-5)
    assert not torch.allclose(outputs[0][1], outputs[1][1], atol=1e-2)


def test_inpainting_measures_only_where_it_paints():
    """Outside the mask the sample is the given picture, noised: no gap comes from there."""
    bare, mask = model("eps"), torch.zeros(2, 1, SIZE, SIZE)
    mask[..., 4:12, 4:12] = 1.0
    guided, report = guide(bare, strength=0.0)
    given = images()[:2].flip(-1) * 6.0
    assert torch.equal(
        run(guided, latent=given, noise_mask=mask), run(bare, latent=given, noise_mask=mask))
    assert report.runs[0].gaps()[-1].max() < 50 and report.runs[0].time_gap() < 150


@pytest.mark.parametrize("edge", [0.0, 0.5, 0.9])
def test_a_soft_mask_is_no_disturbance(edge):
    """At a soft edge the sampler goes on with a mixture of the estimate and the given picture."""
    bare = model("eps", labels=torch.arange(12) % 2)
    mask = torch.full((2, 1, SIZE, SIZE), edge)
    mask[..., 4:12, 4:12] = 1.0
    settings = {"latent": images()[:2].flip(-1), "noise_mask": mask, "cfg": 3.0, "steps": 12}
    assert torch.allclose(run(guide(bare)[0], **settings), run(bare, **settings), atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_mask_that_paints_nothing_wholly(value):
    """Nothing can be measured: the run is the bare one's, and the report says why instead of a gap."""
    bare, mask = model("eps"), torch.full((2, 1, SIZE, SIZE), value)
    guided, report = guide(bare)
    settings = {"latent": images()[:2].flip(-1), "noise_mask": mask}
    assert torch.equal(run(guided, **settings), run(bare, **settings))
    summary = report.runs[0].summary()
    assert "the noise mask paints nothing wholly" in summary["reason"] and not summary["steps"]


def test_a_sample_that_is_not_painted_has_no_gap():
    """Its batch-mate's is told as ever."""
    mask = torch.zeros(2, 1, SIZE, SIZE)
    mask[1] = 1.0
    guided, report = guide(model("eps"))
    output = run(guided, latent=images()[:2].flip(-1), noise_mask=mask)
    with torch.inference_mode():
        gap, curve, summary = TAGTimeGap.execute(report, {"samples": output}).result
    still, painted = json.loads(summary)["samples"]
    assert still["time_gap"] is None and painted["time_gap"] < 100
    assert gap == pytest.approx(painted["time_gap"], abs=1e-3) == json.loads(summary)["time_gap"]


def test_stacks_with_guard_and_with_other_patches_and_cfg():
    bare = model("eps", labels=torch.arange(12) % 2)
    guarded, _ = guard_model(bare, GuardSettings(mode="detect only"))
    both, _ = guide(guarded)
    alone, _ = guide(bare)
    assert torch.equal(run(both, noise=0.2, cfg=2.0), run(alone, noise=0.2, cfg=2.0))
    twice, _ = guide(alone)
    assert run(twice, noise=0.2, cfg=2.0).isfinite().all()
    patched = bare.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.5)
    halved, report = guide(patched, strength=0.0)
    assert torch.equal(run(halved), run(patched))


def test_the_model_given_and_the_options_stay_as_they_were():
    bare = model("eps")
    before = copy.copy(bare.wrappers), copy.deepcopy(bare.model_options)
    guided, report = guide(bare)
    assert bare.wrappers == before[0] and bare.model_options == before[1]

    def fail(*args, **kwargs):
        raise RuntimeError("the sampler broke")

    with pytest.raises(RuntimeError, match="the sampler broke"):
        run(guided, comfy.samplers.KSAMPLER(fail))
    wrappers = guided.model_options.get("transformer_options", {}).get("wrappers", {})
    assert not wrappers.get(WrappersMP.PREDICT_NOISE, {}).get(WRAPPER_KEY)
    assert not report.runs


def test_a_run_inside_another_packs_wrapper_leaves_nothing_behind():
    """A wrapper that samples twice with the same options: the first run's guidance is gone in the second."""
    bare = model("eps")

    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    bare.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "twice", twice)
    guided, report = guide(bare)
    run(guided)
    assert [record.times.shape for record in report.runs] == [(8, 2), (8, 2)]
    assert not any(record.steps for record in report.runs)


def test_time_gap_node():
    """The mean, a picture, and JSON; before any sampling it says so."""
    guided, report = guide(model("eps"), strength=0.73)
    with pytest.raises(ValueError, match="guided model was not sampled yet. Connect `latent`"):
        report.find({"samples": torch.full((2, 3, SIZE, SIZE), 0.3)})
    outputs = [run(guided, noise=0.2, seed=seed) for seed in (1, 2)]
    with torch.inference_mode():
        gap, curve, summary = TAGTimeGap.execute(report, {"samples": outputs[0]}).result
    summary = json.loads(summary)
    assert gap == pytest.approx(report.runs[0].time_gap()) and summary["time_gap"] == pytest.approx(gap, abs=1e-3)
    assert curve.shape[0] == 1 and len(summary["steps"]) == 8 and len(summary["samples"]) == 2
    assert summary["steps"][0]["time"] > 990 > summary["steps"][-1]["time"]


def test_a_schedule_that_is_no_number():
    """core's kl_optimal of one step is NaN, and so is the picture: the node says so, with null in its JSON."""
    guided, report = guide(load_demo_model()[0])
    prompt = [[class_token(1), {}]]
    with torch.inference_mode():
        (latent,) = core_nodes.KSampler().sample(
            guided, 1, 1, 1.0, "euler", "kl_optimal", prompt, prompt, {"samples": torch.zeros(1, 3, 32, 32)}, 1.0
        )
        summary = json.loads(TAGTimeGap.execute(report, latent).result[-1])
    assert summary["time_gap"] is None and "NaN" in summary["notes"][0]


def test_a_latent_without_pictures_is_sampled_unguided():
    sounds = torch.rand(4, 3, 40, generator=torch.Generator().manual_seed(0))
    bare = exact_model(sounds, "flow")
    guided, report = guide(bare)
    assert torch.equal(run(guided, shape=(2, 3, 40)), run(bare, shape=(2, 3, 40)))
    assert "no image part" in report.runs[0].summary()["reason"]


def test_a_model_that_starts_from_an_image_is_sampled_unguided():
    """Image-to-image flow: its noise_scaling adds no noise."""
    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.IMG_TO_IMG_FLOW):
        pass

    bare = model("flow")
    bare.add_object_patch("model_sampling", Sampling())
    bare.set_model_unet_function_wrapper(lambda apply_model, args: 0.9 * args["input"])
    guided, report = guide(bare)
    options = {"latent": images()[:2]}
    assert torch.equal(run(guided, **options), run(bare, **options))
    assert "starts from an image" in report.runs[0].summary()["reason"]


@pytest.mark.parametrize("settings, message", [
    ({"strength": -1.0}, "strength is -1.0; a value from 0 to 200"),
    ({"strength": None}, "strength is None; a value from 0 to 200"),
    ({"strength": float("nan")}, "strength is nan"),
    ({"mode": "absolute"}, "mode is 'absolute'; one of 'relative'"),
    ({"start_percent": 0.5, "end_percent": 0.5}, "Lower start_percent"),
    ({"estimate": "published gradient"}, "none is connected"),
])
def test_bad_settings_are_refused_at_the_node(settings, message):
    with pytest.raises(ValueError, match=message):
        guide(model("eps"), **settings)


def test_several_conditions_move_in_turn():
    """With two positive conditions the published shift is each one's and then the unconditional one's."""
    bare = model("eps", labels=torch.arange(12) % 2)
    conditions = (torch.arange(12) % 2)[:, None].float() + 1
    with torch.enable_grad():
        work = trainer(fresh_predictor(bare, condition_dim=1), conditions=conditions, steps=30)
        for _ in range(30):
            work.step()
    predictor = work.result()

    class Guider:
        original_conds = {"positive": [{"cross_attn": torch.full((1, 1, 1), value)} for value in (1.0, 2.0)]}

    layout = FrameLayout.of([(2, 3, SIZE, SIZE)])
    judge = Judge(predictor, torch.device("cpu"), layout, Guider())
    u, level, omega = torch.randn(2, 3, SIZE, SIZE), torch.zeros(2), torch.full((2,), 0.1)
    with torch.inference_mode():
        together = judge.gradient(u, level, omega)
    moved = u
    for tokens in (1.0, 2.0, None):
        one = Judge(predictor, torch.device("cpu"), layout, Guider())
        one.conditions = [] if tokens is None else [torch.full((1, 1), tokens)]
        moved = moved + 0.1 * one.gradient(moved, level, omega)
    assert torch.allclose(u + 0.1 * together, moved, atol=1e-4)


def test_noisy_euler_adds_what_it_says():
    """The tests' own sampler: without noise it is Euler's."""
    bare = model("flow")
    assert torch.allclose(run(bare, noise=0.0), run(bare), atol=1e-4)


def test_stacks_with_cores_guidance_on_a_network():
    """Perturbed attention and rescaled CFG on the demo model, below and above TAG: both still act, nothing breaks."""
    bare, _ = load_demo_model()
    token, nothing = [[class_token(3), {}]], [[class_token(None), {}]]
    options = {"shape": (2, 3, 32, 32), "steps": 4, "positive": token, "negative": nothing, "cfg": 3.0}
    plain = run(guide(bare)[0], **options)
    for patch in (lambda m: PerturbedAttentionGuidance.execute(m, 2.0)[0], lambda m: RescaleCFG().patch(m, 0.7)[0]):
        for patched in (guide(patch(bare))[0], patch(guide(bare)[0])):
            output = run(patched, **options)
            assert output.isfinite().all() and not torch.equal(output, plain)


def noisy_part(noise, first):
    """Euler's sampler for flow; after every step but the last, noise is added to the values of a pack from `first` on."""

    def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        random = torch.Generator().manual_seed(7)
        for sigma, after in zip(sigmas, sigmas[1:]):
            denoised = model_k(x, sigma * x.new_ones(len(x)), **extra_args)
            x = denoised + (after / sigma) * (x - denoised)
            drawn = torch.randn(x.shape, generator=random)
            x[..., first:] += noise * float(after > 0) * ((1 - after).square() + after.square()).sqrt() * drawn[..., first:]
        return x

    return comfy.samplers.KSAMPLER(sample)


@pytest.mark.parametrize("where", ["audio", "both"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("mode", ["relative", "shift"])
def test_of_video_with_audio_only_the_picture_is_seen(where, trained, mode):
    """Noise on the audio alone changes nothing that is measured, and the audio is what the model makes of it."""
    pictures, sound = images(), 0.7 * torch.randn(12, 4, 64, generator=torch.Generator().manual_seed(0))
    data, _ = comfy.utils.pack_latents([pictures, sound])
    bare, predictor = exact_model(data, "flow"), fresh_predictor(model("flow")) if trained else None
    bare.model.latent_format = model("flow").model.latent_format
    sigmas = comfy.samplers.calculate_sigmas(bare.get_model_object("model_sampling"), "simple", 10)
    first = 0 if where == "both" else pictures[0].numel()

    def sampled(patcher, noise):
        nested = NestedTensor([torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 4, 64)])
        guider = BasicGuider.execute(patcher, conditioning())[0]
        with torch.inference_mode():
            output = SamplerCustomAdvanced.execute(RandomNoise.execute(3)[0], guider, noisy_part(noise, first), sigmas, {"samples": nested})
        return list(output[0]["samples"].unbind())

    measured, calm = guide(bare, predictor, strength=0.0)
    sampled(measured, 0.0)
    shaken, report = guide(bare, predictor, strength=0.0)
    plain = sampled(shaken, 0.3)
    guided = sampled(guide(bare, predictor, mode=mode, strength=1.0)[0], 0.3)
    assert all(torch.equal(one, other) for one, other in zip(plain, sampled(bare, 0.3)))
    if where == "audio" and not trained:
        assert abs(report.runs[-1].time_gap() - calm.runs[-1].time_gap()) < 5
    if where == "both":
        assert (guided[0] - plain[0]).abs().max() > 1e-3, "the picture is corrected"


@pytest.mark.parametrize("kept", [1, 3])
def test_predictor_judges_painted_frames_alone(kept, monkeypatch):
    """Image to video as LTX-Video and Wan 2.2 do it: kept frames reach the model clean."""
    pictures = images()
    video = torch.stack([pictures, pictures.flip(-1), pictures.flip(-2), pictures.flip(-1).flip(-2)], dim=2)
    bare = exact_model(video, "flow")
    bare.model.scale_latent_inpaint = lambda sigma, noise, latent_image, **more: latent_image
    predictor, mask = fresh_predictor(bare), torch.ones(1, 1, 4, SIZE, SIZE)
    mask[:, :, :kept] = 0
    with torch.no_grad():
        for weight in predictor.network.parameters():  # a fresh one says the same of every frame
            weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    seen, real = [], Judge.logits

    def logits(self, u, condition):
        alone = self.network(self.layout.frames(u)[kept:], condition).mean(dim=0)
        seen.append((real(self, u, condition)[0], alone))
        return seen[-1][0][None]

    monkeypatch.setattr(Judge, "logits", logits)
    run(guide(bare, predictor, strength=0.0)[0], shape=(1, 3, 4, SIZE, SIZE), latent=video[:1], noise_mask=mask)
    assert len(seen) == 8 and all(torch.allclose(one, other, atol=1e-4) for one, other in seen)


def test_second_guidance_only_measures_and_says_so():
    bare = model("flow")
    once, first = guide(bare)
    twice, second = guide(once)
    assert torch.equal(run(once, noise=0.3), run(twice, noise=0.3))
    summaries = [report.runs[-1].summary() for report in (first, second)]
    assert [summary["status"] for summary in summaries] == ["guided", "measured only"]
    assert "another Temporal Alignment Guidance" not in str(summaries[0]) and "Another Temporal" in summaries[1]["notes"][0]
    measuring, report = guide(once, strength=0.0)
    run(measuring)
    assert report.runs[-1].summary()["notes"] == []


def test_run_without_steps_is_not_measured():
    """SplitSigmas at the last step leaves one sigma."""
    guided, report = guide(model())
    guider = BasicGuider.execute(guided, conditioning())[0]
    with torch.inference_mode():
        SamplerCustomAdvanced.execute(
            RandomNoise.execute(3)[0], guider, comfy.samplers.sampler_object("euler"), torch.zeros(1), {"samples": images()[:1]}
        )
    summary = report.runs[-1].summary()
    assert summary["status"] == "not measured" and "no steps" in summary["reason"]
