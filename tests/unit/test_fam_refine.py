"""Noise and refining: what is amplified, what is redrawn, what is left bit for bit, and what is reported."""

import json

import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.fam import refine
from artifact_guard.nodes.fam.noise import FlawNoise
from artifact_guard.nodes.fam.refine import Refiner, RefineSettings, soften
from artifact_guard.nodes.fam.schema import FAMNoise, FAMRefine
from artifact_guard.kernels.kv_scale import scale_tokens
from comfy_extras.nodes_custom_sampler import RandomNoise

from tests.small_models import small_model


class Judge:
    """Stands in for a highlighter: the map is a fixed square, the probability the mean brightness inside it."""

    SQUARE = (slice(None), slice(8, 16), slice(8, 16))


@pytest.fixture(autouse=True)
def judged_by_brightness(monkeypatch):
    """Replaces the flaw map of this module's refiner: bright squares are flawed."""
    def flaw_map(highlighter, image):
        maps = torch.zeros(image.shape[:3])
        maps[Judge.SQUARE] = 1
        return maps, image[Judge.SQUARE].mean(dim=(1, 2, 3)).clamp(0, 1)

    monkeypatch.setattr(refine, "flaw_map", flaw_map)


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def flawed(batch=2, value=1.0):
    """Black images with a square of this value in the range -1 to 1."""
    samples = torch.full((batch, 3, 32, 32), -1.0)
    samples[:, :, 8:16, 8:16] = value
    return {"samples": samples}


def run(demo, latent, **settings):
    model, vae = demo
    settings = {"seed": 1, "steps": 6, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.6} | settings
    prompt = [[class_token(1), {}]]
    with torch.inference_mode():
        return Refiner(model, vae, None, prompt, prompt, latent, RefineSettings(**settings)).run()


# Noise

def test_noise_gains_the_map():
    """eps + strength * map, the same on all channels; the seed is the wrapped one's."""
    noise = RandomNoise.execute(7)[0]
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    flaw_map = torch.zeros(1, 64, 64)
    flaw_map[:, :32] = 1
    amplified = FAMNoise.execute(noise, flaw_map, 0.25)[0]
    difference = amplified.generate_noise(latent) - noise.generate_noise(latent)
    assert torch.allclose(difference[:, :, :4], torch.tensor(0.25), atol=1e-6) and not difference[:, :, 4:].any()
    assert amplified.seed == 7


def test_noise_is_deterministic_and_off_bit_for_bit():
    noise, latent = RandomNoise.execute(7)[0], {"samples": torch.zeros(1, 4, 8, 8)}
    flaw_map = torch.ones(1, 8, 8)
    assert torch.equal(FlawNoise(noise, flaw_map, 0.0).generate_noise(latent), noise.generate_noise(latent))
    one, other = (FlawNoise(noise, flaw_map, 0.1).generate_noise(latent) for _ in range(2))
    assert torch.equal(one, other)


def test_noise_of_videos_and_nested_latents():
    noise = RandomNoise.execute(1)[0]
    frames = torch.zeros(3, 8, 8)
    frames[2] = 1
    video = {"samples": torch.zeros(1, 4, 3, 8, 8)}
    difference = FlawNoise(noise, frames, 1.0).generate_noise(video) - noise.generate_noise(video)
    assert torch.allclose(difference[:, :, 2], torch.tensor(1.0), atol=1e-6) and not difference[:, :, :2].any()
    parts = [torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 8, 20)]

    class Wrapped:
        seed = 0

        def generate_noise(self, latent):
            return comfy.nested_tensor.NestedTensor([p.clone() for p in parts])

    result = FlawNoise(Wrapped(), frames, 1.0).generate_noise({}).unbind()
    assert result[0][:, :, 2].min() == 1 and not result[1].any()


@pytest.mark.parametrize("flaw_map, words", [
    (torch.full((1, 8, 8), torch.nan), "flaw_map: the mask holds NaN"), (torch.ones(1, 8, 16), "does not have the shape"),
    (torch.ones(5, 8, 8), "5 masks came for 2 samples"),
])
def test_maps_that_do_not_fit_the_noise(flaw_map, words):
    with pytest.raises(ValueError, match=words):
        FlawNoise(RandomNoise.execute(1)[0], flaw_map, 0.1).generate_noise({"samples": torch.zeros(2, 4, 8, 8)})


# Refining

def test_outside_the_regions_nothing_changes(demo):
    """Bit for bit, whatever the sampler did there; inside it is redrawn."""
    latent = flawed()
    refined, maps, report = run(demo, latent)
    region = soften(torch.nn.functional.pad(torch.ones(2, 8, 8), (8, 16, 8, 16)), 0.5) > 0
    changed = (refined["samples"] != latent["samples"]).any(dim=1)
    assert changed[region].float().mean() > 0.9 and not changed[~region].any()
    assert maps.shape == (2, 32, 32)
    assert [entry["rounds"][0]["kept"] for entry in report["images"]] == [True, True]
    assert all(entry["after"] < entry["before"] for entry in report["images"])


def test_outside_is_untouched_where_latents_are_scaled():
    """Stable Diffusion's latents go through a factor and back, which costs bits: outside the regions none may go."""
    small = small_model("sd15")

    class Vae:
        def decode(self, samples):
            return torch.ones(len(samples), 32, 32, 3)

    latent = {"samples": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))}
    settings = RefineSettings(1, 3, 1.0, "euler", "simple", 0.5)
    with torch.inference_mode():
        refiner = Refiner(small.model, Vae(), None, small.conditioning(1), small.conditioning(2), latent, settings)
        regions = refiner.regions()
        redrawn = refiner.resample(regions, 0)
    outside = (regions == 0).expand_as(redrawn)
    assert outside.any() and torch.equal(redrawn[outside], latent["samples"][outside])
    assert not torch.equal(redrawn, latent["samples"])


def test_a_round_that_made_it_worse_is_undone(demo, monkeypatch):
    """The first round helps the first image only, the second only the second; each keeps its own."""
    values = iter([torch.tensor([0.8, 0.8]), torch.tensor([0.6, 0.9]), torch.tensor([0.7, 0.5])])

    def flaw_map(highlighter, image):
        maps = torch.zeros(image.shape[:3])
        maps[Judge.SQUARE] = 1
        return maps, next(values)

    monkeypatch.setattr(refine, "flaw_map", flaw_map)
    latent = flawed()
    refined, _, report = run(demo, latent, rounds=2)
    first, second = report["images"]
    assert [r["kept"] for r in first["rounds"]] == [True, False] and first["after"] == pytest.approx(0.6)
    assert [r["kept"] for r in second["rounds"]] == [False, True] and second["after"] == pytest.approx(0.5)
    assert first["before"] == second["before"] == pytest.approx(0.8)


def test_sound_images_are_left_alone(demo):
    """Judged sound: bit for bit the given latent, and the report says so. Its batch-mate is refined."""
    latent = flawed()
    latent["samples"][0, :, 8:16, 8:16] = -0.9
    refined, _, report = run(demo, latent)
    assert torch.equal(refined["samples"][0], latent["samples"][0])
    assert not torch.equal(refined["samples"][1], latent["samples"][1])
    assert report["images"][0]["rounds"] == [] and "left as it is" in report["images"][0]["note"]


def test_the_seed_decides_and_other_entries_stay(demo):
    latent = flawed() | {"batch_index": [3, 4]}
    one, other, third = (run(demo, latent, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one["samples"], other["samples"]) and not torch.equal(one["samples"], third["samples"])
    assert one["batch_index"] == [3, 4]


def test_a_noise_mask_limits_the_regions(demo):
    latent = flawed(1)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :12] = 1
    refined, _, _ = run(demo, latent | {"noise_mask": mask})
    changed = (refined["samples"] != latent["samples"]).any(dim=1)[0]
    assert changed[:, :12].any() and not changed[:, 12:].any()


def test_every_strength_does_something(demo):
    """Attention and noise strength change the result, and 0 and 0 is core's plain inpainting of the regions."""
    latent, model = flawed(1), demo[0]
    plain = run(demo, latent, attention_strength=0.0)[0]["samples"]
    assert not torch.equal(plain, run(demo, latent, attention_strength=0.5)[0]["samples"])
    assert not torch.equal(plain, run(demo, latent, attention_strength=0.0, noise_strength=0.5)[0]["samples"])
    assert "optimized_attention_override" not in model.model_options["transformer_options"]


def test_every_sampler_can_refine(demo):
    for sampler in ("dpmpp_2m", "euler_ancestral", "uni_pc", "lcm"):
        assert torch.isfinite(run(demo, flawed(1), sampler_name=sampler)[0]["samples"]).all()


def test_videos_are_refined_frame_by_frame(monkeypatch):
    """A video latent: maps of all image frames, a probability a video."""
    small = small_model("wan")

    class Vae:
        def decode(self, samples):
            batch, _, frames, height, width = samples.shape
            return torch.zeros(batch, 1 + 4 * (frames - 1), height * 8, width * 8, 3)

    def flaw_map(highlighter, image):
        maps = torch.zeros(image.shape[:3])
        maps[5:9, :64, :64] = 1
        return maps, torch.full((len(image),), 0.9)

    monkeypatch.setattr(refine, "flaw_map", flaw_map)
    latent = small.latent(1)
    settings = RefineSettings(1, 4, 1.0, "euler", "simple", 0.5)
    refiner = Refiner(small.model, Vae(), None, small.conditioning(1), small.conditioning(2), latent, settings)
    regions = refiner.regions()
    assert regions.shape == (1, 1, 3, 16, 16) and regions[:, :, 2].max() == 1 and not regions[:, :, :2].any()
    with torch.inference_mode():
        redrawn = refiner.resample(regions, 0)
    changed = (redrawn != latent["samples"]).any(dim=1)[0]
    assert changed[2].any() and not changed[:2].any()


def test_the_node_puts_out_json(demo):
    model, vae = demo
    prompt = [[class_token(1), {}]]
    with torch.inference_mode():
        latent, maps, text = FAMRefine.execute(
            model, vae, None, prompt, prompt, flawed(1), 1, 4, 1.0, "euler", "normal", 0.5, 2, 0.025, 0.0, 0.5
        ).result
    entry = json.loads(text)["images"][0]
    assert entry["sample"] == 0 and 1 <= len(entry["rounds"]) <= 2 and set(entry["rounds"][0]) == {"probability", "kept", "region"}


@pytest.mark.parametrize("wrong, words", [
    ({"denoise": 0.0}, "denoise is 0.0"), ({"rounds": 0}, "rounds is 0"), ({"threshold": 0.0}, "threshold is 0.0"),
])
def test_settings_that_cannot_work(demo, wrong, words):
    with pytest.raises(ValueError, match=words):
        run(demo, flawed(1), **wrong)


@pytest.mark.parametrize("samples, words", [
    (torch.full((1, 3, 32, 32), torch.nan), "holds NaN"), (torch.zeros(1, 4, 32, 32) + 1, "has 4 channels and this model works on 3"),
])
def test_latents_that_cannot_be_refined(demo, samples, words):
    with pytest.raises(ValueError, match=words):
        run(demo, {"samples": samples})


def test_soft_edges_end():
    """1 inside, falling outside, exactly 0 a few pixels away."""
    maps = torch.zeros(1, 64, 64)
    maps[:, 20:30, 20:30] = 0.7
    soft = soften(maps, 0.5)
    assert (soft[0, 20:30, 20:30] == 1).all() and 0 < soft[0, 25, 31] < 1 and not soft[0, 40:].any()
    assert not soften(maps, 0.8).any()


# The kernel

def scaled_by_hand(x, amount, first, axis):
    factor = torch.ones(x.shape[0], x.shape[axis], dtype=torch.float64)
    factor[:, first : first + amount.shape[1]] += amount.double()
    shape = [len(x)] + [1] * (x.ndim - 1)
    shape[axis] = x.shape[axis]
    return x.double() * factor.view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape, axis", [((2, 9, 5), 1), ((2, 3, 9, 5), 2)])
@pytest.mark.parametrize("first, count", [(0, 9), (0, 4), (3, 6), (2, 5), (9, 0)])
def test_scaled_tokens(dtype, shape, axis, first, count):
    """Against float64, within one rounding; the other tokens bit for bit; strides do not matter."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=random).to(dtype)
    amount = 0.3 * torch.rand(2, count, generator=random)
    result = scale_tokens(x, amount, first, axis)
    exact = scaled_by_hand(x, amount.to(dtype).float(), first, axis)
    assert result.dtype == dtype and result.shape == x.shape
    assert ((result.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-12).all()
    others = torch.tensor([i for i in range(9) if not first <= i < first + count], dtype=torch.long)
    assert torch.equal(result.index_select(axis, others), x.index_select(axis, others))
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(scale_tokens(strided, amount, first, axis), result)


def test_small_amounts_survive_bfloat16():
    """On the average: 1 + 0.003 itself would round to 1."""
    x = torch.randn(1, 200_000, 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    result = scale_tokens(x, torch.full((1, 200_000), 0.003))
    assert (result.double() / x.double()).mean().item() == pytest.approx(1.003, abs=3e-4)


@pytest.mark.parametrize("amount, first", [(torch.ones(2, 10), 0), (torch.ones(2, 5), 5), (torch.ones(3, 5), 0), (torch.ones(2, 1), -1)])
def test_amounts_that_do_not_fit(amount, first):
    with pytest.raises(ValueError, match="does not fit x"):
        scale_tokens(torch.ones(2, 9, 4), amount, first)
