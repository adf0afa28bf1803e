"""Pictures of a run: its curves with phases shaded, and its regions over the image or over a preview of the latent."""

import numpy as np
import torch

import latent_preview

from ..latents import FrameLayout
from ..plots import Panel, draw_chart, draw_regions
from .report import RunRecord


def draw_curves(record: RunRecord) -> torch.Tensor:
    """Speed and acceleration of the clean estimate inside and outside the regions, as an IMAGE (1, H, W, 3).

    Speed is the mean of |D_t - D_(t-1)| over pixels and channels, in latent units; acceleration its change from step
    to step. Each value stands at the noise ratio b / a of the later of the steps it compares; phases are the run's own.
    """
    if not record.speed.ratios:
        return draw_chart([Panel(f"Not guarded: {record.reason}"[:100], {}, [], "no steps to show")])
    inside, outside = record.speeds()
    speeds = {"inside regions": inside.tolist(), "outside": outside.tolist()}
    accelerations = {
        name: [float("nan")] + [after - before for before, after in zip(line, line[1:])] for name, line in speeds.items()
    }
    labels = [f"{ratio:.2g}" for ratio in record.speed.ratios]
    bands = phase_bands(record)
    axis = "noise ratio b / a of the step (the run goes from left to right)"
    return draw_chart([
        Panel(f"Score speed ({repair_title(record)})", speeds, labels, axis, bands),
        Panel("Score acceleration", accelerations, labels, axis, bands),
    ])


def phase_bands(record: RunRecord) -> list[tuple[str, float, float]]:
    """The run's own phases along the curves, see estimate_phases: (name, first, last) in positions along the x axis."""
    phases = record.phases()
    if phases is None:
        return []
    last = float(len(record.speed.ratios) - 1)
    mutation, refinement = (min(float(index), last) for index in phases)
    return [("Profiling", 0.0, mutation), ("Mutation", mutation, refinement), ("Refinement", refinement, last)]


def repair_title(record: RunRecord) -> str:
    """What the curves say of the repair: where it was, if there was one."""
    if record.window is None or record.restarts == 0:
        return "no repair"
    return f"repair at b / a {record.ratios[record.window.correct_at]:.2g}"


def draw_overlay(record: RunRecord, latent: dict, image: torch.Tensor | None) -> torch.Tensor:
    """The regions over the image, one picture a mask; without an image over a preview of the latent, whose frames have to be as many
    as the run's: of a part of a batch nobody knows which it is, and no regions are drawn.

    Raises:
        ValueError: no pictures with colours, or their number is neither one nor that of the masks.
    """
    mask = record.artifact_mask()
    if image is None:
        image = preview_latent(latent["samples"], record.latent_format)
        if record.regions is not None:  # a picture a latent frame
            mask = record.regions.float() if len(image) == len(record.regions) else torch.zeros(image.shape[:3])
    elif image.ndim != 4 or image.shape[-1] < 3:
        raise ValueError(f"image: a tensor {tuple(image.shape)} came; images (number, height, width, 3) are wanted, not a mask. Connect VAE Decode.")
    elif len(image) not in (1, len(mask)):
        raise ValueError(
            f"image: {len(image)} pictures came for a run of {len(mask)}. Connect the decoded output of the same sampler."
        )
    return draw_regions(image, mask)


def preview_latent(samples: torch.Tensor, latent_format) -> torch.Tensor:
    """A rough picture of each latent frame by the format's own RGB factors, IMAGE (F, h, w, 3) on the CPU."""
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    layout = FrameLayout.of([p.shape for p in parts])
    if layout is None:
        return torch.zeros(1, 64, 64, 3)
    x0 = latent_format.process_in(parts[layout.part].float().cpu())
    frames = FrameLayout.of([layout.shape]).frames(x0)
    if latent_format.latent_rgb_factors is None:
        grey = frames.mean(dim=1, keepdim=True).sigmoid()
        return grey.expand(-1, 3, -1, -1).movedim(1, -1)
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        getattr(latent_format, "latent_rgb_factors_bias", None),
        getattr(latent_format, "latent_rgb_factors_reshape", None),
    )
    pictures = [np.asarray(previewer.decode_latent_to_preview(frame[None])) for frame in frames]
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255.0)
