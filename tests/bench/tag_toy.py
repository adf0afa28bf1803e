"""Q3, third part: the paper's toy. Two normal distributions in the plane at +-(10, 10), a small network as the model.

100 steps of DDIM on a linear-beta schedule; after each, every point drifts by -0.01 of itself towards the origin. The
Wasserstein distance W1 to real points is that of an optimal matching. Ratios are paired: the same start points.

What could be reached at all is measured beside it: W1 between two draws of real points, and the same runs where the
model is the exact score and the predictor the exact posterior, so that nothing is left to learn.
"""

import torch
from scipy.optimize import linear_sum_assignment

STEPS, DRIFT, POINTS = 100, 0.01, 500
CENTRE, SPREAD = 10.0, 1.0
SEEDS = (0, 1, 2)
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

    def sample(self, steering=None, drift: float = DRIFT, seed: int = 0) -> torch.Tensor:
        """(POINTS, 2)."""
        u = torch.randn(POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(1000 + seed))
        for step, level in enumerate(self.levels):
            level = level.expand(POINTS)
            alpha, v = self.tag.levels.alpha_and_variance(level[:1])
            denoised = self.ask(u, level) if steering is None else steering.estimate(self._answer, u / alpha, u, level)[0]
            if step + 1 == STEPS:
                return denoised.flatten(1)
            after_alpha, after_v = self.tag.levels.alpha_and_variance(self.levels[step + 1])
            u = after_alpha * denoised + (after_v / v).sqrt() * (u - alpha * denoised)
            u = u - drift * u


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


def floors(tag, seed: int, real: torch.Tensor) -> dict[str, float]:
    """W1 of what no network limits."""
    toy = ExactToy(tag)
    cases = {
        "exact model, no drift, off": (None, 0.0), "exact model, off": (None, DRIFT),
        "exact model, training-free (default)": (steered(toy), DRIFT),
        "exact model, exact posterior, relative": (steered(toy, toy.judge), DRIFT),
        "exact model, exact posterior, relative, strength 4": (steered(toy, toy.judge, strength=4.0), DRIFT),
    }
    for omega in (1.0, 20.0, 200.0):
        settings = {"mode": "score", "strength": omega, "estimate": "published gradient"}
        cases[f"exact model, exact posterior, published gradient, omega {omega:g}"] = (
            steered(toy, toy.judge, **settings), DRIFT)
    told = {name: wasserstein(toy.sample(used, drift, seed), real) for name, (used, drift) in cases.items()}
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
        cases = {"no drift, off": (None, 0.0), "no drift, training-free (default)": (steered(toy), 0.0), "off": (None, DRIFT),
                 "training-free (default)": (steered(toy), DRIFT)}
        for layers in LAYERS:
            judge = toy.predictor(layers)
            score = {"mode": "score", "strength": 1.0}
            cases |= {
                f"predictor of {layers} layers, relative": (steered(toy, judge), DRIFT),
                f"predictor of {layers} layers, score, omega 1, closed form": (steered(toy, judge, **score), DRIFT),
                f"predictor of {layers} layers, score, omega 1, published gradient": (
                    steered(toy, judge, estimate="published gradient", **score), DRIFT),
            }
        told = {name: wasserstein(toy.sample(used, drift, seed), real) for name, (used, drift) in cases.items()}
        for name, value in (told | floors(pack.nodes.tag, seed, real)).items():
            distances.setdefault(name, []).append(value)
    return {name: told_ratio(values, distances[baseline(name)]) for name, values in distances.items()}


def baseline(name: str) -> str:
    """The case that a case's ratio is to: the same model and drift, unguided."""
    exact = "exact model, " if name.startswith("exact model") else ""
    return f"{exact}no drift, off" if "no drift" in name else f"{exact}off"


def told_ratio(values: list[float], bare: list[float]) -> dict:
    ratios = [round(value / without, 3) for value, without in zip(values, bare)]
    return {"W1": [round(v, 2) for v in values], "ratio": round(sum(ratios) / len(ratios), 3), "ratios": ratios}
