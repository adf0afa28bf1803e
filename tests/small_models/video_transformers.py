"""Transformers of videos."""

import comfy.supported_models as supported

from .base import SmallModel, build


WAN_SIZES = {
    "dim": 64, "out_dim": 16, "num_heads": 2, "ffn_dim": 128, "num_layers": 2, "patch_size": (1, 2, 2),
    "freq_dim": 32, "text_dim": 24, "in_dim": 16, "cross_attn_norm": True,
}


def wan(seed: int) -> SmallModel:
    """Wan 2.1 text to video: flow, self-attention over all frames, text in cross-attention."""
    return SmallModel("wan", build(supported.WAN21_T2V, WAN_SIZES, seed), channels=16, width=24, frames=3)


def vace(seed: int) -> SmallModel:
    """Wan 2.1 VACE: Wan with blocks of control beside it."""
    sizes = WAN_SIZES | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}
    return SmallModel("wan_vace", build(supported.WAN21_Vace, sizes, seed), channels=16, width=24, frames=3, odd=False)


def hunyuan_video(seed: int) -> SmallModel:
    """HunyuanVideo: Flux's blocks over all frames, a refiner of the text's tokens."""
    sizes = {
        "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 24, "axes_dim": [4, 6, 6],
        "context_in_dim": 24, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 2,
        "theta": 256, "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
        "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
    }
    return SmallModel("hunyuan_video", build(supported.HunyuanVideo, sizes, seed), channels=16, width=24, pooled=24, frames=3,
                      odd=False)


COSMOS_SIZES = {
    "max_img_h": 32, "max_img_w": 32, "max_frames": 16, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True, "crossattn_emb_channels": 24,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "use_adaln_lora": True,
    "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 2, "extra_per_block_abs_pos_emb": False,
    "rope_enable_fps_modulation": False,
}


def cosmos_predict2(seed: int) -> SmallModel:
    """Cosmos Predict 2: keys are normed and rotated in one step; its latents are videos."""
    return SmallModel("cosmos_predict2", build(supported.CosmosT2IPredict2, COSMOS_SIZES, seed), channels=16, width=24, frames=2)


def cogvideox(seed: int) -> SmallModel:
    """CogVideoX: text, then all frames."""
    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "time_embed_dim": 32,
        "text_embed_dim": 24, "num_layers": 2, "patch_size": 2, "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": False, "sample_width": 16, "sample_height": 16, "sample_frames": 9,
    }
    return SmallModel("cogvideox", build(supported.CogVideoX_T2V, sizes, seed), channels=16, width=24, frames=3)


def mochi(seed: int) -> SmallModel:
    """Mochi: all frames, then the text."""
    sizes = {
        "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32, "mlp_ratio_x": 192.0,
        "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
        "out_bias": True, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
        "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 24, "t5_token_length": 6,
        "rope_theta": 10000.0,
    }
    return SmallModel("mochi", build(supported.GenmoMochi, sizes, seed), channels=12, width=24, frames=2, masked=True,
                      odd=False)


def ltxv(seed: int) -> SmallModel:
    """LTX-Video: tokens of one latent pixel, self- and cross-attention."""
    sizes = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "cross_attention_dim": 64,
             "caption_channels": 24, "in_channels": 128}
    return SmallModel("ltxv", build(supported.LTXV, sizes, seed), channels=128, width=24, frames=2, size=(8, 8),
                      masked=True)


KANDINSKY5_SIZES = {
    "model_dim": 64, "axes_dims": (8, 12, 12), "time_dim": 32, "ff_dim": 64, "visual_embed_dim": 132,
    "num_text_blocks": 1, "num_visual_blocks": 2, "in_text_dim": 24, "in_text_dim2": 16,
}


def kandinsky5(seed: int) -> SmallModel:
    """Kandinsky 5 for videos."""
    return SmallModel("kandinsky5", build(supported.Kandinsky5, KANDINSKY5_SIZES, seed), channels=16, width=24, pooled=16, frames=2,
                      odd=False)


BUILDERS = {
    "wan": wan, "wan_vace": vace, "hunyuan_video": hunyuan_video, "cosmos_predict2": cosmos_predict2,
    "cogvideox": cogvideox, "mochi": mochi, "ltxv": ltxv, "kandinsky5": kandinsky5,
}
