"""The attention patch beside other patches, in part of the schedule, in some of the blocks, and after an error."""

import pytest
import torch
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel

from tests.small_models import not_in_this_release, sample, small_model
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
])
def test_blocks_that_are_not_there(family, blocks, words):
    small = small_model(family)
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
