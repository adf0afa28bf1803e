"""The report's pictures: what is drawn where, at which size, and what is refused."""

import math

import comfy.latent_formats as latent_formats
import pytest
import torch
from artifact_guard.nodes.asced.detector import Findings
from artifact_guard.nodes.asced.options import GuardSettings
from artifact_guard.nodes.asced.pictures import draw_curves, draw_overlay, phase_bands
from artifact_guard.nodes.asced.report import RunRecord
from artifact_guard.nodes.asced.window import Window, estimate_phases
from artifact_guard.nodes.demo.model import PixelLatent
from artifact_guard.nodes.latents import FrameLayout
from artifact_guard.nodes.plots import BACKGROUND, LINE_COLOURS, REGION_COLOUR, Panel, draw_chart, draw_regions


def has_colour(picture: torch.Tensor, colour: tuple[int, int, int]) -> bool:
    return bool((picture * 255 - torch.tensor(colour)).abs().amax(dim=-1).lt(1).any())


def test_chart_draws_every_line_and_leaves_out_what_is_not_finite():
    picture = draw_chart([Panel("t", {"a": [0.0, 1.0, math.nan, 2.0], "b": [2.0, 1.0, 1.0, 0.0]}, ["1", "2", "3", "4"])])
    assert picture.shape == (1, 260, 768, 3) and picture.min() >= 0 and picture.max() <= 1
    assert has_colour(picture, LINE_COLOURS[0]) and has_colour(picture, LINE_COLOURS[1])
    empty = draw_chart([Panel("t", {"a": [math.nan, math.inf]}, ["1", "2"])])
    plot = empty[:, 40:, 70:]  # without the title and the key
    assert has_colour(empty, LINE_COLOURS[0]) and not has_colour(plot, LINE_COLOURS[0])


@pytest.mark.parametrize("values", [[], [3.0], [5.0, 5.0], [-2.0, -1.0]])
def test_chart_of_few_or_equal_values_can_be_drawn(values):
    picture = draw_chart([Panel("t", {"a": values}, [str(v) for v in values])] * 2)
    assert picture.shape == (1, 520, 768, 3) and has_colour(picture, BACKGROUND)


def test_regions_are_tinted_outlined_and_the_rest_is_left():
    image = torch.full((1, 32, 32, 3), 0.5)
    mask = torch.zeros(2, 32, 32)
    mask[0, 8:16, 8:16] = 1
    drawn = draw_regions(image, mask)
    assert drawn.shape == (2, 256, 256, 3)
    assert torch.equal(drawn[1], torch.full((256, 256, 3), 0.5))
    tint = 0.7 * 0.5 + 0.3 * torch.tensor(REGION_COLOUR)
    assert torch.allclose(drawn[0, 96, 96], tint) and torch.allclose(drawn[0, 4, 4], torch.full((3,), 0.5))
    assert torch.allclose(drawn[0, 63, 96], torch.tensor(REGION_COLOUR)), "the outline lies around the region"


def test_large_and_rgba_images_keep_their_size_and_lose_alpha():
    assert draw_regions(torch.rand(1, 300, 520, 4), torch.zeros(1, 30, 52)).shape == (1, 300, 520, 3)


def test_long_latents_stay_within_bounds():
    """A minute or two of audio, and a strip whose shorter side would be enlarged 128 times; its regions outlined as ever."""
    assert [draw_regions(torch.rand(1, *size, 3), torch.zeros(1, *size)).shape[1:3] for size in ((16, 1291), (2, 128))] == [(48, 3873), (64, 4096)]
    mask = torch.zeros(1, 2, 128)
    mask[0, 0, 5] = 1.0
    drawn = draw_regions(torch.zeros(1, 2, 128, 3), mask)[0]
    outline = (drawn == torch.tensor(REGION_COLOUR)).all(dim=-1)
    assert outline.sum() == outline[:40, 152:200].sum() == 40 * 48 - 32 * 32


SPEEDS = [1.0, 4.0, 3.0, 1.0, 1.0]


def record_of_a_run(batch: int = 2) -> RunRecord:
    """A run whose mean speed over ln(b / a) is SPEEDS; in a square of the first sample it is three times as fast."""
    record = RunRecord(GuardSettings(), FrameLayout.of([(batch, 3, 32, 32)]), PixelLatent())
    record.plan(Window(1, 3), [9.0, 6.0, 4.0, 3.0, 1.0, 0.5])
    square = torch.zeros(batch, 32, 32, dtype=torch.bool)
    square[0, 4:8, 4:8] = True
    for ratio, level in zip(record.ratios[1:], SPEEDS):
        record.add_speed(ratio, 2.0, level * torch.where(square, 3.0, 1.0))
    record.add_findings(Findings(square, square * 2.5, square * 4.0, suspected=True))
    record.add_repair(square, None)
    record.close(torch.zeros(batch, 3, 32, 32))
    return record


def test_speeds_are_means_inside_and_outside_of_the_regions():
    inside, outside = record_of_a_run().speeds()
    assert torch.allclose(inside, 3 * torch.tensor(SPEEDS)) and torch.allclose(outside, torch.tensor(SPEEDS))
    nothing = record_of_a_run()
    nothing.regions = torch.zeros_like(nothing.regions)
    inside, outside = nothing.speeds()
    assert inside.isnan().all() and outside.isfinite().all()


def test_phases_are_those_of_the_run():
    # Half of the top speed, 2, is passed after the first value and before the fourth.
    assert phase_bands(record_of_a_run()) == [
        ("Profiling", 0.0, 1.0), ("Mutation", 1.0, 3.0), ("Refinement", 3.0, 4.0)
    ]
    assert estimate_phases([9.0, 1.0, 4.0], [math.inf, 1.0, 1.0]) == (2, 3), "a step from pure noise has no rate"
    assert estimate_phases([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]) is None


def test_the_summary_tells_of_every_region():
    record = record_of_a_run()
    described = record.summary()["images"][0]
    assert described["phases"] == {"mutation_from": 4.0, "refinement_from": 1.0}
    (region,) = described["regions"]
    assert region["area"] == 16 / 1024 and region["peak"] == 2.5 and region["outcome"] == "repaired"
    assert region["onset"] == {"step": 2, "noise_ratio": 4.0}
    record.undone = record.regions
    assert "undone" in record.summary()["images"][0]["regions"][0]["outcome"]
    record.fallen_back = record.regions
    assert "much the same" in record.summary()["images"][0]["regions"][0]["outcome"]
    assert record.summary()["images"][1]["verdict"] == "clean"


def test_curves_and_overlay_of_a_run():
    record = record_of_a_run()
    assert draw_curves(record).shape == (1, 520, 768, 3)
    latent = {"samples": torch.zeros(2, 3, 32, 32)}
    preview = draw_overlay(record, latent, None)
    assert preview.shape == (2, 256, 256, 3)
    assert not torch.equal(preview[0], preview[1])
    assert draw_overlay(record, latent, torch.zeros(1, 64, 64, 3)).shape == (2, 256, 256, 3)
    with pytest.raises(ValueError, match="3 pictures came for a run of 2"):
        draw_overlay(record, latent, torch.zeros(3, 64, 64, 3))
    with pytest.raises(ValueError, match=r"image: a tensor \(2, 64, 64\) came.*not a mask"):
        draw_overlay(record, latent, torch.zeros(2, 64, 64))


def test_a_previews_frames_are_those_of_the_latent():
    """Of a video whose latent frames stand for four frames each: the picture that is marked is that of the frame found."""
    layout = FrameLayout.of([(1, 16, 21, 8, 8)])
    record = RunRecord(GuardSettings(), layout, latent_formats.Wan21())
    where = torch.zeros(21, 8, 8, dtype=torch.bool)
    where[10, 2:5, 2:5] = True
    record.add_findings(Findings(where, where * 2.0, where * 4.0, suspected=True))
    record.close(torch.zeros(1, 16, 21, 8, 8))
    latent = {"samples": torch.zeros(1, 16, 21, 8, 8)}
    marked = draw_overlay(record, latent, None)
    assert len(marked) == 21 and [i for i, picture in enumerate(marked) if not torch.equal(picture, marked[0])] == [10]
    for others in (latent["samples"].repeat(2, 1, 1, 1, 1), latent["samples"][:, :, 9:12]):  # whose they are nobody knows
        shown = draw_overlay(record, {"samples": others}, None)
        assert len(shown) == others[:, 0].shape[:2].numel() and all(torch.equal(picture, marked[0]) for picture in shown)


def test_curves_of_an_unguarded_run_say_so():
    record = RunRecord(GuardSettings(), None, PixelLatent())
    record.refuse("no image part")
    record.close(torch.zeros(1, 3, 64))
    assert draw_curves(record).shape == (1, 260, 768, 3)
    assert record.summary()["reason"] == "no image part"
