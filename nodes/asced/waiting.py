"""Changes that wait until a few can be judged together.

That alters nothing, since each is judged by itself, but on a GPU a step of small latents costs what it takes to start the kernels.
"""

import torch

import comfy.model_management

TOGETHER, TOGETHER_VALUES = 16, 2**23
"""At most so many changes wait to be judged together, and fewer of latents that hold so many values among them: no more
memory than that, whatever the number of steps. A window of a run of 25 steps has about eight."""

ONE_BY_ONE = ("cpu",)
"""Where starting an operation costs next to nothing, and what is small stays in the cache: there no change waits."""


def how_many_together(frames: torch.Tensor) -> int:
    """How many changes of such frames (F, C, H, W) are judged at once."""
    return 1 if frames.device.type in ONE_BY_ONE else min(TOGETHER, max(1, TOGETHER_VALUES // frames.numel()))


def joined(steps: list[torch.Tensor]) -> torch.Tensor:
    """The frames of several steps as one batch; those of one step as they are."""
    return steps[0] if len(steps) == 1 else torch.cat(steps)


def on_device(numbers: list[float], device: torch.device) -> torch.Tensor:
    """Numbers as float32 there, (N,). Nothing waits for the device, as it would for a copy that is not told so; but on Apple's GPUs,
    which may read such a copy's source when something else is in its place."""
    at_once = comfy.model_management.device_supports_non_blocking(device)
    return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=at_once)


def times(x: torch.Tensor, numbers: list[float]) -> torch.Tensor:
    """The frames of some steps, (steps x F, ...), each times the number of its step."""
    if len(numbers) == 1:
        return x * numbers[0]
    each = on_device(numbers, x.device).repeat_interleave(len(x) // len(numbers))
    return x * each.view(-1, *[1] * (x.ndim - 1))
