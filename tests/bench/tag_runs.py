"""What the benchmarks of TAG share: guided models, the sampler that is disturbed at each step, paired distances."""

import functools

import comfy.samplers
import torch

PREDICTOR = "demo_fashion_mnist.safetensors"
BOOTSTRAPS = 200


def noisy_euler(noise: float, seed: int = 77):
    """Euler's sampler; after every step but the last, noise of this size (in units of u) is added. VE models only."""

    def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        random = torch.Generator().manual_seed(seed)
        for sigma, after in zip(sigmas, sigmas[1:]):
            denoised = model_k(x, sigma * x.new_ones(len(x)), **extra_args)
            x = denoised + (after / sigma) * (x - denoised)
            if after > 0 and noise > 0:
                x = x + noise * (1 + after.square()).sqrt() * torch.randn(x.shape, generator=random).to(x)
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
    trainer = Trainer(start, TrainingData(data[0]), TrainingSettings(steps, 64, 1e-3, seed), torch.device("cpu"))
    for _ in range(steps):
        trainer.step()
    return trainer.result()


def guided(model, data: tuple, predictor: str = "", **settings):
    """(guided model, report). predictor: "" for none, the shipped one's name or "poor"."""
    from artifact_guard.nodes.tag.guidance import guide_model
    from artifact_guard.nodes.tag.settings import TagSettings

    chosen = None
    if predictor == "poor":
        chosen = train_briefly(model, data)
    elif predictor:
        chosen = load_shipped()
    guided_model, report = guide_model(
        model, TagSettings(predictor=chosen.identity if chosen else "", **settings), chosen
    )
    return guided_model, report


def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return features.mean(dim=0), torch.cov(features.T)


def frechet(one: tuple, other: tuple) -> float:
    """Frechet distance of two normal distributions, each (mean, covariance), float64."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    roots = torch.linalg.eigvals(covariance @ other_covariance).real.clamp_min(0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * roots)


class Features:
    """Judges samples by a classifier's features.

    Args:
        images: real ones (N, 3, 32, 32). labels: the class that was asked for in each sample.
    """

    def __init__(self, classifier, images: torch.Tensor, labels: torch.Tensor):
        self.classifier, self.images, self.labels = classifier, images, labels
        self.real = statistics(self.of(images))

    @torch.no_grad()
    def of(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.classifier.features(part) for part in images.split(500)]).double()

    @torch.no_grad()
    def log_probability(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images).log_softmax(dim=1).gather(1, self.labels[:, None])[:, 0]

    def distance(self, features: torch.Tensor) -> float:
        return frechet(statistics(features), self.real)

    def floor(self, count: int) -> float:
        """FD of `count` real images."""
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[:count]
        return self.distance(self.of(self.images[chosen]))

    def told(self, images: torch.Tensor) -> dict[str, float]:
        log_probability = self.log_probability(images).mean().item()
        return {"FD": round(self.distance(self.of(images)), 1), "log_probability": round(log_probability, 3)}

    def compared(self, bare: torch.Tensor, other: torch.Tensor) -> dict:
        """The other's figures, FD ratio other / bare with its 95 % interval, and the paired gain in log-probability."""
        one, two = self.of(bare), self.of(other)
        random, ratios = torch.Generator().manual_seed(0), []
        for _ in range(BOOTSTRAPS):
            rows = torch.randint(len(one), (len(one),), generator=random)
            ratios.append(self.distance(two[rows]) / self.distance(one[rows]))
        low, high = torch.quantile(torch.tensor(ratios), torch.tensor([0.025, 0.975])).tolist()
        gain = self.log_probability(other) - self.log_probability(bare)
        error = 1.96 * gain.std().item() / len(gain) ** 0.5
        return self.told(other) | {
            "FD_ratio": round(self.distance(two) / self.distance(one), 3), "interval": [round(low, 3), round(high, 3)],
            "log_probability_gain": [round(gain.mean().item(), 3), round(error, 3)],
        }
