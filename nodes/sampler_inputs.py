"""The widgets that every node which samples has, as core's KSampler has them."""

import comfy.samplers
from comfy_api.latest import io


def sampler_inputs(seed: str, steps: str) -> list:
    """seed, steps, cfg, sampler_name and scheduler: names, order, defaults and limits of core's KSampler.

    seed, steps: their tooltips, which differ from node to node.
    """
    return [
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=seed),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=steps),
        io.Float.Input(
            "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
            tooltip="Classifier-free guidance scale: higher follows the prompt more closely.",
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampling algorithm."),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="How the noise falls over the steps."
        ),
    ]
