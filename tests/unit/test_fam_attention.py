"""The attention patch in the situations graphs bring about: guidance, areas, other patches, ranges, blocks, bad input."""

import comfy.context_windows
import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.fam.families import NO_HOOK
from artifact_guard.nodes.fam.schema import FAMAttentionPatch
from artifact_guard.nodes.fam.token_maps import CallView, level_grid, pool_tokens, view_maps
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel

from tests.small_models import sample, small_model

STRENGTH = 0.3


def square(height=16, width=16, count=1):
    """A map of one marked square in the upper left quarter."""
    mask = torch.zeros(count, height, width)
    mask[:, 2:7, 1:6] = 1
    return mask


def patch(small, flaw_map, strength=STRENGTH, model=None, **settings):
    return patch_attention(model or small.model, flaw_map, AttentionSettings(strength, **settings))


def close(one, other):
    return torch.allclose(one / other.abs().max(), other / other.abs().max(), atol=2e-5)


@pytest.fixture(scope="module")
def sd15():
    return small_model("sd15")


class Spy:
    """An attention override that notes the keys and values of every call. A patch applied after it hands on to it."""

    def __init__(self, model):
        self.model, self.keys, self.values = model.clone(), [], []
        self.model.model_options["transformer_options"]["optimized_attention_override"] = self

    def __call__(self, func, q, k, v, *args, **kwargs):
        self.keys.append(k.clone())
        self.values.append(v.clone())
        return func(q, k, v, *args, **kwargs)


def watched(small, flaw_map=None, model=None, steps=1, settings={}, strength=STRENGTH, **more):
    """The keys and values of all attention calls of a short run; patched if there is a map."""
    spy = Spy(model or small.model)
    patched = spy.model if flaw_map is None else patch(small, flaw_map, strength, model=spy.model, **settings)
    sample(small, patched, steps=steps, **more)
    return spy


# Which part of a call is which sample

def test_chunks_of_guidance_come_in_any_order(sd15):
    """Rows are chunk after chunk, each the whole batch: sample 0 is marked in all chunks, however many there are."""
    flaw_map = torch.cat([square(), torch.zeros(1, 16, 16)])
    latent = sd15.latent(2)
    for cfg, chunks in ((4.0, 2), (1.0, 1)):
        bare, marked = (watched(sd15, m, latent=latent, cfg=cfg).keys[0] for m in (None, flaw_map))
        changed = (bare != marked).flatten(1).any(1).tolist()
        assert changed == [True, False] * chunks


def test_conditionings_that_do_not_fit_in_one_batch(sd15):
    """Positive and negative prompts of different lengths are called one after the other, and both are patched."""
    flaw_map = square()
    negative = sd15.conditioning(2, tokens=7)
    bare, marked = (watched(sd15, m, negative=negative) for m in (None, flaw_map))
    firsts = [i for i, k in enumerate(bare.keys) if k.shape[1] == 256]
    assert len(firsts) >= 2
    assert all((bare.keys[i][0] != marked.keys[i][0]).any() for i in firsts)


def test_area_conditioning_sees_its_part_of_the_map(sd15):
    """A prompt for the right half: the call sees 16x8 pixels, and the mark in the left half is not in it."""
    half = [[sd15.conditioning(5)[0][0], {"area": (16, 8, 0, 8), "strength": 1.0}]]
    both = sd15.conditioning(1) + half
    bare, marked = (watched(sd15, m, positive=both) for m in (None, square()))
    confined = [i for i, k in enumerate(bare.keys) if k.shape[1] == 128]
    assert confined and all(torch.equal(bare.keys[i], marked.keys[i]) for i in confined[:1])
    right = torch.zeros(1, 16, 16)
    right[:, :, 8:] = 1
    moved = watched(sd15, right, positive=both)
    assert close(moved.keys[confined[0]], bare.keys[confined[0]] * (1 + STRENGTH))


def test_two_areas_of_equal_size_in_one_call(sd15):
    """Left and right half as chunks of one call: only the left one holds the mark."""
    text = sd15.conditioning(5)[0][0]
    halves = [[text, {"area": (16, 8, 0, x), "strength": 1.0}] for x in (0, 8)]
    bare, marked = (
        watched(sd15, m, positive=halves, negative=halves) for m in (None, square())
    )
    changed = (bare.keys[0] != marked.keys[0]).flatten(1).any(1)
    assert len(changed) == 4 and changed.sum() == 2


def test_a_map_for_all_and_one_for_each_are_the_same(sd15):
    latent = sd15.latent(2)
    one, each = (sample(sd15, patch(sd15, m), latent) for m in (square(), square(count=2)))
    assert torch.equal(one, each)


@pytest.mark.parametrize("size", [16, 40, 128])
def test_maps_of_any_size_with_the_latents_aspect(sd15, size):
    """A map at image size is averaged over each latent pixel."""
    big = torch.nn.functional.interpolate(square()[None], size=(size, size), mode="nearest")[0]
    assert not close(sample(sd15, patch(sd15, big)), sample(sd15))
    if size == 128:
        assert close(sample(sd15, patch(sd15, big)), sample(sd15, patch(sd15, square())))


def test_a_map_of_every_frame_of_a_video():
    """Wan: 3 latent frames are 9 image frames; a mark on the last four falls on the last latent frame alone."""
    wan = small_model("wan")
    frames = torch.zeros(9, 16, 16)
    frames[5:] = square()[0]
    bare, marked = (watched(wan, m) for m in (None, frames))
    changed = (bare.values[0] != marked.values[0]).any(dim=2)[0].view(3, 64).any(1)
    assert changed.tolist() == [False, False, True]


def test_context_windows_see_their_frames():
    """A window over latent frames 2 to 4 of 6 gets the maps of these frames."""
    maps = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 4, 4)
    seen = view_maps(maps, CallView(rows=2, areas=(None, None), frames=(2, 3, 4)))
    assert seen.shape == (2, 3, 4, 4) and seen[1, :, 0, 0].tolist() == [2, 3, 4]


def test_video_with_context_windows():
    wan = small_model("wan")
    handler = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"), context_length=3, context_overlap=1, dim=2,
    )
    model = wan.model.clone()
    model.model_options["context_handler"] = handler
    latent, frames = wan.latent(1, frames=5), torch.zeros(5, 16, 16)
    frames[4] = 1
    bare, marked = (watched(wan, m, model, latent=latent) for m in (None, frames))
    # The second window has one frame in front of it, which core adds and strips.
    for tokens, expected in ((192, [False] * 3), (256, [False] * 3 + [True])):
        call = next(i for i, k in enumerate(bare.keys) if k.shape[1] == tokens)
        assert (bare.values[call] != marked.values[call]).any(2)[0].view(-1, 64).any(1).tolist() == expected


# What is image and what is not

@pytest.mark.parametrize("family", ["wan", "cosmos_predict2", "ltxv", "kandinsky5"])
def test_a_prompt_as_long_as_the_image_is_not_taken_for_it(family):
    """Self- and cross-attention have equal lengths then; only self-attention may be scaled."""
    small = small_model(family)
    tokens = {"wan": 192, "cosmos_predict2": 128, "ltxv": 128, "kandinsky5": 128}[family]
    prompts = {"positive": small.conditioning(1, tokens), "negative": small.conditioning(2, tokens)}
    bare, marked = (watched(small, m, **prompts) for m in (None, torch.ones(1, *small.size)))
    changed = [not torch.equal(b, m) for b, m in zip(bare.keys, marked.keys)]
    first = changed.index(True)
    assert close(marked.keys[first], bare.keys[first] * (1 + STRENGTH))
    assert not torch.allclose(marked.keys[first + 1], bare.keys[first + 1] * (1 + STRENGTH), rtol=0.05)
    assert first == (1 if family == "kandinsky5" else 0)


def test_reference_images_are_left_alone():
    """Flux with a reference image as large as the image: its tokens come last and keep every bit."""
    flux = small_model("flux")
    reference = {"reference_latents": [torch.ones(1, 16, 16, 16)]}
    prompts = {"positive": flux.conditioning(1, **reference), "negative": flux.conditioning(2, **reference)}
    bare, marked = (watched(flux, m, **prompts).values[0] for m in (None, torch.ones(1, 16, 16)))
    changed = (bare != marked).any(dim=(1, 3))[0]
    assert changed.tolist() == [False] * 6 + [True] * 64 + [False] * 64


def test_reference_images_of_omnigen2():
    """There they come between text and image, and have refiners of their own."""
    small = small_model("omnigen2")
    reference = {"reference_latents": [torch.ones(1, 16, 16, 16)]}
    prompts = {"positive": small.conditioning(1, **reference), "negative": small.conditioning(2, **reference)}
    bare, marked = (watched(small, m, **prompts).values for m in (None, torch.ones(1, 16, 16)))
    changed = [(b != m).any(dim=(1, 3))[0].tolist() for b, m in zip(bare, marked) if not torch.equal(b, m)]
    assert changed[0] == [False] * (6 + 64) + [True] * 64


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


@pytest.mark.parametrize("family, blocks, calls", [
    ("sd15", "middle", [6]), ("sd15", "input.1, output.2-3", None), ("flux", "double.1", [1]), ("flux", "single", [2]),
    ("wan", "1", [2]), ("lumina2", "double.0", [2]), ("cosmos_predict2", "0", [0]),
])
def test_blocks(family, blocks, calls):
    """The first call that differs from the bare model is that of the first chosen block."""
    small = small_model(family)
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
])
def test_blocks_that_are_not_there(family, blocks, words):
    small = small_model(family)
    with pytest.raises(ValueError, match=words):
        patch(small, square(), blocks=blocks)


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
