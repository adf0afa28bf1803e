"""What a user can set on the guard, checked once, at the node."""

import math
from dataclasses import dataclass, field

DETECTORS = ("clean estimate", "weighted score", "score dynamics")
CORRECTIONS = ("targeted", "state replacement", "score clipping", "surroundings")
MODES = ("correct", "detect only")
WINDOWS = ("auto", "manual")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError, naming the input, unless low <= value <= high."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} is {value!r}; a value from {low:g} to {high:g} is wanted.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(map(repr, choices))} is wanted.")


@dataclass(frozen=True)
class AscedOptions:
    """The finer settings. Lengths are fractions of the image's shorter side, areas fractions of the image.

    Lengths and areas are the published ones, given there in pixels of a 256x256 image: blur 2, area 100 to 10000,
    width 5, dilation 5. The published method is detector "clean estimate" with correction "targeted".
    """

    detector: str = "score dynamics"
    correction: str = "surroundings"
    reverse_step: int = 1
    blur: float = 2 / 256
    min_area: float = 0.0015
    max_area: float = 0.15
    min_width: float = 5 / 256
    dilate: float = 5 / 256
    rounds: int = 1
    noise_seed: int = 0
    keep_unguarded: bool = False

    def __post_init__(self):
        check_choice("detector", self.detector, DETECTORS)
        check_choice("correction", self.correction, CORRECTIONS)
        check_range("reverse_step", self.reverse_step, 1, 100)
        for name in ("blur", "min_width", "dilate"):
            check_range(name, getattr(self, name), 0.0, 0.5)
        for name in ("min_area", "max_area"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        if self.min_area >= self.max_area:
            raise ValueError(
                f"min_area is {self.min_area:g} and max_area {self.max_area:g}: no region can be larger than the one "
                f"and smaller than the other. Raise max_area or lower min_area."
            )
        check_range("rounds", self.rounds, 1, 10)


@dataclass(frozen=True)
class GuardSettings:
    """The guard's own settings; see the node's tooltips for what each does."""

    mode: str = "correct"
    sensitivity: float = 1.0
    strength: float = 1.0
    window: str = "auto"
    detect_from: float = 0.1
    correct_at: float = 0.4
    options: AscedOptions = field(default_factory=AscedOptions)

    def __post_init__(self):
        check_choice("mode", self.mode, MODES)
        check_choice("window", self.window, WINDOWS)
        check_range("sensitivity", self.sensitivity, 0.01, 10.0)
        check_range("strength", self.strength, 0.0, 10.0)
        check_range("detect_from", self.detect_from, 0.0, 1.0)
        check_range("correct_at", self.correct_at, 0.0, 1.0)
        if self.window == "manual" and self.detect_from >= self.correct_at:
            raise ValueError(
                f"detect_from is {self.detect_from:g} and correct_at {self.correct_at:g}: detection has to begin "
                f"before the correction. Lower detect_from or raise correct_at."
            )
