"""How many kernels the detectors start on a GPU: small latents cost what it takes to start them."""

import pytest
import torch
from artifact_guard.kernels import dispatch, score_dynamics
from artifact_guard.kernels.kv_scale import scale_pair
from artifact_guard.nodes.asced import published as rule
from artifact_guard.nodes.asced import waiting
from artifact_guard.nodes.asced.detector import NEVER
from artifact_guard.nodes.asced.dynamics import DynamicsDetector
from artifact_guard.nodes.asced.estimate import Estimate
from artifact_guard.nodes.asced.learned import LearnedDetector
from artifact_guard.nodes.asced.options import AscedOptions

from tests.bench.detection_cost import SIDE, WINDOW, trajectories
from tests.bench.starts import STARTS, starts_of
from tests.quality import published

MOST_STARTS = 48
"""For a window of 10 steps, regions and all. 154 were counted before changes were judged together, 71 when four were, 45 since
all of a window are."""

MOST_STARTS_OF_DEFAULT = 400
"""For the same window of the default detector."""


def estimates_of(steps):
    return [Estimate(2 * x, x, 1.0, 8 * 0.85**n) for n, x in enumerate(steps)]


def detector_after(estimates, kind=rule.CleanEstimateDetector, valid=None):
    """A detector that has seen these estimates, and how many changes waited after each."""
    detector, counts = kind(AscedOptions(), 1.0, min(estimates[0].denoised.shape[-2:])), []
    for before, now in zip(estimates, estimates[1:]):
        detector.observe(before, now, valid)
        detector.accompany(score_dynamics.change_maps(now.denoised, before.denoised)[1])
        counts.append(detector.unseen if isinstance(detector, DynamicsDetector) else len(detector.waiting) - 1)
    return detector, counts


def test_published_rule_starts_few_kernels():
    """8 images of 128x128 latents, a window of 10 steps: masks are the numpy rule's, and a GPU has little to start."""
    steps = trajectories(0)
    estimates = estimates_of(steps)
    counted, regions = starts_of(lambda: detector_after(estimates)[0].findings().regions)
    wanted = published.detect(torch.stack(steps).numpy())
    assert len(steps) == WINDOW and wanted.any() and (regions.numpy() == wanted).all()
    forms = ("change_speed", "median_and_mad", "label_regions")
    assert {name: counted[name] for name in forms} == {name: STARTS[name] for name in forms}
    counted["change_maps"] = 0  # detector_after's own
    assert sum(counted.values()) <= MOST_STARTS, counted


def test_default_detector_starts_few_kernels_while_nothing_is_found():
    """The same window of the default detector, up to the host's one question whether there is anything."""
    estimates = estimates_of(trajectories(0))
    detector_after(estimates, LearnedDetector)[0].findings()  # the network's weights are read once a process
    counted, detector = starts_of(lambda: detector_after(estimates, LearnedDetector)[0])
    before = sum(counted.values())
    counted, _ = starts_of(detector.conclude)
    assert (before, counted["median_and_mad"], counted["sample_quantile"]) == (2 * (WINDOW - 1) - 1, 2, 4)
    assert before + sum(counted.values()) <= MOST_STARTS_OF_DEFAULT, counted


@pytest.mark.parametrize(
    "kind", [rule.CleanEstimateDetector, rule.WeightedScoreDetector, DynamicsDetector, LearnedDetector]
)
@pytest.mark.parametrize("masked", [False, True])
def test_waiting_changes_nothing(kind, masked, monkeypatch):
    """Changes judged together give, bit for bit, what they give one by one: scores, onsets and regions."""
    steps = [x[:3, :, :64, :64].clone() for x in trajectories(1)]
    steps[4][1, 0, 5, 5] = torch.nan
    valid = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.8 if masked else None
    estimates = estimates_of(steps)
    alone = detector_after(estimates, kind, valid)[0].findings()
    monkeypatch.setattr(waiting, "ONE_BY_ONE", ())
    together = detector_after(estimates, kind, valid)[0].findings()
    assert alone.suspected and len(alone.onset.unique()) > (1 if issubclass(kind, DynamicsDetector) else 3)
    told = sum(x is not None for x in alone)
    assert told == {DynamicsDetector: 5, LearnedDetector: 7}.get(kind, 4) == sum(x is not None for x in together)
    for one, other in zip(alone, together):
        if one is None:
            assert other is None
            continue
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("together", [False, True])
def test_onset_in_pure_noise(together, monkeypatch):
    """What is abnormal from pure noise on began at the noise ratio inf; what is not abnormal has no onset, nor NaN."""
    steps = [x[:2] for x in trajectories(1)[:5]]
    steps[1][0, :, 20:40, 20:40] += 3.0
    estimates = [Estimate(steps[0], steps[0], 0.0, 1.0), *estimates_of(steps)[1:]]
    if together:
        monkeypatch.setattr(waiting, "ONE_BY_ONE", ())
    onset = detector_after(estimates)[0].findings().onset
    began = torch.isinf(onset)
    assert began[0, 25:35, 25:35].all() and not began.all()
    assert (onset[~began] < 8.0).all() and (onset[~began] == NEVER).any()


@pytest.mark.parametrize("kind", [rule.CleanEstimateDetector, LearnedDetector])
def test_few_changes_wait(kind, monkeypatch):
    """However many steps: a few, fewer of large latents, and none on a CPU."""
    steps = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(30)]
    estimates = estimates_of(steps)
    assert not any(detector_after(estimates, kind)[1])
    monkeypatch.setattr(waiting, "ONE_BY_ONE", ())
    assert max(detector_after(estimates, kind)[1]) == waiting.TOGETHER - 1
    monkeypatch.setattr(waiting, "TOGETHER_VALUES", 2 * steps[0].numel())
    assert max(detector_after(estimates, kind)[1]) == 1


def test_a_limit_that_is_asked_for_is_that_of_the_step(monkeypatch):
    """Score clipping needs each step's limit at once: then nothing waits."""
    estimates = estimates_of([x[:2] for x in trajectories(2)])
    monkeypatch.setattr(waiting, "ONE_BY_ONE", ())
    detector = rule.CleanEstimateDetector(AscedOptions(), 1.0, SIDE)
    for previous, current in zip(estimates, estimates[1:]):
        detector.observe(previous, current, None)
        limit = detector.change_limit(previous, current, None)
        change = rule.change_speed(current.denoised, previous.denoised, detector.blur)
        assert torch.equal(limit, rule.robust_threshold(change, detector.k)) and len(detector.waiting) == 1


def test_every_triton_form_is_counted():
    """Those that no detector starts too: of tensors as large as Flux's keys, for which the Triton form is chosen."""
    assert STARTS.keys() == dispatch.KERNELS.keys()
    keys, amount = torch.ones(1, 1024, 3072), torch.ones(1, 1024)
    counted, (key, _) = starts_of(lambda: scale_pair(keys, value=keys, amount=amount))
    assert counted == {"scale_pair": STARTS["scale_pair"]} and (key == 2).all()
