"""The attention patch: FAM's reverse process, K * (1 + s * M) and V * (1 + s * M) in self-attention (arXiv 2512.08774).

The paper leaves open how the map M becomes M_emb. Here it is the map averaged over each token, equal over heads and
channels. The model is patched by ComfyUI's own hooks: two wrappers note what a model call sees of the latent, and the
family's attention hook scales the image's tokens there. Nothing is kept from one call to the next but the maps on
their grids, and these go when the run ends.
"""

import contextlib
import logging
import math
import uuid
from dataclasses import dataclass

import torch

import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...kernels.kv_scale import scale_pair, scale_tokens
from ..compiled import as_written
from ..coordinates import between
from ..latents import FrameLayout, soft_mask_to_frames, temporal_ratio
from .blocks import parse_blocks, running_block
from .calls import Call, Sampled, model_call, pad_of, sampled_latent
from .families import CASCADE, OVERRIDE, UNET, Family, family_of
from .token_maps import level_grid, pool_tokens, resize_tokens, view_maps

WRAPPER_KEY = "artifact_guard.fam"

ATTENTION = "optimized_attention_override"
"""Where a model's transformer_options keep what is called instead of its attention, such as another implementation of it."""

TARGETS = {"key and value": (True, True), "key": (True, False), "value": (False, True)}


@dataclass(frozen=True)
class AttentionSettings:
    """What the node sets. Raises ValueError for values that cannot work."""

    strength: float = 0.025
    target: str = "key and value"
    start_percent: float = 0.0
    end_percent: float = 1.0
    blocks: str = ""

    def __post_init__(self):
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"strength is {self.strength}; 0 (off) or more is wanted, such as 0.025.")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; one of {', '.join(map(repr, TARGETS))} is wanted.")
        if not 0 <= self.start_percent < self.end_percent <= 1:
            raise ValueError(
                f"start_percent is {self.start_percent:g} and end_percent {self.end_percent:g}: the first must be the "
                "smaller one, and both lie between 0 and 1."
            )


def patch_attention(
    model: comfy.model_patcher.ModelPatcher, flaw_map: torch.Tensor, settings: AttentionSettings
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model whose self-attention is stronger where the map is high.

    Args:
        flaw_map: MASK (M, h, w) at image size, 0..1: one for all samples, one a sample, or one a frame of a video.

    Strength 0 and a map of zeros give a clone without any patch, of a model of any family.

    Raises:
        ValueError: the model's family cannot be patched, a block it does not have, or NaN in the map.
    """
    if not torch.isfinite(flaw_map).all():
        raise ValueError("flaw_map: the map holds NaN or infinite values. Make it again; values from 0 to 1 are wanted.")
    patched = model.clone()
    if settings.strength == 0 or not flaw_map.any():
        return patched
    network = model.get_model_object("diffusion_model")
    family = family_of(network)
    blocks = parse_blocks(settings.blocks, family, network)
    sampling = model.get_model_object("model_sampling")
    sigmas = None
    if (settings.start_percent, settings.end_percent) != (0.0, 1.0):
        sigmas = tuple(float(sampling.percent_to_sigma(p)) for p in (settings.start_percent, settings.end_percent))
    patch = FlawAttention(flaw_map, family, settings, sigmas, blocks, model.get_model_object("latent_format"))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, WRAPPER_KEY, patch.calc_cond_batch)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, patch.apply_model)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, WRAPPER_KEY, patch.forget)
    if family is UNET:
        patched.set_model_attn1_patch(patch.unet_patch)
    elif family.hook != OVERRIDE:  # of which there is one a model, that other nodes set too: apply_model puts ours around it
        patched.set_model_attn1_patch(patch.transformer_patch)
    return patched


class FlawAttention:
    """One patch: the maps, and where and when they are applied. Its methods are the wrappers and hooks."""

    def __init__(self, flaw_map, family: Family, settings: AttentionSettings, sigmas, blocks, latent_format):
        self.flaw_map = flaw_map.detach().float().cpu().clamp(0, 1)
        self.family, self.strength, self.sigmas, self.blocks = family, settings.strength, sigmas, blocks
        self.scale_key, self.scale_value = TARGETS[settings.target]
        self.temporal_ratio = temporal_ratio(latent_format)
        self.key = f"{WRAPPER_KEY}.{uuid.uuid4().hex}"
        """Of this patch alone in a call's transformer_options: several patches can be on one model."""
        self.amounts: dict[tuple, torch.Tensor] = {}
        self.told = False

    def forget(self, patcher=None) -> None:
        """The run is over."""
        self.amounts.clear()
        self.told = False

    # What a model call sees of the latent

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """Wrapper around one evaluation of all conditionings: here the whole latent and the areas are known."""
        options = model_options.get("transformer_options", {})
        sampled = sampled_latent(x_in, conds, options)
        model_options = {**model_options, "transformer_options": {**options, self.key: sampled}}
        return executor(model, conds, x_in, timestep, model_options)

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        """Wrapper around one model call: puts its `Call` where the hooks find it, or nothing outside the range."""
        sampled = transformer_options.get(self.key)
        call = None
        if isinstance(sampled, Sampled) and self.in_range(transformer_options):
            network = executor.class_obj.diffusion_model
            call = model_call(sampled, self.family, network, x, c_crossattn, transformer_options, kwargs)
            if not call.is_of(x):
                call = None
                self.tell(x)
        transformer_options = {**transformer_options, self.key: call}
        if call is not None and self.family.hook == OVERRIDE:
            transformer_options[ATTENTION] = self.override(transformer_options.get(ATTENTION))
        with as_written() if call is not None else contextlib.nullcontext():
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def tell(self, x: torch.Tensor) -> None:
        """That the map has no place in what the network was given; once a run."""
        if not self.told:
            logging.warning(
                "Artifact Guard: the flaw attention patch is off in this run. Another node hands the model parts of what the sampler "
                "has, tiles or single rows (%s), of which nobody tells where they lie. Use one of the two.", tuple(x.shape),
            )
        self.told = True

    def in_range(self, options: dict) -> bool:
        """Whether the run is between start_percent and end_percent."""
        return self.sigmas is None or between(float(options["sigmas"][0]), *self.sigmas)

    def latent_maps(self, call: Call) -> torch.Tensor:
        """The maps at the size of the latent, (B, T, H, W); all frames, also those that are not in view."""
        layout = FrameLayout.of([call.shape])
        if layout is None:
            raise ValueError(f"flaw_map: the latent has no image part (its shape is {call.shape}), so no map fits it.")
        maps = soft_mask_to_frames(self.flaw_map, layout, "flaw_map", self.temporal_ratio)
        return maps.unflatten(0, (layout.batch, layout.frames_per_sample))

    def amount(self, call: Call, grid: tuple[int, int] | None, like: torch.Tensor) -> torch.Tensor:
        """Strength times map of each token, (rows, tokens), on a UNet's grid or, without one, on the family's tokens; where
        `like` is, in its dtype."""
        key = (call.shape, call.view, grid, like.device, like.dtype)
        if key not in self.amounts:
            maps = view_maps(self.latent_maps(call), call.view)
            tokens = pool_tokens(maps, self.family.token(call.network)) if grid is None else resize_tokens(maps, *grid)
            self.amounts[key] = (self.strength * tokens).to(like)
        return self.amounts[key]

    # The hooks

    def call_of(self, options: dict) -> Call | None:
        """The call a hook is in, if it is to act in this block."""
        call = options.get(self.key)
        wanted = self.blocks is None or running_block(options) in self.blocks
        return call if isinstance(call, Call) and wanted else None

    def scale(self, k, v, amount, first: int, axis: int):
        """Key and value, those that are to be scaled scaled."""
        if k is v:  # as UNets have it
            scaled = scale_tokens(k, amount, first, axis)
            return scaled if self.scale_key else k, scaled if self.scale_value else v
        if self.scale_key and self.scale_value:
            return scale_pair(k, v, amount, first, axis)
        return (
            scale_tokens(k, amount, first, axis) if self.scale_key else k,
            scale_tokens(v, amount, first, axis) if self.scale_value else v,
        )

    def unet_patch(self, q, k, v, extra_options):
        """attn1_patch of a UNet: gets what goes into the query, key and value layers, (rows, tokens, channels)."""
        call = self.call_of(extra_options)
        if call is None:
            return q, k, v
        grid = extra_options.get("activations_shape", [0, 0])[-2:]
        if "activations_shape" not in extra_options:
            grid = level_grid(*extra_options["original_shape"][-2:], k.shape[1], round_up=True) or grid
        if tuple(k.shape[:2]) != (call.view.rows, grid[0] * grid[1]):
            return q, k, v
        return q, *self.scale(k, v, self.amount(call, tuple(grid), k), 0, axis=1)

    def transformer_patch(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        """attn1_patch of a transformer: q, k, v (rows, heads, tokens, channels), and where its image part lies."""
        call = self.call_of(extra_options or {})
        if call is None or "img_slice" not in extra_options:
            return {}
        amount = self.amount(call, None, k)
        if len(k) > len(amount) and len(k) % len(amount) == 0:  # frames as rows of their own
            amount = amount.unflatten(1, (len(k) // len(amount), -1)).flatten(0, 1)
        first, last = extra_options["img_slice"]
        if self.family.image == "last of slice":
            first = last - amount.shape[1]
        if len(k) != len(amount) or first + amount.shape[1] > k.shape[2]:
            return {}
        k, v = self.scale(k, v, amount, first, axis=2)
        return {"k": k, "v": v}

    def override(self, previous):
        """The attention override: scales, then hands on to the override that was there before."""
        def attention(func, q, k, v, *args, **kwargs):
            options = kwargs.get("transformer_options") or {}
            call = self.call_of(options)
            if call is not None:
                axis = 2 if kwargs.get("skip_reshape") else 1
                amount, first = self.locate(call, q.shape[axis], k.shape[axis], options, k)
                if amount is not None and len(amount) == len(k):
                    k, v = self.scale(k, v, amount, first, axis)
            return func(q, k, v, *args, **kwargs) if previous is None else previous(func, q, k, v, *args, **kwargs)

        return attention

    def locate(self, call: Call, queries: int, keys: int, options: dict, like: torch.Tensor) -> tuple[torch.Tensor | None, int]:
        """The amounts of the image's tokens among `keys` tokens, as `amount` gives them, and where they begin; (None, 0) for other
        attention."""
        family = self.family
        if family is CASCADE:
            height, width = call.shape[-2:]
            step = family.token(call.network)[1]
            grid = level_grid(height // step, width // step, queries, round_up=False)
            return (None, 0) if grid is None else (self.amount(call, grid, like), 0)
        amount = self.amount(call, None, like)
        tokens = amount.shape[1]
        in_parts = queries < keys == call.before + tokens and keys != call.text  # as many keys as the image, not as the text
        if family.splits and in_parts:
            return amount, call.before
        if queries != keys or keys < call.before + tokens or (family.cross and not self.is_self_attention(call, keys, options)):
            return None, 0
        if family.image == "first":
            return amount, call.before
        padded = -(-tokens // pad_of(call.network)) * pad_of(call.network)
        joint = "block_index" in options if family.numbered else keys == call.text + call.references + tokens
        if family.joint and not (joint and keys - padded >= call.text):
            return None, 0
        return amount, keys - padded

    def is_self_attention(self, call: Call, keys: int, options: dict) -> bool:
        """Whether a call with as many queries as keys is self-attention, in a network that has cross-attention too.

        Where the prompt has exactly as many tokens as the image, the two look alike. Every block has its
        self-attention first, so there every second call is it.
        """
        if self.family.numbered and "block_index" not in options:
            return False
        if keys != call.text:
            return True
        call.alike += 1
        return call.alike % 2 == 1
