"""Q3, third part: the paper's toy. Two normal distributions in the plane at +-(10, 10), a small network as the model.

100 steps of DDIM on a linear-beta schedule; after each, every point drifts by -0.01 of itself towards the origin. The
Wasserstein distance W1 to real points is that of an optimal matching. Ratios are paired: the same start points. Beside
it, without a drift, noise at each of 25 steps, and few steps.

What could be reached at all is measured beside it: W1 between two draws of real points, and the same runs where the
model is the exact score and the predictor the exact posterior, so that nothing is left to learn.
"""

import statistics

import torch
from scipy.optimize import linear_sum_assignment

from .distances import over_seeds

STEPS, DRIFT, POINTS = 100, 0.01, 500
CENTRE, SPREAD = 10.0, 1.0
SEEDS = (0, 1, 2, 3, 4)
NOISES, NOISY_STEPS = (0.05, 0.1, 0.2, 0.3), 25
FEW = (1, 3, 5, 10)
LAYERS = (1, 3, 6)
WIDTH, TRAIN_STEPS, PREDICTOR_STEPS, BATCH = 128, 6000, 1500, 512
CLASSES = 100


def schedule() -> torch.Tensor:
    """log-SNR (STEPS,) of the linear-beta schedule of 1,000 steps at every tenth, from noise to clean."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[9::1000 // STEPS]
    return torch.logit(abar).flip(0).float()


def real_points(count: int, random: torch.Generator) -> torch.Tensor:
    """(count, 2)."""
    side = torch.randint(2, (count, 1), generator=random) * 2 - 1
    return side * CENTRE + SPREAD * torch.randn(count, 2, generator=random)


def perceptron(inputs: int, outputs: int, layers: int) -> torch.nn.Sequential:
    """`layers` hidden layers of WIDTH."""
    widths = [inputs, *[WIDTH] * layers]
    hidden = [part for a, b in zip(widths, widths[1:]) for part in (torch.nn.Linear(a, b), torch.nn.SiLU())]
    return torch.nn.Sequential(*hidden, torch.nn.Linear(widths[-1], outputs))


def train(network, loss, steps: int, rate: float = 1e-3):
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        falling.step()
    return network.eval().requires_grad_(False)


class Toy:
    """The trained model of one seed and its predictors."""

    def __init__(self, tag, seed: int):
        torch.manual_seed(seed)
        self.tag, self.random, self.levels = tag, torch.Generator().manual_seed(seed), schedule()
        self.model = train(network := perceptron(3, 2, 3), lambda: self._model_loss(network), TRAIN_STEPS)

    def _noised(self):
        x0 = real_points(BATCH, self.random)
        index = torch.randint(STEPS, (BATCH,), generator=self.random)
        alpha, v = self.tag.levels.alpha_and_variance(self.levels[index])
        eps = torch.randn(x0.shape, generator=self.random)
        return alpha[:, None] * x0 + v.sqrt()[:, None] * eps, index, eps

    def _predict(self, network, u, level):
        return network(torch.cat([u / CENTRE, level[:, None] / 10], dim=1))

    def _model_loss(self, network):
        u, index, eps = self._noised()
        return (self._predict(network, u, self.levels[index]) - eps).square().mean()

    def predictor(self, layers: int, steps: int = PREDICTOR_STEPS):
        """u (B, 2, 1, 1) -> logits (B, STEPS)."""
        torch.manual_seed(layers)
        network = perceptron(2, STEPS, layers)

        def loss():
            u, index, _ = self._noised()
            return torch.nn.functional.cross_entropy(network(u / CENTRE), index)

        train(network, loss, steps)
        return lambda u: network(u.flatten(1) / CENTRE)

    def ask(self, u, level):
        """The clean estimate (B, 2, 1, 1), as a patched ComfyUI model would give it."""
        alpha, v = (value.reshape(-1, 1, 1, 1) for value in self.tag.levels.alpha_and_variance(level))
        eps = self._predict(self.model, u.flatten(1), level).reshape(u.shape)
        return (u - v.sqrt() * eps) / alpha

    def _answer(self, u, level):
        denoised = self.ask(u, level)
        return self.tag.answer.Answer(denoised, denoised)

    def sample(self, steering=None, seed: int = 0, drift: float = 0.0, noise: float = 0.0, steps: int = STEPS) -> torch.Tensor:
        """(POINTS, 2). drift, noise: what is done to u after each step but the last."""
        random = torch.Generator().manual_seed(1000 + seed)
        u = torch.randn(POINTS, 2, 1, 1, generator=random)
        levels = self.levels[torch.linspace(0, STEPS - 1, steps).round().long()]
        for level, after in zip(levels, [*levels[1:], None]):
            level = level.expand(POINTS)
            alpha, v = self.tag.levels.alpha_and_variance(level[:1])
            denoised = self.ask(u, level) if steering is None else steering.estimate(self._answer, u / alpha, u, level)[0]
            if after is None:
                return denoised.flatten(1)
            after_alpha, after_v = self.tag.levels.alpha_and_variance(after)
            u = after_alpha * denoised + (after_v / v).sqrt() * (u - alpha * denoised)
            u = (1 - drift) * u + noise * torch.randn(u.shape, generator=random)


class ExactToy(Toy):
    """The toy without networks: score and time posterior of the two normal distributions themselves."""

    def __init__(self, tag):
        self.tag, self.levels = tag, schedule()
        self.centres = torch.tensor([[CENTRE, CENTRE], [-CENTRE, -CENTRE]])

    def _components(self, u, levels):
        """(distances to both centres (B, K, 2, 2), alpha, total variance (1, K, 1)) at levels (K,)."""
        alpha, v = (value.reshape(1, -1, 1) for value in self.tag.levels.alpha_and_variance(levels))
        return u[:, None, None] - alpha[..., None] * self.centres, alpha, alpha.square() * SPREAD**2 + v

    def judge(self, u):
        """log p(u | level) (B, STEPS), a posterior's logits."""
        distance, _, total = self._components(u.flatten(1), self.levels)
        return torch.logsumexp(-distance.square().sum(3) / (2 * total), dim=2) - total[..., 0].log()

    def ask(self, u, level):
        """E[x0 | u], (B, 2, 1, 1)."""
        alpha, v = (value.reshape(-1, 1, 1) for value in self.tag.levels.alpha_and_variance(level))
        distance = u.flatten(1)[:, None] - alpha * self.centres
        total = alpha.square() * SPREAD**2 + v
        shares = (-distance.square().sum(2) / (2 * total[..., 0])).softmax(dim=1)
        means = self.centres + alpha * SPREAD**2 / total * distance
        return (shares[..., None] * means).sum(dim=1).reshape(u.shape)


CONDITIONS = (
    {"": {"drift": DRIFT}, "no drift, ": {}}
    | {f"noise {noise:g}, ": {"noise": noise, "steps": NOISY_STEPS} for noise in NOISES}
    | {f"{steps} steps, ": {"steps": steps} for steps in FEW}
)
"""What is done to a run, by what stands before its cases' names."""


def floors(tag, seed: int, real: torch.Tensor) -> dict[str, float]:
    """W1 of what no network limits."""
    toy = ExactToy(tag)
    drifting = CONDITIONS[""]
    cases = {
        "exact model, no drift, off": (None, {}), "exact model, off": (None, drifting),
        "exact model, training-free (default)": (steered(toy), drifting),
        "exact model, exact posterior, relative": (steered(toy, toy.judge), drifting),
        "exact model, exact posterior, relative, strength 4": (steered(toy, toy.judge, strength=4.0), drifting),
    }
    for omega in (1.0, 20.0, 200.0):
        settings = {"mode": "score", "strength": omega, "estimate": "published gradient"}
        cases[f"exact model, exact posterior, published gradient, omega {omega:g}"] = (
            steered(toy, toy.judge, **settings), drifting)
    told = {name: wasserstein(toy.sample(used, seed, **done), real) for name, (used, done) in cases.items()}
    others = real_points(POINTS, torch.Generator().manual_seed(900 + seed))
    return {"real points against others": wasserstein(others, real)} | told


def wasserstein(one: torch.Tensor, other: torch.Tensor) -> float:
    """W1 of two equally large sets of points: the mean distance of the best matching."""
    costs = torch.cdist(one.double(), other.double()).numpy()
    return float(costs[linear_sum_assignment(costs)].mean())


def steered(toy: Toy, judge=None, **settings):
    tag = toy.tag
    energy = tag.energy.EnergyEstimator()
    if judge is None:
        return tag.steering.Steering(tag.settings.TagSettings(**settings), energy)

    def gradient(u, level, omega):
        return tag.alignment.published_gradient(u, level, judge, toy.levels)

    estimator = tag.network_estimator.NetworkEstimator(judge, toy.levels, energy)
    return tag.steering.Steering(tag.settings.TagSettings(predictor="toy", **settings), estimator, gradient)


def run(pack, output, data) -> dict:
    from artifact_guard.nodes.tag import alignment, energy, levels, network_estimator, settings, steering  # noqa: F401

    distances: dict[str, list[float]] = {}
    for seed in SEEDS:
        toy = Toy(pack.nodes.tag, seed)
        real = real_points(POINTS, torch.Generator().manual_seed(500 + seed))
        judges = {layers: toy.predictor(layers) for layers in LAYERS}
        told = {}
        for condition, done in CONDITIONS.items():
            cases = {"off": None, "training-free (default)": steered(toy)}
            for layers, judge in judges.items():
                cases[f"predictor of {layers} layers, relative"] = steered(toy, judge)
                if condition:
                    continue
                score = {"mode": "score", "strength": 1.0}
                cases[f"predictor of {layers} layers, score, omega 1, closed form"] = steered(toy, judge, **score)
                cases[f"predictor of {layers} layers, score, omega 1, published gradient"] = steered(
                    toy, judge, estimate="published gradient", **score)
            told |= {f"{condition}{name}": wasserstein(toy.sample(used, seed, **done), real) for name, used in cases.items()}
        for name, value in (told | floors(pack.nodes.tag, seed, real)).items():
            distances.setdefault(name, []).append(value)
    return {name: told_ratio(values, distances[baseline(name)]) for name, values in distances.items()}


def baseline(name: str) -> str:
    """The case that a case's ratio is to: the same model and condition, unguided."""
    exact = "exact model, " if name.startswith("exact model") else ""
    condition = max((c for c in CONDITIONS if name.removeprefix(exact).startswith(c)), key=len)
    return f"{exact}{condition}off"


def told_ratio(values: list[float], bare: list[float]) -> dict:
    """W1 of each seed, and the geometric mean of their ratios with its 95 % interval (Student's t on the logarithms)."""
    ratios = [value / without for value, without in zip(values, bare)]
    return {
        "W1": [round(v, 2) for v in values], "ratio": round(statistics.geometric_mean(ratios), 3),
        "interval_95": [round(v, 3) for v in over_seeds(ratios)], "ratios": [round(r, 3) for r in ratios],
    }
