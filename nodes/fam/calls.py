"""What one model call sees of the sampler's latent, and what else it takes to find the image among its tokens."""

import math
from dataclasses import dataclass

import torch

from .families import Family
from .token_maps import CallView


@dataclass
class Sampled:
    """What CALC_COND_BATCH knows: the whole latent's shape, each conditioning's area by its id, the frames or samples in view."""

    shape: tuple[int, ...]
    areas: dict
    frames: tuple[int, ...] | None
    samples: tuple[int, ...] | None = None


@dataclass
class Call:
    """One model call: its view of the latent, and what is needed to find the image among the tokens.

    before: tokens of a reference image in front of the image. text, references: how many tokens these have.
    alike: attention calls so far in which text and image had equally many tokens.
    """

    shape: tuple[int, ...]
    view: CallView
    network: object
    before: int = 0
    text: int = 0
    references: int = 0
    alike: int = 0

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether x, which the network gets, holds the rows and places of this call: another pack's wrapper around the network may
        have cut it into tiles or rows."""
        places = list(self.shape[2:])
        if self.view.frames is not None:
            places[0] = len(self.view.frames)
        sizes = [tuple(places) if area is None else tuple(area[: len(places)]) for area in self.view.areas]
        samples = self.shape[0] if self.view.samples is None else len(self.view.samples)
        return len(x) == samples * len(sizes) and all(tuple(x.shape[2:]) == size for size in sizes)


def sampled_latent(x: torch.Tensor, conds: list, options: dict) -> Sampled:
    """Read the latent's shape, the areas and the window off the arguments of an evaluation of all conditionings.

    Args:
        x: the sampler's tensor, or of a video the frames of one context window.
        conds: lists of conditionings, as calc_cond_batch gets them.
        options: the model's transformer_options.
    """
    areas = {cond["uuid"]: area_of(cond, x.shape) for group in conds if group for cond in group}
    window = options.get("context_window")
    inside = window_of(window, x.shape)
    if inside is None:
        return Sampled(tuple(x.shape), areas, None)
    total = getattr(window, "total_frames", 0) or max(inside) + 1
    if window.dim == 0:
        return Sampled((total, *x.shape[1:]), areas, None, inside)
    return Sampled((*x.shape[:2], total, *x.shape[3:]), areas, inside)


def model_call(sampled: Sampled, family: Family, network, x, c_crossattn, options: dict, more: dict) -> Call:
    """The call of a network with these arguments of BaseModel.apply_model; `more` are its conditionings by name."""
    areas = tuple(sampled.areas.get(uuid) for uuid in options["uuids"])
    beside = more.get("image_cond")
    view = CallView(len(x), areas, sampled.frames, 0 if beside is None else beside.shape[-1], sampled.samples)
    call, token = Call(sampled.shape, view, network), family.token(network)
    call.text = 0 if c_crossattn is None else c_crossattn.shape[1]
    call.references = sum(tokens_of(latent, token) for latent in more.get("ref_latents") or [])
    if getattr(network, "ref_conv", None) is not None and "reference_latent" in more:
        call.before = tokens_of(more["reference_latent"], token)
    return call


def area_of(cond: dict, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The part of a latent that a conditioning is confined to, cut to the latent as the sampler cuts it."""
    if "area" not in cond:
        return None
    axes, area = len(shape) - 2, tuple(cond["area"])
    sizes, offsets = area[: len(area) // 2], area[len(area) // 2 :]
    missing = axes - len(sizes)
    if missing > 0:
        sizes, offsets = (1 << 30,) * missing + sizes, (0,) * missing + offsets
    sizes, offsets = sizes[:axes], offsets[:axes]
    return (*(min(full - o, s) for full, s, o in zip(shape[2:], sizes, offsets)), *offsets)


def window_of(window, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Which latent frames are in a context window, or which samples, where a video's frames are a batch (dim 0); None if there is no
    window or one of something else."""
    dim = getattr(window, "dim", None)
    if dim != 0 and (dim != 2 or len(shape) != 5):
        return None
    inside = list(window.index_list)
    anchor = getattr(window, "causal_anchor_index", None)
    if anchor is not None and anchor >= 0:
        inside = [anchor, *inside]
    return tuple(inside) if len(inside) == shape[dim] else None


def tokens_of(latent: torch.Tensor, token: tuple[int, int, int]) -> int:
    """How many tokens a latent (..., [T,] H, W) has."""
    sizes = latent.shape[2:] if latent.ndim == 5 else (1, *latent.shape[-2:])
    return math.prod(-(-size // step) for size, step in zip(sizes, token))


def pad_of(network) -> int:
    """The image's tokens are padded to a multiple of this many."""
    return getattr(network, "pad_tokens_multiple", None) or 1
