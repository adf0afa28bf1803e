"""What a guard found, did and cost: one record a sampler run, kept in the report that the guard node puts out."""

import functools
import math
from dataclasses import asdict

import torch

import comfy.nested_tensor
import comfy.utils

from ...kernels.regions import label_regions
from ..latents import FrameLayout, frames_to_mask
from ..run_reports import RunReport, fingerprint, image_part
from .detector import NEVER, Findings
from .options import GuardSettings
from .speeds import Speeds
from .window import MIN_STEPS, Window, estimate_phases


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
        self.speed = Speeds()
        self.suspected = False
        self.regions: torch.Tensor | None = None
        self.peak: torch.Tensor | None = None
        self.onset: torch.Tensor | None = None
        self.repairs: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.repaired: torch.Tensor | None = None
        self.doubted: torch.Tensor | None = None
        self.undone: torch.Tensor | None = None
        self.fallen_back: torch.Tensor | None = None
        self.unguarded: torch.Tensor | None = None
        self.why_not_kept: str | None = None
        self.model_calls = 0
        self.restarts = 0
        self.redraws = 0
        self.seconds = 0.0
        self.fingerprint: torch.Tensor | None = None

    def refuse(self, reason: str) -> None:
        """The run went on unguarded, and this is why."""
        self.reason = reason

    def note(self, text: str) -> None:
        self.notes.append(text)

    def plan(self, window: Window, ratios: list[float]) -> None:
        self.window, self.ratios = window, ratios

    def add_speed(self, ratio: float, length: float, speed: torch.Tensor) -> None:
        """Take in |change of the clean estimate| at a step, mean over channels: (F, H, W), latent units per step.

        ratio: b / a at the step. length: how far ln(b / a) fell since the step before; inf from pure noise.
        """
        self.speed.add(ratio, length, speed)

    def settle(self) -> None:
        """No further regions will be looked for."""
        self.speed.settle(self.regions if self.suspected else None)

    def add_findings(self, findings: Findings) -> None:
        """Take in what a round found."""
        self.suspected |= findings.suspected
        if self.regions is None:
            self.regions, self.peak, self.onset = findings.regions, findings.peak, findings.onset
            return
        self.regions = self.regions | findings.regions
        self.peak = torch.maximum(self.peak, findings.peak)
        self.onset = torch.maximum(self.onset, findings.onset)

    def add_repair(self, mask: torch.Tensor, doubted: torch.Tensor | None) -> None:
        """Take in a repair: what was renoised, and what of it from before its onset, both (F, H, W) bool."""
        self.repairs.append((mask, doubted))
        if self.undone is not None:
            self.undone = self.undone & ~mask
        self.restarts += 1

    def add_redraw(self) -> None:
        """Take in that what of a repair fell back was renoised once more."""
        self.redraws += 1

    def undo(self, mask: torch.Tensor) -> None:
        """Take in that the newest repair was put back: where, (F, H, W) bool. What an earlier one renoised there is in the sample
        again, as that one left it."""
        renoised, doubted = self.repairs[-1]
        self.repairs[-1] = renoised & ~mask, doubted
        gone = functools.reduce(lambda left, repair: left & ~repair[0], self.repairs[:-1], mask)
        self.undone = gone if self.undone is None else self.undone | gone

    def keep_unguarded(self, samples: torch.Tensor) -> None:
        """Take in what the run would have given without its repairs, a sampler's tensor in the latent's own units."""
        self.unguarded = samples.cpu()

    def refuse_unguarded(self, reason: str) -> None:
        """What the run would have given without its repairs is not kept, and this is why."""
        self.why_not_kept = reason
        self.note(f"keep_unguarded has no effect: {reason}.")

    def close(self, output: torch.Tensor) -> None:
        """The run is over: bring everything to the CPU and remember what its output looks like."""
        self.speed.close()
        if self.layout is not None:
            for mask, doubted in self.repairs:
                self.repaired = mask if self.repaired is None else self.repaired | mask
                if doubted is not None:
                    self.doubted = doubted & mask if self.doubted is None else (self.doubted & ~mask) | (doubted & mask)
            self.repairs = []
            height, width = self.layout.size
            empty = torch.zeros(self.layout.batch * self.layout.frames_per_sample, height, width, dtype=torch.bool)
            for name in ("regions", "repaired", "doubted", "undone", "fallen_back"):
                mask = getattr(self, name)
                setattr(self, name, empty if mask is None else mask.cpu())
            for name, largest in (("peak", 1e6), ("onset", math.inf)):  # from pure noise on is an onset of inf
                values = getattr(self, name)
                setattr(self, name, empty.float() if values is None else values.float().nan_to_num(0.0, posinf=largest).cpu())
            self.fingerprint = fingerprint(self.layout.frames(output))

    def artifact_mask(self) -> torch.Tensor:
        """The regions found, as a MASK at image size: (frames, height, width), 0 or 1."""
        if self.layout is None:
            return torch.zeros(1, 64, 64)
        return frames_to_mask(self.regions, self.layout, self.latent_format)

    def speeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean speed at each step inside and outside the regions of all frames, each (steps,); NaN without regions."""
        return self.speed.curves(self.regions)

    def without_repairs(self, latent: dict) -> dict:
        """The LATENT that the run gives without its repairs: `latent` itself if nothing was repaired.

        Raises:
            ValueError: something was repaired, and the guard was not asked to keep the rest.
        """
        if self.restarts == 0:
            return latent
        if self.unguarded is None and self.settings.options.keep_unguarded:
            raise ValueError(
                "The unguarded result was not kept: " + (self.why_not_kept or "the run ended before it was there") + "."
            )
        if self.unguarded is None:
            raise ValueError(
                "The unguarded result was not kept: this run was repaired, and what it gives without that is only there "
                "if keep_unguarded is on in the guard's ASCED Options. Switch it on and run again."
            )
        samples = self.unguarded
        if len(self.layout.shapes) > 1:
            samples = comfy.nested_tensor.NestedTensor(comfy.utils.unpack_latents(samples, list(self.layout.shapes)))
        return {**latent, "samples": samples}

    def phases(self, frame: int | None = None) -> tuple[int, int] | None:
        """Where Mutation and Refinement begin, as indices into `speed.ratios`, which may be their number: not in this run. Of one
        frame or of their mean. None if the run was too short to tell, or nothing moved.
        """
        if len(self.speed.ratios) < MIN_STEPS:
            return None
        return estimate_phases(self.speed.of_frame(frame), self.speed.lengths)

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
            "redraws": self.redraws,
            "seconds": round(self.seconds, 3),
            "images": [],
        }
        if self.window is not None:
            result["window"] = {
                "detect_from": self._step(self.window.detect_from),
                "correct_at": self._step(self.window.correct_at),
                "steps": len(self.ratios),
            }
        if self.layout is not None:
            result["images"] = [self._describe(frame) for frame in range(len(self.regions))]
        return result

    def _step(self, step: int) -> dict:
        return {"step": step, "noise_ratio": finite(self.ratios[step])}

    def _describe(self, frame: int) -> dict:
        """One image or frame in plain data."""
        frames = self.layout.frames_per_sample
        found = [self._describe_region(frame, where) for where in split_regions(self.regions[frame])]
        phases = self.phases(frame)
        return {
            "sample": frame // frames,
            "frame": frame % frames,
            "verdict": "artifacts" if found else "not looked at" if self.reason else "clean",
            "artifact_fraction": self.regions[frame].float().mean().item(),
            "repaired_fraction": self.repaired[frame].float().mean().item(),
            "phases": None if phases is None else {
                name: finite(self.speed.ratios[index]) if index < len(self.speed.ratios) else None
                for name, index in zip(("mutation_from", "refinement_from"), phases)
            },
            "regions": found,
        }

    def _describe_region(self, frame: int, where: torch.Tensor) -> dict:
        """One region (H, W) in plain data: its place, when it began, how abnormal it was at most, what became of it."""
        height, width = where.shape
        rows, columns = torch.nonzero(where, as_tuple=True)
        top, left = rows.min().item(), columns.min().item()
        box = (left / width, top / height, (columns.max().item() - left + 1) / width,
               (rows.max().item() - top + 1) / height)
        onset = self.onset[frame][where].max().item()
        if (self.fallen_back[frame] & where).any():
            outcome = "renoised, and the model drew much the same again"
        elif (self.undone[frame] & where).any():
            outcome = "repair undone: its border showed no less than before"
        elif (self.repaired[frame] & where).any():
            outcome = "repaired"
        else:
            outcome = "not repaired"
        return {
            "area": len(rows) / (height * width),
            "box": [round(v, 4) for v in box],
            "onset": None if onset == NEVER else {
                "step": sum(ratio > onset * (1 + 1e-4) for ratio in self.ratios), "noise_ratio": finite(onset)
            },
            "peak": round(self.peak[frame][where].max().item(), 3),
            "outcome": outcome,
            "renoised_from": self._source(self.repaired[frame] & where, self.doubted[frame]),
        }

    def _source(self, repaired: torch.Tensor, doubted: torch.Tensor) -> str | None:
        """What a repaired region (H, W) was renoised from, in words; None if it was not. doubted: (H, W), see add_repair."""
        if not repaired.any():
            return None
        return "before its onset" if (repaired & doubted).any() else self.settings.options.correction


def finite(value: float) -> float | None:
    """The value, or None (null in JSON) for infinity: pure noise has no finite noise ratio."""
    return value if math.isfinite(value) else None


def split_regions(regions: torch.Tensor) -> list[torch.Tensor]:
    """The connected regions of a mask (H, W), each as a mask, the largest first."""
    labels = label_regions(regions[None])[0]
    masks = [labels == label for label in labels.unique().tolist() if label != 0]
    return sorted(masks, key=lambda mask: -mask.sum().item())


class ArtifactReport(RunReport[RunRecord]):
    """The runs of one guarded model, newest last."""

    patched = "guarded"

    def find(self, latent: dict) -> RunRecord:
        """The record of the run that gave this LATENT; see RunReport.find.

        A guard that is off has no runs: its record is an empty one that says so.
        """
        if self.settings.strength > 0:
            return super().find(latent)
        return self._unguarded(latent, "the guard is off (strength 0)")

    def add_unsampled(self, latent: dict) -> None:
        """Take in a run of no steps, which gives the LATENT that it was given and of which the guard hears nothing."""
        record = self._unguarded(latent, "a run of 0 steps has nothing to guard")
        self.add(record, image_part(latent)[1])

    def _unguarded(self, latent: dict, reason: str) -> RunRecord:
        """A record of a run that gave this LATENT and was not looked at."""
        layout, output = image_part(latent)
        record = RunRecord(self.settings, layout, self.latent_format)
        record.refuse(reason)
        record.close(output)
        return record
