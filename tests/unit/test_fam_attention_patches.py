"""The attention patch beside other patches, in part of the schedule, in some of the blocks, and after an error."""

import math

import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.coordinates import between
from comfy_extras import nodes_lt
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel

from tests.small_models import not_in_this_release, reachable, sample, small_model
from tests.unit.attention_support import STRENGTH, Spy, close, patch, square, watched


@pytest.fixture(scope="module")
def sd15():
    return small_model("sd15")


# Beside other patches

def test_token_merging(sd15):
    """Core merges the queries only: keys and values are scaled as ever, whichever patch comes first."""
    merged = TomePatchModel.execute(sd15.model, 0.5)[0]
    after = patch(sd15, square(), model=merged)
    before = TomePatchModel.execute(patch(sd15, square()), 0.5)[0]
    runs = [watched(sd15, model=model).keys[0] for model in (sd15.model, after, before)]
    assert (runs[0] != runs[1]).any() and torch.equal(runs[1], runs[2])
    assert torch.isfinite(sample(sd15, after)).all()


def test_hypertile_and_perturbed_attention(sd15):
    for other in (lambda m: HyperTile.execute(m, 32, 2, 0, False)[0], lambda m: PerturbedAttentionGuidance.execute(m, 3.0)[0]):
        model = other(sd15.model)
        assert not close(sample(sd15, patch(sd15, square(), model=model)), sample(sd15, model))


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_an_override_that_was_there_is_called(family):
    """It gets the scaled keys, and its result is what the model uses."""
    small = small_model(family)
    spy = Spy(small.model)
    patched = patch(small, torch.ones(1, 16, 16), model=spy.model)
    sample(small, patched, steps=1)
    bare = watched(small)
    assert len(spy.keys) == len(bare.keys)
    changed = (spy.keys[0] != bare.keys[0]).any()
    assert changed


def test_two_patches_multiply(sd15):
    """Two maps on one model, each with its own strength."""
    left, right = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[..., :8], right[..., 8:] = 1, 1
    stacked = patch(sd15, right, 0.2, model=patch(sd15, left, 0.5))
    bare, marked = (watched(sd15, model=model).keys[0] for model in (sd15.model, stacked))
    factor = (marked / bare).median(dim=2).values.view(-1, 16, 16)
    assert torch.allclose(factor[:, :, :8], torch.tensor(1.5), rtol=1e-3)
    assert torch.allclose(factor[:, :, 8:], torch.tensor(1.2), rtol=1e-3)


def rows_one_by_one(apply_model, given):
    x, c = given["input"], given["c"]
    of_row = [{k: v[i : i + 1] if isinstance(v, torch.Tensor) and len(v) == len(x) else v for k, v in c.items()} for i in range(len(x))]
    return torch.cat([apply_model(x[i : i + 1], given["timestep"][i : i + 1], **of_row[i]) for i in range(len(x))])


def two_tiles(apply_model, given):
    halves = given["input"].chunk(2, dim=-1)
    return torch.cat([apply_model(half, given["timestep"], **given["c"]) for half in halves], dim=-1)


@pytest.mark.parametrize("wrapper", [rows_one_by_one, two_tiles])
@pytest.mark.parametrize("family", ["sd15", "flux", "sd3", "wan"])
def test_a_wrapper_that_cuts_the_latent_up(family, wrapper, caplog):
    """As tiled diffusion does it: where the parts lie nobody tells, so the model runs as without the patch, which is said once."""
    small = reachable(small_model(family))
    model = small.model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    bare, marked = (watched(small, flaw_map, model=model, steps=2) for flaw_map in (None, torch.ones(1, 16, 16)))
    assert all(torch.equal(a, b) for a, b in zip(bare.keys, marked.keys, strict=True))
    assert caplog.text.count("the flaw attention patch is off in this run") == 1


def test_a_wrapper_that_hands_the_latent_on(sd15, caplog):
    model = sd15.model.clone()
    model.set_model_unet_function_wrapper(lambda apply_model, given: apply_model(given["input"], given["timestep"], **given["c"]))
    bare, marked = (watched(sd15, flaw_map, model=model) for flaw_map in (None, torch.ones(1, 16, 16)))
    assert not torch.equal(bare.keys[0], marked.keys[0]) and "is off" not in caplog.text


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_ltx_with_a_guide(strength):
    """Below strength 1 core asks the self-attention in two parts, the guide's queries and the others: both with scaled keys."""
    if not hasattr(nodes_lt, "_append_guide_attention_entry"):
        not_in_this_release("has no LTX guides of another strength")
    small = small_model("ltxv")
    latent, random = small.latent(1, frames=3), torch.Generator().manual_seed(5)
    guide = torch.randn(1, 128, 1, 8, 8, generator=random)
    positive, negative, samples, mask = nodes_lt.LTXVAddGuide.append_keyframe(
        small.conditioning(1), small.conditioning(2), 0, latent["samples"], torch.ones(1, 1, 3, 1, 1), guide, 1.0, [8, 32, 32]
    )
    positive, negative = nodes_lt._append_guide_attention_entry(positive, negative, 64, [1, 8, 8], strength=strength)
    given = {"latent": {"samples": samples, "noise_mask": mask}, "positive": positive, "negative": negative}
    bare, marked = (watched(small, flaw_map, **given) for flaw_map in (None, torch.ones(1, 8, 8)))
    tokens = samples[0, 0].numel()
    scaled = [not torch.equal(a, b) for a, b in zip(bare.keys, marked.keys, strict=True)]
    of_image = [a.shape[1] == tokens for a in bare.keys]
    assert scaled == of_image and sum(of_image) > 0 and not all(of_image)


# Ranges and blocks

def test_percent_range(sd15):
    """Patched only in its part of the schedule; the two parts together are not the same as either."""
    bare = watched(sd15, steps=4, cfg=1.0)
    calls = len(bare.keys) // 4
    early, late = (
        watched(sd15, square(), steps=4, cfg=1.0, settings={"start_percent": a, "end_percent": b})
        for a, b in ((0.0, 0.5), (0.5, 1.0))
    )
    assert not torch.equal(early.keys[0], bare.keys[0])
    assert all(torch.equal(late.keys[i], bare.keys[i]) for i in range(calls)), "the first step lies before the range"
    assert not torch.equal(late.keys[3 * calls], bare.keys[3 * calls])
    # After its range the early patch scales no more: the last step's keys come from its other input alone.
    marked = torch.zeros(256, dtype=torch.bool).view(16, 16)
    marked[2:7, 1:6] = True
    ratio = (early.keys[3 * calls].norm(dim=2) / bare.keys[3 * calls].norm(dim=2))[:, marked.flatten()]
    assert (ratio - 1).abs().max() < STRENGTH / 2


@pytest.mark.parametrize("family", ["flux", "sd3", "wan", "lumina2", "ltxv", "hunyuan_video", "qwen_image"])
def test_a_step_at_the_limit_of_a_range_is_in_the_range_that_begins_there(family):
    """Schedules are float32 and percent_to_sigma is not: of Wan's steps one lies at 0.8888888955 where 0.8888888889 is asked for."""
    sampling, seen = small_model(family).model.get_model_object("model_sampling"), 0
    for steps in (4, 5, 8, 10, 20, 25):
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps).tolist()
        for k in range(1, steps):
            limit = float(sampling.percent_to_sigma(k / steps))
            if abs(sigmas[k] / limit - 1) < 1e-6:
                seen += 1
                assert between(sigmas[k], limit, 0.0) and not between(sigmas[k], math.inf, limit), (steps, k)
    assert seen > 10


def test_the_range_of_a_single_step():
    small = small_model("ltxv")
    bare, patched = (sample(small, model, steps=4) for model in (small.model, patch(small, square(), start_percent=0.25, end_percent=0.5)))
    assert not close(bare, patched)


@pytest.mark.parametrize("family, blocks, calls", [
    ("sd15", "middle", [6]), ("sd15", "input.1, output.2-3", None), ("flux", "double.1", [1]), ("flux", "single", [2]),
    ("wan", "1", [2]), ("lumina2", "double.0", [2]), ("cosmos_predict2", "0", [0]),
])
def test_blocks(family, blocks, calls):
    """The first call that differs from the bare model is that of the first chosen block."""
    small = reachable(small_model(family))
    try:
        patch(small, square(), blocks=blocks)
    except ValueError as error:
        assert family == "cosmos_predict2" and "does not tell which" in str(error)
        not_in_this_release("does not tell which block of Cosmos Predict 2 is running")
    bare, marked = (watched(small, m, settings={"blocks": blocks}) for m in (None, torch.ones(1, *small.size)))
    changed = [i for i, (b, m) in enumerate(zip(bare.keys, marked.keys)) if not torch.equal(b, m)]
    assert changed
    if calls:
        assert changed[0] == calls[0]


@pytest.mark.parametrize("family, blocks, words", [
    ("sd15", "middle.1", "is not there. This model has input.0-"),
    ("sd15", "3", "this model has no '3'"),
    ("flux", "triple.0", "this model has no 'triple.0'; it has double.0-1, single.0-1"),
    ("flux", "double 0;1", "is not understood"),
    ("sd3", "2", "does not tell which of its blocks is running"),
    ("sdxl", "input.0-1", "there is no attention in them. It is in input"),
])
def test_blocks_that_are_not_there(family, blocks, words):
    small = reachable(small_model(family))
    with pytest.raises(ValueError, match=words):
        patch(small, square(), blocks=blocks)


def test_interrupted_runs_leave_nothing(sd15):
    """An error in the middle of a run: the options are as before, the maps on their grids are dropped."""
    patched = patch(sd15, square())
    options = repr(patched.model_options)

    def fail(args):
        raise RuntimeError("stop here")

    broken = patched.clone()
    broken.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        sample(sd15, broken)
    assert repr(patched.model_options) == options
    assert torch.equal(sample(sd15, patched), sample(sd15, patch(sd15, square())))
