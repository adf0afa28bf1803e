"""What the benchmarks of TAG share: guided models, and the sampler that is disturbed at each step."""

import functools

import comfy.model_management
import comfy.samplers
import torch

PREDICTOR = "demo_fashion_mnist.safetensors"


def noisy_euler(noise: float, seed: int = 77):
    """Euler's sampler; after every step but the last, noise of this size (in units of u) is added. VE models only.

    The noise is drawn where the sampler runs: the same seed gives the same noise on one kind of device.
    """

    def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        random = torch.Generator(x.device).manual_seed(seed)
        last = len(sigmas) - 2
        for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
            denoised = model_k(x, sigma * x.new_ones(len(x)), **extra_args)
            x = denoised + (after / sigma) * (x - denoised)
            if step < last and noise > 0:
                drawn = torch.randn(x.shape, generator=random, device=x.device)
                x = x + noise * (1 + after.square()).sqrt() * drawn.to(x)
        return x

    return comfy.samplers.KSAMPLER(sample)


@functools.cache
def load_shipped():
    from artifact_guard.nodes.tag.predictor_files import load_predictor

    return load_predictor(PREDICTOR)


def train_briefly(model, data: tuple, steps: int = 50, seed: int = 1):
    """A poor predictor: unconditional, and trained for only so many steps."""
    from artifact_guard.nodes.tag.compatibility import kind_of
    from artifact_guard.nodes.tag.levels import Schedule
    from artifact_guard.nodes.tag.training import Trainer, TrainingData, TrainingSettings, new_predictor

    schedule = Schedule.of(model.get_model_object("model_sampling"))
    start = new_predictor(kind_of(model), schedule, tuple(data[0].shape[-2:]), 0, seed)
    device = comfy.model_management.get_torch_device()
    trainer = Trainer(start, TrainingData(data[0]), TrainingSettings(steps, 64, seed=seed), device)
    for _ in range(steps):
        trainer.step()
    return trainer.result()


def guided(model, data: tuple, predictor="", **settings):
    """(guided model, report). predictor: "" for none, the shipped one's name, "poor", or a predictor."""
    from artifact_guard.nodes.tag.guidance import guide_model
    from artifact_guard.nodes.tag.settings import TagSettings

    chosen = None
    if predictor == "poor":
        chosen = train_briefly(model, data)
    elif predictor:
        chosen = load_shipped() if predictor == PREDICTOR else predictor
    guided_model, report = guide_model(
        model, TagSettings(predictor=chosen.identity if chosen else "", **settings), chosen
    )
    return guided_model, report


