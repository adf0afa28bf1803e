"""Flaw maps on a model's tokens: from maps of the latent to one weight a token, for each row of a model call."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class CallView:
    """What one model call sees of the sampler's latent (B, C, [T,] H, W).

    rows: samples in the call: chunks times the batch.
    areas: for each chunk None, or the part of the latent its conditioning is confined to: sizes, then offsets, of the
        latent's axes after the channels.
    frames: indices of the latent frames in the call, when it holds only some of them (context windows).
    wider: columns of a second image that the network is shown at the right of the first.
    samples: indices of the samples in the call, when it holds only some of them.
    """

    rows: int
    areas: tuple[tuple[int, ...] | None, ...] = (None,)
    frames: tuple[int, ...] | None = None
    wider: int = 0
    samples: tuple[int, ...] | None = None


def view_maps(maps: torch.Tensor, view: CallView) -> torch.Tensor:
    """The latent's maps (B, T, H, W) as the rows of a call see them: (rows, t, h, w).

    Rows come chunk by chunk, each chunk the whole batch in order, as ComfyUI concatenates conditionings.
    """
    if view.samples is not None:
        maps = maps[list(view.samples)]
    if view.frames is not None:
        maps = maps[:, list(view.frames)]
    parts = []
    for area in view.areas:
        part, axes = maps, len(area or ()) // 2
        for axis in range(axes):
            part = part.narrow(maps.ndim - axes + axis, area[axes + axis], area[axis])
        parts.append(part)
    return F.pad(torch.cat(parts), (0, view.wider))


def pool_tokens(maps: torch.Tensor, token: tuple[int, int, int]) -> torch.Tensor:
    """The mean map of each token, (rows, tokens), tokens frame by frame and row by row.

    Args:
        maps: (rows, T, H, W).
        token: (frames, height, width) of one token. Sizes that are no multiple of it are padded at the end with the
            last value, where ComfyUI pads the latent.
    """
    pad = [-size % step for size, step in zip(maps.shape[1:], token)]
    maps = F.pad(maps[:, None], (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")
    return F.avg_pool3d(maps, token, stride=token).flatten(1)


def resize_tokens(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps (rows, 1, H, W) on a grid of another size, as the levels of a UNet have it: (rows, height * width)."""
    return F.interpolate(maps, size=(height, width), mode="area").flatten(1)


def level_grid(height: int, width: int, tokens: int, round_up: bool) -> tuple[int, int] | None:
    """The level of a pyramid over (height, width), each half the last, that has this many tokens; None if none has."""
    while height * width > tokens and height * width > 1:
        height, width = ((height + round_up) // 2, (width + round_up) // 2)
        height, width = max(height, 1), max(width, 1)
    return (height, width) if height * width == tokens else None
