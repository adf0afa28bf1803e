"""What a training run refuses before it starts: inputs that do not belong together, and a highlighter that sees nothing."""

import torch

from ..latents import check_latent
from ..run_reports import image_part
from .flaw_batch import PICTURES, FlawBatch, FlawSampling
from .training_data import LatentData

CONFINED = {"area": None, "mask": None, "control": None, "gligen": None, "hooks": None, "start_percent": 0.0, "end_percent": 1.0}
"""Entries of a conditioning that belong to one picture or a part of its steps, not to a training run, and what is none."""
JUDGED = 16
"""Training images that are decoded to try the highlighter on."""
SAME = 0.01
"""Probabilities of all images within this are one answer."""


def normal_tensors(value):
    """A conditioning with its tensors cloned: made under inference mode, they could not be part of a gradient."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(normal_tensors, value))
    if isinstance(value, dict):
        return {key: normal_tensors(entry) for key, entry in value.items()}
    return value


def check_text(name: str, conditions: list) -> None:
    """Refuse a CONDITIONING input `name` without text, or with NaN in it."""
    if not isinstance(conditions, list) or not conditions:
        raise ValueError(f"{name}: no text encoder output came. Connect a CLIP Text Encode that has a text encoder and a prompt.")
    for entry in conditions:
        tokens = entry[0] if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
        if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2 or tokens.numel() == 0:
            raise ValueError(
                f"{name}: an entry without text encoder output came. Connect a CLIP Text Encode whose clip comes from the "
                "same checkpoint as the model."
            )
        pooled = entry[1].get("pooled_output")
        if not all(torch.isfinite(part).all() for part in (tokens, pooled) if isinstance(part, torch.Tensor)):
            raise ValueError(f"{name}: the text encoder's output holds NaN or infinite values. Run the text encoder in fp32.")


def check_negative(negative: list, positive: list) -> list:
    """The negative prompt for the maps' pictures.

    Raises:
        ValueError: no text in it, NaN, or the output of another text encoder than the positive's.
    """
    check_text("negative", negative)
    wanted = positive[0][0].shape[-1]
    for tokens, _ in negative:
        if tokens.shape[-1] != wanted:
            raise ValueError(
                f"negative: its text encoder's output is {tokens.shape[-1]} wide and that of positive {wanted}. Encode both with the "
                "text encoder of the model's own checkpoint."
            )
    return normal_tensors(negative)


def one_each(entry: list, count: int) -> list:
    """A prompt as an entry for every latent, where its pictures are as many as the latents; else as it is.

    Raises:
        ValueError: another number of pictures.
    """
    tokens, more = entry
    pictures = {name: more[name] for name in PICTURES if more.get(name) is not None}
    each = [part for value in pictures.values() for part in (value if isinstance(value, (list, tuple)) else [value])]
    numbers = {len(part) for part in each} - {1}
    if not numbers:
        return [entry]
    if numbers != {count}:
        raise ValueError(
            f"positive: {', '.join(pictures)} of {', '.join(map(str, sorted(numbers)))} pictures came for {count} latents. Give one for "
            "all of them, or one each, in the same order; a prompt that belongs to one latent has one."
        )

    def row(value, index: int):
        if isinstance(value, (list, tuple)):
            return [row(part, index) for part in value]
        return value if len(value) == 1 else value[index : index + 1]

    return [[tokens, more | {name: row(value, index) for name, value in pictures.items()}] for index in range(count)]


def check_conditions(positive: list, count: int) -> tuple[list, torch.Tensor]:
    """The prompts as CONDITIONINGs of one entry each, and which of them belongs to each of `count` latents.

    Raises:
        ValueError: no text encoder output, NaN in it, one that is confined to a region or to steps, or a number that fits not.
    """
    check_text("positive", positive)
    for entry in positive:
        tokens = entry[0]
        if tokens.shape[0] != 1:
            raise ValueError(
                f"positive: an entry with {tokens.shape[0]} prompts in one batch came. Give each prompt as an entry of its own "
                "(Conditioning (Combine) puts them together)."
            )
        confined = [name for name, none in CONFINED.items() if entry[1].get(name) is not None and entry[1][name] != none]
        if confined:
            raise ValueError(
                f"positive: a prompt is confined by {', '.join(confined)}. Training takes plain prompts, one for all latents "
                "or one each."
            )
    if len(positive) not in (1, count):
        raise ValueError(
            f"positive: {len(positive)} prompts came for {count} latents. Give one for all of them, or one each, in the "
            "same order (Conditioning (Combine) puts them together)."
        )
    each = count if len(positive) == 1 else 1  # pictures that a prompt may have
    entries = [part for entry in normal_tensors(positive) for part in one_each(entry, each)]
    which = torch.arange(count) if len(entries) > 1 else torch.zeros(count, dtype=torch.long)
    return [[entry] for entry in entries], which


def check_rank(rank: int) -> None:
    """Refuse a rank that no LoRA has."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; a whole number of 1 or more is wanted. 4 to 32 are usual.")


def check_latents(model, latents: dict) -> torch.Tensor:
    """The clean latents, (N, C, [T,] H, W), as a LATENT has them.

    Raises:
        ValueError: none, nested ones, NaN, or latents of another model's format.
    """
    samples = latents["samples"]
    layout, part = image_part(latents)
    if layout is None or len(part) == 0 or getattr(samples, "is_nested", False):
        raise ValueError("latents: an empty batch, or latents that are not of images or videos alone, came. Encode the training "
                         "images with the model's own VAE (VAE Encode).")
    latent_format = model.get_model_object("latent_format")
    check_latent(samples, latent_format, nested=False)
    axes = getattr(latent_format, "latent_dimensions", 2)
    if axes == 3 and samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if samples.ndim != axes + 2:
        raise ValueError(
            f"latents: they have {samples.ndim - 2} axes after the channels and this model's have {axes}: they are of another "
            "model's format. Encode the training images with the model's own VAE."
        )
    return samples.detach().float().cpu().clone()


def training_data(model, latents: dict, positive: list) -> tuple[LatentData, torch.Tensor]:
    """(what is trained on, the latents as they came)."""
    samples = check_latents(model, latents)
    conditions, which = check_conditions(positive, len(samples))
    return LatentData(model.model.process_latent_in(samples), conditions, which), samples


def spoilt(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Images (B, H, W, C) with the middle of each replaced by random blocks: anybody would call these flawed.

    Blocks of an eighth of the shorter side, whatever the size: finer noise is what training a highlighter teaches it to
    overlook.
    """
    images, (height, width) = images.clone(), images.shape[1:3]
    top, left, block = height // 4, width // 4, max(1, min(height, width) // 8)
    area = images[:, top : height - top, left : width - left]
    shape = (len(images), -(-area.shape[1] // block), -(-area.shape[2] // block), images.shape[-1])
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).round()
    blocks = blocks.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
    area.copy_(blocks[:, : area.shape[1], : area.shape[2]])
    return images


def check_highlighter(sampling: FlawSampling, samples: torch.Tensor, batch: FlawBatch) -> list[str]:
    """Refuse a highlighter whose maps can mean nothing, before anything is trained by them.

    It is asked about training images, the model's own samples, and training images spoilt on purpose.

    Returns:
        What else speaks against it: what its own training warned of, and one verdict for everything.

    Raises:
        ValueError: it gives all of them the same probability, or its maps are empty.
    """
    real = sampling.judge_samples(samples[:JUDGED])
    noisy = sampling.judge(spoilt(real.images))
    groups = {"training images": real, "images of the model": batch, "images spoilt on purpose": noisy}
    asked = ", ".join(f"{len(group.images)} {name}" for name, group in groups.items())
    probabilities = torch.cat([group.probabilities for group in groups.values()])
    generated = probabilities >= 0.5
    low, high = probabilities.min().item(), probabilities.max().item()
    advice = (
        "Train it (Train Flaw Highlighter) on real images like your training images against images that this model made, "
        "until its held-out accuracy is well above 50 %, and look at its maps (Flaw Map) first."
    )
    verdict = "generated" if generated.all() else "real" if not generated.any() else "undecided"
    if high - low < SAME:
        raise ValueError(
            f"flaw_highlighter: it answers the same for everything. Asked about {asked}, it says {verdict} every time "
            f"(probability of being generated {low:.1%} to {high:.1%}), so its maps would mean nothing. {advice}"
        )
    if not torch.cat([batch.maps.flatten(1), noisy.maps.flatten(1)]).any():
        raise ValueError(f"flaw_highlighter: its maps are empty: nothing in {asked} speaks for generated to it. {advice}")
    doubts = list(sampling.highlighter.settings.warnings)
    if verdict != "undecided":
        doubts.append(f"It calls all of {asked} {verdict} (probability of being generated {low:.1%} to {high:.1%}). {advice}")
    return doubts
