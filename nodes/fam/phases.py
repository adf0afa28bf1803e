"""The two-phase rule of FAM training (arXiv 2512.08774): ordinary steps first, then steps that know where the flaws are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """Which phase a step, counted from 0, belongs to, and at which steps the flaw map is renewed.

    steps: of the whole run. base_steps: how many of them are ordinary training. map_every: steps a map lasts.
    """

    steps: int
    base_steps: int
    map_every: int

    @classmethod
    def of(cls, steps: int, base_fraction: float, map_every: int) -> "Phases":
        """The rule as a user states it; the published split is base_fraction 0.5."""
        return cls(steps, round(base_fraction * steps), map_every)

    def refining(self, step: int) -> bool:
        """Whether this step is of the refinement phase."""
        return step >= self.base_steps

    def map_due(self, step: int) -> bool:
        """Whether a new map is to be made before this step."""
        return self.refining(step) and (step - self.base_steps) % self.map_every == 0 and step < self.steps

    def maps(self, first: int) -> int:
        """How many maps are made from step `first` on."""
        return sum(self.map_due(step) for step in range(first, self.steps))

    def stretch_end(self, step: int) -> int:
        """The first step after `step` at which the phase or the map changes, or the end of the run."""
        if not self.refining(step):
            return min(self.base_steps, self.steps)
        return min(step + self.map_every - (step - self.base_steps) % self.map_every, self.steps)
