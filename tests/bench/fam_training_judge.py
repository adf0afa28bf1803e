"""How samples of `fam_training` are judged: FD, precision and recall in the features of the bench's own classifier."""

import functools

import torch
import torch.nn.functional as F

from ..harness.cache import cache_folder
from .classifier import predict, trained_classifier
from .distances import frechet, statistics

NEIGHBOURS = 3
CLASSIFIER_SIDE = 32


def classes(count: int) -> torch.Tensor:
    """The classes in turn."""
    return torch.arange(count) % 10


def shown(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, S, S) at the size that the classifier takes."""
    scale = CLASSIFIER_SIDE // images.shape[-1]
    return images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="nearest")


def neighbour_radius(features: torch.Tensor) -> torch.Tensor:
    """Distance of each feature vector (N, C) to its third neighbour."""
    return torch.cdist(features, features).kthvalue(NEIGHBOURS + 1, dim=1).values


def coverage(features: torch.Tensor, of: torch.Tensor) -> float:
    """Share of `features` within the neighbourhood of some vector of `of` (arXiv 1904.06991)."""
    return (torch.cdist(features, of) <= neighbour_radius(of)[None]).any(dim=1).float().mean().item()


class Judge:
    """Args:
        images, labels: the training images, which the classifier learns from. test: the test images and labels.
        Images of 16x16 are shown to it at twice the size.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor], device: torch.device):
        self.images, self.labels, self.test, self.device = images, labels, test, device

    @functools.cached_property
    def classifier(self):
        with torch.enable_grad():
            side, data = self.images.shape[-1], cache_folder() / "data"
            folder = data if side == CLASSIFIER_SIDE else data / f"{side}x{side}"
            return trained_classifier(shown(self.images), self.labels, folder, device=self.device).to(self.device)

    @functools.cached_property
    def real(self) -> torch.Tensor:
        """Features of the test images."""
        return self.features(self.test[0])

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The classifier's, (N, 128) float32, on the CPU."""
        return torch.cat([self.classifier.features(shown(part).to(self.device)).cpu() for part in images.split(500)])

    def chosen(self, count: int) -> torch.Tensor:
        """Features of as many test images."""
        return self.real[torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))[:count]]

    def fd(self, features: torch.Tensor) -> float:
        return frechet(statistics(features.double()), statistics(self.real.double()))

    def of_classifier(self) -> float:
        """Share of the test images that it names rightly."""
        return (predict(self.classifier, shown(self.test[0])) == self.test[1]).double().mean().item()

    def figures(self, samples: torch.Tensor, features: torch.Tensor) -> dict[str, float]:
        """Of samples (N, 3, S, S), the classes in turn, and their features."""
        means = features.double().mean(dim=0) - self.real.double().mean(dim=0)
        near, real_near = features.to(self.device), self.chosen(len(features)).to(self.device)
        return {
            "FD": self.fd(features), "FD_of_means": means.square().sum().item(), "precision": coverage(near, real_near),
            "recall": coverage(real_near, near), "brightness": samples.mean().item(),
            "as_asked": (predict(self.classifier, shown(samples)) == classes(len(samples))).double().mean().item(),
        }
