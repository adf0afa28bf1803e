"""A trained predictor at work in one run: on the run's device, on all frames of a sample, with the run's conditions."""

import copy

import torch

import comfy.utils

from ..latents import FrameLayout
from .alignment import published_gradient
from .posterior import column
from .predictor import TimePredictor


class Judge:
    """u -> logits over the predictor's levels, for a sampler's tensor.

    The frames of a video share their noise level: their logits are averaged, of those that an inpainting mask paints; the others
    may be clean (image to video). A conditional predictor is asked with the
    run's positive conditions and the answers averaged; without any it answers for all conditions. A condition that holds
    one entry a sample is told to each sample by itself, as the model is.
    """

    def __init__(
        self, predictor: TimePredictor, device: torch.device, layout: FrameLayout, guider, painted: torch.Tensor | None = None
    ):
        """layout: of the part that is judged. painted: (B * T,), 1 for frames that are painted somewhere; None: all are."""
        with torch.inference_mode(False):
            self.network = copy.deepcopy(predictor.network).to(device)
            self.levels = predictor.levels.clone().to(device)
            self.conditions = run_conditions(predictor, guider, layout, device)
            self.shares = None if painted is None else shares_of(painted.clone().unflatten(0, (layout.batch, -1)))
        self.layout = layout

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """(B, K) logits of u (B, ...)."""
        answers = [self.logits(u, condition) for condition in self.conditions or [None]]
        return torch.stack(answers).mean(dim=0)

    def logits(self, u: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """(B, K) under one condition (1 or B * T, D) or None."""
        per_frame = self.network(self.layout.frames(u), condition)
        per_frame = per_frame.unflatten(0, (self.layout.batch, -1))
        return per_frame.mean(dim=1) if self.shares is None else (per_frame * self.shares).sum(dim=1)

    def gradient(self, u: torch.Tensor, level: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
        """The published TLS. With several conditions each one's shift, omega (B,) times its TLS, moves u in turn, and
        the unconditional one's last; what comes back is the whole shift over omega.
        """
        order = list(self.conditions)
        if len(order) != 1:
            order.append(None)
        with torch.inference_mode(False):
            moved, level, omega = u.detach().clone(), level.detach().clone(), column(omega.detach().clone(), u)
            for condition in order:
                tls = published_gradient(moved, level, lambda v, c=condition: self.logits(v, c), self.levels)
                moved = moved + omega * tls
            return (moved - u) / omega


def shares_of(painted: torch.Tensor) -> torch.Tensor:
    """What the logits of each frame count in their sample's, (B, T, 1): painted frames alike, all where none is. painted: (B, T)."""
    painted = torch.where(painted.sum(dim=1, keepdim=True) > 0, painted, torch.ones_like(painted))
    return (painted / painted.sum(dim=1, keepdim=True))[..., None]


def run_conditions(predictor: TimePredictor, guider, layout: FrameLayout, device: torch.device) -> list[torch.Tensor]:
    """The means over tokens of a run's positive conditions, each (1, D), or (B * T, D) where samples have their own; none
    for an unconditional predictor.
    """
    if not predictor.condition_dim:
        return []
    conditions = []
    for entry in guider.original_conds.get("positive") or []:
        tokens = entry.get("cross_attn")
        if tokens is not None and tokens.shape[-1] == predictor.condition_dim:
            means = tokens.detach().clone().float().mean(dim=1).to(device)
            if len(means) > 1:
                each = comfy.utils.repeat_to_batch_size(means, layout.batch)
                means = each.repeat_interleave(layout.frames_per_sample, dim=0)
            conditions.append(means)
    return conditions
