"""The exact denoiser against brute force, autograd and its own definition, and as a model under ComfyUI's samplers."""

import comfy.samplers
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.exact.denoiser import ExactDenoiser, vp_coefficients
from tests.exact.images import shape_images
from tests.exact.model import Trajectory, conditioning, exact_model, resume, sample
from tests.exact.time_posterior import log_time_posterior, time_linked_score

SIZE = 16


@pytest.fixture(scope="module")
def images():
    return shape_images(200, SIZE, 3, seed=5)


@pytest.fixture(scope="module")
def tiny():
    random = torch.Generator().manual_seed(0)
    return torch.rand(6, 2, 2, 3, generator=random, dtype=torch.float64) * 2 - 1


def brute_mixture(data, h, a, b):
    """The noised mixture as torch.distributions sees it, over flat vectors."""
    flat = data.flatten(1)
    deviation = torch.full_like(flat, (a ** 2 * h ** 2 + b ** 2) ** 0.5)
    return MixtureSameFamily(Categorical(torch.ones(len(flat))), Independent(Normal(a * flat, deviation), 1))


@pytest.mark.parametrize("a, b", [(1.0, 0.4), (1.0, 3.0), (0.3, 0.7), (0.0, 1.0), (0.9, 0.02)])
def test_matches_brute_force(tiny, a, b):
    h, x = 0.3, torch.randn(4, 2, 2, 3, dtype=torch.float64)
    exact = ExactDenoiser(tiny, h)
    expected = torch.zeros_like(x)
    for n, one in enumerate(x):
        v = a * a * h * h + b * b
        weights = torch.stack([torch.exp(-((one - a * image) ** 2).sum() / (2 * v)) for image in tiny])
        # each component is a Gaussian posterior of its own: precision 1/h^2 around x_i and a^2/b^2 around x/a
        means = torch.stack([(image / h ** 2 + a * one / b ** 2) / (1 / h ** 2 + a * a / b ** 2) for image in tiny])
        expected[n] = (weights.view(-1, 1, 1, 1) * means).sum(0) / weights.sum()
    torch.testing.assert_close(exact.denoise(x, a, b), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(exact.log_p(x, a, b), brute_mixture(tiny, h, a, b).log_prob(x.flatten(1)))


@pytest.mark.parametrize("a, b", [(1.0, 0.05), (1.0, 2.0), (0.4, 0.6), (0.0, 1.0)])
def test_score_is_the_gradient_of_log_p(tiny, a, b):
    exact, x = ExactDenoiser(tiny, 0.2), torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(exact.log_p(x, a, b).sum(), x)
    torch.testing.assert_close(exact.score(x, a, b), gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((a * exact.denoise(x, a, b) - x) / b ** 2, gradient, rtol=1e-9, atol=1e-9)


def test_is_right_at_the_ends_of_the_noise_range(tiny):
    exact, x = ExactDenoiser(tiny, 0.05), tiny[:2] + 0.01
    torch.testing.assert_close(exact(x, 0.0), x)  # without noise the sample is its own estimate
    torch.testing.assert_close(exact(1e-8 * torch.randn_like(x) + x, 1e-8), x, atol=1e-6, rtol=0)
    far = 1e6 * torch.randn_like(x)
    torch.testing.assert_close(exact(far, 1e6), tiny.mean(0).expand_as(x), atol=1e-4, rtol=0)
    assert exact.log_p(far, 1.0, 1e-4).isfinite().all()


def test_labels_restrict_the_mixture(tiny):
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    exact, x = ExactDenoiser(tiny, 0.1, labels), torch.randn(3, 2, 2, 3, dtype=torch.float64)
    got = exact.denoise(x, 1.0, 2.0, torch.tensor([1, 2, -1]))
    for row, chosen in enumerate((labels == 1, labels == 2, labels >= 0)):
        only = ExactDenoiser(tiny[chosen], 0.1)
        torch.testing.assert_close(got[row:row + 1], only.denoise(x[row:row + 1], 1.0, 2.0))
    with pytest.raises(ValueError, match="no image carries"):
        exact.denoise(x[:1], 1.0, 2.0, torch.tensor([7]))


def test_time_posterior_and_time_linked_score(tiny):
    h, sigmas = 0.1, torch.logspace(-1.5, 1, 40, dtype=torch.float64)
    exact, prior = ExactDenoiser(tiny, h), torch.linspace(-1, 1, 40, dtype=torch.float64)
    a, b = vp_coefficients(sigmas)
    torch.testing.assert_close(a ** 2 + b ** 2, torch.ones_like(a))
    torch.testing.assert_close(b / a, sigmas)
    at = torch.tensor([3, 20, 33])
    u = a[at].view(-1, 1, 1, 1) * tiny[:3] + b[at].view(-1, 1, 1, 1) * torch.randn(3, 2, 2, 3, dtype=torch.float64)
    u.requires_grad_(True)
    posterior = log_time_posterior(exact, u, sigmas, prior)
    densities = torch.stack([brute_mixture(tiny, h, float(p), float(q)).log_prob(u.flatten(1)) for p, q in zip(a, b)])
    torch.testing.assert_close(posterior, (densities.T + prior).log_softmax(1))
    index = torch.tensor([5, 12, 39])
    gradient, = torch.autograd.grad(posterior.gather(1, index[:, None]).sum(), u)
    torch.testing.assert_close(time_linked_score(exact, u.detach(), sigmas, index, prior), gradient)


@pytest.mark.parametrize("sigma", [0.0307, 1.3, 9.0])
def test_parameterizations_agree(images, sigma):
    """Same VE point through eps, v and flow: the sigma must arrive unrounded and a, b must be the model's own."""
    x = images[:3] + sigma * torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    expected = ExactDenoiser(images, 0.05)(x, sigma).float()
    for kind in ("eps", "v", "flow"):
        at = sigma / (1 + sigma) if kind == "flow" else sigma
        scaled = x * (1 - at) if kind == "flow" else x
        got = exact_model(images, kind).model.apply_model(scaled, torch.full((3,), at))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def nearest_rms(x, images):
    return torch.cdist(x.flatten(1), images.flatten(1)).min(1).values / x[0].numel() ** 0.5


@pytest.mark.parametrize("kind, sampler, scheduler", [
    ("eps", "euler", "normal"), ("eps", "dpmpp_2m", "karras"), ("v", "euler_ancestral", "normal"),
    ("flow", "euler", "simple"), ("flow", "dpmpp_2m", "beta"), ("flow", "euler_ancestral", "simple"),
    ("eps", "heun", "normal"), ("eps", "uni_pc", "normal"), ("eps", "dpm_adaptive", "karras"),
])
def test_samplers_reach_the_data(images, kind, sampler, scheduler):
    model = exact_model(images, kind, kernel_width=0.03)
    result = sample(model, sampler, scheduler, 20, seed=3, latent=(4, 3, SIZE, SIZE))
    assert nearest_rms(result, images).max() < 0.05
    assert nearest_rms(torch.zeros_like(result), images).min() > 0.2  # 0.05 is near
    assert model.model.calls == len(model.model.call_sigmas) >= 20


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_resume_goes_on_where_the_run_was(images, kind):
    model, trace = exact_model(images, kind), Trajectory()
    result = sample(model, scheduler="simple", steps=12, latent=(2, 3, SIZE, SIZE), callback=trace)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 12)
    torch.testing.assert_close(resume(model, trace.x[5], sigmas[5:]), result, atol=1e-4, rtol=0)


def test_counts_calls_at_the_true_sigmas(images):
    model, trace = exact_model(images), Trajectory()
    sample(model, steps=7, latent=(2, 3, SIZE, SIZE), callback=trace)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 7)
    assert model.model.call_sigmas == pytest.approx(sigmas[:-1].tolist(), rel=1e-6) and model.model.calls == 7 == len(trace.denoised)
    model.model.forget_calls()
    assert model.model.calls == 0 and model.model.call_sigmas == []


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_speed_peaks_in_the_middle(images, kind):
    trace = Trajectory()
    sample(exact_model(images, kind), scheduler="simple", steps=25, latent=(8, 3, SIZE, SIZE), callback=trace)
    speed = trace.stack().diff(dim=0).square().mean((1, 2, 3, 4)).sqrt()
    peak = int(speed.argmax())
    assert 2 <= peak <= 12
    assert speed[0] < 0.8 * speed[peak] and speed[-8:].max() < 0.2 * speed[peak]


def test_guidance_and_conditions_pick_the_label(images):
    labels = torch.arange(len(images)) % 4
    model = exact_model(images, labels=labels)
    for cfg in (1.0, 2.0):
        result = sample(model, steps=20, cfg=cfg, seed=1, latent=(6, 3, SIZE, SIZE), positive=conditioning(2))
        picked = labels[torch.cdist(result.flatten(1), images.flatten(1)).argmin(1)]
        assert (picked == 2).all()
    free = sample(model, steps=20, seed=1, latent=(6, 3, SIZE, SIZE))
    assert len(labels[torch.cdist(free.flatten(1), images.flatten(1)).argmin(1)].unique()) > 1


def test_video_inpainting_and_image_to_image(images):
    video = torch.stack([images[:40], images[:40].roll(2, -1)], dim=2)  # (N, C, 2, H, W)
    result = sample(exact_model(video), steps=15, latent=(2, 3, 2, SIZE, SIZE))
    assert nearest_rms(result, video).max() < 0.08
    model, keep = exact_model(images), torch.zeros(1, 1, SIZE, SIZE)
    keep[..., SIZE // 2:] = 1.0
    result = sample(model, steps=15, latent=images[:2], noise_mask=keep)
    torch.testing.assert_close(result[..., :SIZE // 2], images[:2, ..., :SIZE // 2], atol=1e-5, rtol=0)
    result = sample(model, steps=15, latent=images[:2], denoise=0.2)
    assert (torch.cdist(result.flatten(1), images.flatten(1)).argmin(1) == torch.arange(2)).all()


def test_gradients_flow_even_when_built_under_inference_mode(images):
    with torch.inference_mode():
        model = exact_model(images[:20]).model
    x = torch.randn(1, 3, SIZE, SIZE, requires_grad=True)
    gradient, = torch.autograd.grad(model.apply_model(x, torch.tensor([5.0])).square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
