"""Refining: what is redrawn and from what, what is left bit for bit, what is kept, and what is reported."""

import json
from types import SimpleNamespace

import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.fam import refine
from artifact_guard.nodes.fam.flaw_regions import soften
from artifact_guard.nodes.fam.refine import Refiner, RefineSettings
from artifact_guard.nodes.fam.schema import FAMRefine

from tests.small_models import small_model
from tests.unit.fam_support import SQUARE, by_brightness, flawed


@pytest.fixture(autouse=True)
def judged_by_brightness(monkeypatch):
    """Replaces the flaw map of this module's refiner."""
    monkeypatch.setattr(refine, "flaw_map", by_brightness)


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def run(demo, latent, **settings):
    model, vae = demo
    settings = {"seed": 1, "steps": 6, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.6} | settings
    prompt = [[class_token(1), {}]]
    with torch.inference_mode():
        return Refiner(model, vae, None, prompt, prompt, latent, RefineSettings(**settings)).run()


def test_outside_the_regions_nothing_changes(demo):
    """Bit for bit, whatever the sampler did there; inside it is redrawn."""
    latent = flawed()
    refined, maps, report = run(demo, latent)
    region = soften(torch.nn.functional.pad(torch.ones(2, 8, 8), (8, 16, 8, 16)), 0.5, grow=0.03) > 0
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
        maps[SQUARE] = 1
        return maps, next(values)

    monkeypatch.setattr(refine, "flaw_map", flaw_map)
    latent = flawed()
    refined, _, report = run(demo, latent, rounds=2)
    first, second = report["images"]
    assert [r["kept"] for r in first["rounds"]] == [True, False] and first["after"] == pytest.approx(0.6)
    assert [r["kept"] for r in second["rounds"]] == [False, True] and second["after"] == pytest.approx(0.5)
    assert first["before"] == second["before"] == pytest.approx(0.8)


def test_a_sample_of_nan_is_undone(demo, monkeypatch):
    """The sampler gives NaN for the second image: it stays as it was, and its batch-mates are refined."""
    resample = Refiner.resample

    def broken(refiner, regions, number):
        redrawn = resample(refiner, regions, number)
        redrawn[1, 0, 10, 10] = torch.nan
        return redrawn

    monkeypatch.setattr(Refiner, "resample", broken)
    latent = flawed(3)
    refined, maps, report = run(demo, latent)
    assert torch.isfinite(refined["samples"]).all() and torch.equal(refined["samples"][1], latent["samples"][1])
    (told,) = report["images"][1]["rounds"]
    assert told["probability"] is None and not told["kept"] and "NaN" in told["note"]
    assert json.loads(json.dumps(report)) == report
    assert all(entry["rounds"][0]["kept"] and "note" not in entry["rounds"][0] for entry in report["images"][::2])


def test_models_that_cannot_be_patched_are_refined_without(demo, monkeypatch):
    """As at attention_strength 0, and the report says why."""
    def refuse(network):
        raise ValueError("model: PixArt lets nobody reach its attention")

    monkeypatch.setattr(refine, "family_of", refuse)
    refined, _, report = run(demo, flawed(), attention_strength=0.5)
    monkeypatch.undo()
    assert "PixArt" in report["note"]
    monkeypatch.setattr(refine, "flaw_map", by_brightness)
    bare, _, bare_report = run(demo, flawed(), attention_strength=0.0)
    assert torch.equal(refined["samples"], bare["samples"]) and "note" not in bare_report


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


def test_from_its_surroundings_nothing_of_a_flaw_is_left(demo):
    """A grey square in the middle of a black picture: filled, hardly renoised, and so nearly black; from the image, grey."""
    filled, kept = (
        run(demo, flawed(1, 0.6), start_from=start, denoise=0.05, threshold=0.5)[0]["samples"][0, :, 9:15, 9:15]
        for start in ("surroundings", "image")
    )
    assert filled.mean() < -0.9 and kept.mean() > 0.4


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
    ({"start_from": "noise"}, "start_from is 'noise'; one of 'surroundings', 'image'"), ({"grow": 0.6}, "grow is 0.6"),
    ({"steps": 0}, "steps is 0"), ({"cfg": float("nan")}, "cfg is nan"),
    ({"attention_strength": -0.1}, "attention_strength is -0.1; a number of 0 or more"),
    ({"noise_strength": float("inf")}, "noise_strength is inf"),
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


def test_masks_and_vaes_that_cannot_be_used(demo):
    model, vae = demo
    mask = torch.ones(1, 32, 32)
    mask[0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="latent: its noise mask holds NaN"):
        run(demo, flawed() | {"noise_mask": mask})
    with pytest.raises(ValueError, match="latent: it has 3 axes after the channels and this model's have 2"):
        run(demo, {"samples": torch.ones(1, 3, 2, 32, 32)})
    with pytest.raises(ValueError, match="vae: it gives NaN.*--fp32-vae"):
        run((model, SimpleNamespace(decode=lambda samples: torch.full((2, 32, 32, 3), torch.nan))), flawed())
    with pytest.raises(ValueError, match="vae: none came"):
        run((model, None), flawed())
    with pytest.raises(ValueError, match="vae: it decodes latents of 16 channels and this model's have 3"):
        run((model, SimpleNamespace(latent_channels=16)), flawed())



class Frames:
    """A VAE of a video model: one picture a latent frame, as bright as its first channel."""

    def decode(self, samples):
        pictures = samples[:, :1].movedim(1, -1).expand(*samples.shape[:1], *samples.shape[2:], 3)
        return pictures.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_each_sample_of_a_video_model_has_its_own_noise_mask():
    """Pictures as latents of one frame (Qwen-Image): a mask for each, which core would take for the frames of one clip."""
    small = small_model("qwen_image")
    latent = small.latent(2)
    samples = latent["samples"] = torch.ones_like(latent["samples"])
    mask = torch.zeros(2, 8 * samples.shape[-2], 8 * samples.shape[-1])
    half = mask.shape[-1] // 2
    mask[0, :, :half] = 1
    mask[1, :, half:] = 1
    refiner = Refiner(small.model, Frames(), None, small.conditioning(1), small.conditioning(2), latent | {"noise_mask": mask},
                      RefineSettings(1, 3, 1.0, "euler", "simple", 0.5))
    refiner.maps = torch.ones_like(refiner.maps)
    first, second = refiner.regions()[:, 0, 0]
    column = first.shape[-1] // 2
    assert first[:, :column].all() and not first[:, column:].any()
    assert second[:, column:].all() and not second[:, :column].any()


def test_a_picture_that_the_vae_gives_as_nan_stays_as_it_was(demo):
    """Its batch-mates go on, and the report says whose fault it was."""
    model, vae = demo

    class Overflowing:
        calls = 0

        def decode(self, samples):
            images = vae.decode(samples).clone()
            self.calls += 1
            if self.calls == 2:
                images[0] = float("nan")
            return images

    latent = flawed()
    refined, _, report = run((model, Overflowing()), latent)
    (first,), (second,) = (entry["rounds"] for entry in report["images"])
    assert not first["kept"] and first["probability"] is None and "the VAE gave NaN" in first["note"]
    assert torch.equal(refined["samples"][0], latent["samples"][0])
    assert second["kept"] and not torch.equal(refined["samples"][1], latent["samples"][1])
