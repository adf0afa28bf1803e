"""P4: what guidance costs, beside core's PerturbedAttentionGuidance and SelfAttentionGuidance: runs interleaved, medians
of rounds; by the clock on a GPU, else in processor time.

The demo model, and a UNet of Stable Diffusion 1.5's size with random weights in fp16 at 512x512. Without a GPU that one is
narrower, smaller and in fp32, which says so, and its ratios are not P4's. `dev.py bench tag_cost` runs it alone. Training
to the time gap of P7 is timed by `dev.py train-time-predictor`.
"""

import comfy.sample
import comfy.samplers
import torch
from comfy.supported_models import SD15 as SD15Config

from .full_models import SD15, build
from .tag_runs import guided
from .timing import in_turns

STEPS, REPEATS, BATCH = 25, 5, 4
CFG = 4.0
"""For the second table: SelfAttentionGuidance works with classifier-free guidance only."""


def sd15_sized(width: int, side: int, dtype: torch.dtype):
    """(model, latent shape, context): ComfyUI's own SD 1.5 UNet with random weights; `width` is 320 in the real one."""
    return build(SD15Config, SD15 | {"model_channels": width}, dtype), (1, 4, side, side), torch.zeros(1, 77, 768)


def measure(cases: dict, shape, context, cfg: float = 1.0) -> dict:
    """Median seconds, and the median ratio to `off`, round by round, with its interval."""
    latent = torch.zeros(shape)
    prompt, sampler = [[context, {}]], comfy.samplers.sampler_object("euler")

    def run_of(model):
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        return lambda seed: comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(latent, seed), cfg, sampler, sigmas, prompt, prompt, latent,
            disable_pbar=True, seed=seed,
        )

    return in_turns({name: run_of(model) for name, model in cases.items()}, REPEATS, "off")


def untrained(model, size: tuple[int, int]):
    """A predictor for this model: training does not change what it costs."""
    from artifact_guard.nodes.tag.compatibility import kind_of
    from artifact_guard.nodes.tag.levels import Schedule
    from artifact_guard.nodes.tag.training import new_predictor

    return new_predictor(kind_of(model), Schedule.of(model.get_model_object("model_sampling")), size, 0, 0)


def guided_cases(model, size: tuple[int, int]) -> dict:
    predictor = untrained(model, size)
    gradient = {"mode": "score", "strength": 1.0, "estimate": "published gradient"}
    return {
        "off": model,
        "training-free (default)": guided(model, ())[0],
        "measured only": guided(model, (), strength=0.0)[0],
        "predictor": guided(model, (), predictor)[0],
        "predictor, published gradient": guided(model, (), predictor, **gradient)[0],
    }


def compared(model, shape, context) -> dict:
    """Both tables of one model: without classifier-free guidance, and with it."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    cases = guided_cases(model, tuple(shape[-2:]))
    others = {"core's PerturbedAttentionGuidance": PerturbedAttentionGuidance.execute(model, 3.0)[0]}
    sag = {"core's SelfAttentionGuidance": SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]}
    short = {name: cases[name] for name in ("off", "training-free (default)", "predictor")}
    return {"CFG 1": measure(cases | others, shape, context), f"CFG {CFG:g}": measure(short | others | sag, shape, context, CFG)}


def run(pack, output, data) -> dict:
    demo, _ = pack.nodes.demo.model.load_demo_model()
    figures = {"demo model": compared(demo, (BATCH, 3, 32, 32), pack.nodes.demo.model.class_token(0))}
    if torch.cuda.is_available():
        figures["SD 1.5-size UNet, fp16, 512x512"] = compared(*sd15_sized(320, 64, torch.float16))
    else:
        print("No GPU: the UNet of SD 1.5's shape has 64 channels instead of 320, in fp32, at 128x128. Not P4's case.", flush=True)
        figures["SD 1.5-shaped UNet of 64 channels, fp32, 128x128, CPU"] = compared(*sd15_sized(64, 16, torch.float32))
    return figures
