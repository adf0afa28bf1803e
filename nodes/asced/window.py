"""When to look and when to repair: the window of a run, planned on its own schedule before it starts."""

import math
from dataclasses import dataclass

MIN_STEPS = 3
"""One change needs two estimates, and after the repair there has to be a step left to use it."""

LATE_CHANGES = 3
"""So many changes a run that enters late is watched for, if it has them: of fewer no detector can say much."""

ROUNDING = 1e-6
"""0.29 of 100 steps is step 29, though 0.29 * 100 is a little less than that."""


def fraction_for(step: int, steps: int) -> float:
    """The smallest fraction in thousandths, as the widgets take it, that means at least this many of the steps."""
    return math.ceil(1000 * step / steps) / 1000


@dataclass(frozen=True)
class Window:
    """Indices into the run's sigmas: estimates from `detect_from` on are compared, the repair is at `correct_at`."""

    detect_from: int
    correct_at: int

    def following(self, steps: int) -> "Window | None":
        """The window of the next round: from the repair on, half as long, at least two steps; None if none fits."""
        correct = self.correct_at + max(2, (self.correct_at - self.detect_from) // 2)
        return Window(self.correct_at, correct) if correct <= steps - 2 else None


def plan_window(
    ratios: list[float], window: str, detect_from: float, correct_at: float, between: tuple[float, float], lead: int = 1
) -> Window | str:
    """Choose the window of a run.

    Args:
        ratios: b / a at every sigma at which a step begins, falling; its length is the number of steps.
        window: "manual" takes the two fractions of the run's steps. "auto" ignores them: it looks from `lead`
            steps before the first one at or below the detector's first noise ratio, so that the changes from there on
            can be compared with what went before, and repairs at the last step not below its second. A run that starts
            below its first (img2img, a second stage) is looked at from its first step on, and for at least a quarter of
            its steps and LATE_CHANGES of them.
        between, lead: where the detector looks, see Detector.

    Returns:
        The window, or the reason why the run cannot be guarded.
    """
    steps = len(ratios)
    last = steps - 2
    if steps < MIN_STEPS:
        return f"a run of {steps} step{'s' * (steps != 1)} is too short to be guarded: {MIN_STEPS} are needed"
    if window == "manual":
        first, correct = (int(fraction * steps + ROUNDING) for fraction in (detect_from, correct_at))
        if correct > last:
            return (
                f"correct_at {correct_at:g} is step {correct} of {steps}, too late: two steps have to be left after "
                f"the repair. Set correct_at to {fraction_for(last, steps)} or less"
            )
        if correct - first < 1:
            return (
                f"the window from {detect_from:g} to {correct_at:g} holds one of the run's {steps} steps, and a change "
                f"needs two. Widen it by at least {fraction_for(1, steps)}"
            )
        return Window(first, correct)
    early = [i for i, ratio in enumerate(ratios) if ratio >= between[1]]
    least = max(steps // 4, LATE_CHANGES) if ratios[0] < between[0] else 2
    correct = min(max(early[-1] if early else 0, least), last)
    visible = sum(ratio > between[0] for ratio in ratios)
    first = max(0, min(visible - lead, correct - 3))
    return Window(first, correct)


def estimate_phases(speeds: list[float], lengths: list[float]) -> tuple[int, int] | None:
    """Where the Mutation and the Refinement phase of a run begin, from how fast its clean estimate moves.

    The speed over ln(b / a), in which all schedules are alike, has one hump. Mutation is where it is at least half as
    high as at its top; Profiling lies before, Refinement after (ASCED, section 3.1, tells the phases by eye).

    Args:
        speeds: mean |D_t - D_(t-1)| of each step; lengths: how far ln(b / a) fell in it, inf from pure noise.

    Returns:
        (first step of Mutation, first step of Refinement), indices into `speeds`; the latter is their number where the run ends
        before it gets there. None if nothing moves.
    """
    rates = [speed / length if 0 < length < math.inf else 0.0 for speed, length in zip(speeds, lengths)]
    top = max(range(len(rates)), key=rates.__getitem__)
    if not rates[top] > 0:
        return None
    first = after = top
    while first > 0 and rates[first - 1] >= rates[top] / 2:
        first -= 1
    while after < len(rates) and rates[after] >= rates[top] / 2:
        after += 1
    return first, after
