"""Time gaps of a run: how far, at each model call, the time at which a sample seems to lie is from the step's time."""

import math
from dataclasses import asdict

import torch

from ..latents import FrameLayout
from ..plots import Panel, draw_chart
from ..run_reports import RunReport, fingerprint
from .levels import Schedule
from .posterior import Posterior
from .settings import TagSettings


NO_STEPS = "the run had no steps: its schedule ends where it begins"


class RunRecord:
    """What was measured in one run. Times are thousandths of the model's schedule, 0 clean and 1000 pure noise.

    steps: per model call (step's level (B,), likeliest level (B,)), on the sampler's device until the run is closed.
    painted: (B,) bool, the samples of which an inpainting mask paints something wholly; of the others nothing can be told.
    """

    def __init__(self, settings: TagSettings, layout: FrameLayout | None):
        self.settings = settings
        self.layout = layout
        self.schedule: Schedule | None = None
        self.reason: str | None = None
        self.notes: list[str] = []
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.painted: torch.Tensor | None = None
        self.times = self.estimates = torch.zeros(0, 0)
        self.fingerprint: torch.Tensor | None = None

    def refuse(self, reason: str) -> None:
        """The run was neither measured nor guided, and this is why."""
        self.reason = reason

    def add_step(self, level: torch.Tensor, posterior: Posterior) -> None:
        self.steps.append((level, posterior.likeliest()))

    def close(self, output: torch.Tensor) -> None:
        """The run is over: times (S, B) of its steps and of its samples, on the CPU."""
        if self.layout is None:
            return
        frames = self.layout.frames(output)
        self.fingerprint = fingerprint(frames)
        if not torch.isfinite(frames).all():
            self.notes.append("The run's own result holds NaN or infinite values: its time gaps say nothing.")
        if not self.steps:
            self.reason = self.reason or NO_STEPS
        else:
            steps, samples = (torch.stack(values).cpu() for values in zip(*self.steps))
            self.times, self.estimates = self.schedule.time(steps), self.schedule.time(samples)
            self.steps = []

    def gaps(self) -> torch.Tensor:
        """|time of the sample - time of the step|, (S, B); NaN of a sample that was not painted."""
        gaps = (self.estimates - self.times).abs()
        return gaps if self.painted is None else gaps.masked_fill(~self.painted, math.nan)

    def seen(self) -> torch.Tensor:
        """The times (S, B) at which the samples seem to lie; NaN of a sample that was not painted."""
        return self.estimates if self.painted is None else self.estimates.masked_fill(~self.painted, math.nan)

    def time_gap(self) -> float:
        """The paper's figure: the mean gap over steps and samples; 0 for a run that was not measured."""
        return self.gaps().nanmean().item() if self.times.numel() else 0.0

    def summary(self) -> dict:
        """Everything that was measured, as plain data."""
        return {
            "status": "not measured" if self.reason else "measured only" if self.settings.strength == 0 else "guided",
            "reason": self.reason,
            "notes": self.notes,
            "settings": asdict(self.settings),
            "estimate_of_time": "time predictor" if self.settings.predictor else "training-free",
            "time_gap": rounded(self.time_gap(), 3) if self.times.numel() else None,
            "steps": [
                {"time": rounded(time, 2), "estimated": rounded(estimate, 2), "gap": rounded(gap, 2)}
                for time, estimate, gap in zip(
                    self.times.mean(dim=1).tolist(), self.seen().nanmean(dim=1).tolist(), self.gaps().nanmean(dim=1).tolist()
                )
            ] if self.times.numel() else [],
            "samples": [{"sample": i, "time_gap": rounded(gap, 3)} for i, gap in enumerate(self.gaps().mean(dim=0).tolist())]
            if self.times.numel() else [],
        }


def rounded(value: float, digits: int) -> float | None:
    """The value for JSON; None (null) where it is no number, as in a run whose schedule has none: kl_optimal of one step."""
    return round(value, digits) if math.isfinite(value) else None


class TimeGapReport(RunReport[RunRecord]):
    """The runs of one guided model, newest last."""

    patched = "guided"


def draw_time_gap(record: RunRecord) -> torch.Tensor:
    """Times of steps and samples, and the gap, over the run, as an IMAGE (1, H, W, 3)."""
    if not record.times.numel():
        return draw_chart([Panel(f"Not measured: {record.reason}"[:100], {}, [], "no steps to show")])
    times = record.times.mean(dim=1).tolist()
    labels = [f"{time:.0f}" for time in times]
    axis = "time of the step (1000 pure noise, 0 clean; the run goes from left to right)"
    return draw_chart([
        Panel("Time", {"of the step": times, "of the sample": record.seen().nanmean(dim=1).tolist()}, labels, axis),
        Panel(f"Time gap, mean {record.time_gap():.1f}", {"|sample - step|": record.gaps().nanmean(dim=1).tolist()}, labels, axis),
    ])
