"""P4: what guidance costs, beside core's PerturbedAttentionGuidance: runs interleaved, medians of pairs.

Without a GPU the demo model on the CPU; with one also a UNet of Stable Diffusion 1.5's size with random weights in
fp16 at 512x512. Training to the time gap of P7 is timed by `dev.py train-time-predictor`.
"""

import statistics
import time

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from .tag_runs import PREDICTOR, guided

STEPS, REPEATS, BATCH = 25, 5, 4


def sd15_sized(demo_model):
    """(model, latent shape, context): ComfyUI's own SD 1.5 UNet with random fp16 weights."""
    from comfy.supported_models import SD15

    config = SD15(SD15.unet_config | {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": (1, 2, 4, 4), "num_heads": 8, "num_head_channels": -1,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "use_spatial_transformer": True, "legacy": False,
    })
    config.set_inference_dtype(torch.float16, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, device=device)
    random = torch.Generator(device).manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, device=device, dtype=torch.float16) * 0.02
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    return patcher, (1, 4, 64, 64), torch.zeros(1, 77, 768)


def timed(model, shape, context) -> float:
    """Seconds of one run."""
    latent = torch.zeros(shape)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    cuda = torch.cuda.is_available()
    with torch.inference_mode():
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(latent, 0), 1.0, comfy.samplers.sampler_object("euler"), sigmas,
            [[context, {}]], [[context, {}]], latent, disable_pbar=True, seed=0)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(cases: dict, shape, context) -> dict:
    """Median ratio to `off`, pair by pair, with the smallest and the largest."""
    for model in cases.values():
        timed(model, shape, context)
    seconds = {name: [] for name in cases}
    for repeat in range(REPEATS):
        order = list(cases) if repeat % 2 == 0 else list(cases)[::-1]
        for name in order:
            seconds[name].append(timed(cases[name], shape, context))
    told = {}
    for name, values in seconds.items():
        ratios = sorted(value / bare for value, bare in zip(values, seconds["off"]))
        told[name] = {"seconds": round(statistics.median(values), 3), "ratio": round(statistics.median(ratios), 3),
                      "from": round(ratios[0], 3), "to": round(ratios[-1], 3)}
    return told


def run(pack, output, data) -> dict:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    demo, _ = pack.nodes.demo.model.load_demo_model()
    token = pack.nodes.demo.model.class_token(0)

    def cases(model, predictors: bool) -> dict:
        made = {
            "off": model,
            "training-free (default)": guided(model, ())[0],
            "measured only": guided(model, (), strength=0.0)[0],
            "core's PerturbedAttentionGuidance": PerturbedAttentionGuidance.execute(model, 3.0)[0],
        }
        if predictors:
            score = {"mode": "score", "strength": 1.0, "estimate": "published gradient"}
            made["predictor"] = guided(model, (), PREDICTOR)[0]
            made["predictor, published gradient"] = guided(model, (), PREDICTOR, **score)[0]
        return made

    figures = {"demo model": measure(cases(demo, True), (BATCH, 3, 32, 32), token)}
    if torch.cuda.is_available():
        model, shape, context = sd15_sized(pack.nodes.demo.model)
        figures["SD 1.5-size UNet, fp16, 512x512"] = measure(cases(model, False), shape, context)
    return figures
