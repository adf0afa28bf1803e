"""P5: a sampling run with the flaw attention patch on and off, interleaved, medians of several pairs.

On a GPU a UNet of Stable Diffusion 1.5's size with random weights, fp16, 512x512, 25 steps; otherwise the demo model.
"""

import statistics
import time
from pathlib import Path

import torch

PAIRS = 7


def sd15_on_gpu():
    """(model, conditioning, empty latent) of Stable Diffusion 1.5's size, in half precision."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    from ..small_models.base import initialise

    sizes = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": (1, 2, 4, 4),
        "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "legacy": False,
        "use_spatial_transformer": True, "use_checkpoint": False,
    }
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(False):
        config = comfy.supported_models.SD15({**comfy.supported_models.SD15.unet_config, **sizes})
        config.set_inference_dtype(torch.float16, None)
        model = config.get_model({}, device=torch.device("cpu"))
        initialise(model.diffusion_model, 0)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    return patcher, [[torch.randn(1, 77, 768), {}]], torch.zeros(1, 4, 64, 64)


def run(pack, output: Path, data: Path | None) -> dict:
    import nodes as core

    from artifact_guard.nodes.demo.model import class_token, load_demo_model
    from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention

    if torch.cuda.is_available():
        name, steps, (model, prompt, empty) = "SD 1.5 size, fp16, 512x512", 25, sd15_on_gpu()
    else:
        name, steps, model = "demo model, 32x32, batch 8", 20, load_demo_model()[0]
        prompt, empty = [[class_token(1), {}]], torch.zeros(8, 3, 32, 32)
    flaw_map = torch.rand(1, *empty.shape[-2:], generator=torch.Generator().manual_seed(0))
    models = {"off": model, "on": patch_attention(model, flaw_map, AttentionSettings())}
    seconds = {"off": [], "on": []}
    for pair in range(PAIRS + 1):
        for kind in ("off", "on") if pair % 2 else ("on", "off"):
            start = time.perf_counter()
            with torch.inference_mode():
                core.common_ksampler(models[kind], pair, steps, 2.5, "euler", "normal", prompt, prompt, {"samples": empty})
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if pair:
                seconds[kind].append(time.perf_counter() - start)
    ratios = [on / off for on, off in zip(seconds["on"], seconds["off"])]
    return {
        "case": name, "steps": steps, "pairs": PAIRS,
        "median_seconds": {kind: statistics.median(times) for kind, times in seconds.items()},
        "median_ratio": statistics.median(ratios), "ratios": [round(r, 3) for r in sorted(ratios)],
    }
