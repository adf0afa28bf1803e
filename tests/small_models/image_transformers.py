"""Transformers of images."""

import comfy.supported_models as supported

from .base import TOKENS, SmallModel, build
from .video_transformers import KANDINSKY5_SIZES

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


def z_image(seed: int) -> SmallModel:
    """Z-Image: Lumina 2's network with padded token counts."""
    sizes = {
        "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 24, "n_layers": 2, "n_refiner_layers": 1,
        "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "axes_lens": [1536, 512, 512], "qk_norm": True,
        "multiple_of": 32, "ffn_dim_multiplier": 1.0, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }
    return SmallModel("z_image", build(supported.ZImage, sizes, seed), channels=16, width=24)


def flux2(seed: int) -> SmallModel:
    """Flux 2: one modulation for all blocks, tokens of one latent pixel."""
    sizes = FLUX_SIZES | {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "mlp_ratio": 3.0,
        "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1, "qkv_bias": False, "global_modulation": True,
        "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
    }
    return SmallModel("flux2", build(supported.Flux2, sizes, seed), channels=128, width=24, size=(8, 8), pooled=24)


def chroma(seed: int) -> SmallModel:
    """Chroma: Flux's blocks with modulations from one small network."""
    sizes = {
        "in_channels": 64, "out_channels": 64, "context_in_dim": 24, "hidden_size": 64, "mlp_ratio": 2.0,
        "num_heads": 4, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 2, "txt_ids_dims": [],
        "vec_in_dim": None,
    }
    return SmallModel("chroma", build(supported.Chroma, sizes, seed), channels=16, width=24)


def aura_flow(seed: int) -> SmallModel:
    """AuraFlow: register tokens and text, then the image."""
    sizes = {"cond_seq_dim": 24, "max_seq": 256, "n_double_layers": 1, "n_layers": 3, "dim": 64, "n_heads": 4,
             "global_conddim": 64}
    return SmallModel("aura_flow", build(supported.AuraFlow, sizes, seed), channels=4, width=24)


def omnigen2(seed: int) -> SmallModel:
    """OmniGen 2: refiners of text, image and reference images, then joint layers with grouped heads."""
    sizes = {
        "axes_dim_rope": [8, 8, 8], "axes_lens": [300, 512, 512], "ffn_dim_multiplier": None, "hidden_size": 96,
        "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-5, "num_attention_heads": 4, "num_kv_heads": 2,
        "num_layers": 2, "num_refiner_layers": 1, "out_channels": None, "patch_size": 2, "text_feat_dim": 24,
        "timestep_scale": 1000.0,
    }
    return SmallModel("omnigen2", build(supported.Omnigen2, sizes, seed), channels=16, width=24, masked=True)


def krea2(seed: int) -> SmallModel:
    """Krea 2: single blocks, a text side of stacked layers; its latents are videos of one frame."""
    sizes = {"features": 64, "channels": 16, "patch": 2, "layers": 2, "heads": 4, "kvheads": 2, "txtlayers": 2,
             "txtdim": 12, "txtheads": 2, "txtkvheads": 2, "tdim": 32}
    return SmallModel("krea2", build(supported.Krea2, sizes, seed), channels=16, width=24, frames=1)


def hidream(seed: int) -> SmallModel:
    """HiDream: the image's tokens first, mixtures of experts."""
    sizes = {
        "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4], "caption_channels": [24, 24], "max_resolution": [32, 32],
        "in_channels": 16, "llama_layers": [0, 1], "num_attention_heads": 4, "num_routed_experts": 2,
        "num_activated_experts": 1, "num_layers": 1, "num_single_layers": 1, "out_channels": 16, "patch_size": 2,
        "text_emb_dim": 24,
    }
    return SmallModel("hidream", build(supported.HiDream, sizes, seed), channels=16, width=24, pooled=24,
                      extra={"conditioning_llama3": (1, 2, TOKENS, 24)})


def kandinsky5_image(seed: int) -> SmallModel:
    """Kandinsky 5 for images: text blocks, then blocks with self- and cross-attention."""
    sizes = KANDINSKY5_SIZES | {"model_dim": 96, "visual_embed_dim": 64}
    return SmallModel("kandinsky5_image", build(supported.Kandinsky5Image, sizes, seed), channels=16, width=24, pooled=16,
                      odd=False)


def cascade_c(seed: int) -> SmallModel:
    """Stable Cascade, stage C: keys of the image and the text together."""
    sizes = {"stable_cascade_stage": "c", "c_cond": 64, "c_hidden": [64, 64], "nhead": [4, 4],
             "blocks": [[1, 1], [1, 1]], "c_clip_text": 24, "c_clip_text_pooled": 24}
    return SmallModel("cascade_c", build(supported.Stable_Cascade_C, sizes, seed), channels=16, width=24, pooled=24)


BUILDERS = {
    "sd3": sd3, "flux": flux, "flux2": flux2, "chroma": chroma, "qwen_image": qwen_image, "krea2": krea2,
    "lumina2": lumina2, "z_image": z_image, "omnigen2": omnigen2, "aura_flow": aura_flow, "hidream": hidream,
    "kandinsky5_image": kandinsky5_image, "cascade_c": cascade_c,
}
