"""The demo model trained as a whole by FAM's two-phase rule: by the node's own loop, with its network in the LoRA's place.

The run starts from the shipped weights. The highlighter is one that learned to tell training images from samples of
just these weights, made the way the maps' batches are made.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from .data import load_fashion_mnist
from .fam_flaws import as_image
from .train_highlighter import write
from .training_runs import quick_dtype

SAMPLING_STEPS, CFG, SCHEDULER = 10, 1.0, "normal"
"""Of the maps' batches, the highlighter's training images and the samples that are judged alike: ten Euler steps show
flaws, and cost a quarter of what the pictures of the quickstart cost."""
LABEL_DROPOUT = 0.1
PEAK_RATE, WARMUP, BATCH, MAP_IMAGES = 1e-4, 20, 32, 16
SAVE_EVERY = 50
BETAS = (0.9, 0.99)
HIGHLIGHTER_IMAGES, HIGHLIGHTER_EPOCHS, HIGHLIGHTER_SIZE = 1200, 25, 64


def falling_rate(steps: int) -> Callable[[int], float]:
    """Learning rate by step: linear warm-up, then half a cosine down to zero at the last step."""
    def rate(step: int) -> float:
        progress = max(0, step - WARMUP) / max(1, steps - WARMUP)
        return PEAK_RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


def trainable(demo_model, unet_config: dict, sampling_settings: dict):
    """A model of the demo model's kind in fp32, made so that a gradient may pass, its weights not set yet: a model patcher."""
    import comfy.model_patcher
    import comfy.ops

    device = comfy.model_management.get_torch_device()
    config = demo_model.DemoConfig(unet_config)
    config.custom_operations = comfy.ops.disable_weight_init
    config.sampling_settings = sampling_settings
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=device)
    model.diffusion_model.to(device)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def trainable_demo(demo_model):
    """The demo model with its shipped weights in fp32, made so that a gradient may pass: a model patcher."""
    import comfy.utils

    model = trainable(demo_model, demo_model.UNET_CONFIG, {})
    weights = comfy.utils.load_torch_file(str(demo_model.WEIGHTS), safe_load=True)
    model.model.diffusion_model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model


def conditions_of(demo_model) -> list:
    """Ten classes and, last, none: CONDITIONINGs of one entry."""
    return [[[demo_model.class_token(label), {}]] for label in [*range(len(demo_model.LABELS)), None]]


def demo_training(demo_model, images: torch.Tensor, labels: torch.Tensor, highlighter, settings):
    """A FlawAwareTraining of the whole network from its shipped weights."""
    from artifact_guard.nodes.fam.flaw_aware import FlawAwareTraining
    from artifact_guard.nodes.fam.flaw_batch import FlawSampling
    from artifact_guard.nodes.fam.training_data import LatentData

    import comfy.sd

    model = trainable_demo(demo_model)
    network = model.model.diffusion_model.requires_grad_(True)
    conditions = conditions_of(demo_model)
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    sampling = FlawSampling(
        vae, highlighter, conditions[:-1], conditions[-1], tuple(images.shape[1:]), MAP_IMAGES, SAMPLING_STEPS, CFG, SCHEDULER
    )
    data = LatentData(images, conditions, labels, (LABEL_DROPOUT, len(conditions) - 1))
    return FlawAwareTraining(model, dict(network.named_parameters()), data, sampling, settings, falling_rate(settings.steps), BETAS)


@torch.no_grad()
def sample_demo(demo_model, model, count: int, seed: int) -> torch.Tensor:
    """Samples (count, 3, 32, 32) in [-1, 1], the classes in turn; the noise depends on the seed alone."""
    import comfy.sample

    tokens = torch.cat([demo_model.class_token(index % len(demo_model.LABELS)) for index in range(count)])
    nothing, parts = [[demo_model.class_token(None), {}]], []
    dtype = quick_dtype(model.load_device)
    for number, part in enumerate(tokens.split(50)):
        latent = torch.zeros(len(part), 3, 32, 32)
        noise = comfy.sample.prepare_noise(latent, seed * 1000 + number)
        with torch.autocast("cpu", dtype, enabled=model.load_device.type == "cpu" and dtype != torch.float32):
            parts.append(comfy.sample.sample(
                model, noise, SAMPLING_STEPS, CFG, "euler", SCHEDULER, [[part, {}]], nothing, latent, disable_pbar=True, seed=0
            ).float().cpu())
    return torch.cat(parts).clamp(-1, 1)


def base_highlighter(demo_model, images: torch.Tensor, cache: Path):
    """The highlighter of the shipped weights' samples, or the one an earlier call left in the folder `cache`."""
    from artifact_guard.nodes.fam.highlighter import KIND, FlawHighlighter
    from artifact_guard.nodes.fam.session import train_highlighter
    from artifact_guard.nodes.fam.training import TrainingSettings
    from artifact_guard.nodes.model_files import read_model_file

    path = cache / f"base-highlighter-{HIGHLIGHTER_IMAGES}-{HIGHLIGHTER_EPOCHS}.safetensors"
    if not path.exists():
        with torch.inference_mode(False):
            generated = sample_demo(demo_model, trainable_demo(demo_model), HIGHLIGHTER_IMAGES, seed=900)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(900))[:HIGHLIGHTER_IMAGES]
        settings = TrainingSettings(HIGHLIGHTER_EPOCHS, 32, 2e-5, HIGHLIGHTER_SIZE, 0, "small")
        highlighter, training = train_highlighter(as_image(images[chosen]), as_image(generated), settings)
        print(f"Highlighter of the base model's samples: held-out accuracy {training.accuracy:.1%}", flush=True)
        write(highlighter, path)
    return FlawHighlighter.from_state(*read_model_file(str(path), path.name, KIND))


def run_flaw_aware(demo_model, settings, output: Path, data: Path | None) -> dict[str, torch.Tensor]:
    """Fine-tune the demo model as a whole, resumably; gives the averaged weights for a file."""
    from artifact_guard.nodes.fam.flaw_aware import Watcher
    from artifact_guard.nodes.fam.lora_state import KIND, RunFile, changes, restore
    from artifact_guard.nodes.model_files import read_model_file
    from tqdm import tqdm

    (images, labels), _ = load_fashion_mnist(data)
    training = demo_training(demo_model, images, labels, base_highlighter(demo_model, images, output), settings)
    file = RunFile(0, str(output / "flaw-aware.safetensors"))
    if Path(file.path).exists():
        tensors, earlier = read_model_file(file.path, "flaw-aware.safetensors", KIND)
        different = changes(training, 0, earlier) + (["steps"] if earlier["steps"] != settings.steps else [])  # the rate falls over all
        if different:
            raise SystemExit(f"{file.path} is of a run with another {', '.join(different)}: choose another --output.")
        if earlier["step"] >= settings.steps:
            print(f"{file.path} holds {earlier['step']} steps: this run is done.", flush=True)
            return {name: tensors[f"average.{name}"].half().contiguous() for name in training.average.values}
        restore(training, tensors, earlier, file.path)
    bar = tqdm(initial=training.progress.step, total=settings.steps, unit="step", mininterval=5)

    def after_step(step: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
        if (step + 1) % SAVE_EVERY == 0:
            file.save(training)

    training.trial()
    training.run(Watcher(after_step=after_step))
    file.save(training)
    return {name: value.half().cpu().contiguous() for name, value in training.average.values.items()}
