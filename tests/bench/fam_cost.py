"""P5: a sampling run with the flaw attention patch on and off, interleaved, the median of many pairs.

On a GPU a UNet of Stable Diffusion 1.5's size with random weights, fp16, 512x512, 25 steps, by the clock. Otherwise the
demo model, one thread, by the processor time of this process, which other programs on the machine disturb far less.
"""

import statistics
import time
from pathlib import Path

import torch

PAIRS = 21
DRAWS = 2000
"""Of the bootstrap that gives the median's interval."""


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


def interval_of_median(ratios: list[float]) -> list[float]:
    """95 % bootstrap interval of the median."""
    values = torch.tensor(ratios)
    chosen = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    medians = values[chosen].median(dim=1).values
    return [round(medians.quantile(q).item(), 4) for q in (0.025, 0.975)]


def seconds_of(work) -> float:
    """How long `work` takes: by the clock on a GPU, which is waited for, else in processor time of this process."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    start = clock()
    with torch.inference_mode():
        work()
    if gpu:
        torch.cuda.synchronize()
    return clock() - start


def run(pack, output: Path, data: Path | None) -> dict:
    import nodes as core

    from artifact_guard.nodes.demo.model import class_token, load_demo_model
    from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention

    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        name, steps, (model, prompt, empty) = "SD 1.5 size, fp16, 512x512", 25, sd15_on_gpu()
    else:
        torch.set_num_threads(1)
        name, steps, model = "demo model, 32x32, batch 8, one thread, processor time", 5, load_demo_model()[0]
        prompt, empty = [[class_token(1), {}]], torch.zeros(8, 3, 32, 32)
    flaw_map = torch.rand(1, *empty.shape[-2:], generator=torch.Generator().manual_seed(0))
    models = {"off": model, "on": patch_attention(model, flaw_map, AttentionSettings())}

    def sample(kind: str, seed: int) -> None:
        core.common_ksampler(models[kind], seed, steps, 2.5, "euler", "normal", prompt, prompt, {"samples": empty})

    seconds = {"off": [], "on": []}
    for pair in range(PAIRS + 1):
        for kind in ("off", "on") if pair % 2 else ("on", "off"):
            spent = seconds_of(lambda: sample(kind, pair))
            if pair:  # the first pair warms up
                seconds[kind].append(spent)
    torch.set_num_threads(threads)
    ratios = [on / off for on, off in zip(seconds["on"], seconds["off"])]
    return {
        "case": name, "steps": steps, "pairs": PAIRS,
        "median_seconds": {kind: statistics.median(times) for kind, times in seconds.items()},
        "median_ratio": statistics.median(ratios), "interval_95": interval_of_median(ratios),
        "ratios": [round(r, 3) for r in sorted(ratios)],
    }
