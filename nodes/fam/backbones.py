"""The highlighter's networks: VGG16 as published, and a small one; weights fresh or from a standard file.

arXiv 2512.08774 uses VGG16's convolutions and two linear layers. Both backbones here end in one convolution whose
activations (after ReLU) the flaw map is read from, `features`, and a head that pools over space, so that images of any
size go in: the paper's head flattens and fixes the size. A head looks at the strongest places besides the mean, because
a flaw that fills one part in a hundred of an image hardly moves a mean.
"""

import math

import torch
import torch.nn.functional as F

import comfy.ops

LAYERS = comfy.ops.disable_weight_init

VGG16_WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
SMALL_LAYERS = (
    (3, 24, 4, 2, 1), (24, 32, 3, 1, 1), (32, 48, 4, 2, 1), (48, 64, 3, 1, 1), (64, 64, 3, 1, 1), (64, 64, 3, 1, 2),
    (64, 64, 1, 1, 1),
)
"""(inputs, outputs, kernel, stride, dilation) of each convolution. Where the stride is 2 the kernel is 4 wide, which keeps
every cell of the map centred on the pixels it stands for; 3 would shift the map by half a cell."""
STRONGEST = 0.05
"""Share of a map's cells that the small backbone's head averages besides all: about the area of a flaw. Measured on planted
flaws (develop images, short runs): the single strongest cell marks a corner of a flaw (map's peak on the flaw in 59 %, IoU
0.06), these mark it whole (82 %, 0.29)."""


class VGG16Head(torch.nn.Module):
    """Mean plus maximum over space, and the two linear layers: features (B, C, h, w), not negative, give logits (B, 2)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.hidden = LAYERS.Linear(channels, hidden)
        self.output = LAYERS.Linear(hidden, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled = features.mean(dim=(-2, -1)) + features.amax(dim=(-2, -1))
        return self.output(F.relu(self.hidden(pooled)))


class SmallHead(torch.nn.Module):
    """Mean of all cells plus mean of the strongest ones of each channel, and one weight a channel: logits (-z, z) / 2.

    Being linear in the pooled channels, it makes Grad-CAM the sum of the channels by their weights: a place is marked
    for what is there, whatever else is in the image.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.output = LAYERS.Linear(channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        cells = features.flatten(2)
        strongest = cells.topk(max(1, int(STRONGEST * cells.shape[-1])), dim=-1).values
        evidence = self.output(cells.mean(dim=-1) + strongest.mean(dim=-1)) / 2
        return torch.cat([-evidence, evidence], dim=1)


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
    """Seven convolutions, 4 pixels a cell of the map, each cell sees 46x46; 0.14 million weights: trains in minutes.

    It learns fast through batch norm, which, unlike norms over the image, does not carry what one place shows to all
    others (planted flaws, equal time: AUC 0.95; with a norm over the channels of each place 0.90).
    """

    def __init__(self):
        super().__init__()
        self.convolutions = torch.nn.ModuleList(
            LAYERS.Conv2d(
                a, b, kernel, stride=stride, dilation=dilation, padding=dilation if kernel > 1 else 0,
                padding_mode="replicate",
            )
            for a, b, kernel, stride, dilation in SMALL_LAYERS
        )
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(layer[1]) for layer in SMALL_LAYERS[:-1])
        self.head = SmallHead(SMALL_LAYERS[-1][1])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the last convolution sees, (B, 64, H / 4, W / 4), of images (B, 3, H, W) in 0..1."""
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
        self.head = VGG16Head(512, 256)

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
        network = BACKBONES[backbone]().eval()
        generator = torch.Generator().manual_seed(seed)
        for name, weight in network.named_parameters():
            gain = 1 if name.startswith("head.output") else 2
            scale = (gain / math.prod(weight.shape[1:])) ** 0.5 if weight.ndim > 1 else 0.0
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
