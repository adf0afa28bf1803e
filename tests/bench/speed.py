"""P1, P2, P4, P5, P6: what each method costs a sampling run, beside core's PAG and SAG, in one process.

With a GPU SD 1.5, SDXL, SD 3.5 medium and Flux at full size with random weights. Without one the demo model, in processor time of
one thread. Nothing is found in the runs with the guard: they show what watching costs. One more run, at a sensitivity at which
something is, counts the model calls of a repair. On a machine whose times scatter by more than a few percent `own_cost` says more.
"""

from pathlib import Path

import comfy.sample
import comfy.samplers
import torch

from .full_models import full_models
from .starts import starts_of
from .timing import in_turns, on_gpu, peak_bytes

STEPS = 25
CPU_STEPS, CPU_REPEATS, CPU_BATCH = 20, 31, 4
BLIND, EAGER = 0.01, 10.0
"""Sensitivities of the guard: at the first nothing is ever found."""


def patched(model, latent: torch.Tensor) -> dict:
    """The model with each patch: name -> model. Core's SAG works on UNets only."""
    from artifact_guard.nodes.asced.options import AscedOptions, GuardSettings
    from artifact_guard.nodes.asced.guard import guard_model
    from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
    from artifact_guard.nodes.tag.guidance import guide_model
    from artifact_guard.nodes.tag.settings import TagSettings
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    flaw_map = torch.rand(1, *latent.shape[-2:], generator=torch.Generator().manual_seed(0))

    def guard(on, **more):
        return guard_model(on, GuardSettings(sensitivity=BLIND, **more))[0]

    def attend(on):
        return patch_attention(on, flaw_map, AttentionSettings())

    def guide(on, **more):
        return guide_model(on, TagSettings(**more))[0]

    cases = {
        "off": model,
        "guard, nothing found": guard(model),
        "guard by the published rule, nothing found": guard(model, options=AscedOptions(detector="clean estimate")),
        "TAG": guide(model),
        "TAG, measured only": guide(model, strength=0.0),
        "flaw attention patch": attend(model),
        "all three": guard(guide(attend(model))),
        "core's PerturbedAttentionGuidance": PerturbedAttentionGuidance.execute(model, 3.0)[0],
    }
    if hasattr(model.model.diffusion_model, "middle_block"):
        cases["core's SelfAttentionGuidance"] = SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]
    return cases


def sampler_run(model, latent: torch.Tensor, prompt, steps: int, seed: int) -> torch.Tensor:
    """One run of Euler with CFG 1, as a function of the model."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    noise = comfy.sample.prepare_noise(latent, seed)
    euler = comfy.samplers.sampler_object("euler")
    return comfy.sample.sample_custom(model, noise, 1.0, euler, sigmas, prompt, prompt, latent, disable_pbar=True, seed=seed)


def calls_of(model, run) -> int:
    """Model calls of a run."""
    calls = []
    counted = model.clone()
    counted.set_model_unet_function_wrapper(lambda apply, c: (calls.append(1), apply(c["input"], c["timestep"], **c["c"]))[1])
    with torch.inference_mode():
        run(counted)
    return len(calls)


def measure(model, latent: torch.Tensor, prompt, steps: int, repeats: int) -> dict:
    """The table of one model: ratios of time, extra memory in latents and in shares of the model, model calls and
    the operations that a GPU would start (starts.py)."""
    from artifact_guard.nodes.asced.guard import guard_model
    from artifact_guard.nodes.asced.options import AscedOptions, GuardSettings

    cases = patched(model, latent)
    table = in_turns(
        {name: lambda seed, m=m: sampler_run(m, latent, prompt, steps, seed) for name, m in cases.items()}, repeats, "off"
    )
    size, whole = latent.numel() * 4, model.model_size()
    base = None
    for name, m in cases.items():
        peak = peak_bytes(lambda: sampler_run(m, latent, prompt, min(steps, 12), 0))
        base = peak if base is None else base
        extra = peak - base
        table[name] |= {
            "model_calls": calls_of(m, lambda counted: sampler_run(counted, latent, prompt, steps, 0)),
            "operations": sum(starts_of(lambda: sampler_run(m, latent, prompt, steps, 0))[0].values()),
            "extra_memory_latents": round(extra / size, 2), "extra_memory_of_model": round(extra / whole, 4),
            "within_P6": extra <= max(6 * size, 0.03 * whole),
        }
    published = AscedOptions(detector="clean estimate", max_area=1.0)
    eager, report = guard_model(model, GuardSettings(sensitivity=EAGER, options=published))
    calls = calls_of(eager, lambda counted: sampler_run(counted, latent, prompt, steps, 0))
    repairs = report.runs[-1].restarts
    return {"cases": table, "repair": {"repairs": repairs, "extra_model_calls": calls - steps}}


def run(pack, output: Path, data: Path | None, models: list[str] | None = None) -> dict:
    if not on_gpu():
        print("No GPU: the demo model on the CPU, processor time of one thread. P1, P4 and P5 ask for a GPU.", flush=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        demo = pack.nodes.demo.model
        model, prompt = demo.load_demo_model()[0], [[demo.class_token(1), {}]]
        figures = measure(model, torch.zeros(CPU_BATCH, 3, 32, 32), prompt, CPU_STEPS, CPU_REPEATS)
        torch.set_num_threads(threads)
        return {f"demo model, batch {CPU_BATCH}, {CPU_STEPS} steps, one CPU thread": figures}
    builders, figures = full_models(), {}
    for chosen in models or builders:
        full = builders[chosen]()
        for height, width in full.sizes:
            latent = torch.zeros(1, full.channels, height, width)
            name = f"{full.name}, latents {height}x{width}, {STEPS} steps"
            figures[name] = measure(full.model, latent, full.conditioning(), STEPS, full.repeats)
            print(name, *figures[name]["cases"].items(), figures[name]["repair"], sep="\n  ", flush=True)
        del full
        torch.cuda.empty_cache()
    return figures
