"""How far samples are from real images, and whether guided ones are nearer: paired ratios with an interval.

Two distances in a classifier's features. KID is the unbiased squared maximum mean discrepancy with the cubic kernel
(x . y / d + 1)^3 (Binkowski et al. 2018): its mean does not depend on the number of samples. FD, the Frechet distance,
is larger the fewer samples there are, by about c / N: it is also extrapolated, FD_inf = 2 FD(N) - mean FD of two halves
(Chong and Forsyth 2020). Pairs come in BLOCKS blocks; leaving one out at a time (jackknife) gives the standard error of
a logarithm of a ratio, and Student's t the 95 % interval. No pair is repeated, unlike in a bootstrap, which would raise
both distances.
"""

import math

import torch

BLOCKS = 16
STUDENT = 2.131
"""Of 95 % with BLOCKS - 1 = 15 degrees of freedom."""


def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of features (N, d), on the CPU: the eigenproblems of FD are too small for a GPU."""
    return features.mean(dim=0).cpu(), torch.cov(features.T).cpu()


def frechet(one: tuple, other: tuple) -> float:
    """Frechet distance of two normal distributions, each (mean, covariance), float64."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    root = symmetric_root(other_covariance)
    roots = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * roots)


def symmetric_root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one @ other.T / one.shape[1] + 1).pow(3)


def unbiased_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of a square kernel matrix without its diagonal."""
    n = len(values)
    return (values.sum() - values.trace()) / (n * (n - 1))


class Samples:
    """Features (N, d) of samples, and what their distances to real ones need."""

    def __init__(self, features: torch.Tensor, real: torch.Tensor):
        self.features = features
        self.own, self.across = kernel(features, features), kernel(features, real).mean(dim=1)

    def kid(self, rows: torch.Tensor, real_mean: float) -> float:
        return float(unbiased_mean(self.own[rows][:, rows]) + real_mean - 2 * self.across[rows].mean())

    def fd(self, rows: torch.Tensor, real: tuple) -> float:
        return frechet(statistics(self.features[rows]), real)

    def endless_fd(self, rows: torch.Tensor, real: tuple) -> float:
        """FD as if of endlessly many samples."""
        halves = sum(self.fd(half, real) for half in rows.chunk(2)) / 2
        return 2 * self.fd(rows, real) - halves


def blocks(count: int) -> list[torch.Tensor]:
    """All rows, then all rows but one block of consecutive ones, BLOCKS times."""
    rows = torch.arange(count)
    return [rows, *(rows[rows * BLOCKS // count != block] for block in range(BLOCKS))]


def jackknife_ratio(one: list[float], other: list[float]) -> list[float | None]:
    """other / one of the whole, with its 95 % interval; each list is the whole's value, then those without each block.

    None where the quotient of a part is not positive: the distance is then within chance of zero.
    """
    ratios = [b / a if a > 0 and b > 0 else math.nan for a, b in zip(one, other)]
    if any(math.isnan(ratio) for ratio in ratios):
        return [None, None, None]
    parts = torch.tensor(ratios[1:], dtype=torch.float64).log()
    error = STUDENT * math.sqrt((BLOCKS - 1) / BLOCKS * (parts - parts.mean()).square().sum())
    return [round(ratios[0] * factor, 3) for factor in (1.0, math.exp(-error), math.exp(error))]


class Features:
    """A classifier's features of images, their Frechet distance to real ones, and its opinion of what was asked for.

    Args:
        classifier: features and kernels are computed on its device; images may lie anywhere.
        images: real ones (N, 3, 32, 32). labels: (M,) the class that was asked for in each sample.
    """

    def __init__(self, classifier, images: torch.Tensor, labels: torch.Tensor):
        self.device = next(classifier.parameters()).device
        self.classifier, self.images, self.labels = classifier, images, labels.to(self.device)
        self.real_features = self.of(images)
        self.real = statistics(self.real_features)

    @torch.no_grad()
    def of(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.classifier.features(part.to(self.device)) for part in images.split(500)]).double()

    @torch.no_grad()
    def log_probability(self, images: torch.Tensor) -> torch.Tensor:
        """(M,) of samples, on the CPU."""
        told = self.classifier(images.to(self.device)).log_softmax(dim=1)
        return told.gather(1, self.labels[: len(images), None])[:, 0].cpu()

    def distance(self, features: torch.Tensor) -> float:
        return frechet(statistics(features), self.real)


class Judge(Features):
    """Compares pairs of samples, see above."""

    REAL = 4000
    """Real images in KID's kernel, or half of them if they are fewer; FD takes all."""

    def __init__(self, classifier, images: torch.Tensor, labels: torch.Tensor):
        super().__init__(classifier, images, labels)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        near = min(self.REAL, len(images) // 2)
        self.near, self.others = self.real_features[order[:near].to(self.device)], images[order[near:]]
        self.near_mean = float(unbiased_mean(kernel(self.near, self.near)))

    def distances(self, images: torch.Tensor) -> dict[str, list[float]]:
        """KID, FD and endless FD of the whole, and without each block."""
        samples, parts = Samples(self.of(images), self.near), blocks(len(images))
        return {"KID": [samples.kid(rows, self.near_mean) for rows in parts],
                "FD": [samples.fd(rows, self.real) for rows in parts],
                "FD_endless": [samples.endless_fd(rows, self.real) for rows in parts]}

    def floor(self, count: int) -> dict[str, float]:
        """The same of `count` real images, or of as many as are left, none of which is among those in KID's kernel."""
        return {name: round(values[0], 3) for name, values in self.distances(self.others[:count]).items()}

    def told(self, images: torch.Tensor, distances: dict[str, list[float]]) -> dict[str, float]:
        """The figures of samples whose distances were taken."""
        told = {name: round(values[0], 3) for name, values in distances.items()}
        return told | {"log_probability": round(self.log_probability(images).mean().item(), 3)}

    def compared(self, bare: torch.Tensor, bare_distances: dict[str, list[float]], other: torch.Tensor) -> dict:
        """The other's figures; ratios other / bare with 95 % intervals; the paired gain in log-probability."""
        distances = self.distances(other)
        gain = self.log_probability(other) - self.log_probability(bare)
        error = 1.96 * gain.std().item() / len(gain) ** 0.5
        ratios = {f"{name}_ratio": jackknife_ratio(bare_distances[name], distances[name]) for name in distances}
        return self.told(other, distances) | ratios | {"log_probability_gain": [round(gain.mean().item(), 3), round(error, 3)]}


STUDENT_OF_SEEDS = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Of 95 %, by the number of seeds."""


def over_seeds(ratios: list[float]) -> list[float] | None:
    """The geometric mean's 95 % interval by Student's t on the logarithms; None of one seed."""
    if len(ratios) not in STUDENT_OF_SEEDS:
        return None
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    error = STUDENT_OF_SEEDS[len(ratios)] * logs.std().item() / math.sqrt(len(ratios))
    return [math.exp(logs.mean().item() - error), math.exp(logs.mean().item() + error)]
