"""What the training node refuses, in words and before it trains."""

from dataclasses import replace

import comfy.sd
import pytest
import torch
from artifact_guard.nodes.fam.flaw_batch import with_pictures
from artifact_guard.nodes.fam.lora_checks import check_conditions, normal_tensors, spoilt
from artifact_guard.nodes.fam.lora_schema import zeroed
from artifact_guard.nodes.fam.train_steps import UnlikePrompts, check_alike
from comfy.conds import CONDRegular
from comfy.patcher_extension import WrappersMP

from nodes import ConditioningSetTimestepRange

from tests.small_models import shallow_sd15, small_model
from tests.unit.fam_lora_support import RoughPlaces, SameForAll, ToyVAE, rough_highlighter, smooth_latents
from tests.unit.test_fam_lora_models import train


class Broken(ToyVAE):
    """Of another architecture."""

    def decode(self, samples):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.fixture(scope="module")
def small():
    return shallow_sd15()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"positive": []}, "positive: no text encoder output"),
        ({"positive": [[None, {}]]}, "positive: an entry without text encoder output"),
        ({"positive": [[torch.zeros(1, 0, 24), {}]]}, "positive: an entry without"),
        ({"positive": [[torch.zeros(6, 6, 24), {}]]}, "positive: an entry with 6 prompts in one batch"),
        ({"positive": [[torch.full((1, 6, 24), torch.nan), {}]]}, "positive: .* NaN"),
        ({"positive": [[torch.zeros(1, 6, 24), {"area": (8, 8, 0, 0)}]]}, "positive: .* confined by area"),
        ({"positive": [[torch.zeros(1, 6, 24), {}]] * 4}, "positive: 4 prompts came for 6 latents"),
        ({"positive": [[torch.zeros(1, 6, 77), {}]]}, "could not take a training step .* text encoder of another model"),
        ({"positive": [[torch.zeros(1, 6, 24), {"pooled_output": torch.full((1, 8), torch.nan)}]]}, "positive: .* NaN"),
        ({"positive": ConditioningSetTimestepRange().set_range([[torch.zeros(1, 6, 24), {}]], 0.0, 0.5)[0]}, "confined by end_percent"),
        ({"positive": [[torch.zeros(1, 6 + (n == 4), 24), {}] for n in range(6)]}, "^positive: .* do not fit .* Set batch_size to 1"),
        ({"positive": [[torch.zeros(1, 6, 24), {"reference_latents": [torch.zeros(4, 4, 16, 16)]}]]},
         "reference_latents of 4 pictures came for 6 latents"),
        ({"positive": [[torch.zeros(1, 6, 24), {"concat_mask": torch.zeros(1 + (n == 2), 1, 16, 16)}] for n in range(6)]},
         "concat_mask of 2 pictures .* a prompt that belongs to one latent has one"),
        ({"negative": []}, "negative: no text encoder output"),
        ({"negative": [[torch.zeros(1, 6, 99), {}]]}, "negative: .* is 99 wide and that of positive 24"),
        ({"negative": [[torch.full((1, 6, 24), torch.inf), {}]]}, "negative: .* NaN or infinite"),
        ({"vae": None}, "vae: none came"),
        ({"vae": Broken(4)}, "pictures for a flaw map could not be made .* decoded by vae"),
        ({"latents": {"samples": torch.zeros(2, 16, 8, 8)}}, "16 channels and this model works on 4"),
        ({"latents": {"samples": torch.zeros(2, 4, 3, 8, 8)}}, "latents: they have 3 axes"),
        ({"latents": {"samples": torch.zeros(0, 4, 8, 8)}}, "latents: an empty batch"),
        ({"latents": {"samples": torch.full((2, 4, 8, 8), torch.nan)}}, "NaN"),
        ({"vae": ToyVAE(16)}, "vae: it decodes latents of 16 channels and this model's have 4"),
        ({"rank": 0}, "rank is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"base_fraction": 1.5}, "base_fraction is 1.5"),
        ({"attention_strength": float("nan")}, "attention_strength is nan"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"resume": "nowhere.safetensors"}, "nowhere.safetensors.* no such file"),
        ({"flaw_highlighter": rough_highlighter(SameForAll())}, "answers the same for everything.*real every time .*35.4% to 35.4%"),
        ({"flaw_highlighter": rough_highlighter(RoughPlaces(-9.0))}, "the same for everything.*generated every time"),
        ({"flaw_highlighter": rough_highlighter(RoughPlaces(9.0))}, "the same for everything.*real every time"),
    ],
)
def test_refused_in_words(small, change, words):
    with pytest.raises(ValueError, match=words):
        train(small, **change)


def test_prompt_over_the_whole_run_and_prompts_of_unlike_lengths_one_by_one_are_taken(small):
    (whole,) = ConditioningSetTimestepRange().set_range(small.conditioning(1), 0.0, 1.0)
    assert train(small, positive=whole, steps=1)[0]
    assert train(small, positive=[[torch.zeros(1, 6 + (n == 4), 24), {}] for n in range(6)], batch_size=1, steps=1)[0]


class Mild(RoughPlaces):
    """Tells images apart, and calls all of them real."""

    def head(self, features):
        return 0.1 * super().head(features) + torch.tensor([2.0, -2.0])


def test_one_verdict_for_everything_and_its_own_warnings_are_told(small, caplog):
    caplog.set_level("INFO")
    highlighter = rough_highlighter(Mild())
    highlighter.settings = replace(highlighter.settings, warnings=("Spurious cue: light.",))
    lora, _, _ = train(small, flaw_highlighter=highlighter)
    assert lora and "flaw_highlighter: Spurious cue: light." in caplog.text
    assert "flaw_highlighter: It calls all of 6 training images" in caplog.text and " real (probability" in caplog.text


def test_a_run_without_maps_asks_nothing_of_the_highlighter(small):
    assert train(small, flaw_highlighter=rough_highlighter(SameForAll()), base_fraction=1.0)[0]


def test_a_model_that_cannot_be_loaded_whole_is_told(small, monkeypatch):
    model = small.model.clone()
    monkeypatch.setattr(type(model), "is_dynamic", lambda self: True)
    model.cached_patcher_init = None
    with pytest.raises(ValueError, match="model: ComfyUI loads it piece by piece.*--disable-dynamic-vram"):
        train(small, model=model)


def test_missing_pooled_text_is_told():
    """SDXL's prompt without what its second text encoder gives."""
    small = small_model("sdxl")
    with pytest.raises(ValueError, match="could not take a training step"):
        train(small, positive=[[small.conditioning(1)[0][0], {"pooled_output": torch.zeros(1, 7)}]])


def test_a_wrapper_that_writes_into_what_its_gradient_needs():
    """Told with gradient_checkpointing, trained without."""
    small = small_model("sd15")

    def brighter(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        out[:, :1] = out[:, :1] * out.mean()
        return out

    patched = small.model.clone()
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", brighter)
    with pytest.raises(ValueError, match="writes into activations that its gradient needs.*gradient_checkpointing off"):
        train(small, model=patched, base_fraction=1.0, gradient_checkpointing=True)
    assert train(small, model=patched, base_fraction=1.0, gradient_checkpointing=False)


def test_prompts_of_different_lengths_need_batches_of_one():
    small = small_model("flux")
    prompts = [small.conditioning(1, tokens=4 + index)[0] for index in range(6)]
    with pytest.raises(ValueError, match="Set batch_size to 1"):
        train(small, positive=prompts, batch_size=4, base_fraction=1.0)
    assert train(small, positive=prompts, batch_size=1, base_fraction=1.0)


def test_a_lora_in_bypass_mode_is_refused(small):
    patched = small.model.clone()
    lora, _, _ = train(small)
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(patched, None, lora, 1.0, 0)
    with pytest.raises(ValueError, match="bypass"):
        train(small, model=bypassed)


def test_a_constant_highlighter_is_no_matter_where_no_map_acts(small):
    assert train(small, flaw_highlighter=rough_highlighter(SameForAll()), attention_strength=0.0)


def test_conditions_made_under_inference_mode_can_be_part_of_a_gradient():
    with torch.inference_mode():
        tokens = torch.ones(1, 2, 3)
        value = [[tokens, {"pooled_output": tokens, "list": [tokens], "n": 3}]]
    with torch.inference_mode(False):
        freed = normal_tensors(value)
    assert not freed[0][0].is_inference() and not freed[0][1]["list"][0].is_inference() and freed[0][1]["n"] == 3


def test_spoilt_images_are_spoilt_in_the_middle_only():
    image = torch.full((1, 8, 8, 3), 0.5)
    changed = (spoilt(image) != image).any(-1)[0]
    assert changed[2:6, 2:6].all() and changed.sum() == 16 and (image == 0.5).all()


def test_smooth_images_are_real_to_the_hand_made_highlighter(small):
    """The tests' own judge tells the two apart, so that the refusals above are for the right reason."""
    judge = rough_highlighter()
    smooth = ToyVAE().decode(smooth_latents(small)["samples"])
    assert (judge.generated_probability(smooth) < 0.5).all() and (judge.generated_probability(spoilt(smooth)) > 0.5).all()


def test_negative_is_told_the_pictures_of_the_prompt_beside_it():
    """A negative from InpaintModelConditioning has those of the whole batch, an empty one those of the first latent."""
    pictures = torch.arange(3.0).view(3, 1, 1, 1)
    positive, _ = check_conditions([[torch.ones(1, 6, 24), {"concat_latent_image": pictures}]], 3)
    for condition, own in zip(positive, pictures):
        for negative in (zeroed(positive), [[torch.zeros(1, 6, 24), {"concat_latent_image": pictures, "pooled_output": 1}]]):
            (tokens, more), = with_pictures(negative, condition)
            assert more["concat_latent_image"].flatten().tolist() == own.flatten().tolist() and not tokens.any()


def test_prompts_of_which_some_have_a_picture_do_not_make_a_batch():
    text, picture = CONDRegular(torch.zeros(1, 6, 24)), CONDRegular(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UnlikePrompts, match="some prompts have ref_latents and others have not"):
        check_alike([{"model_conds": {"c_crossattn": text}}, {"model_conds": {"c_crossattn": text, "ref_latents": picture}}])
