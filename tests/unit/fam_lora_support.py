"""A highlighter and a VAE made by hand, and short training runs, for the tests of flaw-aware training."""

import torch
import torch.nn.functional as F
from artifact_guard.nodes.fam.flaw_aware import FlawAwareTraining, Watcher
from artifact_guard.nodes.fam.flaw_batch import FlawSampling
from artifact_guard.nodes.fam.highlighter import FlawHighlighter, HighlighterSettings
from artifact_guard.nodes.fam.lora_adapters import LoRAWeights, training_copy
from artifact_guard.nodes.fam.lora_settings import FlawAwareSettings
from artifact_guard.nodes.fam.lora_state import run_tensors
from artifact_guard.nodes.fam.training_data import LatentData

from tests.small_models import shallow_sd15


class RoughPlaces(torch.nn.Module):
    """Calls an image generated for its rough places: differences of neighbouring pixels, pooled by four."""

    def __init__(self, threshold: float = 0.06):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.tensor(threshold))

    def features(self, images):
        rough = F.pad((images[..., 1:] - images[..., :-1]).abs(), (0, 1))
        return F.avg_pool2d(rough, 4)

    def head(self, features):
        logit = 40 * (features.mean(dim=(1, 2, 3)) - self.threshold)
        return torch.stack([-logit, logit], dim=1)

    def forward(self, images):
        return self.head(self.features(images))


class SameForAll(RoughPlaces):
    """Has one answer."""

    def head(self, features):
        return super().head(features) * 0 + torch.tensor([0.3, -0.3])


class ToyVAE:
    """Shows a latent's first three channels, one pixel a latent pixel."""

    def __init__(self, channels=None):
        self.latent_channels = channels

    def decode(self, samples):
        samples = samples[:, :3]
        return samples.movedim(1, -1).sigmoid()


def rough_highlighter(network=None, size=16):
    return FlawHighlighter(network or RoughPlaces(), HighlighterSettings("small", size))


def smooth_latents(small, count=6, seed=0):
    """LATENT of slow waves: nothing rough."""
    samples = torch.randn((count, *small.latent()["samples"].shape[1:]), generator=torch.Generator().manual_seed(seed))
    return {"samples": samples.cumsum(-1).cumsum(-2) / samples[0, 0].numel() ** 0.5}


def settings(steps=6, **more):
    """Half base, half refinement, two maps."""
    given = {"map_every": 2, "batch_size": 2, "training_dtype": "fp32", "gradient_checkpointing": False, "learning_rate": 1e-3}
    return FlawAwareSettings(steps, **(given | more))


def start(small, setting, model=None, rank=3, prompts=2):
    """(training, weights) of a LoRA on a small model."""
    with torch.inference_mode(False):
        data = LatentData(
            smooth_latents(small)["samples"], [small.conditioning(seed) for seed in range(prompts)], torch.arange(6) % prompts
        )
        shape = tuple(data.latents.shape[1:])
        sampling = FlawSampling(ToyVAE(), rough_highlighter(), data.conditions, small.conditioning(9), shape, 2, 2, 1.0)
        copy = training_copy(model or small.model)
        copy.model.requires_grad_(False)
        copy.set_model_compute_dtype(setting.dtype_on(copy.load_device))
        weights = LoRAWeights(copy, rank, setting.seed)
        return FlawAwareTraining(copy, weights.parameters, data, sampling, setting), weights


def trained(**changes):
    """A finished run's tensors."""
    training, _ = start(shallow_sd15(), settings(**changes))
    training.run()
    return run_tensors(training)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Stop(Exception):
    """Ends a run from outside."""


def run_until(training, step):
    """Run, and stop before this step."""
    def before_step(number):
        if number == step:
            raise Stop

    try:
        training.run(Watcher(before_step))
    except Stop:
        pass
    assert training.progress.step == step
