"""Pictures of FAM: a flaw map laid over its image as heat, and the curves of a training run."""

import math

import torch
import torch.nn.functional as F

from ..plots import Panel, draw_chart

HEAT = ((0.0, (0.0, 0.0, 0.0)), (0.35, (0.35, 0.0, 0.45)), (0.7, (0.95, 0.35, 0.1)), (1.0, (1.0, 0.95, 0.4)))
"""(map value, colour): dark, violet, orange, yellow; rising brightness, so that it also reads in grey."""
OPACITY = 0.75


def heat_colours(maps: torch.Tensor) -> torch.Tensor:
    """Colours (B, 3, H, W) of maps (B, H, W) in 0..1, by straight lines between the steps of HEAT."""
    result = torch.zeros(len(maps), 3, *maps.shape[1:])
    for (low, first), (high, second) in zip(HEAT, HEAT[1:]):
        share = ((maps - low) / (high - low)).clamp(0, 1)[:, None]
        first, second = (torch.tensor(colour).view(1, 3, 1, 1) for colour in (first, second))
        result = torch.where((maps >= low)[:, None], first + (second - first) * share, result)
    return result


def draw_heat(image: torch.Tensor, maps: torch.Tensor, smallest: int = 256) -> torch.Tensor:
    """The maps over their images, where they are high; small images are enlarged first.

    Args:
        image: IMAGE (B, H, W, C), 0..1. maps: MASK (B or 1, H, W), 0..1.
        smallest: shorter side of the result in pixels at least, by a whole factor.

    Returns:
        IMAGE (B, H', W', 3) on the CPU.
    """
    image = image[..., :3].float().cpu().movedim(-1, 1).expand(-1, 3, -1, -1).clamp(0, 1)
    factor = max(1, math.ceil(smallest / min(image.shape[-2:])))
    image = F.interpolate(image, scale_factor=factor, mode="nearest")
    maps = F.interpolate(maps.float().cpu()[:, None], size=image.shape[-2:], mode="bilinear")[:, 0].clamp(0, 1)
    opacity = OPACITY * maps[:, None].sqrt()
    return (image * (1 - opacity) + heat_colours(maps) * opacity).movedim(1, -1).clamp(0, 1)


def draw_training(losses: list[float], accuracies: list[float], best_epoch: int) -> torch.Tensor:
    """Loss and held-out accuracy of each epoch, the best one marked, as an IMAGE (1, H, W, 3)."""
    labels = [str(epoch + 1) for epoch in range(max(len(losses), 1))]
    best = [("best", best_epoch - 1.25, best_epoch - 0.75)] if best_epoch else []
    return draw_chart([
        Panel("Training loss", {"loss": losses or [math.nan]}, labels, "epoch", best),
        Panel("Accuracy on held-out images (0.5 is guessing)", {"accuracy": accuracies or [math.nan]}, labels, "epoch", best),
    ])
