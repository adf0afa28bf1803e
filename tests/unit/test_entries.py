"""How the runs begin from which the detector's network learns image to image, inpainting and second samplers."""

import math
import random

import pytest
import torch

from tests.bench.entries import Entry, drawn_entry, handed_over, within
from tests.bench.trap_runs import HANDED, PARTIAL, auto_window, entered, record
from tests.exact.images import shape_images
from tests.exact.model import exact_model
from tests.exact.wide_traps import JUMP, wide_traps

SAMPLING = {"steps": 25, "sampler_name": "euler", "scheduler": "normal"}


@pytest.fixture(scope="module")
def images():
    return shape_images(60, 32, seed=3)


def planted(count=32):
    return [wide.trap for wide in wide_traps("scripted", 5, (32, 32), count)]


def test_pictures_and_masks(images):
    """Both kinds come; a mask redraws a part of each sample, the trap's place in it; the same number draws the same again."""
    traps, kinds = planted(), set()
    for number in range(12):
        entry, again = (drawn_entry(random.Random(number), images, 32, number, traps) for _ in range(2))
        kinds.add(entry.kind)
        assert torch.equal(entry.latent, again.latent) and entry.latent.shape == (32, 3, 32, 32)
        if entry.kind == "image to image":
            assert 0.4 <= entry.denoise <= 0.95
            continue
        share = entry.noise_mask.mean((1, 2, 3))
        assert entry.noise_mask.shape == (32, 1, 32, 32) and 0.04 < share.min() and share.max() < 0.75
        assert all((mask[0] > 0)[trap.mask[0]].any() for mask, trap in zip(entry.noise_mask, traps))
        assert torch.equal(entry.noise_mask, again.noise_mask)
    assert kinds == {"image to image", "inpainting"}
    assert Entry(torch.zeros(1, 3, 8, 8)).kind == "whole"


def test_traps_are_moved_into_a_late_window():
    """The widest span of first jumps lies between four tenths of the window and nearly all of it; the rest keeps its proportions."""
    for trap in planted():
        moved = within(trap, 3.0, 1.2)
        first, last = 1.2 * (3.0 / 1.2) ** 0.93, 1.2 * (3.0 / 1.2) ** 0.4
        assert last * 0.9 <= moved.at[0] <= first + 1e-6 and moved.release < moved.at[-1]
        assert len(moved.at) == len(trap.at) and moved.amplitude == trap.amplitude
        place = math.log(trap.at[0] / JUMP[0]) / math.log(JUMP[1] / JUMP[0])
        assert math.log(moved.at[0] / last) / math.log(first / last) == pytest.approx(place)
    attractor = wide_traps("attractor", 5, (32, 32), 1)[0].trap
    assert within(attractor, 3.0, 1.2) is attractor


def test_a_run_that_is_handed_over_is_seen_from_there_on(images):
    """The estimates begin where the second sampler would; at least five steps are left, and the window lies in them."""
    ratios = [20.0 * 0.75**n for n in range(25)]
    for seed in range(20):
        entry = handed_over(random.Random(seed), torch.zeros(1), ratios)
        assert entry.kind == "second sampler" and ratios[entry.first] < 8.0 and len(ratios) - entry.first >= 5
    bare = exact_model(images)
    entry, traps = entered(random.Random(1), HANDED, images, planted(), bare, SAMPLING)
    whole = record(bare, 7, SAMPLING, Entry(entry.latent))
    run = record(bare, 7, SAMPLING, entry)
    assert run["ratios"] == whole["ratios"][entry.first :]
    assert torch.equal(run["estimates"][0], whole["estimates"][entry.first])
    window = auto_window(run["ratios"])
    assert all(run["ratios"][window.correct_at] < trap.at[0] < run["ratios"][0] for trap in traps)


def test_whole_runs_are_left_as_they_are(images):
    traps = planted()
    entry, same = entered(random.Random(1), PARTIAL - 1, images, traps, exact_model(images), SAMPLING)
    assert entry.kind == "whole" and same is traps and entry.latent.shape == (32, 3, 32, 32)
