"""The time predictor: a small network that sees at which noise level a sample lies, p(t | u) or p(t | u, c)."""

import hashlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import comfy.ops

from .levels import CLASSES

SCALES = 3
"""Resolutions at which energies are taken: the sample's own, half and a quarter of it."""

FILTERS = 9
"""Of each channel and scale: the discrete cosine transform of 3x3 positions."""

WIDTHS = (32, 64)
"""Channels of the two convolutions that see what is in the picture, at half the resolution."""

HIDDEN = 256
CONDITION_WIDTH = 64

PER_CHANNEL = (FILTERS + 1) * SCALES + 2
"""Energies of each channel: of its filters and of itself at each scale, and two of its flattest places."""

LEAST_ENERGY = 1e-5
"""Added to energies before their logarithm: a hundredth of the noise at the cleanest level of common schedules."""

EVENING, LEAST_SPREAD = 0.2, 1e-6
"""The power of its own spread that an axis of the energies is divided by, and what is added to the spread before. In a
trial with fixed features alone the held-out gap after 3,000 steps was 1.35 times the exact posterior's without this, 1.22
and 1.23 at powers from 0.15 to 0.25, and 1.41 at 0.5, which is whitening."""

REACH = 6.0
"""Half the span of the classes in the units of the centre that the network names: its output is then of size 1."""

ops = comfy.ops.disable_weight_init


class TimeNetwork(torch.nn.Module):
    """Energies of fixed filters, two convolutions, two linear layers, and a bell over the classes.

    Noise shows in energies: of each filter of a cosine transform of 3x3 positions and of the channels, and of the channels
    themselves, at three scales, half the logarithm of the mean square over positions. Where the picture is flat, noise
    shows alone: the means of 1 / w and 1 / w^2 over windows of 3x3, w being the energy of all filters but the mean, are
    those of the flattest windows, and their quotient does not depend on how many these are.

    All these rise and fall together, by far more than they differ, while the difference is what tells picture from noise.
    So they are turned to the axes of their spread and these made more even (`evening_map`) before anything learns.

    Two learned convolutions with ReLU see the picture at half the resolution: their means and energies tell how much of it
    is signal. All are means over positions, so that any size fits. Out of them a linear map and two hidden layers make
    centre and width of a bell over the classes, and a free term for each class. The bell is normal near its centre and
    falls exponentially far from it: a normal one's gradients grow with the distance, and with them it learned half as fast.

    The paper has four plain blocks of convolution, ReLU and pooling, flattened. It learns slower and less: figures in
    web/docs/TAGTrainTimePredictor.md.

    The mean of a condition over its tokens, embedded, joins before the hidden layers; zeros stand for no condition. All in
    fp32, whatever the model computes in.

    Args:
        channels: of the latent, any number.
        classes: noise levels that are told apart.
        condition_dim: width of the condition's tokens; 0 for an unconditional network.
    """

    def __init__(self, channels: int, classes: int = CLASSES, condition_dim: int = 0):
        super().__init__()
        self.channels, self.classes, self.condition_dim = channels, classes, condition_dim
        shape, like = weight_shapes(channels, classes, condition_dim), {"dtype": torch.float32}
        self.blocks = torch.nn.ModuleList(
            ops.Conv2d(before, after, 3, padding=1, **like) for before, after in zip((channels, *WIDTHS), WIDTHS)
        )
        self.embed = ops.Linear(condition_dim, CONDITION_WIDTH, **like) if condition_dim else None
        features = shape["first.weight"][1]
        self.even = ops.Linear(*reversed(shape["even.weight"]), **like)
        self.first = ops.Linear(features, HIDDEN, **like)
        self.second = ops.Linear(HIDDEN, HIDDEN, **like)
        self.direct = ops.Linear(features, 1, **like)
        self.bell = ops.Linear(HIDDEN, 2, **like)
        self.head = ops.Linear(HIDDEN, classes, **like)
        self.register_buffer("mixing", cosine_transform(channels).reshape(channels, channels, 1, 1), persistent=False)
        self.register_buffer("filters", cosine_filters().repeat(channels, 1, 1, 1), persistent=False)
        self.register_buffer("positions", REACH * torch.linspace(-1, 1, classes), persistent=False)

    def forward(self, u: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, classes) of u (B, C, H, W), and of condition means (B or 1, condition_dim) if there are any."""
        mixed = F.conv2d(u.float(), self.mixing)
        x = torch.cat([self.even(self.energies(mixed)), *self.picture(mixed)], dim=1)
        if self.embed is not None:
            embedded = x.new_zeros(len(x), CONDITION_WIDTH)
            if condition is not None:
                known = (condition != 0).any(dim=1, keepdim=True)
                embedded = (F.relu(self.embed(condition.float())) * known).expand(len(x), -1)
            x = torch.cat([x, embedded], dim=1)
        hidden = F.silu(self.second(F.silu(self.first(x))))
        centre, width = self.bell(hidden).split(1, dim=1)
        centre = REACH / 2 * (centre + self.direct(x))
        distance = (self.positions - centre) * torch.exp(-width.clamp(-REACH, REACH))
        return self.head(hidden) - ((1 + distance.square()).sqrt() - 1)

    def energies(self, x: torch.Tensor) -> torch.Tensor:
        """(B, PER_CHANNEL * C) of mixed channels x (B, C, H, W); noise of variance 1 gives 0 at every scale, but for the
        flattest windows."""
        told = []
        for scale in range(SCALES):
            if scale:
                x = 2 * F.avg_pool2d(x, 2, ceil_mode=True)
            squares = F.conv2d(at_least_3x3(x), self.filters, groups=self.channels).square()
            told += [squares.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))]
            if not scale:
                detail = squares.unflatten(1, (self.channels, FILTERS))[:, :, 1:].mean(dim=2)
                flatness = (detail + LEAST_ENERGY).reciprocal()
                told += [flatness.mean(dim=(2, 3)), flatness.square().mean(dim=(2, 3))]
        return half_logarithm(torch.cat(told, dim=1))

    def picture(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of each convolution the means after ReLU (B, width), then the energies of both."""
        means, squares = [], []
        for block in self.blocks:
            seen = block(F.avg_pool2d(x, 2, ceil_mode=True))
            x = F.relu(seen)
            means.append(x.mean(dim=(2, 3)))
            squares.append(seen.square().mean(dim=(2, 3)))
        return [*means, half_logarithm(torch.cat(squares, dim=1)) + 1.0]


def at_least_3x3(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W) itself, or its edges repeated until a filter fits."""
    height, width = x.shape[-2:]
    if min(height, width) >= 3:
        return x
    return F.pad(x, (0, max(0, 3 - width), 0, max(0, 3 - height)), mode="replicate")


def half_logarithm(energy: torch.Tensor) -> torch.Tensor:
    """Of energies, mean squares: the logarithm of an RMS."""
    return 0.5 * torch.log(energy + LEAST_ENERGY)


def evening_map(energies: torch.Tensor, axes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (axes, F) and bias (axes,) that turn energies (N, F), N >= axes, to the axes of their largest spread about
    their mean, each divided by its spread to the power EVENING: partly whitened, the largest axis still the largest.
    """
    centre = energies.mean(dim=0)
    _, sizes, directions = torch.linalg.svd(energies - centre, full_matrices=False)
    spread = sizes[:axes].square() / len(energies) + LEAST_SPREAD
    weight = directions[:axes] * spread.pow(-EVENING)[:, None]
    return weight, -(weight @ centre)


def cosine_transform(size: int) -> torch.Tensor:
    """The orthonormal discrete cosine transform (DCT-II), (size, size), from the mean to the finest."""
    k = torch.arange(size).float()
    rows = torch.cos(math.pi * (k + 0.5) * k[:, None] / size)
    return rows / rows.norm(dim=1, keepdim=True)


def cosine_filters() -> torch.Tensor:
    """The FILTERS filters, (FILTERS, 1, 3, 3), each of norm 1."""
    rows = cosine_transform(3)
    return torch.einsum("ik,jl->ijkl", rows, rows).reshape(FILTERS, 1, 3, 3)


def weight_shapes(channels: int, classes: int, condition_dim: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of such a network."""
    widths = (channels, *WIDTHS)
    energies = PER_CHANNEL * channels
    axes = min(energies, HIDDEN)
    features = axes + 2 * sum(WIDTHS) + (CONDITION_WIDTH if condition_dim else 0)
    layers = {"even": (axes, energies), "first": (HIDDEN, features), "second": (HIDDEN, HIDDEN), "direct": (1, features)}
    layers |= {"bell": (2, HIDDEN), "head": (classes, HIDDEN)}
    layers |= {"embed": (CONDITION_WIDTH, condition_dim)} if condition_dim else {}
    layers |= {f"blocks.{i}": (widths[i + 1], widths[i], 3, 3) for i in range(len(WIDTHS))}
    shapes = {}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def initial_weights(channels: int, classes: int, condition_dim: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights to begin training with: normal with variance 2 / (fan in) as suits ReLU (He et al. 2015), biases 0.

    What names the level begins at 0; the energies are taken as they are until the training's data are known
    (`evening_map`). ComfyUI's layers come without values.
    """
    random = torch.Generator().manual_seed(seed % 2**63)
    weights = {
        name: torch.randn(shape, generator=random) * math.sqrt(2.0 / math.prod(shape[1:])) if len(shape) > 1
        else torch.zeros(shape)
        for name, shape in weight_shapes(channels, classes, condition_dim).items()
    }
    weights |= {name: torch.zeros_like(weights[name]) for name in ("direct.weight", "bell.weight", "head.weight")}
    return weights | {"even.weight": torch.eye(*weights["even.weight"].shape)}


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
