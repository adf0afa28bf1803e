"""Planted traps do what their docstrings promise, and their truth functions judge rightly."""

import functools
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch

from tests.exact.denoiser import ExactDenoiser
from tests.exact.images import shape_images
from tests.exact.model import Trajectory, conditioning, exact_model, resume, sample
from tests.exact.more_patterns import MORE_PATTERNS
from tests.exact.trap_families import make_traps, one_per_sample
from tests.exact.traps import AttractorTrap, ScriptedTrap, mixture_with_traps
from tests.exact.truth import fell, region_log_likelihood, repaired
from tests.exact.wide_traps import PATTERNS, SHAPES, wide_traps

SIZE, STEPS = 16, 25


@pytest.fixture(scope="module")
def images():
    return shape_images(200, SIZE, 3, seed=5)


def square(top=5, left=5, side=6):
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[:, top:top + side, left:left + side] = True
    return mask


def inside(mask, x):
    return mask[:, None].expand(len(x), x.shape[1], -1, -1)


def sigmas_of(model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


CHECKER = ((torch.arange(SIZE)[:, None] + torch.arange(SIZE)) % 2 * 2.0 - 1.0).expand(1, 3, SIZE, SIZE)


def test_script_by_hand():
    """One pixel, D falls by 1 a step; jump of 0.3 at b/a 4 and 3, a quarter of the motion, released below 2."""
    trap = ScriptedTrap(torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1), 0.6, (4.0, 3.0), motion=0.25, release=2.0)
    anchors, played = [], []
    for ratio, d in ((5.0, 10.0), (4.0, 9.0), (3.5, 8.0), (3.0, 7.0), (2.5, 6.0), (2.0, 5.0), (1.0, 4.0), (4.5, 9.5)):
        played.append(trap.play(torch.full((1, 1, 1, 1), d), torch.full((1, 1), ratio), anchors).item())
    assert played == pytest.approx([10.0, 9.3, 9.05, 9.1, 8.85, 8.6, 7.6, 9.5])
    assert anchors == []  # the last call went back above the first threshold


@pytest.mark.parametrize("sampler, cfg", [("euler", 1.0), ("euler", 3.0), ("heun", 1.0), ("dpmpp_2m", 1.0)])
def test_script_in_a_run(images, sampler, cfg):
    """Bit-equal to the clean run up to the jump, then the jump inside only, then a region that hardly moves."""
    labels, steps = torch.arange(len(images)) % 4, STEPS
    sigmas = sigmas_of(exact_model(images))
    trap = ScriptedTrap(square(), CHECKER, 0.5, (float(sigmas[6]),), motion=0.2, release=float(sigmas[12]))
    model = exact_model(images, traps=[trap], labels=labels)
    traces = []
    for case in (model, exact_model(images, labels=labels), model):
        traces.append(Trajectory())
        sample(case, sampler, "normal", steps, cfg, seed=2, latent=(2, 3, SIZE, SIZE), positive=conditioning(1),
               callback=traces[-1])
    trapped, clean, again = (trace.stack() for trace in traces)
    assert torch.equal(trapped, again) and len(model.model.states) == (1 if cfg == 1.0 else 2)  # each run starts anew
    assert torch.equal(trapped[:6], clean[:6])
    if sampler != "heun":  # heun's second call of step 5 springs the trap, so that x itself differs at step 6
        region = inside(trap.mask, clean[6])
        assert torch.equal(trapped[6][~region], clean[6][~region])
        torch.testing.assert_close(trapped[6] - clean[6], torch.where(region, 0.5 * CHECKER, 0.0), atol=1e-5, rtol=0)
    plain = exact_model(images, labels=labels)
    untouched = torch.stack([plain_estimate(plain, x, s, cfg) for x, s in zip(traces[0].x[6:12], sigmas[6:12])])
    moved, free = (d.diff(dim=0)[:, inside(trap.mask, d[0])].abs().mean() for d in (trapped[6:12], untouched))
    assert moved == pytest.approx(0.2 * float(free), rel=1e-3)


def plain_estimate(model, x, sigma, cfg):
    t = sigma.expand(len(x))
    cond, uncond = (model.model.apply_model(x, t, c_crossattn=conditioning(label)[0][0]) for label in (1, None))
    return uncond + (cond - uncond) * cfg


def test_attractor_is_an_exact_mixture():
    """D' against a mixture of explicitly built components: every clean image, and every image with the garbage in."""
    torch.manual_seed(0)
    data, garbage = torch.rand(5, 1, 2, 3, dtype=torch.float64), torch.full((1, 1, 2, 3), -0.5, dtype=torch.float64)
    mask, h, width, pi = torch.tensor([[[True, True, False], [False, True, False]]]), 0.2, 0.4, 0.3
    trap = AttractorTrap(mask, garbage, pi, width)
    means = torch.cat([data, torch.where(mask[:, None], garbage, data)]).flatten(1)
    widths = torch.full_like(means, h)
    widths[5:, mask.flatten()] = width
    prior = torch.tensor([(1 - pi) / 5] * 5 + [pi / 5] * 5).double()
    for a, b in ((1.0, 0.3), (1.0, 4.0), (0.4, 0.6), (0.0, 1.0)):
        x = torch.randn(3, 1, 2, 3, dtype=torch.float64)
        v = a * a * widths ** 2 + b * b
        log_w = prior.log() - (((x.flatten(1)[:, None] - a * means) ** 2) / (2 * v) + 0.5 * v.log()).sum(2)
        parts = (a * widths ** 2 * x.flatten(1)[:, None] + b * b * means) / v
        expected = (log_w.softmax(1)[..., None] * parts).sum(1).reshape(x.shape)
        ab = (torch.full((3, 1), value, dtype=torch.float64) for value in (a, b))
        torch.testing.assert_close(mixture_with_traps(ExactDenoiser(data, h), [trap], x, *ab), expected)


@pytest.fixture(scope="module")
def attracted(images):
    """64 runs with a garbage square of weight 0.4, and the same seeds without it."""
    trap = AttractorTrap(square(), 0.8 * CHECKER, weight=0.4)
    model, clean_model = exact_model(images, traps=[trap]), exact_model(images)
    shape, traces, results = (64, 3, SIZE, SIZE), [Trajectory(), Trajectory()], []
    for case, trace in zip((model, clean_model), traces):
        results.append(sample(case, steps=STEPS, seed=11, latent=shape, callback=trace))
    denoiser = clean_model.model.denoiser
    return SimpleNamespace(trap=trap, model=model, denoiser=denoiser, result=results[0], clean=results[1],
                           trace=traces[0], clean_trace=traces[1], fell=fell(trap, denoiser, results[0]))


def test_share_of_falls_is_the_weight(attracted):
    """26 of 64 expected; 13 and 38 are 3.2 standard deviations of the binomial away."""
    assert 13 <= int(attracted.fell.sum()) <= 38
    assert not fell(attracted.trap, attracted.denoiser, attracted.clean).any()
    region = inside(attracted.trap.mask, attracted.result)
    distance = (attracted.result - attracted.trap.pattern).masked_fill(~region, 0.0).square().sum((1, 2, 3)).sqrt()
    assert (distance[attracted.fell] / region[0].sum() ** 0.5 < 0.1).all()


def test_repaired_tells_fallen_from_clean(attracted):
    def good(x0):
        return repaired(attracted.denoiser, x0, attracted.trap.mask, attracted.clean)

    assert not good(attracted.result)[attracted.fell].any()
    assert good(attracted.result)[~attracted.fell].float().mean() > 0.9
    assert good(attracted.clean).sum() == 63  # all but the one below their own first percentile
    swapped = torch.where(inside(attracted.trap.mask, attracted.clean), attracted.clean.roll(1, 0), attracted.clean)
    assert good(swapped).sum() <= 3  # another image's region is not a repair
    likely = region_log_likelihood(attracted.denoiser, attracted.clean[:2], attracted.trap.mask)
    keep = 1.0 - inside(attracted.trap.mask, attracted.clean[:2]).flatten(1).double()
    flat = attracted.clean[:2].flatten(1).double()
    outside = attracted.denoiser.log_components(flat, 1.0, 0.1, keep=keep).logsumexp(1)
    torch.testing.assert_close(likely, attracted.denoiser.log_p(attracted.clean[:2], 1.0, 0.1) - outside)


def test_a_fallen_run_stays_and_a_fair_redraw_escapes(attracted):
    sigmas = sigmas_of(attracted.model)
    step = int((sigmas <= 3.0).nonzero()[0])
    x, fallen = attracted.trace.x[step], attracted.fell
    late = int((sigmas <= 0.7).nonzero()[0])
    kept = resume(attracted.model, attracted.trace.x[late], sigmas[late:], "euler_ancestral", seed=5)
    assert torch.equal(fell(attracted.trap, attracted.denoiser, kept), fallen)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    region = inside(attracted.trap.mask, x)
    shares = []
    for x0 in (attracted.clean_trace.denoised[step], attracted.trap.pattern):
        redrawn = torch.where(region, x0 + sigmas[step] * eps, x)
        result = resume(attracted.model, redrawn, sigmas[step:])
        shares.append(float(fell(attracted.trap, attracted.denoiser, result)[fallen].float().mean()))
    assert shares[0] < 0.35 and shares[1] > 0.65  # from the clean run's state; from the garbage itself


@pytest.mark.parametrize("kind", ["scripted", "attractor"])
def test_families(images, kind):
    made = {split: make_traps(kind, split, 3, (32, 32), 24) for split in ("develop", "held out")}
    for traps in made.values():
        areas = torch.cat([trap.mask for trap in traps]).float().mean((1, 2))
        assert areas.min() >= 0.009 and areas.max() <= 0.15 and areas.max() / areas.min() > 4
        if kind == "scripted":
            power = torch.stack([t.pattern[inside(t.mask, t.pattern)].square().mean().sqrt() for t in traps])
            torch.testing.assert_close(power, torch.ones_like(power))
    same = [torch.equal(p.mask, q.mask) and torch.equal(p.pattern, q.pattern)
            for p, q in zip(make_traps(kind, "develop", 3, (32, 32), 24), made["develop"])]
    assert all(same)
    assert not any(torch.equal(p.pattern, q.pattern) for p, q in zip(made["develop"], made["held out"]))


@pytest.mark.parametrize("patterns", [PATTERNS, MORE_PATTERNS], ids=["patterns", "more patterns"])
@pytest.mark.parametrize("kind", ["scripted", "attractor"])
def test_wide_traps(kind, patterns):
    """Of every shape and pattern, as large as asked for, in the data's own unit, and the same for the same seed."""
    make = functools.partial(wide_traps, kind, size=(24, 32), channels=5, unit=2.0, patterns=patterns)
    made = make(seed=3, count=300)
    assert {trap.shape for trap in made} == set(SHAPES) and {trap.pattern for trap in made} == set(patterns)
    areas = torch.stack([trap.trap.mask for trap in made]).flatten(1).sum(1) / (24 * 32)
    assert 0.005 <= areas.min() < 0.015 and 0.1 < areas.max() <= 0.2  # pixels as near as the last belong to it too
    for trap in (t.trap for t in made):
        assert trap.pattern.shape == (1, 5, 24, 32)
        if kind == "scripted":
            assert trap.pattern[inside(trap.mask, trap.pattern)].square().mean().sqrt().item() == pytest.approx(2.0, abs=1e-4)
        else:
            assert trap.pattern.abs().max() <= 2.0 and trap.pattern.abs().max() > 0.05
    again, other = (make(seed=seed, count=2) for seed in (3, 4))
    assert torch.equal(again[1].trap.pattern, made[1].trap.pattern)
    assert not torch.equal(other[0].trap.pattern, made[0].trap.pattern)


@pytest.mark.parametrize("kind", ["scripted", "attractor"])
def test_each_sample_has_its_own_trap(images, kind):
    traps = make_traps(kind, "develop", 1, (SIZE, SIZE), 3, amplitude=0.5)
    x = images[:3] + 2.0 * torch.randn(3, 3, SIZE, SIZE)
    t = torch.full((3,), 2.0)
    together = exact_model(images, traps=one_per_sample(traps)).model.apply_model(x, t)
    alone = [exact_model(images, traps=[trap]).model.apply_model(x[j:j + 1], t[:1]) for j, trap in enumerate(traps)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert (together - exact_model(images).model.apply_model(x, t)).abs().max() > 0.01
    model = exact_model(images, traps=one_per_sample(traps))
    guided = [sample(model, steps=6, cfg=cfg, latent=x.shape) for cfg in (1.0, 2.0)]
    torch.testing.assert_close(*guided, atol=1e-4, rtol=0)  # equal conds: two estimates in one batch, one result
