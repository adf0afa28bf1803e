"""The attention patch on releases of ComfyUI whose networks call fewer hooks: said in words, never without effect."""

import pytest
import torch
from artifact_guard.nodes.fam import families
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention

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
