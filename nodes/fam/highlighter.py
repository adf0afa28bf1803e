"""The flaw highlighter: a network that tells generated from real images, and what is known of it.

arXiv 2512.08774 uses VGG16's convolutions and two linear layers. Both backbones here end in one convolution whose
activations (after ReLU) the flaw map is read from, `features`, and a head that pools over space, so that images of any
size go in: the paper's head flattens and fixes the size. The pool is the sum of mean and maximum, because a flaw that
fills one part in a hundred of an image hardly moves a mean.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F

import comfy.model_management
import comfy.model_patcher
import comfy.ops

REAL, GENERATED = 0, 1
"""The two classes, as columns of the logits."""

KIND = "flaw highlighter"
FOLDER = "flaw_highlighters"

LAYERS = comfy.ops.disable_weight_init

VGG16_WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
SMALL_LAYERS = ((3, 16, 2), (16, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1), (64, 96, 1))
"""(inputs, outputs, stride) of each convolution."""


class Head(torch.nn.Module):
    """Mean plus maximum over space, and the two linear layers: features (B, C, h, w), not negative, give logits (B, 2)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.hidden = LAYERS.Linear(channels, hidden)
        self.output = LAYERS.Linear(hidden, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled = features.mean(dim=(-2, -1)) + features.amax(dim=(-2, -1))
        return self.output(F.relu(self.hidden(pooled)))


class Backbone(torch.nn.Module):
    """What both backbones share: `forward` is the head of `features`."""

    MEAN, DEVIATION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.last_activation = torch.nn.ReLU()

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) from 0..1 to what the convolutions expect."""
        mean, deviation = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.MEAN, self.DEVIATION))
        return (images - mean) / deviation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class SmallBackbone(Backbone):
    """Six convolutions, 8 pixels a cell of the map, 0.15 million weights: trains in minutes."""

    def __init__(self):
        super().__init__()
        self.convolutions = torch.nn.ModuleList(
            LAYERS.Conv2d(a, b, 3, stride=stride, padding=1, padding_mode="replicate") for a, b, stride in SMALL_LAYERS
        )
        self.norms = torch.nn.ModuleList(LAYERS.GroupNorm(8, b) for _, b, _ in SMALL_LAYERS[:-1])
        self.head = Head(SMALL_LAYERS[-1][1], 64)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the last convolution sees, (B, 96, H / 8, W / 8), of images (B, 3, H, W) in 0..1."""
        x = self.normalise(images)
        for convolution, norm in zip(self.convolutions, self.norms):
            x = F.relu(norm(convolution(x)))
        return self.last_activation(self.convolutions[-1](x))


class VGG16Backbone(Backbone):
    """VGG16's thirteen convolutions under their usual names (`features.N`), 16 pixels a cell of the map."""

    MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self):
        super().__init__()
        layers, channels, position = {}, 3, 0
        for width in VGG16_WIDTHS:
            if width == "pool":
                position += 1
                continue
            layers[str(position)] = LAYERS.Conv2d(channels, width, 3, padding=1)
            channels, position = width, position + 2
        self.convolutions = torch.nn.ModuleDict(layers)
        self.head = Head(512, 256)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the last convolution sees, (B, 512, H / 16, W / 16), of images (B, 3, H, W) in 0..1."""
        x, convolutions = self.normalise(images), iter(self.convolutions.values())
        for width in VGG16_WIDTHS[:-1]:
            x = F.max_pool2d(x, 2) if width == "pool" else F.relu(next(convolutions)(x))
        return self.last_activation(next(convolutions)(x))


BACKBONES = {"vgg16": VGG16Backbone, "small": SmallBackbone}
SMALLEST_SIDE = {"vgg16": 32, "small": 16}


def new_network(backbone: str, seed: int) -> Backbone:
    """A network with fresh weights (Kaiming), outside inference mode, so that gradients can go through it."""
    with torch.inference_mode(False):
        network = BACKBONES[backbone]()
        generator = torch.Generator().manual_seed(seed)
        for name, weight in network.named_parameters():
            fan_in = math.prod(weight.shape[1:])
            scale = (2 / fan_in) ** 0.5 if weight.ndim > 1 else 0.0
            values = scale * torch.randn(weight.shape, generator=generator)
            weight.data = values + 1.0 if "norms" in name and name.endswith("weight") else values
        return network


def take_vgg16_weights(network: VGG16Backbone, tensors: dict[str, torch.Tensor]) -> None:
    """Start the convolutions from a standard VGG16 file, whose names are `features.0.weight` to `features.28.bias`.

    Raises:
        ValueError: weights are missing or of other shapes.
    """
    wanted = network.convolutions.state_dict()
    given = {name: tensors.get(f"features.{name}") for name in wanted}
    wrong = [name for name, value in given.items() if value is None or value.shape != wanted[name].shape]
    if wrong:
        raise ValueError(
            f"This is not a VGG16 file: features.{wrong[0]} is missing or of another shape. A file with torchvision's "
            "names (features.0.weight ... features.28.bias) and without batch norm is wanted."
        )
    with torch.inference_mode(False):
        network.convolutions.load_state_dict({name: value.float() for name, value in given.items()})


@dataclass(frozen=True)
class HighlighterSettings:
    """What a highlighter is and how it came to be; goes into its file."""

    backbone: str
    image_size: int
    epochs: int = 0
    accuracy: float = 0.0
    seed: int = 0
    real_images: int = 0
    generated_images: int = 0
    warnings: tuple[str, ...] = field(default_factory=tuple)


class FlawHighlighter:
    """A network and its settings, ready to judge images on the device ComfyUI chose."""

    def __init__(self, network: Backbone, settings: HighlighterSettings):
        self.network = network.eval().requires_grad_(False)
        self.settings = settings
        management = comfy.model_management
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )

    def load(self) -> torch.device:
        """Bring the network to its device; gives the device. Call under torch.inference_mode(False)."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.load_device

    @torch.inference_mode(False)
    @torch.no_grad()
    def generated_probability(self, image: torch.Tensor, batch: int = 16) -> torch.Tensor:
        """How surely each image is generated, (B,), 0..1, on the CPU. image: IMAGE (B, H, W, C)."""
        device, images = self.load(), fit_images(image, self.settings)
        logits = [self.network(part.to(device)).float().cpu() for part in images.split(batch)]
        return torch.cat(logits).softmax(dim=1)[:, GENERATED]

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, settings) for a file: weights in half precision."""
        weights = self.network.state_dict()
        return {name: value.half() for name, value in weights.items()}, asdict(self.settings)

    @classmethod
    def from_state(cls, tensors: dict[str, torch.Tensor], settings: dict) -> "FlawHighlighter":
        """The highlighter that `state` gave.

        Raises:
            ValueError: settings or weights are not a highlighter's.
        """
        try:
            settings = HighlighterSettings(**settings | {"warnings": tuple(settings.get("warnings", ()))})
            with torch.inference_mode(False):
                network = BACKBONES[settings.backbone]()
                network.load_state_dict({name: value.float() for name, value in tensors.items()})
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"The file says that it holds a flaw highlighter, but its content does not fit ({error}). It was "
                "changed or comes from another version: train or save it again."
            ) from error
        return cls(network, settings)


def fit_images(image: torch.Tensor, settings: HighlighterSettings) -> torch.Tensor:
    """An IMAGE as the highlighter sees it: (B, 3, h, w) in 0..1 on the CPU, the shorter side `image_size`.

    Grey images are repeated to three channels, an alpha channel is left out, the aspect is kept.

    Raises:
        ValueError: not a batch of images, other channels than 1, 3 or 4, NaN, or an image too small to judge.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or min(image.shape) < 1:
        raise ValueError(
            f"image: an IMAGE of shape (count, height, width, channels) with 1, 3 or 4 channels is wanted, "
            f"{tuple(image.shape)} came."
        )
    images = image[..., :3].detach().float().cpu().movedim(-1, 1).expand(-1, 3, -1, -1)
    if not torch.isfinite(images).all():
        raise ValueError("image: the image holds NaN or infinite values. A VAE in fp16 is the usual cause.")
    height, width = images.shape[-2:]
    scale = settings.image_size / min(height, width)
    size = tuple(max(settings.image_size, round(side * scale)) for side in (height, width))
    if size != (height, width):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(0, 1).contiguous()
