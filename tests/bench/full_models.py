"""Models of real size with random weights: speed and memory do not depend on the weights. For a GPU.

Sizes as ComfyUI reads them off the released checkpoints of Stable Diffusion 1.5, SDXL, SD 3.5 medium and Flux.1 dev.
"""

from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch


@dataclass
class FullModel:
    """A model, its latent's channels, the size of its prompts, and the latent sizes (height, width) people use."""

    name: str
    model: comfy.model_patcher.ModelPatcher
    channels: int
    tokens: int
    width: int
    pooled: int | None
    sizes: tuple[tuple[int, int], ...]
    repeats: int
    extra: dict = field(default_factory=dict)

    def conditioning(self) -> list:
        more = {} if self.pooled is None else {"pooled_output": torch.zeros(1, self.pooled)}
        return [[torch.zeros(1, self.tokens, self.width), more | self.extra]]


SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": (1, 2, 4, 4),
    "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "use_spatial_transformer": True,
    "legacy": False, "use_checkpoint": False, "use_temporal_attention": False,
}
SDXL = SD15 | {
    "channel_mult": (1, 2, 4), "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048,
    "num_classes": "sequential", "adm_in_channels": 2816,
}
SD3 = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None, "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    "num_patches": 147456, "pos_embed_max_size": 384, "qk_norm": "rms", "x_block_self_attn_layers": list(range(13)),
}
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}


def build(config_class, sizes: dict, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """The model of one of ComfyUI's configs on ComfyUI's device, matrices of the usual scale, norms about 1."""
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(False), torch.no_grad():
        config = config_class({**config_class.unet_config, **sizes})
        config.set_inference_dtype(dtype, None)
        model = config.get_model({}, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for name, weight in model.diffusion_model.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.02
            weight.normal_(0.0, scale, generator=generator)
            if weight.ndim == 1 and name.endswith(("weight", "scale")):
                weight.add_(1.0)
        for name, table in model.diffusion_model.named_buffers():
            if name.endswith("pos_embed"):
                table.zero_()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def costless(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone that costs nothing: its estimate is a part of the sample."""
    clone = model.clone()
    clone.set_model_unet_function_wrapper(lambda apply, call: call["input"] * 0.9)
    return clone


def costless_sd15() -> FullModel:
    """SD 1.5's latents and schedule without its network."""
    model = costless(build(supported.SD15, SD15 | {"model_channels": 32, "context_dim": 64}, torch.float32))
    return FullModel("a model that costs nothing", model, 4, 77, 64, None, ((64, 64),), 1)


def full_models():
    """Builders by name, smallest first: each makes its model when it is called."""
    half, brain = torch.float16, torch.bfloat16
    return {
        "sd15": lambda: FullModel("SD 1.5, fp16", build(supported.SD15, SD15, half), 4, 77, 768, None, ((64, 64),), 7),
        "sdxl": lambda: FullModel("SDXL, fp16", build(supported.SDXL, SDXL, half), 4, 77, 2048, 1280, ((128, 128),), 5),
        "sd3": lambda: FullModel("SD 3.5 medium, bf16", build(supported.SD3, SD3, brain), 16, 154, 4096, 2048, ((128, 128),), 5),
        "flux": lambda: FullModel(
            "Flux.1 dev, bf16", build(supported.Flux, FLUX, brain), 16, 512, 4096, 768, ((128, 128),), 3, {"guidance": 3.5}
        ),
    }
