"""The speeds of a run in bounded memory: few maps until the regions are known, two sums a step from then on."""

import math

import pytest
import torch
from artifact_guard.nodes.asced.guard import guard_model
from artifact_guard.nodes.asced.options import AscedOptions, GuardSettings
from artifact_guard.nodes.asced.speeds import CELLS, MAPS, Speeds
from artifact_guard.nodes.demo.model import class_token, load_demo_model

from tests.bench.speed import sampler_run

FRAMES, SIDE = 2, 4 * CELLS
REGIONS = torch.zeros(FRAMES, SIDE, SIDE, dtype=torch.bool)
REGIONS[0, 8:24, 16:32] = True


def speeds_of(levels, lengths=None, settle_at=None):
    """A run that is three times as fast inside the regions, at these speeds outside."""
    speeds = Speeds()
    for step, level in enumerate(levels):
        if step == settle_at:
            speeds.settle(REGIONS)
        length = 0.1 if lengths is None else lengths[step]
        speeds.add(float(len(levels) - step), length, level * torch.where(REGIONS, 3.0, 1.0))
    return speeds


@pytest.mark.parametrize("steps", [1, MAPS, MAPS + 1, 5 * MAPS])
@pytest.mark.parametrize("settle_at", [None, 0, 1, MAPS + 3])
def test_curves_are_those_of_every_step(steps, settle_at):
    """However many steps share a map, where inside and outside keep their proportion."""
    levels = (1 + torch.rand(steps, generator=torch.Generator().manual_seed(0))).tolist()
    speeds = speeds_of(levels, settle_at=settle_at)
    speeds.close()
    inside, outside = speeds.curves(REGIONS)
    torch.testing.assert_close(inside, 3 * torch.tensor(levels), rtol=2e-3, atol=0)
    torch.testing.assert_close(outside, torch.tensor(levels), rtol=2e-3, atol=0)
    torch.testing.assert_close(torch.tensor(speeds.of_frame(1)), torch.tensor(levels))


def test_few_maps_are_kept():
    """The closest neighbours in ln(b / a) become one; a step from pure noise, infinitely long, stays alone."""
    speeds = speeds_of([1.0] * 3 * MAPS, [math.inf] + [0.01] * MAPS + [0.1] * (2 * MAPS - 1))
    assert len(speeds.stretches) == MAPS and sum(s.steps for s in speeds.stretches) == 3 * MAPS
    assert speeds.stretches[0].steps == 1
    finite = [s.length for s in speeds.stretches[1:]]
    assert max(finite) < 4 * min(finite)
    assert all(s.map.dtype == torch.float16 and s.map.shape == (FRAMES, CELLS, CELLS) for s in speeds.stretches)


def test_after_the_last_round_only_sums_are_kept():
    speeds = speeds_of([1.0] * 10, settle_at=4)
    assert len(speeds.stretches) == 4 and [s.numel() for s in speeds.sums] == [2] * 6


def test_without_regions_only_means_are_kept():
    levels = [1.0, 2.0, 3.0, 4.0]
    speeds = Speeds()
    for step, level in enumerate(levels):
        if step == 2:
            speeds.settle(None)
        speeds.add(1.0, 0.1, torch.full((FRAMES, SIDE, SIDE), level))
    speeds.close()
    assert not speeds.stretches and not speeds.sums
    inside, outside = speeds.curves(torch.zeros_like(REGIONS))
    assert inside.isnan().all() and outside.tolist() == levels == speeds.of_frame(0)


@pytest.mark.parametrize("found", [False, True])
def test_a_guarded_run_settles_when_its_last_round_is_over(found):
    """On sums where something was found, on means where nothing was."""
    model, prompt = load_demo_model()[0], [[class_token(1), {}]]
    options = AscedOptions(detector="clean estimate", min_area=0.0, max_area=1.0, min_width=0.0)
    guarded, report = guard_model(model, GuardSettings(sensitivity=2.0 if found else 0.01, mode="detect only", options=options))
    sampler_run(guarded, torch.zeros(1, 3, 32, 32), prompt, 12, 0)
    record = report.runs[-1]
    speed = record.speed
    assert found == bool(record.regions.any()) and len(speed.ratios) == len(speed.means) == 11
    maps = record.window.correct_at if found else 0
    assert (len(speed.stretches), len(speed.sums)) == (maps, 11 - maps if found else 0)
    inside, outside = record.speeds()
    assert outside.isfinite().all() and inside.isfinite().all() == found


def test_nan_in_one_frame_leaves_the_curves_finite():
    speeds = speeds_of([1.0, 2.0])
    broken = torch.ones(FRAMES, SIDE, SIDE)
    broken[1] = torch.nan
    for step in range(2 * MAPS):
        speeds.add(1.0, 0.1, broken)
    speeds.close()
    assert all(line.isfinite().all() for line in speeds.curves(REGIONS))
