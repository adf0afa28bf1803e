"""Transformers of images: SD3, Flux, Qwen-Image, Lumina 2."""

import comfy.supported_models as supported

from .base import SmallModel, build

FLUX_SIZES = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 24, "hidden_size": 64, "mlp_ratio": 2.0,
    "num_heads": 4, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}


def sd3(seed: int) -> SmallModel:
    """SD 3.5 medium: flow, joint attention of image and text, and attention of the image alone in the first block."""
    sizes = {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": 24,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
        "num_patches": 256, "pos_embed_max_size": 16, "qk_norm": "rms", "x_block_self_attn_layers": [0],
    }
    return SmallModel("sd3", build(supported.SD3, sizes, seed), channels=16, width=24, pooled=24)


def flux(seed: int) -> SmallModel:
    """Flux: flow with guidance embedding, double and single blocks."""
    return SmallModel("flux", build(supported.Flux, FLUX_SIZES, seed), channels=16, width=24, pooled=24)


def qwen_image(seed: int) -> SmallModel:
    """Qwen-Image: flow, double blocks; its latents are videos of one frame."""
    sizes = {
        "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
    }
    return SmallModel("qwen_image", build(supported.QwenImage, sizes, seed), channels=16, width=24, frames=1)


def lumina2(seed: int) -> SmallModel:
    """Lumina 2: flow, grouped heads, refiners of text and image before the joint layers."""
    sizes = {
        "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 24, "n_layers": 2, "n_refiner_layers": 1,
        "n_heads": 4, "n_kv_heads": 2, "axes_dims": [8, 8, 8], "axes_lens": [300, 512, 512], "qk_norm": True,
        "multiple_of": 32, "ffn_dim_multiplier": 1.0,
    }
    return SmallModel("lumina2", build(supported.Lumina2, sizes, seed), channels=16, width=24)


BUILDERS = {"sd3": sd3, "flux": flux, "qwen_image": qwen_image, "lumina2": lumina2}
