"""Flaw maps: Grad-CAM (arXiv 1610.02391) of the class "generated" on the highlighter's last convolution."""

import torch
import torch.nn.functional as F

from .backbones import Backbone
from .highlighter import GENERATED, FlawHighlighter, fit_images


def grad_cam(network: Backbone, images: torch.Tensor, target: int = GENERATED) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the evidence for a class lies: ReLU(sum over channels of mean gradient times activation).

    The gradient of the class's logit is taken with respect to the last convolution's output, so only the head is run
    backwards.

    Args:
        images: (B, 3, H, W) in 0..1, on the network's device. Works inside inference mode too, if the network was
            made outside it.

    Returns:
        maps (B, h, w), at the resolution of the last convolution, not negative; logits (B, 2).
    """
    with torch.inference_mode(False):
        with torch.no_grad():
            features = network.features(images.clone())
        with torch.enable_grad():
            features = features.clone().requires_grad_(True)
            logits = network.head(features)
            (gradient,) = torch.autograd.grad(logits[:, target].sum(), features)
    weights = gradient.mean(dim=(-2, -1), keepdim=True)
    return F.relu((weights * features.detach()).sum(dim=1)), logits.detach()


def scale_to_one(maps: torch.Tensor) -> torch.Tensor:
    """Each map (B, h, w) over its own largest value; a map of zeros stays one."""
    largest = maps.amax(dim=(-2, -1), keepdim=True)
    return maps / torch.where(largest > 0, largest, torch.ones_like(largest))


@torch.inference_mode(False)
def flaw_map(
    highlighter: FlawHighlighter, image: torch.Tensor, batch: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """The flaw map of each image, and how surely it is generated.

    Args:
        image: IMAGE (B, H, W, C).
        batch: how many images are judged at once.

    Returns:
        MASK (B, H, W) in 0..1, and probabilities (B,) float64, which tells those near 1 apart, both on the CPU. The maps are relative: 1 is the most suspect
        place of that image, however sound the image is; the probability says how suspect it is.

    Raises:
        ValueError: see `fit_images`.
    """
    images, device = fit_images(image, highlighter.settings), highlighter.load()
    parts = [grad_cam(highlighter.network, part.to(device)) for part in images.split(batch)]
    maps, logits = (torch.cat([part[i].float().cpu() for part in parts]) for i in (0, 1))
    maps = F.interpolate(scale_to_one(maps)[:, None], size=image.shape[1:3], mode="bilinear")[:, 0]
    return maps.clamp(0, 1), logits.double().softmax(dim=1)[:, GENERATED]
