"""What a user can set on temporal alignment guidance, checked once, at the node."""

import math
from dataclasses import dataclass

from .alignment import MODES

ESTIMATES = ("closed form", "published gradient")
ASKED_AT = ("sample's level", "step's level")
LARGEST_STRENGTH = 200.0


@dataclass(frozen=True)
class TagSettings:
    """See the node's tooltips. `predictor` is the identity of the time predictor, "" without one."""

    strength: float = 1.0
    mode: str = "relative"
    start_percent: float = 0.0
    end_percent: float = 1.0
    estimate: str = "closed form"
    ask_at: str = "sample's level"
    predictor: str = ""

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("estimate", ESTIMATES), ("ask_at", ASKED_AT)):
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}; one of {wanted} is wanted.")
        for name, high in (("strength", LARGEST_STRENGTH), ("start_percent", 1.0), ("end_percent", 1.0)):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and 0.0 <= value <= high):
                raise ValueError(f"{name} is {value!r}; a value from 0 to {high:g} is wanted.")
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"start_percent is {self.start_percent:g} and end_percent {self.end_percent:g}: nothing lies between. "
                f"Lower start_percent or raise end_percent."
            )
        if self.estimate == "published gradient" and not self.predictor:
            raise ValueError(
                "estimate: the published gradient is that of a time predictor, and none is connected. Connect one to "
                "time_predictor, or choose 'closed form', which works without."
            )
