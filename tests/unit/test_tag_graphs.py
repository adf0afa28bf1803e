"""Guidance in graphs that people wire: image to video, prompts with ranges, small masks, guiders of other kinds, runs that go on."""

import comfy.sample
import comfy.samplers
import node_helpers
import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.tag.course import FEWEST
from artifact_guard.nodes.tag.predictor_files import load_predictor
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

from tests.exact.model import conditioning
from tests.small_models import small_model
from tests.unit.tag_support import SIZE, guide, images, model, noisy_euler, run

SHIPPED = "demo_fashion_mnist.safetensors"


def prompt(label):
    return [[class_token(label), {}]]


def moved(one, other):
    return (one - other).square().mean().sqrt().item()


@pytest.mark.parametrize("family", ["ltxv", "hunyuan_video", "cosmos_predict2"])
def test_frames_that_a_mask_keeps_reach_the_model_as_they_would_at_its_level(family):
    """Image to video, disturbed: where the model is asked at a noisier level it sees the first frame as core shows it there."""
    small, seen = small_model(family), []
    latent = small.latent(1, frames=3)["samples"]
    latent[:, :, 0] = torch.randn(latent[:, :, 0].shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, *latent.shape[2:])
    mask[:, :, 0] = 0.0
    watched = small.model.clone()

    def see(executor, x, t, *args, **kwargs):
        seen.append((t.clone(), x.clone()))
        return executor(x, t, *args, **kwargs)

    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "see", see)
    guided, report = guide(watched)
    run(guided, noisy_euler(0.3), shape=latent.shape, latent=latent, noise_mask=mask, positive=small.conditioning(1), negative=small.conditioning(2))
    asked, scheduled = torch.stack([t[0] for t, _ in seen]), report.runs[0].schedule
    assert len(set(asked.tolist()) - set(scheduled.sigmas.tolist())) > 3
    kept = small.model.model.process_latent_in(latent)
    noise = comfy.sample.prepare_noise(latent, 3)
    for sigma, x in seen:
        wanted = small.model.model.scale_latent_inpaint(x=x, sigma=sigma, noise=noise, latent_image=kept)
        torch.testing.assert_close(x[:, :, 0], wanted[:, :, 0], rtol=1e-4, atol=1e-4)


def test_a_shift_leaves_what_a_mask_keeps_alone():
    """Mode shift asks the model of a shifted sample: shifted where the mask paints."""
    bare, seen = model("eps"), []

    def see(executor, x, t, *args, **kwargs):
        seen.append(x.clone())
        return executor(x, t, *args, **kwargs)

    bare = bare.clone()
    bare.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "see", see)
    mask = torch.zeros(2, 1, SIZE, SIZE)
    mask[..., :8] = 1.0
    settings = {"latent": images()[:2].flip(-1), "noise_mask": mask, "noise": 0.3}
    run(guide(bare, mode="shift", strength=20.0)[0], **settings)
    first, second = seen[2:4]  # of the second step: at the sample, and at the shifted one
    assert torch.equal(first[..., 8:], second[..., 8:]) and not torch.equal(first[..., :8], second[..., :8])


def noisy_for(rows):
    """Euler that adds noise to some samples of the batch alone."""

    def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        random = torch.Generator().manual_seed(7)
        for sigma, after in zip(sigmas, sigmas[1:]):
            denoised = model_k(x, sigma * x.new_ones(len(x)), **extra_args)
            x = denoised + (after / sigma) * (x - denoised)
            noise = torch.randn(x.shape, generator=random)
            for row in rows:
                x[row] += 0.3 * (1 + after * after).sqrt() * noise[row] * (after > 0)
        return x

    return comfy.samplers.KSAMPLER(sample)


@pytest.mark.parametrize("split", [0.4, 0.6])
def test_ranges_of_prompts_go_by_the_schedule(split):
    """A prompt that takes over in the middle: not later for a sample because its batch-mate has too much noise."""
    guided, _ = guide(load_demo_model()[0])
    first, second = (
        node_helpers.conditioning_set_values(prompt(label), {"start_percent": start, "end_percent": end})
        for label, start, end in ((1, 0.0, split), (8, split, 1.0))
    )
    settings = {"shape": (2, 3, 32, 32), "steps": 10, "scheduler": "normal", "positive": first + second, "negative": prompt(None)}
    calm, disturbed = (run(guided, noisy_for(rows), **settings) for rows in ([], [0]))
    assert moved(calm[0], disturbed[0]) > 0.01
    assert torch.allclose(calm[1], disturbed[1], atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_of_few_painted_values_nothing_is_told(sampler):
    """A mask of 4x4 pixels: chance in 48 values is no disturbance. The report says so; a batch-mate that is painted wholly is guided."""
    bare, mask = model("eps"), torch.zeros(2, 1, SIZE, SIZE)
    mask[0, :, 4:8, 4:8] = 1.0
    mask[1] = 1.0
    settings = {"sampler": sampler, "latent": images()[:2].flip(-1), "noise_mask": mask, "steps": 12}
    guided, report = guide(bare)
    result, wanted = run(guided, **settings), run(bare, **settings)
    assert torch.allclose(result[0], wanted[0], atol=1e-4)
    (note,) = report.runs[0].summary()["notes"]
    assert f"fewer than {FEWEST} values of sample 0" in note
    settings = settings | {"sampler": noisy_euler(0.3)}
    assert moved(run(guided, **settings)[1], run(bare, **settings)[1]) > 5e-4
    assert torch.allclose(run(guided, **settings)[0], run(bare, **settings)[0], atol=1e-4)


@pytest.mark.parametrize("mode", ["score", "shift", "relative"])
def test_a_rising_schedule_runs_as_without_it(mode):
    """An image that is turned back into noise, as by core's Flip Sigmas; the report says why."""
    bare = model("eps")
    guided, report = guide(bare, mode=mode, strength=4.0)
    sigmas = comfy.samplers.calculate_sigmas(bare.get_model_object("model_sampling"), "simple", 8).flip(0)
    sigmas[0] = 1e-4
    euler, prompt, noise = comfy.samplers.sampler_object("euler"), conditioning(), torch.zeros(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        wanted, result = (
            comfy.sample.sample_custom(patcher, noise, 1.0, euler, sigmas, prompt, prompt, images()[:2], disable_pbar=True, seed=3)
            for patcher in (bare, guided))
    assert torch.equal(result, wanted)
    summary = report.runs[0].summary()
    assert "the noise schedule rises" in summary["reason"] and not summary["steps"]


@pytest.mark.parametrize("mode, strength", [("score", 4.0), ("shift", 4.0), ("relative", 1.0)])
def test_a_sample_is_guided_the_same_whatever_its_batch_mate_paints(mode, strength):
    """A quarter of the first sample is painted; of its mate all, or as much."""
    bare, results = model("eps"), []
    for rows in (SIZE, 8):
        mask = torch.zeros(2, 1, SIZE, SIZE)
        mask[0, :, :8] = 1.0
        mask[1, :, :rows] = 1.0
        settings = {"latent": images()[:2].flip(-1), "noise_mask": mask, "noise": 0.3}
        results.append(run(guide(bare, mode=mode, strength=strength)[0], **settings))
    assert moved(results[0][0], run(bare, **settings)[0]) > 1e-3
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)


def dual(on):
    """Regular style at 5 and 1: the last scale that the model's patches are told is 1."""
    guider = Guider_DualCFG(on)
    guider.set_conds(prompt(3), prompt(None), prompt(None))
    guider.set_cfg(5.0, 1.0)
    return guider


def scaled_by(scale):
    def made(on):
        guider = comfy.samplers.CFGGuider(on)
        guider.set_conds(prompt(3), prompt(None))
        guider.set_cfg(scale)
        return guider

    return made


@pytest.mark.parametrize("name", ["dual, the second scale 1", "scale 5", "perturbed attention"])
def test_guidance_of_any_kind_is_not_taken_for_noise_by_a_predictor(name):
    """Undisturbed runs of Euler stay, whatever it is that guides beyond the conditional prediction."""
    bare, _ = load_demo_model()
    made = dual if name.startswith("dual") else scaled_by(5.0)
    if name == "perturbed attention":
        bare, made = PerturbedAttentionGuidance.execute(bare, 3.0)[0], scaled_by(1.0)
    sigmas = comfy.samplers.calculate_sigmas(bare.get_model_object("model_sampling"), "normal", 5)
    latent = torch.zeros(2, 3, 32, 32)

    def drawn(on):
        with torch.inference_mode():
            return made(on).sample(
                comfy.sample.prepare_noise(latent, 3), latent, comfy.samplers.sampler_object("euler"), sigmas.clone(), disable_pbar=True, seed=3
            )

    assert moved(drawn(guide(bare, load_predictor(SHIPPED))[0]), drawn(bare)) < 1e-3


def test_a_run_that_goes_on_under_guidance_is_not_taken_for_noise_by_a_predictor():
    """The second half of a run at CFG 5: the predictor does not know pictures that guidance made."""
    bare, _ = load_demo_model()
    sigmas = comfy.samplers.calculate_sigmas(bare.get_model_object("model_sampling"), "normal", 8)
    settings = {"positive": prompt(3), "negative": prompt(None), "disable_pbar": True, "seed": 3}
    euler, latent = comfy.samplers.sampler_object("euler"), torch.zeros(2, 3, 32, 32)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 3)
        half = comfy.sample.sample_custom(bare, noise, 5.0, euler, sigmas[:5], latent_image=latent, **settings)
        rest = [
            comfy.sample.sample_custom(on, torch.zeros_like(noise), 5.0, euler, sigmas[4:], latent_image=half, **settings)
            for on in (bare, guide(bare, load_predictor(SHIPPED))[0])
        ]
    assert moved(*rest) < 1e-4


def test_both_predictions_at_scale_1_are_no_guidance():
    """As a patch has them that turns core's shortcut off: put together they are the conditional one but for rounding, and the predictor counts."""
    bare, _ = load_demo_model()
    whole = bare.clone()
    whole.model_options["disable_cfg1_optimization"] = True
    settings = {"shape": (2, 3, 32, 32), "steps": 5, "noise": 0.2, "positive": prompt(3), "negative": prompt(None)}
    one, other = (run(guide(on, load_predictor(SHIPPED))[0], **settings) for on in (bare, whole))
    assert moved(one, other) < 1e-4


def test_a_step_on_the_border_of_a_range_has_the_prompts_that_core_gives_it():
    """20 steps of a flow model: sigma 0.8 in single precision, and prompts that change over at 0.8 in double. Both are at work there."""
    bare, counts = model("flow"), []
    first, second = (
        node_helpers.conditioning_set_values(conditioning(0), {"start_percent": start, "end_percent": end})
        for start, end in ((0.0, 0.2), (0.2, 1.0))
    )

    def see(executor, x, t, *args, **kwargs):
        counts[-1].append(len(x))
        return executor(x, t, *args, **kwargs)

    watched = bare.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "see", see)
    for on in (watched, guide(watched)[0]):
        counts.append([])
        run(on, steps=20, positive=first + second)
    assert counts[0] == counts[1] and max(counts[0]) == 2 * min(counts[0])
