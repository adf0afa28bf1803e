"""Transformers of videos: Wan 2.1."""

import comfy.supported_models as supported

from .base import SmallModel, build


def wan(seed: int) -> SmallModel:
    """Wan 2.1 text to video: flow, self-attention over all frames, text in cross-attention."""
    sizes = {
        "dim": 64, "out_dim": 16, "num_heads": 2, "ffn_dim": 128, "num_layers": 2, "patch_size": (1, 2, 2),
        "freq_dim": 32, "text_dim": 24, "in_dim": 16, "cross_attn_norm": True,
    }
    return SmallModel("wan", build(supported.WAN21_T2V, sizes, seed), channels=16, width=24, frames=3)


BUILDERS = {"wan": wan}
