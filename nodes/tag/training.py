"""Training of a time predictor: cross-entropy of the noise level of samples that the forward process made.

Every step draws its batch, levels and noise from a generator seeded by (seed, step), so that a run that was stopped and
gone on with is the same run, bit for bit. On a GPU levels and noise are drawn there, which gives other draws than a CPU,
and nothing waits for it: a step is many small launches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .levels import CLASSES, Schedule, alpha_and_variance
from .predictor import ModelKind, TimePredictor, TrainingState, build_network, evening_map, initial_weights

RATE = 20.0
"""Adam's step size in units of the node's learning rate: the paper's 1e-4 is for a hundred times as many steps. 30 was no
faster."""

WARM_UP = 100
"""Steps over which the step size rises."""

EMA_POWER = 6.0
"""The weights of step t count as t^6 in the average: most of it is the last seventh of the training, however long that
is. This does nearly what a falling learning rate would (held-out gap 2 % higher), and training can stop and go on anywhere."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
CONDITION_DROPOUT = 0.1
"""Share of the samples that a conditional predictor sees without their condition: it then answers p(t | u) too."""

BETWEEN = 4
"""Levels from one class to the next at which a sample's posterior is taken: it is as narrow as a class on 3x32x32 latents,
and narrower on larger ones."""

EVENED_BY = 2048
"""Noised frames from which the spread of the energies is taken before the first step."""

HELD_OUT = 0.1
GOLDEN = 0.6180339887498949
HELD_OUT_DRAWS = 512
KEPT_ON_GPU = 0.25
"""Share of the GPU's free memory that the frames may take there; larger ones stay on the CPU and go over batch by batch."""
JUDGED_AT_ONCE = 64


@dataclass(frozen=True)
class TrainingData:
    """Clean frames in the model's own latent space, and what belongs to each.

    frames: (N, C, H, W) float32. conditions: (N, D), the mean of each frame's condition over its tokens, or None.
    clips: (N,), the sample that each frame is of, counted from 0; None where every frame is one.
    """

    frames: torch.Tensor
    conditions: torch.Tensor | None = None
    clips: torch.Tensor | None = None

    def split(self) -> tuple["TrainingData", "TrainingData"]:
        """(to train on, held out): of the samples a tenth, at least one, is held out with all its frames; of a single video the last
        tenth of its frames.

        No seed decides it, and more samples after the first change next to nothing: a training that is gone on with under another
        seed must not be judged by what it was trained on.
        """
        clips = torch.arange(len(self.frames)) if self.clips is None else self.clips
        count = int(clips.max()) + 1
        if count == 1:
            order, clips, count = torch.arange(len(clips)).flip(0), torch.arange(len(clips)), len(clips)
        else:  # the places of multiples of the golden ratio, which lie evenly however many there are and have no period
            order = torch.argsort((torch.arange(1, count + 1, dtype=torch.float64) * GOLDEN).frac(), stable=True)
        held = torch.isin(clips, order[:max(1, round(HELD_OUT * count))])
        return self.take((~held).nonzero()[:, 0]), self.take(held.nonzero()[:, 0])

    def take(self, rows: torch.Tensor) -> "TrainingData":
        """These rows, wherever the data lie."""
        rows = rows.to(self.frames.device, non_blocking=True)
        return TrainingData(self.frames[rows], None if self.conditions is None else self.conditions[rows])

    def to(self, device: torch.device) -> "TrainingData":
        return TrainingData(self.frames.to(device), None if self.conditions is None else self.conditions.to(device))


@dataclass(frozen=True)
class TrainingSettings:
    """What the node sets. Raises ValueError for values that cannot work."""

    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a whole number of 1 or more is wanted.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; a value above 0 is wanted, such as 1e-4.")


def new_predictor(kind: ModelKind, schedule: Schedule, size: tuple[int, int], condition_dim: int, seed: int) -> TimePredictor:
    """An untrained predictor for this kind of model."""
    weights = initial_weights(kind.channels, CLASSES, condition_dim, seed)
    network = build_network(weights, kind.channels, CLASSES, condition_dim)
    return TimePredictor(network, schedule.grid(), kind, 0, size)


class Trainer:
    """One run of training, step by step; `result` may be asked for at any time.

    To be made and used with inference mode off. Adam; the weights that are used are a moving average (EMA_POWER).

    Args:
        predictor: to begin with; it is not changed.
        device: where to train.
    """

    def __init__(self, predictor: TimePredictor, data: TrainingData, settings: TrainingSettings, device: torch.device):
        self.start, self.settings, self.device = predictor, settings, device
        self.data = data.to(device) if fits_on_gpu(data, device) else data
        self.steps = predictor.steps
        average = predictor.network.state_dict()
        state = predictor.training
        shape = (predictor.kind.channels, len(predictor.levels), predictor.condition_dim)
        self.network = build_network(state.weights if state else average, *shape).to(device).train().requires_grad_(True)
        self.network.even.requires_grad_(False)
        fine = BETWEEN * (len(predictor.levels) - 1) + 1
        self.fine = torch.linspace(float(predictor.levels[0]), float(predictor.levels[-1]), fine).to(device)
        self.sharing = shared_between_classes(torch.arange(fine) / BETWEEN, len(predictor.levels)).to(device)
        if not self.steps:
            average = average | self._even_energies()
        self.average = {name: weight.detach().clone().to(device) for name, weight in average.items()}
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=RATE * settings.learning_rate, betas=BETAS, eps=EPSILON,
            foreach=device.type == "cuda",
        )
        if state:
            for name, parameter in self.network.named_parameters():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(predictor.steps)),
                    "exp_avg": state.first[name].clone().to(device),
                    "exp_avg_sq": state.second[name].clone().to(device),
                }

    def step(self) -> torch.Tensor:
        """One step; gives its loss, () on the training's device (nats: the logarithm of the number of classes is chance)."""
        u, condition, targets = self._draw(self.steps)
        loss = F.cross_entropy(self.network(u, condition), targets)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * self.settings.learning_rate * min(1.0, (self.steps + 1) / WARM_UP)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        share = min(1.0, (EMA_POWER + 1) / self.steps)
        with torch.no_grad():
            for name, weight in self.network.state_dict().items():
                self.average[name].lerp_(weight, share)
        return loss.detach()

    def _even_energies(self) -> dict[str, torch.Tensor]:
        """Set the network's map of energies by those of noised frames; its weights by name."""
        with torch.no_grad():
            draws = range(-math.ceil(EVENED_BY / self.settings.batch_size), 0)
            seen = [self.network.energies(F.conv2d(self._draw(step)[0], self.network.mixing)).cpu() for step in draws]
            weight, bias = evening_map(torch.cat(seen), len(self.network.even.bias))
            self.network.even.weight.copy_(weight)
            self.network.even.bias.copy_(bias)
        return {"even.weight": weight, "even.bias": bias}

    def _draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """u (B, C, H, W), conditions (B, D) or None and targets (B, classes) of a step, on the training's device. Draws of
        steps below 0 are none of the training's.
        """
        seed = (self.settings.seed * 1_000_003 + step) % 2**63
        random = torch.Generator().manual_seed(seed)
        batch = self.data.take(torch.randint(len(self.data.frames), (self.settings.batch_size,), generator=random))
        if self.device.type == "cuda":
            batch, random = batch.to(self.device), torch.Generator(self.device).manual_seed(seed)
        u, level = noised(batch.frames, self.start.levels, random)
        condition = batch.conditions
        if condition is not None:
            kept = torch.rand(len(condition), 1, generator=random, device=condition.device) >= CONDITION_DROPOUT
            condition = (condition * kept).to(self.device)
        u, level, frames = u.to(self.device), level.to(self.device), batch.frames.to(self.device)
        return u, condition, log_posterior(u, frames, level, self.fine).softmax(dim=1) @ self.sharing

    def result(self) -> TimePredictor:
        """The predictor as it is now, with all that going on with it needs, on the CPU."""
        start = self.start
        network = build_network(
            {k: v.cpu() for k, v in self.average.items()}, start.kind.channels, len(start.levels), start.condition_dim
        )
        training = None
        if self.optimizer.state:
            moments = {"exp_avg": {}, "exp_avg_sq": {}}
            for name, parameter in self.network.named_parameters():
                state = self.optimizer.state.get(parameter, {})
                for moment, values in moments.items():
                    values[name] = state.get(moment, torch.zeros_like(parameter)).detach().cpu().clone()
            latest = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
            training = TrainingState(latest, *moments.values())
        return TimePredictor(network, start.levels, start.kind, self.steps, tuple(self.data.frames.shape[-2:]), training)


def fits_on_gpu(data: TrainingData, device: torch.device) -> bool:
    """Whether the frames may lie on this device during training: a CUDA device with memory to spare."""
    if device.type != "cuda":
        return False
    return data.frames.nbytes <= KEPT_ON_GPU * torch.cuda.mem_get_info(device)[0]


def noised(frames: torch.Tensor, levels: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """u (B, C, H, W) of clean frames at levels (B,) drawn evenly over the grid's range, and these levels.

    Everything is drawn on the frames' device, which is `random`'s.
    """
    level = levels[0] + (levels[-1] - levels[0]) * torch.rand(len(frames), generator=random, device=frames.device)
    alpha, variance = (value.reshape(-1, 1, 1, 1) for value in alpha_and_variance(level))
    return alpha * frames + variance.sqrt() * torch.randn(frames.shape, generator=random, device=frames.device), level


def log_posterior(u: torch.Tensor, frames: torch.Tensor, level: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """log p(level | u, x0) up to a constant, (B, K) at `levels` (K,), of u made of clean frames x0 at `level` (B,).

    ln N(u; alpha x0, v) for every level. As a target its mean given u is p(level | u), like that of the level itself, and
    it scatters less. |u - alpha x0|^2 is taken from the true level's residual, so that no digits are lost.
    """
    clean, (alpha, variance) = frames.flatten(1), alpha_and_variance(levels)
    true_alpha = alpha_and_variance(level)[0][:, None]
    residual, beyond = u.flatten(1) - true_alpha * clean, true_alpha - alpha
    squares = residual.square().sum(dim=1, keepdim=True)
    crossed, energy = (residual * clean).sum(dim=1, keepdim=True), clean.square().sum(dim=1, keepdim=True)
    distance = squares + 2 * beyond * crossed + beyond.square() * energy
    return -0.5 * (clean.shape[1] * variance.log() + distance / variance)


def shared_between_classes(position: torch.Tensor, classes: int) -> torch.Tensor:
    """Targets (B, classes) of places (B,): the two classes beside each share it, the nearer one has more."""
    return (1 - (position[:, None] - torch.arange(classes, device=position.device)).abs()).clamp_min(0)


def held_out_time_gap(
    judge: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor], levels: torch.Tensor, data: TrainingData,
    schedule: Schedule, seed: int = 0, draws: int = HELD_OUT_DRAWS, latest: float = 1000.0,
) -> float:
    """Mean |time of the likeliest class - true time| over noised held-out frames, in thousandths of the schedule.

    Args:
        judge: u (B, C, H, W), conditions (B, D) or None -> logits (B, classes).
        latest: only draws up to this time count.
    """
    random = torch.Generator().manual_seed(seed % 2**63)
    times = latest * torch.rand(draws, generator=random, dtype=torch.float64)
    level = schedule.level(times).float()
    batch = data.take(torch.randint(len(data.frames), (draws,), generator=random))
    alpha, variance = (value.reshape(-1, 1, 1, 1) for value in alpha_and_variance(level))
    u = alpha * batch.frames + variance.sqrt() * torch.randn(batch.frames.shape, generator=random)
    with torch.no_grad():
        guesses = []
        for rows in torch.arange(draws).split(JUDGED_AT_ONCE):
            condition = None if batch.conditions is None else batch.conditions[rows]
            guesses.append(judge(u[rows], condition).argmax(dim=1).cpu())
    return (schedule.time(levels[torch.cat(guesses)]) - times).abs().mean().item()
