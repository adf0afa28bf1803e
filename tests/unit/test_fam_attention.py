"""The attention patch in the calls graphs bring about: guidance, areas, videos, windows, text and reference tokens."""

import comfy.context_windows
import pytest
import torch
from artifact_guard.nodes.fam.token_maps import CallView, view_maps

from tests.small_models import sample, small_model
from tests.unit.attention_support import STRENGTH, close, patch, square, watched


@pytest.fixture(scope="module")
def sd15():
    return small_model("sd15")


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
    # The second window has one frame in front of it, which core adds and strips; not so in releases such as 0.20.1.
    added = int(hasattr(handler, "causal_window_fix"))
    assert len(bare.keys) % 2 == 0
    for call, expected in ((0, [False] * 3), (len(bare.keys) // 2, [False] * (2 + added) + [True])):
        assert bare.keys[call].shape[1] == 64 * len(expected)
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


def test_frames_as_a_batch_with_context_windows():
    """A window over samples 2 to 5 of 8 (dim 0, as AnimateDiff's) gets the maps of these; one map for all acts too."""
    small = small_model("sd15")
    handler = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"), context_length=4, context_overlap=1, dim=0,
    )
    model, latent, frames = small.model.clone(), small.latent(8), torch.zeros(8, 16, 16)
    model.model_options["context_handler"] = handler
    frames[7] = 1
    bare, one, last = (sample(small, on, latent, steps=2) for on in (model, patch(small, square(), model=model), patch(small, frames, model=model)))
    changed = (bare != last).flatten(1).any(dim=1)
    assert not close(one, bare) and changed[7] and not changed[:4].any()
