"""The default detector: the signals of a whole window, weighed for each place by a small network that sees what surrounds it.

The hand-made rule of dynamics.py looks at one pixel at a time. But what a burst means depends on what is around it: in a
clean run of an uneven picture much moves suddenly, and a spot that locked in before the rest shows by its edges alone.
So the rule's two scores are here two of 17 maps (signals.py), and a network of 12,000 weights, fitted on
develop traps and clean runs by an earlier form of `python dev.py train-trap-net`, says where they add up to a trap. It
sees no picture, no channel and no pixel of the latent: only ratios within one frame, on a grid of at most 32 cells
along the shorter side.

The network was fitted on whole windows of whole pictures. Where a run enters late (image to image), the user's window ends
early, a second round looks at what is left, the steps are too few to tell (BEGINS, ENDS, LEAST_CHANGES), or a part of the
picture is kept (inpainting: its edges lock in from the start), the hand-made rule judges alone.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import comfy.utils

from ...kernels.local_net import local_net
from .detector import NEVER
from .dynamics import DynamicsDetector
from .estimate import Estimate
from .signals import Signals

WEIGHTS = Path(__file__).with_name("trap_net.safetensors")

LIMIT = 0.0
"""Logit at which a place is called abnormal."""

SOFTNESS = 2.0
"""The score is exp((logit - LIMIT) / SOFTNESS): sensitivity 2 moves the limit by 1.4, and regions grow to where it is that
much lower."""

HIGHEST = 50.0
"""The score is cut off here, so that at the lowest sensitivity nothing is abnormal."""

BEGINS, ENDS, LEAST_CHANGES = 5.0, 2.6, 5
"""A whole window: its first change began at this noise ratio b / a or above, its last ended at this one or below, and
there were at least that many. With 3 and 4, as in 12 steps of a flow model at shift 1, clean runs of a data set of 120
pictures were flagged; traps among 1,200 pictures were found better (F1 0.90 instead of 0.73 and 0.75 at 12 and 16 steps)."""


@functools.lru_cache(maxsize=None)
def trap_net(device: torch.device) -> dict[str, torch.Tensor]:
    """The shipped weights on a device, read once a process."""
    weights = comfy.utils.load_torch_file(str(WEIGHTS), safe_load=True)
    return {name: weight.to(device, torch.float32) for name, weight in weights.items()}


class LearnedDetector(DynamicsDetector):
    """See the module. Beside the hand-made rule's state it keeps six maps and three estimates on the grid."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.signals = Signals()
        self.began, self.ended = -math.inf, math.inf

    def gather(self, velocity: torch.Tensor, start: float, current: Estimate) -> None:
        self.signals.add(velocity, start, current.position, current.denoised)
        self.began, self.ended = max(self.began, start), current.position

    def maps(self) -> torch.Tensor | None:
        """Conclude as the hand-made rule does; then the signals for the network, (F, K, h, w), or None if the window
        or the picture was not a whole one."""
        straggler = None if self.peak is None else self.peak / self.sensitivity
        super().conclude()
        whole = self.began >= math.log(BEGINS) and self.ended <= math.log(ENDS) and self.signals.changes >= LEAST_CHANGES
        if not whole or self.valid is not None or self.burst is None or self.travel is None:
            return None
        straggler = torch.zeros_like(self.burst) if straggler is None else straggler
        return self.signals.maps(self.travel, self.burst / self._usual_burst(), straggler, self.burst_at)

    def conclude(self) -> None:
        maps = self.maps()
        if maps is None:
            return
        with torch.no_grad():
            logit = local_net(trap_net(maps.device), maps)
        logit = F.interpolate(logit[:, None], size=self.burst.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        self.peak = self.sensitivity * torch.exp((logit - LIMIT) / SOFTNESS).clamp(max=HIGHEST)
        self.onset = torch.where((self.onset == NEVER) & (self.peak > 1), self.burst_at, self.onset)
