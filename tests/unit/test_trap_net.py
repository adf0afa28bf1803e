"""The default detector's network: its arithmetic, what its maps mean, when it judges, and that it is worth having."""

import math

import artifact_guard
import pytest
import torch
from artifact_guard.kernels import local_net as local_net_module
from artifact_guard.kernels.local_net import CLIP, DILATIONS, local_net
from artifact_guard.kernels.score_dynamics import change_maps
from artifact_guard.nodes.asced import learned
from artifact_guard.nodes.asced.dynamics import DynamicsDetector
from artifact_guard.nodes.asced.estimate import Estimate
from artifact_guard.nodes.asced.learned import LearnedDetector, trap_net
from artifact_guard.nodes.asced.options import AscedOptions
from artifact_guard.nodes.asced.signals import EDGES, LATE, LATE_FALL, NAMES, grid_of, scaled_to

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


def watched(kind, steps, ratios=RATIOS, valid=None, sensitivity=1.0, travel=None):
    """A detector that has seen these steps."""
    detector = kind(AscedOptions(), sensitivity, min(steps[0].shape[-2:]), travel)
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


def test_network_in_double_precision_as_on_a_gpu(monkeypatch):
    """The same logits, in float32; and no setting of the process is asked for or changed, whoever has changed it how."""
    weights = trap_net(torch.device("cpu"))
    maps = 2 * torch.randn(2, len(NAMES), 17, 30, generator=torch.Generator().manual_seed(1))
    single = local_net(weights, maps)
    monkeypatch.setattr(local_net_module, "DOUBLE_DEVICES", ("cpu",))
    double = local_net(weights, maps)
    assert double.dtype == torch.float32 and not torch.equal(double, single)
    torch.testing.assert_close(double, single)
    settings = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(settings, "fp32_precision"):
        return
    before, settings.fp32_precision = settings.fp32_precision, "ieee"  # from then on the older way to ask raises
    try:
        for devices in (("cpu",), ()):
            monkeypatch.setattr(local_net_module, "DOUBLE_DEVICES", devices)
            assert torch.isfinite(local_net(weights, maps)).all()
    finally:
        settings.fp32_precision = before
    assert settings.fp32_precision == before


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


def test_kept_parts_are_not_judged():
    """Inpainting: D is the picture from the start where it is kept. A trap beside that is found, and nothing in what is kept."""
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :, 22:] = False
    steps = path(trap_at=5)
    steps = [torch.where(valid[:, None], step, steps[-1]) for step in steps]
    found = watched(LearnedDetector, steps, valid=valid).findings()
    truth = torch.zeros(2, 32, 32, dtype=torch.bool)
    truth[0, 10:18, 12:20] = True
    assert (found.regions & truth).sum() > 0.8 * truth.sum() and (found.regions & ~truth).sum() < 0.3 * truth.sum()
    assert found.peak[~valid].max() == 0


def test_what_is_kept_does_not_count():
    """Means over a frame leave it out: the maps of what changes are those of the same frame without more kept beside it."""
    steps = path(trap_at=5)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :, 20:] = False
    steps = [torch.where(valid[:, None], step, steps[-1]) for step in steps]
    pad = torch.nn.functional.pad
    wide = [pad(step, (0, 12, 0, 0), mode="replicate") for step in steps]
    maps = watched(LearnedDetector, steps, valid=valid).maps()
    other = watched(LearnedDetector, wide, valid=pad(valid, (0, 12))).maps()
    torch.testing.assert_close(other[..., :20], maps[..., :20])
    assert NAMES[-2:] == ("kept", "began") and (maps[:, -2, :, 20:] == 1).all() and (maps[:, -2, :, :20] == 0).all()


def test_sensitivity_scales_the_score():
    low, high = (watched(LearnedDetector, path(trap_at=5), sensitivity=s).findings().peak for s in (0.5, 2.0))
    torch.testing.assert_close(high, 4 * low)


@pytest.mark.parametrize("ratios", [[3 * r for r in RATIOS], [14.0, 5.0, 1.7]])
def test_parts_of_a_window_are_left_to_the_rule(ratios, monkeypatch):
    """A window that ends early, too few steps: as without the network, which is not asked."""
    monkeypatch.setattr(learned, "local_net", None)
    steps = path(trap_at=5)[-len(ratios):]
    ours, rule = (watched(kind, steps, ratios).findings() for kind in (LearnedDetector, DynamicsDetector))
    assert all(torch.equal(one, other) for one, other in zip(ours[:3], rule[:3]))


LATER = [r / 4 for r in RATIOS]
FROM_PICTURES = (1003, 1004, 1015)


def test_late_window_of_a_run_that_began_before():
    """A second round, or a window that the user set late: how far each pixel had come before makes no difference to the maps."""
    come = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(5))
    late, known = (watched(LearnedDetector, path(trap_at=5), LATER, travel=travel).maps() for travel in (None, come))
    travel = NAMES.index("travel")
    rest = [n for n, name in enumerate(NAMES) if name not in ("travel", "burst", "when")]
    torch.testing.assert_close(known[:, travel], late[:, travel], atol=1e-3, rtol=1e-3)
    assert torch.equal(known[:, rest], late[:, rest])


def test_runs_that_enter_late_are_seen_on_a_scale_of_their_own():
    """All noise ratios a quarter as high: the trap is found as in a whole run, and a clean run left alone. What the maps call by
    noise ratios lies at the same places of the window."""
    found, clean = (watched(LearnedDetector, path(trap_at=at), LATER).findings() for at in (5, None))
    truth = torch.zeros(2, 32, 32, dtype=torch.bool)
    truth[0, 10:18, 12:20] = True
    assert (found.regions & truth).sum() > 0.6 * truth.sum() and not clean.regions.any()
    late = [math.exp(x) for x in scaled_to(math.log(3.5), EDGES)]
    assert late[0] == pytest.approx(3.5) and late[-1] == pytest.approx(EDGES[-1])
    places = [[math.log(x / edges[-1]) / math.log(edges[0] / edges[-1]) for x in edges] for edges in (EDGES, late)]
    assert places[0] == pytest.approx(places[1])
    assert math.exp(scaled_to(0.0, EDGES)[-1]) == pytest.approx(1 / LATE_FALL)
    assert scaled_to(math.log(LATE), EDGES) == pytest.approx([math.log(x) for x in EDGES])


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
    batch = {"maps": maps.half(), "truth": truth, "stood": truth, "what": "scripted", "set": "shapes", "new": False}
    weights = fit([batch], steps=120, width=8)
    assert set(weights) == set(trap_net(torch.device("cpu")))

    def right(weights):
        return ((local_net(weights, maps) > 0) == truth).float().mean()

    assert right(weights) > 0.97
    more = fit([batch | {"new": True}], steps=3, rate=1e-4, start=weights)  # goes on, and leaves what it starts from as it is
    assert right(more) > 0.97 and not torch.equal(more["out.weight"], weights["out.weight"]) and not weights["out.weight"].requires_grad


@pytest.mark.parametrize("trap_at", [3, 4, 5])
def test_onset_and_what_was_there_before_it(trap_at):
    """A square jumps between two steps: its onset is the first of them, and what was there before it the estimate of that step."""
    steps = path(trap_at=trap_at)
    findings = watched(LearnedDetector, steps).findings()
    square = (slice(11, 17), slice(13, 19))
    assert (findings.onset[(0, *square)] == torch.tensor(RATIOS[trap_at - 1])).all()
    where = (0, slice(None), *square)
    torch.testing.assert_close(findings.before[where].float(), steps[trap_at - 1][where], atol=2e-3, rtol=0)
    assert findings.likely[(0, *square)].any()


@pytest.fixture
def demo_run(monkeypatch):
    """The benchmark's runs of the demo model, of half as many pictures each."""
    from tests.bench import trap_runs

    monkeypatch.setattr(trap_runs, "BATCH", 16)
    return trap_runs.demo_run


def test_demo_model(demo_run):
    """A trained network that the fit did not know: traps planted in its estimates are found, its clean runs left alone, and
    better than by the rule alone."""
    from tests.bench.detection import Score
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


def test_demo_model_from_pictures(demo_run):
    """The same in image to image and inpainting: from pictures of its own, at strengths, samplers and masks drawn."""
    from tests.bench.detection import Score
    from tests.bench.trap_runs import watched as watched_run
    from tests.exact.model import sample

    demo = artifact_guard.nodes.demo.model
    model, _ = demo.load_demo_model()
    labels = torch.arange(10)
    asked = [[torch.cat([demo.class_token(int(label)) for label in labels]), {}]]
    with torch.inference_mode():
        photos = sample(model, steps=10, cfg=2.5, seed=3, latent=(10, 3, 32, 32), positive=asked, negative=[[demo.class_token(None), {}]])
    scores = {kind: (Score(), Score()) for kind in (LearnedDetector, DynamicsDetector)}
    entries = set()
    for number in FROM_PICTURES:
        run = demo_run(number, demo, (photos, labels))
        entries.add(run["entry"])
        for kind, (trapped, clean) in scores.items():
            found = watched_run(kind, run["estimates"], run["ratios"], run["valid"]).findings().regions
            (trapped if run["what"] == "scripted" else clean).add(found, run["truth"])
    (trapped, clean), (rule_trapped, rule_clean) = scores.values()
    assert entries == {"image to image", "inpainting"}
    assert trapped.f1 > 0.7 and trapped.f1 > rule_trapped.f1 + 0.1
    assert clean.right >= 0.95 and clean.right >= rule_clean.right
