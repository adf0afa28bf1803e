"""Predictors and guided runs for the tests of TAG.

    predictor = tiny_predictor(model)                     # barely trained
    guided, report = guide(model, strength=1.0)           # the guidance node
    output = run(guided, "euler", noise=0.2)              # core's sampling; noise: added after every step
"""

import comfy.sample
import comfy.samplers
import torch
from artifact_guard.nodes.tag.compatibility import kind_of
from artifact_guard.nodes.tag.energy import Counted, EnergyGrid
from artifact_guard.nodes.tag.levels import LOG_SNR_RANGE, Schedule
from artifact_guard.nodes.tag.schema import TemporalAlignmentGuidance
from artifact_guard.nodes.tag.training import Trainer, TrainingData, TrainingSettings, new_predictor

from tests.exact.images import shape_images
from tests.exact.model import conditioning, exact_model

CPU = torch.device("cpu")
KINDS = ("eps", "v", "edm", "flow")
SIZE = 16


def images(count=12, size=SIZE):
    return shape_images(count, size)


def model(kind="eps", **settings):
    return exact_model(images(), kind, **settings)


def fresh_predictor(patcher, condition_dim=0, seed=0, size=SIZE):
    """An untrained predictor for this model."""
    schedule = Schedule.of(patcher.get_model_object("model_sampling"))
    return new_predictor(kind_of(patcher), schedule, (size, size), condition_dim, seed)


def trainer(predictor, frames=None, conditions=None, steps=4, rate=1e-4, batch=8, seed=0):
    data = TrainingData(images() if frames is None else frames, conditions)
    return Trainer(predictor, data, TrainingSettings(steps, batch, rate, seed), CPU)


def guide(patcher, predictor=None, **settings):
    """(guided model, report) from the node, its defaults changed by `settings`."""
    widgets = {i.id: i.default for i in TemporalAlignmentGuidance.GET_SCHEMA().inputs if hasattr(i, "default")}
    return TemporalAlignmentGuidance.execute(patcher, **(widgets | settings), time_predictor=predictor).result


def noisy_euler(noise, seed=77):
    """Euler's sampler; after every step but the last, noise of this size (in units of u) is added."""

    def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        random = torch.Generator().manual_seed(seed)
        for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
            denoised = model_k(x, sigma * x.new_ones(len(x)), **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigma, "denoised": denoised})
            x = denoised + (after / sigma) * (x - denoised)
            if after > 0:
                flow = sigmas[0] <= 1
                size = (1 - after).square() + after.square() if flow else 1 + after.square()
                x = x + noise * size.sqrt() * torch.randn(x.shape, generator=random).to(x)
        return x

    return comfy.samplers.KSAMPLER(sample)


def run(patcher, sampler="euler", noise=None, shape=(2, 3, SIZE, SIZE), steps=8, seed=3, cfg=1.0, **more):
    """The samples of one run through comfy.sample, under inference mode as ComfyUI runs nodes."""
    if noise is not None:
        sampler = noisy_euler(noise)
    elif isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    latent, scheduler = torch.zeros(shape), more.pop("scheduler", "simple")
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), scheduler, steps)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            patcher, comfy.sample.prepare_noise(latent, seed), cfg, sampler, sigmas,
            more.pop("positive", conditioning()), more.pop("negative", conditioning()), more.pop("latent", latent),
            disable_pbar=True, seed=seed, **more)


def energy_posterior(u, anchor, weight=None, noisiest=LOG_SNR_RANGE[0]):
    """p(level | u) if u is alpha * anchor + noise, all (B, ...): from the energy that remains when the anchor is taken away."""
    grid = EnergyGrid(noisiest, Counted.of(u, weight).values, u.device)
    across, away = (mean_product(*pair, weight)[:, None] for pair in ((u, anchor), (u - anchor, u - anchor)))
    return grid.posterior(across, away)


def mean_product(x, y, weight=None):
    """Mean of x * y over each sample, (B,), where the weight (B, 1, ...) is 1."""
    weight = torch.ones_like(x) if weight is None else weight.expand(x.shape)
    return (x * y * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1)
