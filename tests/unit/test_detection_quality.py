"""Small, seeded forms of the benchmarks: what the default finds on planted traps and leaves alone on clean runs."""

import artifact_guard
import pytest
import torch

from tests.bench.detection import Score
from tests.bench.exact_runs import BATCH, guarded_run, hand_made_rule, trapped_batch
from tests.exact.denoiser import ExactDenoiser
from tests.exact.images import shape_images
from tests.exact.local import LocalDenoiser
from tests.exact.model import exact_model

options = artifact_guard.nodes.asced.options
LOOK = options.GuardSettings(mode="detect only")


@pytest.fixture(scope="module")
def images():
    return shape_images(600, 32, seed=23)


def looked_at(images, kind, settings=LOOK, **traps):
    planted, truth = trapped_batch("scripted", "held out", 11, images, **traps) if traps else ([], torch.zeros(BATCH, 32, 32).bool())
    score = Score()
    score.add(guarded_run(artifact_guard, exact_model(images, kind, traps=planted), settings, 11).record.regions, truth)
    return score


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_planted_traps_are_found_and_clean_runs_left_alone(images, kind):
    """Traps of the held-out family; the published rule on the same runs is far from it, on traps and on clean runs."""
    published = options.GuardSettings(mode="detect only", options=options.AscedOptions(detector="clean estimate"))
    clean, strong = looked_at(images, kind), looked_at(images, kind, amplitude=0.8)
    assert strong.f1 > 0.85 and strong.right > 0.9
    assert clean.false <= 0.005 * clean.pixels and clean.right >= 0.9
    assert looked_at(images, kind, published, amplitude=0.8).f1 < strong.f1 - 0.2
    assert looked_at(images, kind, published).false > 5 * max(clean.false, 50)


def test_denoisers_that_invent_are_left_alone_too(images):
    """Patch by patch, as trained networks work: traps are found, and clean runs left alone, of which the rule flags some."""
    def found(traps, seed):
        model = exact_model(images, "flow", traps=traps, denoiser=LocalDenoiser(images[:200], reach=5.0))
        return guarded_run(artifact_guard, model, LOOK, seed, steps=20).record.regions

    planted, truth = trapped_batch("scripted", "held out", 12, images, amplitude=0.6)
    trapped, clean, rule = Score(), Score(), Score()
    trapped.add(found(planted, 12), truth)
    clean.add(found([], 13), torch.zeros_like(truth))
    with hand_made_rule(artifact_guard):
        rule.add(found([], 13), torch.zeros_like(truth))
    assert trapped.f1 > 0.85
    assert clean.right >= 0.9 and clean.right > rule.right + 0.1


def test_sensitivity_finds_more(images):
    """Weak traps: what a higher sensitivity hits grows."""
    hits = [
        looked_at(images, "flow", options.GuardSettings(mode="detect only", sensitivity=s), amplitude=0.2).hit
        for s in (0.5, 1.0, 2.0)
    ]
    assert hits[0] < hits[1] < hits[2]


def test_regions_renoised_from_their_surroundings_escape(images):
    """Attractor traps of weight 0.1 with the true masks: most escape, few do with the published form."""
    from tests.bench.repair import Batch, guarded

    denoiser = ExactDenoiser(images, 0.05)
    clean = torch.cat([guarded_run(artifact_guard, exact_model(images), LOOK, 900 + s).result for s in range(4)])
    counts = {}
    for seed in (1, 2):
        batch = Batch(artifact_guard, images, "eps", seed, denoiser, clean)
        for correction in ("surroundings", "targeted"):
            settings = options.GuardSettings(options=options.AscedOptions(correction=correction))
            good = batch.sound(guarded(artifact_guard, batch, settings, seed, True).result)
            tally = counts.setdefault(correction, [0, 0])
            tally[0] += int((good & batch.fallen).sum())
            tally[1] += int(batch.fallen.sum())
    repaired, fallen = counts["surroundings"]
    assert fallen >= 5 and repaired >= 0.8 * fallen
    assert counts["targeted"][0] < 0.5 * fallen
