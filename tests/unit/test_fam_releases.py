"""The attention patch on releases of ComfyUI whose networks call fewer hooks: said in words, never without effect."""

import comfy.latent_formats
import pytest
import torch
from artifact_guard.nodes.fam import families
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.latents import temporal_ratio

from tests.small_models import sample, small_model

MAP = torch.ones(1, 16, 16)


@pytest.fixture
def older(monkeypatch):
    """ComfyUI as if its networks' code were without this word."""
    source = families._source

    def without(word):
        monkeypatch.setattr(families, "_source", lambda module: source(module).replace(word, ""))

    return without


@pytest.mark.parametrize("name", ["flux", "chroma", "qwen_image", "hunyuan_video"])
def test_without_the_hook_the_model_is_refused(name, older):
    older("attn1_patch")
    with pytest.raises(ValueError, match="lets nobody reach its attention in this release.*Update ComfyUI"):
        patch_attention(small_model(name).model, MAP, AttentionSettings(0.3))


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_who_needs_no_such_hook_is_not_refused(name, older):
    older("attn1_patch")
    patch_attention(small_model(name).model, MAP, AttentionSettings(0.3))


def test_blocks_that_are_not_told_cannot_be_chosen(older):
    older("block_index")
    model = small_model("cosmos_predict2").model
    with pytest.raises(ValueError, match="does not tell which of its blocks is running"):
        patch_attention(model, MAP, AttentionSettings(0.3, blocks="0"))


def test_without_block_numbers_the_patch_still_acts(older, monkeypatch):
    """Cosmos before 0.30: self-attention is told from cross-attention by its lengths, or by its place."""
    small = small_model("cosmos_predict2")
    whole = sample(small, patch_attention(small.model, MAP, AttentionSettings(0.3)))
    older("block_index")
    family = families.family_of(small.model.model.diffusion_model)
    assert family.numbered == {}
    blind = sample(small, patch_attention(small.model, MAP, AttentionSettings(0.3)))
    assert torch.equal(blind, whole) and not torch.equal(whole, sample(small))


@pytest.mark.parametrize("name, ratio", [
    ("SD15", 1), ("Flux", 1), ("Wan21", 4), ("Wan22", 4), ("HunyuanVideo", 4), ("HunyuanVideo15", 4), ("Mochi", 6), ("LTXV", 8), ("Cosmos1CV8x8x8", 8),
])
def test_frames_of_a_video_are_known_in_releases_whose_formats_do_not_tell(name, ratio, monkeypatch):
    """The same as of formats that do."""
    latent_format = getattr(comfy.latent_formats, name)()
    assert temporal_ratio(latent_format) == ratio
    for kind in type(latent_format).__mro__:
        if "temporal_downscale_ratio" in vars(kind):
            monkeypatch.delattr(kind, "temporal_downscale_ratio")
    assert not hasattr(latent_format, "temporal_downscale_ratio") and temporal_ratio(latent_format) == ratio
