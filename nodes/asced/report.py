"""What a guard found, did and cost: one record a sampler run, kept in the report that the guard node puts out."""

import math
from dataclasses import asdict

import torch
import torch.nn.functional as F

from ...kernels.regions import label_regions
from ..latents import FrameLayout, frames_to_mask
from ..run_reports import RunReport, fingerprint, image_part
from .options import GuardSettings
from .window import Window

CURVE_PIXELS = 32
"""Speed maps are kept at this size at most: enough to tell inside from outside, and small beside a latent."""


class RunRecord:
    """All that is known of one run of a guarded model. Maps are frames (F, H, W) in latent pixels.

    Args:
        settings: the guard's settings.
        layout: how the run's latent is seen as frames; None if it has no image part.
        latent_format: the model's, for sizes and previews.
    """

    def __init__(self, settings: GuardSettings, layout: FrameLayout | None, latent_format):
        self.settings = settings
        self.layout = layout
        self.latent_format = latent_format
        self.reason: str | None = None
        self.notes: list[str] = []
        self.window: Window | None = None
        self.ratios: list[float] = []
        self.speed_ratios: list[float] = []
        self.speed_maps: list[torch.Tensor] = []
        self.regions: torch.Tensor | None = None
        self.repaired: torch.Tensor | None = None
        self.model_calls = 0
        self.restarts = 0
        self.seconds = 0.0
        self.fingerprint: torch.Tensor | None = None

    def refuse(self, reason: str) -> None:
        """The run went on unguarded, and this is why."""
        self.reason = reason

    def note(self, text: str) -> None:
        self.notes.append(text)

    def plan(self, window: Window, ratios: list[float]) -> None:
        self.window, self.ratios = window, ratios

    def add_speed(self, ratio: float, speed: torch.Tensor) -> None:
        """Take in |change of the clean estimate| at a step, mean over channels: (F, H, W), latent units per step."""
        height, width = (min(CURVE_PIXELS, side) for side in speed.shape[-2:])
        self.speed_ratios.append(ratio)
        self.speed_maps.append(F.adaptive_avg_pool2d(speed[:, None], (height, width))[:, 0])

    def add_regions(self, regions: torch.Tensor) -> None:
        """Take in a round's regions, (F, H, W) bool."""
        self.regions = regions if self.regions is None else self.regions | regions

    def add_repair(self, mask: torch.Tensor) -> None:
        """Take in a repair: what was renoised, (F, H, W) bool."""
        self.repaired = mask if self.repaired is None else self.repaired | mask
        self.restarts += 1

    def close(self, output: torch.Tensor) -> None:
        """The run is over: bring everything to the CPU and remember what its output looks like."""
        self.speed_maps = [m.cpu() for m in self.speed_maps]
        if self.layout is not None:
            height, width = self.layout.size
            empty = torch.zeros(self.layout.batch * self.layout.frames_per_sample, height, width, dtype=torch.bool)
            self.regions = empty if self.regions is None else self.regions.cpu()
            self.repaired = empty if self.repaired is None else self.repaired.cpu()
            self.fingerprint = fingerprint(self.layout.frames(output))

    def artifact_mask(self) -> torch.Tensor:
        """The regions found, as a MASK at image size: (frames, height, width), 0 or 1."""
        if self.layout is None:
            return torch.zeros(1, 64, 64)
        return frames_to_mask(self.regions, self.layout, self.latent_format)

    def speeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean speed at each step inside and outside the regions of all frames, each (steps,); NaN without regions."""
        maps = torch.stack(self.speed_maps, dim=1)
        inside = F.adaptive_max_pool2d(self.regions.float()[:, None], maps.shape[-2:])[:, 0] > 0
        inside = inside[:, None].expand_as(maps)

        def mean(where: torch.Tensor) -> torch.Tensor:
            return (maps * where).nan_to_num().sum(dim=(0, 2, 3)) / where.sum(dim=(0, 2, 3))

        return mean(inside), mean(~inside)

    def summary(self) -> dict:
        """What was found, done and cost, as plain data."""
        settings = asdict(self.settings)
        options = settings.pop("options")
        result = {
            "status": "not guarded" if self.reason else "guarded",
            "reason": self.reason,
            "notes": self.notes,
            "settings": settings | options,
            "window": None,
            "model_calls": self.model_calls,
            "restarts": self.restarts,
            "seconds": round(self.seconds, 3),
            "images": [],
        }
        if self.window is not None:
            first, correct = self.window.detect_from, self.window.correct_at
            result["window"] = {
                "detect_from": {"step": first, "noise_ratio": finite(self.ratios[first])},
                "correct_at": {"step": correct, "noise_ratio": finite(self.ratios[correct])},
                "steps": len(self.ratios),
            }
        if self.layout is not None:
            frames = self.layout.frames_per_sample
            for index, (regions, repaired) in enumerate(zip(self.regions, self.repaired)):
                found = describe_regions(regions)
                result["images"].append({
                    "sample": index // frames,
                    "frame": index % frames,
                    "verdict": "artifacts" if found else "clean",
                    "artifact_fraction": regions.float().mean().item(),
                    "repaired_fraction": repaired.float().mean().item(),
                    "regions": found,
                })
        return result


def finite(value: float) -> float | None:
    """The value, or None (null in JSON) for infinity: pure noise has no finite noise ratio."""
    return value if math.isfinite(value) else None


def describe_regions(regions: torch.Tensor) -> list[dict]:
    """Area (fraction of the image) and box (fractions: left, top, width, height) of each region of a mask (H, W)."""
    height, width = regions.shape
    labels = label_regions(regions[None])[0]
    described = []
    for label in labels.unique().tolist():
        if label == 0:
            continue
        rows, columns = torch.nonzero(labels == label, as_tuple=True)
        top, left = rows.min().item(), columns.min().item()
        box = (left / width, top / height, (columns.max().item() - left + 1) / width,
               (rows.max().item() - top + 1) / height)
        described.append({"area": len(rows) / (height * width), "box": [round(v, 4) for v in box]})
    return sorted(described, key=lambda region: -region["area"])


class ArtifactReport(RunReport[RunRecord]):
    """The runs of one guarded model, newest last."""

    patched = "guarded"

    def find(self, latent: dict) -> RunRecord:
        """The record of the run that gave this LATENT; see RunReport.find.

        A guard that is off has no runs: its record is an empty one that says so.
        """
        if self.settings.strength > 0:
            return super().find(latent)
        layout, output = image_part(latent)
        record = RunRecord(self.settings, layout, self.latent_format)
        record.refuse("the guard is off (strength 0)")
        record.close(output)
        return record
