"""P5: a sampling run with the flaw attention patch on and off, interleaved, the median of many pairs.

On a GPU a UNet of Stable Diffusion 1.5's size with random weights, fp16, 512x512, 25 steps, by the clock. Otherwise the
demo model, one thread, by the processor time of this process, which other programs on the machine disturb far less.
"""

from pathlib import Path

import torch

from .timing import in_turns, on_gpu

PAIRS = 21


def run(pack, output: Path, data: Path | None) -> dict:
    import nodes as core

    from artifact_guard.nodes.demo.model import class_token, load_demo_model
    from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention

    threads = torch.get_num_threads()
    if on_gpu():
        from .full_models import full_models

        full = full_models()["sd15"]()
        name, steps, model, prompt = f"{full.name}, 512x512", 25, full.model, full.conditioning()
        empty = torch.zeros(1, full.channels, *full.sizes[0])
    else:
        torch.set_num_threads(1)
        name, steps, model = "demo model, 32x32, batch 8, one thread, processor time", 5, load_demo_model()[0]
        prompt, empty = [[class_token(1), {}]], torch.zeros(8, 3, 32, 32)
    flaw_map = torch.rand(1, *empty.shape[-2:], generator=torch.Generator().manual_seed(0))

    def run_of(on):
        return lambda seed: core.common_ksampler(
            on, seed, steps, 2.5, "euler", "normal", prompt, prompt, {"samples": empty}
        )

    patched = patch_attention(model, flaw_map, AttentionSettings())
    cases = in_turns({"off": run_of(model), "on": run_of(patched)}, PAIRS, "off")
    torch.set_num_threads(threads)
    return {"case": name, "steps": steps, "pairs": PAIRS} | cases
