"""The attention patch against a direct computation of K * (1 + s * M), V * (1 + s * M), on small models of each family.

Where a family keeps its image tokens is written out here by hand, as lengths of the small models' attention calls; the
patch does not see this table. The reference is an attention override of the test's own.
"""

import importlib
import pathlib
import re

import pytest
import torch
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.fam.families import FAMILIES, NO_HOOK, class_name, family_of

from tests.harness.pack import ROOT
from tests.small_models import FAMILIES as SMALL_FAMILIES
from tests.small_models import not_in_this_release, reachable, sample, small_model

STRENGTH = 0.3
"""Far above the published 0.025, so that a wrong token shows."""

TEXT = 6
PLACES = {
    "sd15": {(n, n): (0, n) for n in (256, 64, 16, 4)},
    "sdxl": {(n, n): (0, n) for n in (64, 16)},
    "sd3": {(70, 70): (TEXT, 64), (64, 64): (0, 64)},
    "flux": {(70, 70): (TEXT, 64)},
    "flux2": {(576, 576): (512, 64)},
    "chroma": {(70, 70): (TEXT, 64)},
    "qwen_image": {(70, 70): (TEXT, 64)},
    "krea2": {(70, 70): (TEXT, 64)},
    "lumina2": {(70, 70): (TEXT, 64)},
    "z_image": {(96, 96): (32, 64)},
    "omnigen2": {(70, 70): (TEXT, 64)},
    "aura_flow": {(78, 78): (8 + TEXT, 64)},
    "hidream": {(82, 82): (0, 64)},
    "kandinsky5_image": {(64, 64): (0, 64)},
    "cascade_c": {(256, 270): (0, 256)},
    "wan": {(192, 192): (0, 192)},
    "wan_vace": {(192, 192): (0, 192)},
    "hunyuan_video": {(198, 198): (TEXT, 192)},
    "cosmos_predict2": {(128, 128): (0, 128)},
    "cogvideox": {(198, 198): (TEXT, 192)},
    "mochi": {(134, 134): (0, 128)},
    "ltxv": {(128, 128): (0, 128)},
    "kandinsky5": {(128, 128): (0, 128)},
}
"""Family -> (queries, keys) of its self-attention calls -> (first, count) of the image's tokens. Other calls are left alone."""


def maps(small, batch=2):
    """A map a sample, or a frame, at the size of the latent; smooth, so that every token has a value of its own."""
    count = batch * (small.frames or 1)
    return torch.rand(count, *small.size, generator=torch.Generator().manual_seed(5))


def direct_amounts(small, tokens, flaw_map, batch=2):
    """Strength times map of every image token of each sample, (batch, tokens), by plain means over squares."""
    height, width = small.size
    frames = small.frames or 1
    step = round((height * width * frames / tokens) ** 0.5)
    squares = flaw_map.reshape(batch, frames, height // step, step, width // step, step)
    return STRENGTH * squares.mean(dim=(3, 5)).reshape(batch, tokens)


def reference(small, flaw_map, places, keys=True, values=True, batch=2):
    """The model with an override that scales by hand; also a list that gets the lengths of all calls."""
    seen = []

    def override(func, q, k, v, *args, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        lengths = (q.shape[axis], k.shape[axis])
        seen.append(lengths)
        if lengths in places:
            first, image = places[lengths]
            amounts = direct_amounts(small, image, flaw_map, batch).to(k.device)
            factor = torch.ones(len(amounts), lengths[1], device=k.device)
            factor[:, first : first + image] += amounts
            factor = factor.repeat(len(k) // len(amounts), 1)
            # By hand for each: SD3's values have their heads behind the tokens, its keys have them in the channels.
            k, v = (
                t * factor.view([len(t)] + [lengths[1] if i == axis else 1 for i in range(1, t.ndim)]) if wanted else t
                for t, wanted in ((k, keys), (v, values))
            )
        return func(q, k, v, *args, **kwargs)

    model = small.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model, seen


def close(one, other):
    scale = other.abs().max()
    return torch.allclose(one / scale, other / scale, atol=2e-5)


@pytest.fixture(scope="module")
def small(request):
    return reachable(small_model(request.param))


each_small = pytest.mark.parametrize("small", SMALL_FAMILIES, indirect=True)


@each_small
@pytest.mark.parametrize("target, keys, values", [("key and value", 1, 1), ("key", 1, 0), ("value", 0, 1)])
def test_equals_the_direct_computation(small, target, keys, values):
    """Four steps with guidance on a batch of two: the same samples as with K and V scaled by hand."""
    flaw_map, latent = maps(small), small.latent(2)
    model, seen = reference(small, flaw_map, PLACES[small.family], keys, values)
    expected = sample(small, model, latent)
    assert set(PLACES[small.family]) <= set(seen), f"the calls are {sorted(set(seen))}"
    patched = patch_attention(small.model, flaw_map, AttentionSettings(STRENGTH, target))
    result = sample(small, patched, latent)
    assert close(result, expected)
    assert not close(result, sample(small, latent=latent)), "the patch does nothing"


@each_small
def test_every_sample_has_its_own_map(small):
    """A sample whose map is empty comes out as without the patch, its batch-mate does not."""
    flaw_map, latent = maps(small), small.latent(2)
    flaw_map[: small.frames or 1] = 0
    bare = sample(small, latent=latent)
    result = sample(small, patch_attention(small.model, flaw_map, AttentionSettings(STRENGTH)), latent)
    assert close(result[:1], bare[:1]) and not close(result[1:], bare[1:])


@each_small
def test_off_is_bit_for_bit(small):
    """Strength 0 and a map of zeros are the bare model."""
    bare = sample(small)
    for flaw_map, strength in ((maps(small, 1), 0.0), (torch.zeros(1, 16, 16), STRENGTH)):
        patched = patch_attention(small.model, flaw_map, AttentionSettings(strength))
        assert torch.equal(sample(small, patched), bare)


@each_small
def test_the_model_given_is_not_changed(small):
    """Its options are the same objects with the same content, before and after the patched clone was sampled."""
    options = small.model.model_options
    before = repr(options)
    sample(small, patch_attention(small.model, maps(small, 1), AttentionSettings(STRENGTH)))
    assert small.model.model_options is options and repr(options) == before


@each_small
def test_odd_sizes(small):
    """Sizes that are no multiple of a token: the patch acts. Some architectures cannot sample these themselves."""
    height, width = small.size[0] - 3, small.size[1] - 1
    latent = small.latent(1, height, width)
    if not small.odd:
        with pytest.raises((RuntimeError, AssertionError)):
            sample(small, latent=latent)
        return
    patched = patch_attention(small.model, torch.ones(1, height, width), AttentionSettings(STRENGTH))
    assert not close(sample(small, patched, latent), sample(small, latent=latent))


def test_every_known_network_was_measured():
    """No family of the table without a small model; no small model without a family."""
    measured = {class_name(small_model(name).model.model.diffusion_model) for name in SMALL_FAMILIES}
    known = {name for family in FAMILIES for name in family.networks}
    assert measured <= known
    assert {family.name for family in FAMILIES} == {
        family_of(small_model(name).model.model.diffusion_model).name for name in SMALL_FAMILIES
    }
    # Relatives that differ from a measured network in what lies outside their attention.
    assert known - measured == {
        "comfy.ldm.chroma_radiance.model.ChromaRadiance", "comfy.ldm.anima.model.Anima",
        "comfy.ldm.lumina.model.NextDiTPixelSpace", "comfy.ldm.cascade.stage_b.StageB",
    }


def table_rows():
    """The support table as it has to stand in the help page: from the families, and from runs of their small models."""
    works, rows = {}, []
    for name in SMALL_FAMILIES:
        small = small_model(name)
        patched = patch_attention(small.model, torch.ones(1, *small.size), AttentionSettings(STRENGTH))
        changed = not close(sample(small, patched, steps=2), sample(small, steps=2))
        family = family_of(small.model.model.diffusion_model)
        works[family.name] = works.get(family.name, True) and changed
    for family in FAMILIES:
        kinds = ", ".join(f"`{kind}`" if kind else "numbers" for kind in family.numbered) or "all only"
        rows.append(f"| {family.name} | {'yes' if works[family.name] else 'no'} | {family.hook} | {kinds} |")
    return rows + [f"| {name} | no: it calls no hook | | |" for name in NO_HOOK.values()]


def test_the_help_pages_table_is_what_was_measured():
    """Run with -s to see the table to paste."""
    page = (ROOT / "web" / "docs" / "FAMAttentionPatch.md").read_text(encoding="utf-8")
    rows = table_rows()
    print("\n".join(rows))
    found = re.findall(r"^\| (?!family|---).*\| (?:yes|no)\b.*\|$", page, re.M)
    assert found == rows


@pytest.mark.parametrize("name", NO_HOOK)
def test_networks_without_hook_call_none(name):
    """Their code hands no transformer_options to attention, so no override can be called; and they call no patch."""
    try:
        module = importlib.import_module(name.rpartition(".")[0])
    except ModuleNotFoundError:
        not_in_this_release(f"has no {name}")
    assert hasattr(module, name.rpartition(".")[2])
    folder = pathlib.Path(module.__file__).parent
    calls = [
        call for path in folder.glob("*.py") if "vae" not in path.name
        for call in re.findall(r"optimized_attention\w*\([^#]*?\)\s*$", path.read_text(encoding="utf-8"), re.M | re.S)
    ]
    assert calls and not [call for call in calls if "transformer_options" in call.split("\n\n")[0][:400]]
    assert not [path for path in folder.glob("*.py") if "attn1_patch" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("small", ["lumina2", "sd3", "wan"], indirect=True)
def test_another_attention_may_come_before_the_patch_or_after_it(small):
    """As nodes for SageAttention set theirs: over whatever was there."""
    def other(model):
        replaced = model.clone()
        replaced.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: func(*args, **kwargs)
        return replaced

    def patched(model):
        return patch_attention(model, maps(small), AttentionSettings(STRENGTH))

    latent = small.latent(2)
    bare, before, after = (sample(small, model, latent) for model in (small.model, patched(other(small.model)), other(patched(small.model))))
    assert torch.equal(before, after) and not close(after, bare)
