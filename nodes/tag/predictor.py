"""The time predictor: a small network that sees at which noise level a sample lies, p(t | u) or p(t | u, c)."""

import hashlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import comfy.ops

from .levels import CLASSES

WIDTHS = (32, 64, 128, 256)
"""Channels of the four blocks, as published."""

CONDITION_WIDTH = 64

ops = comfy.ops.disable_weight_init


class TimeNetwork(torch.nn.Module):
    """Four blocks (3x3 convolution, ReLU, 2x2 average pool), the mean over positions, a linear layer to the classes.

    The paper flattens before the linear layer, which fixes the image's size; the mean does not. The mean of a condition
    over its tokens, embedded, joins before the linear layer; zeros stand for no condition. All in fp32, whatever the
    model computes in.

    Args:
        channels: of the latent, any number.
        classes: noise levels that are told apart.
        condition_dim: width of the condition's tokens; 0 for an unconditional network.
    """

    def __init__(self, channels: int, classes: int = CLASSES, condition_dim: int = 0):
        super().__init__()
        self.channels, self.classes, self.condition_dim = channels, classes, condition_dim
        self.blocks = torch.nn.ModuleList(
            ops.Conv2d(before, after, 3, padding=1, dtype=torch.float32)
            for before, after in zip((channels, *WIDTHS), WIDTHS)
        )
        embedded = CONDITION_WIDTH if condition_dim else 0
        self.embed = ops.Linear(condition_dim, embedded, dtype=torch.float32) if condition_dim else None
        self.head = ops.Linear(WIDTHS[-1] + embedded, classes, dtype=torch.float32)

    def forward(self, u: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, classes) of u (B, C, H, W), and of condition means (B or 1, condition_dim) if there are any."""
        x = u.float()
        for block in self.blocks:
            x = F.avg_pool2d(F.relu(block(x)), 2, ceil_mode=True)
        x = x.mean(dim=(2, 3))
        if self.embed is not None:
            embedded = x.new_zeros(len(x), CONDITION_WIDTH)
            if condition is not None:
                known = (condition != 0).any(dim=1, keepdim=True)
                embedded = (F.relu(self.embed(condition.float())) * known).expand(len(x), -1)
            x = torch.cat([x, embedded], dim=1)
        return self.head(x)


def weight_shapes(channels: int, classes: int, condition_dim: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of such a network."""
    widths = (channels, *WIDTHS)
    shapes = {f"blocks.{i}.weight": (widths[i + 1], widths[i], 3, 3) for i in range(len(WIDTHS))}
    shapes |= {f"blocks.{i}.bias": (width,) for i, width in enumerate(WIDTHS)}
    if condition_dim:
        shapes |= {"embed.weight": (CONDITION_WIDTH, condition_dim), "embed.bias": (CONDITION_WIDTH,)}
    joined = WIDTHS[-1] + (CONDITION_WIDTH if condition_dim else 0)
    return shapes | {"head.weight": (classes, joined), "head.bias": (classes,)}


def initial_weights(channels: int, classes: int, condition_dim: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights to begin training with, normal with variance 2 / (fan in) as suits ReLU (He et al. 2015); biases 0.
    ComfyUI's layers come without any.
    """
    random = torch.Generator().manual_seed(seed % 2**63)
    return {
        name: torch.randn(shape, generator=random) * math.sqrt(2.0 / math.prod(shape[1:])) if len(shape) > 1
        else torch.zeros(shape)
        for name, shape in weight_shapes(channels, classes, condition_dim).items()
    }


def build_network(weights: dict[str, torch.Tensor], channels: int, classes: int, condition_dim: int) -> TimeNetwork:
    """A network with copies of these weights in fp32. To be called with inference mode off if it is to give gradients.

    Raises:
        ValueError: names or shapes are not those of such a network.
    """
    wanted = weight_shapes(channels, classes, condition_dim)
    came = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong = sorted(name for name in wanted.keys() | came.keys() if wanted.get(name) != came.get(name))
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights are not those of a time predictor with {channels} channels and {classes} classes, "
            f"such as {wrong[0]}: {came.get(wrong[0])} came, {wanted.get(wrong[0])} was wanted"
        )
    network = TimeNetwork(channels, classes, condition_dim)
    network.load_state_dict({name: weight.detach().float().clone() for name, weight in weights.items()})
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class ModelKind:
    """The kind of model a predictor is for: what it must share with the model it is used with.

    schedule: the model's log-SNR at nine times, from clean to pure noise.
    """

    latent_format: str
    channels: int
    prediction_type: str
    schedule: tuple[float, ...]


@dataclass
class TrainingState:
    """What going on with training needs beside the averaged weights: the latest weights and Adam's moments, by name."""

    weights: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]


@dataclass
class TimePredictor:
    """A trained predictor. Training never changes one: going on with it gives another.

    network: with the averaged (EMA) weights, on the CPU.
    levels: (classes,) log-SNR of each class, from noise to clean.
    steps: training steps so far. size: (height, width) in latent pixels it was trained on.
    training: None in files that were made small for sharing.
    """

    network: TimeNetwork
    levels: torch.Tensor
    kind: ModelKind
    steps: int
    size: tuple[int, int]
    training: TrainingState | None = None
    identity: str = field(init=False)

    def __post_init__(self):
        digest = hashlib.sha256(self.levels.numpy().tobytes())
        for name, weight in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + weight.contiguous().numpy().tobytes())
        self.identity = digest.hexdigest()[:16]

    @property
    def condition_dim(self) -> int:
        return self.network.condition_dim
