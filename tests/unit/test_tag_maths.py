"""The equations of TAG on the exact denoiser, in closed form and against finite differences."""

import math

import pytest
import torch
from artifact_guard.nodes.tag.alignment import (
    closed_form, level_of, limited, published_gradient, relative_correction, score_correction, shift,
)
from artifact_guard.nodes.tag.answer import Answer
from artifact_guard.nodes.tag.energy import EnergyEstimator
from artifact_guard.nodes.tag.levels import LOG_SNR_RANGE, Schedule, Step, alpha_and_variance, coefficients, log_snr
from artifact_guard.nodes.tag.network_estimator import NetworkEstimator
from artifact_guard.nodes.tag.posterior import Posterior, inner
from artifact_guard.nodes.tag.process import Process

from tests.exact.denoiser import ExactDenoiser
from tests.exact.time_posterior import log_time_posterior, time_linked_score
from tests.unit.tag_support import CPU, KINDS, energy_posterior, images, mean_product, model

GRID = torch.linspace(-5.0, 7.0, 128)
SIGMAS = torch.exp(-0.5 * GRID.double())


def off_manifold(index, extra, count=4, seed=0):
    """u of clean images at level GRID[index], with noise of size `extra` added to it."""
    random = torch.Generator().manual_seed(seed)
    x0 = images()[:count]
    alpha, v = alpha_and_variance(GRID[index])
    u = alpha * x0 + v.sqrt() * torch.randn(x0.shape, generator=random)
    return u + extra * torch.randn(x0.shape, generator=random)


def denoised_at(denoiser, u, index):
    alpha, v = alpha_and_variance(GRID[index].double())
    return denoiser.denoise(u, alpha, v.sqrt()).float()


def compare(estimate, truth):
    """(cosine, length ratio), means over samples."""
    one, other = estimate.flatten(1).double(), truth.flatten(1).double()
    cosine = torch.cosine_similarity(one, other).mean().item()
    return cosine, (one.norm(dim=1) / other.norm(dim=1)).mean().item()


@pytest.mark.parametrize("index", [50, 70, 90])
def test_closed_form_with_the_exact_posterior_is_the_exact_score(index):
    """Theorem 3.3 with the model's one estimate for all levels, where that is good: direction and length."""
    denoiser, u = ExactDenoiser(images(), 0.05), off_manifold(index, 0.2)
    gamma = log_time_posterior(denoiser, u, SIGMAS).exp().float()
    level = GRID[index].expand(len(u))
    estimate = closed_form(u, denoised_at(denoiser, u, index), Step.at(level), Posterior.of(GRID.expand(len(u), -1), gamma))
    cosine, length = compare(estimate, time_linked_score(denoiser, u, SIGMAS, index))
    assert cosine > 0.99 and 0.9 < length < 1.1


@pytest.mark.parametrize("index", [40, 60, 80, 100])
@pytest.mark.parametrize("extra", [0.1, 0.3])
def test_training_free_score_is_near_the_exact_one(index, extra):
    """Noise is added after a step: the estimate from the step before and from this one."""
    denoiser, before = ExactDenoiser(images(), 0.05), off_manifold(index - 4, 0.0)
    estimator, first = EnergyEstimator(), denoised_at(denoiser, before, index - 4)
    estimator.after(before, Step.at(GRID[index - 4].expand(4)), first)
    estimator.keep(Answer(first, first))
    (alpha, v), (alpha_after, v_after) = (alpha_and_variance(GRID[i]) for i in (index - 4, index))
    u = alpha_after * first + (v_after / v).sqrt() * (before - alpha * first)
    u = u + extra * torch.randn(u.shape, generator=torch.Generator().manual_seed(9))
    step, denoised = Step.at(GRID[index].expand(4)), denoised_at(denoiser, u, index)
    estimate = closed_form(u, denoised, step, estimator.after(u, step, denoised).posterior)
    cosine, length = compare(estimate, time_linked_score(denoiser, u, SIGMAS, index))
    assert cosine > 0.95 and 0.7 < length < 1.4


def test_published_gradient_is_the_gradient_of_the_log_probability():
    """Against central differences, through a smooth judge in float64."""
    weights = torch.randn(3 * 16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    levels = torch.linspace(-2, 2, 5, dtype=torch.float64)
    u = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    level = torch.tensor([-0.9, 2.2], dtype=torch.float64)  # nearest classes 1 and 4

    def judge(v):
        return torch.tanh(v.flatten(1) @ weights)

    with torch.inference_mode():
        gradient = published_gradient(u, level, judge, levels)
    step = torch.zeros_like(u)
    step[:, 1, 2, 3] = 1e-5
    differences = (judge(u + step).log_softmax(1) - judge(u - step).log_softmax(1)) / 2e-5
    assert torch.allclose(gradient[:, 1, 2, 3], differences[[0, 1], [1, 4]], rtol=1e-6)


def noise_at(variance, dimensions=3 * 32 * 32, seed=0):
    """(u, anchor) of one sample with exactly this noise variance around an anchor of unit variance."""
    random = torch.Generator().manual_seed(seed)
    side = math.isqrt(dimensions // 3)
    anchor, eps = (torch.randn(1, 3, side, side, generator=random) for _ in range(2))
    anchor, eps = anchor / anchor.square().mean().sqrt(), eps - (eps * anchor).mean() * anchor
    eps = eps / eps.square().mean().sqrt()
    return math.sqrt(1 - variance) * anchor + math.sqrt(variance) * eps, anchor


@pytest.mark.parametrize("variance", [0.001, 0.03, 0.25, 0.7])
@pytest.mark.parametrize("dimensions", [3 * 16 * 16, 3 * 64 * 64])
def test_energy_posterior_has_its_mean_and_at_most_the_spread_of_chance(variance, dimensions):
    """Its mean is the noise that is there; its spread sqrt(2 / n) where the signal alpha * x0 tells nothing more."""
    mean, spread_squared = energy_posterior(*noise_at(variance, dimensions)).log_variance()
    spread = spread_squared.sqrt()
    chance = math.sqrt(2 / dimensions)
    assert mean.exp().item() == pytest.approx(variance, rel=0.01) and spread.item() < 1.1 * chance
    if variance < 0.01:
        assert spread.item() == pytest.approx(chance, rel=0.1)


def test_inner_product_counts_only_where_the_weight_is():
    x = torch.ones(2, 3, 4, 4)
    x[:, :, :2] = 5.0
    weight = torch.zeros(2, 1, 4, 4)
    weight[:, :, 2:] = 1.0
    assert inner(x, x, weight).tolist() == [24.0, 24.0] and inner(x, x).tolist() == [624.0, 624.0]
    assert inner(torch.stack([x, 2 * x]), x, weight).tolist() == [[24.0, 24.0], [48.0, 48.0]]


@pytest.mark.parametrize("variance, least, most", [(0.1, 0, 0), (0.25, 0, 1e-3), (0.2525, 0, 2e-3), (0.5, 0.67, 0.71)])
def test_surplus_ignores_less_noise_and_what_chance_explains(variance, least, most):
    """v of the step 0.25, 768 dimensions: a gap of 1 % almost vanishes, one of ln 2 stays."""
    level = torch.logit(torch.tensor([0.75]))
    assert least <= energy_posterior(*noise_at(variance, 768)).surplus(level).item() <= most


@pytest.mark.parametrize("variance", [0.01, 0.25, 0.7, 0.995])
def test_noise_that_is_added_is_found_at_every_level(variance):
    """Also near pure noise, where a variance-preserving sample of any other level has nearly the same energy; and 2 %, which
    chance alone may give a start. At a run's first step nothing was added, whatever chance made of the noise."""
    level = torch.logit(torch.tensor([1 - variance]))
    u, anchor = noise_at(variance, 3 * 64 * 64)
    assert EnergyEstimator().after(u * 1.5, Step.at(level), anchor).surplus.item() == 0.0

    def found(sample):
        """At the step after, which is hardly another level."""
        estimator = EnergyEstimator()
        estimator.after(u, Step.at(level - 1e-4), anchor)
        estimator.keep(Answer(anchor, anchor))
        return estimator.after(sample, Step.at(level), anchor).surplus.item()

    for surplus in (0.3, 0.02):
        added = u + math.sqrt(surplus * variance) * torch.randn(u.shape, generator=torch.Generator().manual_seed(7))
        assert found(added) == pytest.approx(math.log(1 + surplus), rel=0.05, abs=5e-3)
    assert found(u) < 1e-4
    assert found(u - 0.1 * (u - math.sqrt(1 - variance) * anchor)) == 0.0


@pytest.mark.parametrize("variance", [0.01, 0.25, 0.7, 0.995])
@pytest.mark.parametrize("surplus, kept", [(0.0, 1.0), (0.02, 1.0), (0.7, 1.0), (0.3, 0.9)])
def test_a_sample_is_asked_for_as_what_it_is(variance, surplus, kept):
    """At the level returned, scaled by the factor, its signal and noise are alpha and sqrt(v) of that level."""
    level = torch.logit(torch.tensor([1 - variance]))
    fallen, factor = level_of(Step.at(level), torch.tensor([surplus]), torch.tensor([kept]))
    alpha, v = alpha_and_variance(fallen)
    noise = kept * math.sqrt(variance * math.exp(surplus))
    assert (factor * kept * math.sqrt(1 - variance)).item() == pytest.approx(alpha.item(), rel=1e-4)
    assert (factor * noise).item() == pytest.approx(v.sqrt().item(), rel=1e-4)
    assert fallen.item() == pytest.approx(level.item() - surplus, rel=1e-5)


def test_no_level_is_noisier_than_all():
    fallen, factor = level_of(Step.at(torch.tensor([LOG_SNR_RANGE[0]])), torch.tensor([9.0]), torch.ones(1))
    assert fallen.item() == LOG_SNR_RANGE[0] and factor.item() == pytest.approx(math.exp(-4.5), rel=1e-3)
    beyond = torch.tensor([LOG_SNR_RANGE[0] - 2.0])
    assert torch.equal(level_of(Step.at(beyond), torch.zeros(1), torch.ones(1))[0], beyond)


def third_step(factor, estimate, anchor, level):
    """What is found at a third step, at `level`, of a run whose model said `estimate` of nearly pure noise twice and then says
    `anchor`; the sample is DDIM's, times `factor`. And the leeway that is left there.
    """
    u, estimator = torch.randn(anchor.shape, generator=torch.Generator().manual_seed(6)), EnergyEstimator()
    for at, after in ((LOG_SNR_RANGE[0], -6.0), (-6.0, level)):
        at, after = torch.tensor([at]), torch.tensor([after])
        estimator.after(u, Step.at(at), estimate)
        estimator.keep(Answer(estimate, estimate))
        (alpha, v), (alpha_after, v_after) = alpha_and_variance(at), alpha_and_variance(after)
        u = alpha_after * estimate + (v_after / v).sqrt() * (u - alpha * estimate)
    return estimator.after(factor * u, Step.at(after), anchor), estimator.course.leeway.item()


@pytest.mark.parametrize("factor", [1.0, 0.9, 0.97])
def test_a_sample_that_shrank_is_told_by_its_signal(factor):
    """Noise and signal fell alike: the noise is less than it should be, and the log-SNR is what it was."""
    _, anchor = noise_at(0.1, 3 * 64 * 64)
    found, leeway = third_step(factor, anchor, anchor, math.log(9))
    assert leeway < 0.02 and found.kept.item() == pytest.approx(min(1.0, factor + leeway), abs=3e-3)
    assert found.surplus.item() == pytest.approx(-2 * math.log(found.kept.item()), abs=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_what_the_model_saw_too_late_is_not_lost(factor):
    """After large steps the sample has a fifth of the signal that the model sees then. Only what it had and lost counts."""
    _, anchor = noise_at(0.1, 3 * 64 * 64)
    found, leeway = third_step(factor, 0.2 * anchor, anchor, math.log(9))
    assert found.kept.item() == pytest.approx(min(1.0, factor + leeway), abs=0.02)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_run_lacks_signal_at_its_second_step(factor):
    """Before the first call there was no estimate: nothing of the first one can be lost yet."""
    _, anchor = noise_at(0.1, 3 * 64 * 64)
    u, estimator = torch.randn(anchor.shape, generator=torch.Generator().manual_seed(6)), EnergyEstimator()
    estimator.after(u, Step.at(torch.tensor([LOG_SNR_RANGE[0]])), anchor)
    estimator.keep(Answer(anchor, anchor))
    sample = factor * math.sqrt(0.9) * anchor + math.sqrt(0.1) * u
    assert estimator.after(sample, Step.at(torch.tensor([math.log(9)])), anchor).kept.item() == 1.0


def test_positions_without_weight_do_not_count():
    """Noise outside the weight is not seen."""
    u, anchor = noise_at(0.25)
    disturbed, weight = u.clone(), torch.zeros(1, 1, 32, 32)
    disturbed[..., :8] += 5.0
    weight[..., 8:] = 1.0
    one, other = (energy_posterior(v, anchor, weight).log_variance()[0] for v in (u, disturbed))
    assert torch.allclose(one, other)
    assert energy_posterior(disturbed, anchor).log_variance()[0].exp() > 0.9


@pytest.mark.parametrize("strength", [0.01, 1.0, 200.0])
def test_corrections_are_bounded_at_every_level(strength):
    """Whatever the time-linked score: never more than half the distance to the sample, never NaN."""
    step = Step.at(torch.tensor([LOG_SNR_RANGE[0], -2.0, 0.0, 4.0, LOG_SNR_RANGE[1]]))
    shape, reach = (5, 3, 8, 8), torch.full((5,), 0.3)
    for tls in (torch.randn(shape) * 1e6, torch.full(shape, torch.inf), torch.full(shape, torch.nan), torch.zeros(shape)):
        gap = torch.linspace(0, 9, 5)
        for correction in (relative_correction(tls, reach, strength, gap), score_correction(tls, reach, strength, step)):
            assert correction.isfinite().all() and (correction.flatten(1).norm(dim=1) <= 0.1501).all()
        moved = shift(tls, strength, step)
        assert moved.isfinite().all() and (mean_product(moved, moved) <= 0.25 * step.v * 1.001).all()


def test_a_useless_judge_moves_nothing_it_cannot_know():
    """Logits of NaN become a flat posterior, which is wide: the gap is shrunk, and nothing is NaN."""
    u = torch.randn(2, 3, 8, 8)
    step = Step.at(torch.tensor([-3.0, 3.0]))
    useless = NetworkEstimator(lambda v: torch.full((len(v), 128), torch.nan), GRID, EnergyEstimator())
    posterior, surplus, _ = useless.before(u, step)
    assert torch.allclose(posterior.gamma, torch.full_like(posterior.gamma, 1 / 128))
    assert surplus.isfinite().all()
    assert closed_form(u, torch.zeros_like(u), step, posterior).isfinite().all()


def test_limited_keeps_direction():
    correction = limited(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([1.0]))
    assert torch.allclose(correction, torch.tensor([[[[0.6, 0.8]]]]))


@pytest.mark.parametrize("kind", KINDS)
def test_process_reads_the_model(kind):
    """u is variance-preserving, levels follow a and b, and a noisier level has the sigma that gives it."""
    sampling = model(kind).get_model_object("model_sampling")
    schedule = Schedule.of(sampling)
    process = Process(sampling, schedule, CPU)
    sigma = torch.tensor([0.7, 0.3])
    a, b = coefficients(sampling, sigma).unbind(1)
    assert torch.allclose(b / a, sigma / (1 - sigma) if kind == "flow" else sigma)
    x0, eps = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    x = sampling.noise_scaling(sigma.reshape(-1, 1, 1, 1), eps, x0)
    level, scale = process.level_and_scale(sigma)
    assert process.vp(x, scale).std().item() == pytest.approx(1.0, abs=0.02)

    def noisier(by):
        return process.noisier(sigma, level, level - by)

    assert torch.equal(noisier(0.0), sigma) and torch.equal(noisier(-1.0), sigma)
    assert torch.allclose(process.level_and_scale(noisier(0.5))[0], level - 0.5, atol=0.01)
    assert noisier(50.0).max() <= float(sampling.sigma_max)


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_thousandths_of_the_schedule(kind):
    sampling = model(kind).get_model_object("model_sampling")
    schedule = Schedule.of(sampling)
    for time in (150, 333, 500, 900):  # below 110 of EDM's lies what LOG_SNR_RANGE leaves out
        sigma = torch.tensor([float(sampling.percent_to_sigma(1 - time / 1000))], dtype=torch.float64)
        assert schedule.time(log_snr(coefficients(sampling, sigma))).item() == pytest.approx(time, abs=0.6)
    grid = schedule.grid()
    assert (grid.diff() > 0).all() and len(grid) == 256
