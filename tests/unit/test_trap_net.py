"""The default detector's network: its arithmetic, what its maps mean, when it judges, and that it is worth having."""

import artifact_guard
import pytest
import torch
from artifact_guard.kernels.local_net import CLIP, DILATIONS, local_net
from artifact_guard.kernels.score_dynamics import change_maps
from artifact_guard.nodes.asced import learned
from artifact_guard.nodes.asced.dynamics import DynamicsDetector
from artifact_guard.nodes.asced.estimate import Estimate
from artifact_guard.nodes.asced.learned import LearnedDetector, trap_net
from artifact_guard.nodes.asced.options import AscedOptions
from artifact_guard.nodes.asced.signals import NAMES, grid_of

RATIOS = [14.0, 11.0, 8.5, 6.6, 5.1, 4.0, 3.1, 2.4, 1.9]


def path(trap_at=None, channels=3, size=(32, 32), frames=2, seed=0):
    """Estimates of a run whose picture comes out evenly; at one step a square of frame 0 jumps and then freezes."""
    random = torch.Generator().manual_seed(seed)
    picture = torch.nn.functional.interpolate(torch.randn(frames, channels, 4, 4, generator=random), size, mode="bicubic")
    fog = torch.nn.functional.interpolate(torch.randn(frames, channels, 8, 8, generator=random), size, mode="bicubic")
    steps = [picture * (1 - 0.75**n) + 0.1 * 0.75**n * fog for n in range(len(RATIOS))]
    if trap_at is not None:
        square = (0, slice(None), slice(10, 18), slice(12, 20))
        for step in steps[trap_at:]:
            step[square] = steps[trap_at - 1][square] + 0.8
    return steps


def watched(kind, steps, ratios=RATIOS, valid=None, sensitivity=1.0):
    """A detector that has seen these steps."""
    detector = kind(AscedOptions(), sensitivity, min(steps[0].shape[-2:]))
    seen = [Estimate(x, x, 1.0, ratio) for x, ratio in zip(steps, ratios)]
    for previous, now in zip(seen, seen[1:]):
        detector.observe(previous, now, valid)
        detector.accompany(change_maps(now.denoised, previous.denoised)[1])
    return detector


def test_network_is_what_its_formula_says():
    """Against torch's own layers, and not by one output alone: the shipped weights on maps drawn at random."""
    weights = trap_net(torch.device("cpu"))
    maps = 2 * torch.randn(2, len(NAMES), 17, 30, generator=torch.Generator().manual_seed(1))

    def layer(name, kind, *arguments, **named):
        made = kind(*arguments, **named)
        made.load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
        return made

    width = len(weights["inp.bias"])
    x = (maps - weights["mean"].view(1, -1, 1, 1)) / weights["std"].view(1, -1, 1, 1)
    with torch.no_grad():
        x = layer("inp", torch.nn.Conv2d, len(NAMES), width, 1)(x.clamp(-CLIP, CLIP)).relu()
        for k, dilation in enumerate(DILATIONS):
            if k == 1:
                x = x + layer("ctx", torch.nn.Linear, width, width)(x.mean((2, 3)))[:, :, None, None]
            x = x + layer(f"cs.{k}", torch.nn.Conv2d, width, width, 3, padding=dilation, dilation=dilation)(x).relu()
        torch.testing.assert_close(local_net(weights, maps), layer("out", torch.nn.Conv2d, width, 1, 1)(x)[:, 0])


@pytest.mark.parametrize("change", ["scale", "channels", "size", "order"])
def test_maps_mean_the_same_in_every_latent_space(change):
    """Ten times the values, every channel four times, four times the size, or the frames turned round: the same maps."""
    steps = path(trap_at=4)
    changed = {
        "scale": lambda x: 10 * x,
        "channels": lambda x: x.repeat(1, 4, 1, 1),
        "size": lambda x: x.repeat_interleave(4, -1).repeat_interleave(4, -2),
        "order": lambda x: x.flip(0),
    }[change]
    maps, other = (watched(LearnedDetector, [f(x) for x in steps]).maps() for f in (lambda x: x, changed))
    maps = maps.flip(0) if change == "order" else maps
    assert maps.shape == (2, len(NAMES), 32, 32)
    apart = (other - maps).abs() > 1e-3
    assert apart.float().mean() < 1e-2, "more than the pixels in which two steps' bursts are equally strong"


def test_grid():
    assert grid_of((17, 30)) == (17, 30) and grid_of((64, 96)) == (32, 48) and grid_of((256, 40)) == (205, 32)


def test_the_trap_is_found_and_only_there():
    """The square of frame 0 to a pixel, nothing in frame 1, nothing in a run without it."""
    found = watched(LearnedDetector, path(trap_at=5)).findings()
    truth = torch.zeros(2, 32, 32, dtype=torch.bool)
    truth[0, 10:18, 12:20] = True
    assert (found.regions & truth).sum() > 0.8 * truth.sum() and (found.regions & ~truth).sum() < 0.3 * truth.sum()
    assert (found.onset[found.regions] > 1.6).all()
    assert not watched(LearnedDetector, path()).findings().regions.any()


def test_kept_parts_are_left_to_the_rule(monkeypatch):
    """Inpainting: the network, fitted on whole pictures, is not asked."""
    monkeypatch.setattr(learned, "local_net", None)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :, 10:] = False
    ours, rule = (watched(kind, path(trap_at=5), valid=valid).findings() for kind in (LearnedDetector, DynamicsDetector))
    assert torch.equal(ours.peak, rule.peak) and ours.peak[~valid].max() == 0


def test_sensitivity_scales_the_score():
    low, high = (watched(LearnedDetector, path(trap_at=5), sensitivity=s).findings().peak for s in (0.5, 2.0))
    torch.testing.assert_close(high, 4 * low)


@pytest.mark.parametrize("ratios", [[r / 3 for r in RATIOS], [3 * r for r in RATIOS], [14.0, 5.0, 1.7]])
def test_parts_of_a_window_are_left_to_the_rule(ratios, monkeypatch):
    """A run that enters late, a window that ends early, too few steps: as without the network, which is not asked."""
    monkeypatch.setattr(learned, "local_net", None)
    steps = path(trap_at=5)[-len(ratios):]
    ours, rule = (watched(kind, steps, ratios).findings() for kind in (LearnedDetector, DynamicsDetector))
    assert all(torch.equal(one, other) for one, other in zip(ours[:3], rule[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(17, 30), (8, 8), (96, 64)])
def test_maps_are_finite(dtype, size):
    """Odd and small sizes, a frame that never moves, low precision."""
    steps = [x.to(dtype) for x in path(size=size, channels=16)]
    for step in steps:
        step[1] = 0.5
    maps = watched(LearnedDetector, steps).maps()
    assert maps.isfinite().all() and maps.shape[-2:] == grid_of(size)


def test_fit_learns_where_traps_lie():
    """A made-up mark in one map: the fitted network tells it from the rest; weights have the shipped ones' names."""
    from tests.bench.train_trap_net import fit

    random = torch.Generator().manual_seed(3)
    maps = torch.randn(24, len(NAMES), 16, 16, generator=random)
    truth = torch.zeros(24, 16, 16, dtype=torch.bool)
    truth[:12, 4:9, 5:11] = True
    maps[:, 2] += 3.0 * truth
    batch = {"maps": maps.half(), "truth": truth, "stood": truth, "what": "scripted", "set": "shapes"}
    weights = fit([batch], steps=120, width=8)
    assert set(weights) == set(trap_net(torch.device("cpu")))
    logit = local_net(weights, maps)
    assert ((logit > 0) == truth).float().mean() > 0.97


def test_demo_model():
    """A trained network that the fit did not know: traps planted in its estimates are found, its clean runs left alone, and
    better than by the rule alone."""
    from tests.bench.detection import Score
    from tests.bench.trap_runs import demo_run
    from tests.bench.trap_runs import watched as watched_run

    scores = {kind: (Score(), Score()) for kind in (LearnedDetector, DynamicsDetector)}
    for number in (100, 101):
        run = demo_run(number, artifact_guard.nodes.demo.model)
        for kind, (trapped, clean) in scores.items():
            found = watched_run(kind, run["estimates"], run["ratios"]).findings().regions
            (trapped if run["what"] == "scripted" else clean).add(found, run["truth"])
    (trapped, clean), (rule_trapped, rule_clean) = scores.values()
    assert trapped.f1 > 0.85 and trapped.f1 > rule_trapped.f1
    assert clean.right >= 0.93 and clean.right > rule_clean.right
    assert clean.false < 0.005 * clean.pixels
