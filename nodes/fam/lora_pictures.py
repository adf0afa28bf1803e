"""Pictures of a flaw-aware training run: its curves, and what is seen while it goes on."""

import math

import numpy as np
import torch
from PIL import Image

from ..plots import Panel, draw_chart
from .flaw_aware import Progress
from .flaw_batch import FlawBatch
from .phases import Phases
from .pictures import draw_heat

POINTS = 150
SHOWN_IMAGES = 6
WIDTH = 768


def bands_of(phases: Phases, ends: list[int]) -> list[tuple[str, float, float]]:
    """The two phases as bands over points that end at these steps."""
    border = sum(end <= phases.base_steps for end in ends) - 0.5
    bands = [("base", -0.5, border), ("refinement", border, len(ends) - 0.5)]
    return [band for band in bands if band[2] > band[1]]


def draw_curves(progress: Progress, phases: Phases, title: str = "") -> torch.Tensor:
    """Loss over the steps and, from map to map, how generated the samples look: an IMAGE (1, H, W, 3)."""
    losses = np.asarray(progress.losses or [math.nan])
    parts = np.array_split(losses, min(POINTS, len(losses)))
    ends = np.cumsum([len(part) for part in parts]).tolist()
    loss = Panel(
        title or "Training loss", {"loss": [float(part.mean()) for part in parts]}, [str(end) for end in ends], "step",
        bands_of(phases, ends),
    )
    steps = [str(step) for step, _ in progress.judged] or ["-"]
    values = [value for _, value in progress.judged] or [math.nan]
    judged = Panel(
        "How generated its samples look to the highlighter (0 real, 1 generated)", {"mean of the map's batch": values}, steps,
        "step at which the map was made",
    )
    return draw_chart([loss, judged], WIDTH)


def draw_batch(batch: FlawBatch) -> torch.Tensor:
    """Samples above, their flaws as heat below, the mean map at the right: (1, H, W, 3), WIDTH wide."""
    images, maps = batch.images[:SHOWN_IMAGES], batch.maps[:SHOWN_IMAGES]
    plain = draw_heat(images, torch.zeros_like(maps))
    heat = draw_heat(images, maps)
    mean = draw_heat(torch.zeros_like(images[:1]), batch.mean_map)
    above = torch.cat([*plain, torch.zeros_like(mean[0])], dim=1)
    below = torch.cat([*heat, mean[0]], dim=1)
    picture = torch.cat([above, below])[None].movedim(-1, 1)
    height = max(1, round(picture.shape[2] * WIDTH / picture.shape[3]))
    return torch.nn.functional.interpolate(picture, size=(height, WIDTH), mode="area").movedim(1, -1)


def preview(progress: Progress, phases: Phases, batch: FlawBatch | None, title: str) -> tuple:
    """What the page shows while the run goes on, in the form in which ComfyUI shows previews."""
    parts = [draw_curves(progress, phases, title)]
    if batch is not None:
        parts.append(draw_batch(batch))
    pixels = (torch.cat(parts, dim=1)[0].clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    return ("JPEG", Image.fromarray(pixels), 1024)
