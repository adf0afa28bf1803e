"""A training run as a file: what has been learned and all it takes to go on, in models/fam_training.

A run writes one file of its own, under the next free number, and renews only that one.
"""

from dataclasses import asdict

import torch

from ..latents import of_one_shape
from ..model_files import file_names, load_model_file, register_folder, save_model_file, write_model_file
from .flaw_aware import FlawAwareTraining, Progress

FOLDER, KIND = "fam_training", "flaw-aware training run"
PREFIX = "fam_lora"
NEW_RUN = "new run"

TOLD = ("base_fraction", "map_every", "attention_strength", "noise_strength", "learning_rate", "batch_size", "seed",
        "training_dtype", "latents", "sampling", "model", "positive", "negative", "vae", "flaw_highlighter")
"""What makes a resumed run another one than was interrupted, if it was changed."""

NAMED = ("latents", "model", "positive", "negative", "vae", "flaw_highlighter")
"""Those of them of which a short name is kept, which tells a person nothing."""

NEEDED = ("rank", "step", "base_steps", "judged")
"""What a file has to say of its run."""

register_folder(FOLDER)


def run_names() -> list[str]:
    """The choices of the widget `resume`."""
    return [NEW_RUN, *file_names(FOLDER)]


def describe(training: FlawAwareTraining, rank: int) -> dict:
    """The settings that go into the file, and short names of all that the run is made of."""
    sampling = training.sampling
    return asdict(training.settings) | {
        "clip": None, "rank": rank, "base_steps": training.phases.base_steps,
        "latents": training.data.fingerprint,
        "sampling": [sampling.images, sampling.steps, sampling.cfg],
    } | training.names


def run_tensors(training: FlawAwareTraining) -> dict[str, torch.Tensor]:
    """Weights, their average, the optimizer's moments, the map, the losses."""
    progress = training.progress
    tensors = {"losses": torch.tensor(progress.losses, dtype=torch.float64)}
    if progress.flaw_map is not None:
        tensors["flaw_map"] = progress.flaw_map
    for name, parameter in training.parameters.items():
        tensors[f"weights.{name}"] = parameter
        tensors[f"average.{name}"] = training.average.values[name]
        for key, value in training.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


class RunFile:
    """The file of one run. `save` makes it the first time, under a free number unless a path is given, and renews it later."""

    def __init__(self, rank: int, path: str | None = None):
        self.rank, self.path = rank, path

    def save(self, training: FlawAwareTraining) -> str:
        """Write the run as it stands; the file's path."""
        progress = training.progress
        settings = describe(training, self.rank) | {"step": progress.step, "judged": progress.judged}
        if self.path is None:
            self.path = save_model_file(FOLDER, PREFIX, KIND, run_tensors(training), settings)
        else:
            write_model_file(self.path, KIND, run_tensors(training), settings)
        return self.path


def read_run(name: str, rank: int) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and settings of a run's file.

    Raises:
        ValueError: no such file, one of another kind, one that lacks something, or a run of another rank.
    """
    tensors, settings = load_model_file(FOLDER, name, KIND)
    parts = [key.removeprefix("weights.") for key in tensors if key.startswith("weights.")]
    missing = [key for key in NEEDED if key not in settings]
    missing += [key for key in ("losses", *(f"average.{part}" for part in parts)) if key not in tensors]
    if missing:
        raise ValueError(f"resume: {name} is not a whole training run: it lacks {missing[0]}. Copy it again, or begin a new run.")
    if settings["rank"] != rank:
        had = settings["rank"]
        raise ValueError(f"resume: the run in {name} has rank {had} and the node says {rank}. Set rank to {had}.")
    return tensors, settings


def changes(training: FlawAwareTraining, rank: int, settings: dict) -> list[str]:
    """What the node says otherwise than the run that is gone on with, in words; of numbers both. A file of an earlier release
    says less: what it does not say counts as unchanged."""
    now = describe(training, rank)
    changed = [name for name in TOLD if now[name] != settings.get(name, now[name])]
    words = [name if name in NAMED else f"{name} {settings[name]} -> {now[name]}" for name in changed]
    return [f"{told} (without effect: the base phase ends where it was to)" if told.startswith("base_fraction") else told for told in words]


def restore(training: FlawAwareTraining, tensors: dict[str, torch.Tensor], settings: dict, name: str) -> None:
    """Put a run where the file left it.

    The base phase ends where it was to end when the run began, whatever `steps` says now: a longer run is refined
    longer.

    Raises:
        ValueError: the file is of a LoRA on another model or of pictures of another shape, or its run was as long as the node
            asks already.
    """
    names = {key.removeprefix("weights.") for key in tensors if key.startswith("weights.")}
    fits = names == set(training.parameters) and all(
        tensors[f"weights.{key}"].shape == value.shape for key, value in training.parameters.items()
    )
    if not fits:
        raise ValueError(f"resume: the run in {name} is of a LoRA on another model. Connect the model it was begun with.")
    if settings["step"] >= training.settings.steps:
        raise ValueError(
            f"resume: the run in {name} has done {settings['step']} steps and the node asks for {training.settings.steps} in "
            "all. Raise steps to go on with it."
        )
    flaw_map, (height, width) = tensors.get("flaw_map"), training.sampling.shape[-2:]
    if flaw_map is not None and not of_one_shape(tuple(flaw_map.shape[-2:]), (height, width)):
        raise ValueError(
            f"resume: the run in {name} is of pictures of another shape: its flaw map has {flaw_map.shape[-1]}x{flaw_map.shape[-2]} "
            f"pixels, the latents {width}x{height}. Connect the latents it was begun with, or begin a new run."
        )
    training.keep_phase_border(settings["base_steps"])
    for key, parameter in training.parameters.items():
        parameter.data.copy_(tensors[f"weights.{key}"])
        training.average.values[key].copy_(tensors[f"average.{key}"])
        moments = {part: tensors.get(f"optimizer.{part}.{key}") for part in ("step", "exp_avg", "exp_avg_sq")}
        if moments["step"] is not None:
            to = parameter.device
            training.optimizer.state[parameter] = {
                "step": moments["step"].clone(), **{part: moments[part].clone().to(to) for part in ("exp_avg", "exp_avg_sq")}
            }
    judged = [(int(step), float(value)) for step, value in settings["judged"]]
    training.progress = Progress(settings["step"], tensors["losses"].tolist(), judged, tensors.get("flaw_map"))
