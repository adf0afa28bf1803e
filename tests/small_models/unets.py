"""UNets: Stable Diffusion 1.5 and SDXL."""

import comfy.supported_models as supported

from .base import SmallModel, build


def sd15(seed: int) -> SmallModel:
    """Stable Diffusion 1.5: EPS, attention at three sizes and in the middle."""
    sizes = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": (1, 2, 2, 2),
        "num_res_blocks": [1, 1, 1, 1], "transformer_depth": [1, 1, 1, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0], "context_dim": 24, "use_spatial_transformer": True,
        "legacy": False, "use_checkpoint": False,
    }
    sizes["use_temporal_attention"] = False
    return SmallModel("sd15", build(supported.SD15, sizes, seed), channels=4, width=24)


def shallow_sd15(seed: int = 0) -> SmallModel:
    """SD 1.5 of two sizes instead of four, with attention at the first and in the middle: for tests that train or sample often."""
    sizes = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": (1, 2),
        "num_res_blocks": [1, 1], "transformer_depth": [1, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 0, 0], "context_dim": 24, "use_spatial_transformer": True,
        "legacy": False, "use_checkpoint": False, "use_temporal_attention": False,
    }
    return SmallModel("sd15", build(supported.SD15, sizes, seed), channels=4, width=24)


def sdxl(seed: int) -> SmallModel:
    """SDXL: EPS, two attention sizes of different depth, pooled text and size conditioning."""
    sizes = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": (1, 2, 4),
        "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 2], "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 1, 1, 2, 2], "context_dim": 24, "use_spatial_transformer": True,
        "legacy": False, "use_checkpoint": False, "num_classes": "sequential", "adm_in_channels": 2816,
    }
    return SmallModel("sdxl", build(supported.SDXL, sizes, seed), channels=4, width=24, pooled=1280)


BUILDERS = {"sd15": sd15, "sdxl": sdxl}
