"""The regions that refining redraws: where a map is high, grown, with soft edges; and what is put there to start from."""

import torch

from ...kernels.fill import fill_from_surroundings
from ...kernels.regions import dilate_square
from ...kernels.score_dynamics import gaussian_blur
from ..latents import FrameLayout, pixels

SOFTNESS = 0.02
"""Blur of a region's edge, as a fraction of the shorter side; at least half a latent pixel."""
FAINTEST = 0.02
"""Edges fainter than this belong to the outside, which is left untouched."""
LARGEST_FILL = 0.5
"""Share of a frame up to which its regions are filled: beyond it there are too few surroundings to tell what was there."""


def soften(maps: torch.Tensor, threshold: float, grow: float = 0.0) -> torch.Tensor:
    """Regions of maps (F, H, W), at the size of the latent, with soft edges: 0..1, exactly 0 outside.

    grow: by how much the regions are widened on all sides, as a fraction of the shorter side.
    """
    side = min(maps.shape[-2:])
    region = dilate_square(maps >= threshold, pixels(grow, side, 0)).float()
    soft = torch.maximum(region, gaussian_blur(region[:, None], max(0.5, SOFTNESS * side))[:, 0]).clamp(0, 1)
    return torch.where(soft > FAINTEST, soft, 0.0)


def fill_regions(samples: torch.Tensor, regions: torch.Tensor, layout: FrameLayout) -> torch.Tensor:
    """The samples with their regions replaced by the smooth continuation of what surrounds them.

    Renoising as image to image has it keeps much of a flaw: what is coarse in it outlives the noise, and the model
    draws the flaw again. From its surroundings the model has to draw something that belongs there.

    Args:
        samples: (B, C, [T,] H, W). regions: (B, 1, [T,] H, W), redrawn where above 0; frames that are redrawn by more
            than half stay as they are.

    Returns:
        As samples; bit for bit outside the regions.
    """
    holes = layout.frames(regions > 0)[:, 0]
    holes = holes & (holes.float().mean(dim=(1, 2), keepdim=True) <= LARGEST_FILL)
    filled = fill_from_surroundings(layout.frames(samples), holes)
    return layout.with_frames(samples, filled.to(samples))
