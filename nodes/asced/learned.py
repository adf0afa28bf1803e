"""The default detector: the signals of a whole window, weighed for each place by a small network that sees what surrounds it.

The hand-made rule of dynamics.py looks at one pixel at a time. But what a burst means depends on what is around it: in a
clean run of an uneven picture much moves suddenly, and a spot that locked in before the rest shows by its edges alone.
So the rule's two scores are here two of 23 maps (signals.py), and a network of 48,000 weights, fitted on
planted traps and clean runs by `python dev.py train-trap-net --more`, says where they add up to a trap. It sees no picture, no
channel and no pixel of the latent: only ratios within one frame, on a grid of at most 32 cells along the shorter side.
It was fitted on no trained network, so that the demo model tells what to expect of one that it does not know.

The network was fitted on runs from pure noise, on such as enter late, from a picture or from where another sampler left
off, which it sees on a scale of its own (signals.py), and on inpainting, where it knows what is kept. Where the user's window ends
early, or the steps are too few to tell (ENDS, LEAST_CHANGES), the hand-made rule judges alone.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import comfy.utils

from ...kernels.local_net import local_net
from .detector import NEVER, Findings
from .dynamics import DynamicsDetector, Move
from .estimate import Estimate
from .signals import LATE, Signals

WEIGHTS = Path(__file__).with_name("trap_net.safetensors")

LIMIT, EXTENT = 2.5, -2.0
"""Logits: a region has to reach the first somewhere, and goes as far as the second. After the first fit, of 2,560 clean pictures of
the demo model, which the fit did not know, 34 were flagged with a limit of -0.5, 6 with 1.5 and 2 with 2.5; of traps in it 91, 89 and
88 % were seen. Of 113 traps of wide_traps.py that runs fell into 102 were repaired with 1.5 and with 3, 100 with 4.5."""

CAUTION, MANY_CHANGES = 2.0, 5
"""Added to both where fewer changes than that were seen: there clean runs of few pictures look abrupt. With an earlier
network, in 12 steps of 120 pictures, 3 of 120 clean samples were flagged, with 1 instead of 2 it was 4; no trap of 60 was missed."""

SOFTNESS = 2.0
"""The score is exp((logit - limit) / SOFTNESS): sensitivity 2 moves both limits by 1.4."""

HIGHEST = 50.0
"""The score is cut off here, so that at the lowest sensitivity nothing is abnormal."""

SURE = math.exp((6.8 - LIMIT) / SOFTNESS)
"""Score at sensitivity 1 from which the network has no doubt. With an earlier network 30 of 38 traps of wide_traps.py that runs fell
into reached it, and 2 of the 70 sound places flagged beside them; with a later one a logit of 2.2 repaired no more and
harmed more (8 of 638 sound samples instead of 5)."""

LIKELY = 3.7
"""Score at sensitivity 1 that a region has to reach somewhere not to be doubted. On two sets of traps apart from those that are
reported, of 207 that runs fell into, one more was left unrepaired by renoising regions below it from before their onset, and 5
fewer sound samples were harmed (8 saved, 3 lost). Below SURE, on one of the two, 99 of 105 were repaired either way, and 8
instead of 17 harmed; but on the reported ones 134 of 172 instead of 144, and 17 instead of 24 harmed: too dear."""

ENDS, LEAST_CHANGES = 2.6, 3
"""The network judges windows of so many changes or more whose last ended at this noise ratio b / a or below."""


@functools.lru_cache(maxsize=None)
def trap_net(device: torch.device) -> dict[str, torch.Tensor]:
    """The shipped weights on a device, read once a process."""
    weights = comfy.utils.load_torch_file(str(WEIGHTS), safe_load=True)
    return {name: weight.to(device, torch.float32) for name, weight in weights.items()}


class LearnedDetector(DynamicsDetector):
    """See the module. Beside the hand-made rule's state it keeps eight maps and three estimates on the grid, and how far each
    pixel had come where the window begins late."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.signals = Signals()
        self.travel_before: torch.Tensor | None = None
        self.ended = math.inf
        self.asked = False

    def findings(self, frames_per_sample: int = 1) -> Findings | None:
        findings = super().findings(frames_per_sample)
        if not self.asked:
            return findings
        likely, sure = (in_every_frame(findings.peak >= self.sensitivity * limit, frames_per_sample) for limit in (LIKELY, SURE))
        return findings._replace(likely=likely, sure=sure)

    def observe(self, previous: Estimate, current: Estimate, valid: torch.Tensor | None) -> None:
        if self.newest is None and previous.position < math.log(LATE):
            self.travel_before = self.travel
        super().observe(previous, current, valid)

    def gather(self, velocity: torch.Tensor, ends: torch.Tensor, moves: list[Move]) -> None:
        self.signals.add(velocity, ends, [(move.began, move.ended) for move in moves])
        self.ended = moves[-1].ended

    def maps(self) -> torch.Tensor | None:
        """Conclude as the hand-made rule does; then the signals for the network, (F, K, h, w), or None if it is
        not to judge this window."""
        super().conclude()
        if self.ended > math.log(ENDS) or self.signals.changes < LEAST_CHANGES:
            return None
        straggler = torch.zeros_like(self.burst) if self.straggler is None else self.straggler
        travel = self.travel if self.travel_before is None else self.travel - self.travel_before
        return self.signals.maps(travel, self.burst / self._usual_burst(), straggler, self.burst_at(), self.valid)

    def conclude(self) -> None:
        maps = self.maps()
        if maps is None:
            return
        self.asked = True
        with torch.no_grad():
            logit = local_net(trap_net(maps.device), maps)
        logit = F.interpolate(logit[:, None], size=self.burst.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        limit = LIMIT if self.signals.changes >= MANY_CHANGES else LIMIT + CAUTION
        self.weak = math.exp((EXTENT - LIMIT) / SOFTNESS)
        self.peak = self.sensitivity * torch.exp((logit - limit) / SOFTNESS).clamp(max=HIGHEST)
        if self.valid is not None:
            self.peak = self.peak.masked_fill(~self.valid, 0.0)
        self.onset = torch.where(self.peak > self.weak, self.burst_at(), NEVER)


def in_every_frame(marked: torch.Tensor, frames_per_sample: int) -> torch.Tensor:
    """What some frame of a video marks, all its frames do: (F, H, W) bool, F = batch x time. Else a region that is followed
    through the frames would be drawn from one source here and from another there."""
    videos = marked.unflatten(0, (-1, frames_per_sample))
    return videos.any(dim=1, keepdim=True).expand_as(videos).flatten(0, 1)
