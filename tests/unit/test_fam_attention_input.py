"""The attention patch: half precision, maps and models it has to refuse, and maps on the grid of tokens."""

import pytest
import torch
from artifact_guard.nodes.fam.attention import AttentionSettings
from artifact_guard.nodes.fam.families import NO_HOOK
from artifact_guard.nodes.fam.schema import FAMAttentionPatch
from artifact_guard.nodes.fam.token_maps import level_grid, pool_tokens

from tests.small_models import sample, small_model
from tests.unit.attention_support import patch, square, watched


@pytest.fixture(scope="module")
def sd15():
    return small_model("sd15")


# Precision and bad input

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, sd15):
    """In half precision the patch does what it does in float32, up to what the dtype itself loses."""
    small = small_model("flux")
    small.model.model.diffusion_model.to(dtype)
    small.model.model.diffusion_model.dtype = dtype
    bare, marked = (watched(small, m, strength=0.025).values[0] for m in (None, torch.ones(1, 16, 16)))
    assert marked.dtype == dtype
    factor = (marked.float().abs().sum() / bare.float().abs().sum()).item()
    share = 64 / 70
    assert factor == pytest.approx(1 + 0.025 * share, abs=0.002)


@pytest.mark.parametrize("flaw_map, words", [
    (torch.full((1, 16, 16), torch.nan), "flaw_map: the map holds NaN"),
    (torch.ones(1, 16, 32), "does not have the shape of the latent"),
    (torch.ones(3, 16, 16), "3 masks came for 2 samples"),
])
def test_maps_that_do_not_fit(sd15, flaw_map, words):
    with pytest.raises(ValueError, match=words):
        sample(sd15, patch(sd15, flaw_map), sd15.latent(2))


@pytest.mark.parametrize("settings, words", [
    ({"strength": -1.0}, "strength is -1.0"), ({"strength": float("nan")}, "strength is nan"),
    ({"target": "query"}, "target is 'query'; one of 'key and value', 'key', 'value'"),
    ({"start_percent": 0.7, "end_percent": 0.3}, "start_percent is 0.7 and end_percent 0.3"),
])
def test_settings_that_cannot_work(settings, words):
    with pytest.raises(ValueError, match=words):
        AttentionSettings(**settings)


@pytest.mark.parametrize("name, words", [*NO_HOOK.items(), ("some.other.Network", "Network is of a kind this patch was not tried on")])
def test_a_family_without_hook_is_refused_at_the_node(sd15, name, words):
    """Before any sampling, with the family's name and what to do instead."""
    module, _, network = name.rpartition(".")
    model = sd15.model.clone()
    model.add_object_patch("diffusion_model", type(network, (), {"__module__": module})())
    with pytest.raises(ValueError, match=f"model: .*{words.split(' ')[0]}"):
        FAMAttentionPatch.execute(model, square(), 0.025, "key and value", 0.0, 1.0, "")


def test_a_patch_that_does_nothing_suits_any_family(sd15):
    """At strength 0 or with an empty map: the bare model, not a refusal."""
    model = sd15.model.clone()
    model.add_object_patch("diffusion_model", type("Network", (), {"__module__": "some.other"})())
    for flaw_map, strength in ((square(), 0.0), (torch.zeros(1, 16, 16), 0.3)):
        patched = FAMAttentionPatch.execute(model, flaw_map, strength, "key and value", 0.0, 1.0, "")[0]
        assert patched.model_options == model.model_options and not patched.callbacks.get("on_cleanup")


# Tokens

def test_tokens_are_means_over_their_pixels():
    """Hand-computed: 3x5 pixels in tokens of 2x2, padded with the last row and column."""
    maps = torch.arange(15.0).view(1, 1, 3, 5)
    tokens = pool_tokens(maps, (1, 2, 2))
    assert tokens.tolist() == [[(0 + 1 + 5 + 6) / 4, (2 + 3 + 7 + 8) / 4, (4 + 4 + 9 + 9) / 4, 10.5, 12.5, 14.0]]


def test_tokens_over_time():
    maps = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert pool_tokens(maps, (2, 2, 2)).tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize("tokens, up, wanted", [(256, True, (16, 16)), (64, True, (8, 8)), (16, False, (4, 4)), (65, True, None)])
def test_levels(tokens, up, wanted):
    assert level_grid(16, 16, tokens, up) == wanted
    assert level_grid(15, 13, 56, True) == (8, 7) and level_grid(15, 13, 42, False) == (7, 6)
