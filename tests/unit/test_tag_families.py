"""One strength for every model: real architectures, narrow, with the sample and the clean image given.

The models' own sampling, wrappers and layouts are at work; what their random weights would draw is replaced by a known
clean estimate, so that the noise a sample has is known too.
"""

import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.coordinates import coefficients, coefficients_of_all
from artifact_guard.nodes.demo.model import load_demo_model

from tests.small_models import small_model
from tests.unit.tag_support import guide, model

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "flux2", "qwen_image", "lumina2", "aura_flow", "cascade_c", "wan",
            "hunyuan_video", "cosmos_predict2", "ltxv", "mochi")
OTHERS = ("v", "edm")
RATIOS = (4.0, 1.0)
"""Noise over signal, b / a, at the two steps that are looked at; surplus noise comes at the second."""
EXCESS = 0.3
SIZE = 32


def noise_ratio(sampling, sigma) -> float:
    a, b = coefficients(sampling, sigma)
    return b / max(a, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_of_a_schedule_are_those_of_its_sigmas(family):
    sampling = small_model(family).model.get_model_object("model_sampling")
    sigmas = torch.linspace(float(sampling.sigma_min), float(sampling.sigma_max), 7)
    assert coefficients_of_all(sampling, sigmas) == [coefficients(sampling, sigma) for sigma in sigmas]


def sigma_at(sampling, ratio: float) -> float:
    """The sigma with this b / a, by halving."""
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if noise_ratio(sampling, middle) < ratio else (low, middle)
    return high


def unit(x: torch.Tensor, across: torch.Tensor | None = None) -> torch.Tensor:
    """Each sample with a mean square of 1, orthogonal to the same one of `across`: no chance is left in energies."""
    flat = x.flatten(1)
    if across is not None:
        other = across.flatten(1)
        flat = flat - (flat * other).mean(dim=1, keepdim=True) * other
    return (flat / flat.square().mean(dim=1, keepdim=True).sqrt()).reshape(x.shape)


class TwoSteps:
    """A sampler that asks the model at b / a of RATIOS, the second time at a sample with EXCESS more variance in its noise.

    told: what the model was asked at, as b / a. signal: how much of x0 its samples held, over a of that. share: RMS of the correction over RMS(D - x), of each sample.
    """

    def __init__(self, patcher, clean: torch.Tensor, excess: float = EXCESS):
        self.sampling, self.clean, self.excess = patcher.get_model_object("model_sampling"), clean, excess
        self.told: list[float] = []
        self.signal: list[float] = []
        self.patcher = patcher.clone()
        self.patcher.set_model_unet_function_wrapper(self.answer)

    def answer(self, apply_model, args):
        sigma = args["timestep"].flatten()[0]
        self.told.append(noise_ratio(self.sampling, sigma))
        held = (args["input"].float() * self.clean.to(args["input"])).mean()
        self.signal.append(held.item() / float(coefficients(self.sampling, sigma)[0]))
        return self.clean.to(args["input"])

    def sample(self, model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        clean = self.clean.to(x)
        eps = unit(torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x), clean)
        for ratio, more in zip(RATIOS, (0.0, self.excess)):
            sigma = sigma_at(self.sampling, ratio)
            a, b = coefficients(self.sampling, sigma)
            x = a * clean + b * (1 + more) ** 0.5 * eps
            denoised = model_k(x, x.new_full((len(x),), sigma), **(extra_args or {}))
        moved, reach = (t.flatten(1).square().mean(dim=1).sqrt() for t in (denoised - clean, clean - x))
        self.share = moved / reach
        return denoised

    def run(self, positive, **settings) -> "TwoSteps":
        guided, _ = guide(self.patcher, **settings)
        latent = torch.zeros_like(self.clean)
        sigmas = torch.tensor([float(self.sampling.sigma_max), float(self.sampling.sigma_min)])
        with torch.inference_mode():
            comfy.sample.sample_custom(
                guided, comfy.sample.prepare_noise(latent, 0), 1.0, comfy.samplers.KSAMPLER(self.sample), sigmas, positive,
                positive, latent, disable_pbar=True, seed=0)
        return self


def two_steps(family: str, excess: float = EXCESS, **settings) -> TwoSteps:
    """Two samples of this family, sampled as far as is looked at."""
    if family in OTHERS or family == "demo":
        patcher = load_demo_model()[0] if family == "demo" else model(family)
        shape, positive = (2, 3, SIZE, SIZE), [[torch.zeros(1, 1, 16), {}]]
    else:
        small = small_model(family)
        shape = (2, *small.latent(height=SIZE, width=SIZE)["samples"].shape[1:])
        patcher, positive = small.model, small.conditioning()
    clean = unit(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    return TwoSteps(patcher, clean, excess).run(positive, **settings)


@pytest.mark.parametrize("family", (*FAMILIES, *OTHERS, "demo"))
def test_one_strength_does_the_same_to_every_model(family):
    """The correction is the same share of the way from sample to estimate, 1 - sqrt(v / v of the sample), for EPS, V,
    EDM, Cosmos' and other flows; strength scales it; the model is asked at the level that the sample really has, and
    of it as a sample of that level."""
    done = two_steps(family)
    expected = 1 - 1 / math.sqrt(1 + EXCESS)
    assert done.share.tolist() == pytest.approx([expected] * 2, rel=0.03)
    assert done.told == pytest.approx([RATIOS[0], RATIOS[1] * math.sqrt(1 + EXCESS)], rel=0.01)
    assert done.signal == pytest.approx([1.0, 1.0], rel=0.01)
    assert two_steps(family, strength=0.5).share.tolist() == pytest.approx([expected / 2] * 2, rel=0.03)


@pytest.mark.parametrize("family", ("sd15", "flux", "wan", "edm"))
def test_without_surplus_nothing_is_moved(family):
    done = two_steps(family, excess=0.0)
    assert done.share.max() < 0.01 and done.told == pytest.approx(RATIOS, rel=0.01)
