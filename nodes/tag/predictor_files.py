"""Time predictors as files under models/time_predictors: tensors and words, never code."""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from ..model_files import file_names, load_model_file, register_folder, save_model_file
from .compatibility import SCHEDULE_TIMES
from .predictor import ModelKind, TimePredictor, TrainingState, build_network

FOLDER = "time_predictors"
KIND = "time predictor"
SHIPPED = Path(__file__).with_name("predictors")
"""Predictors that come with the pack; listed beside the user's own."""

VERSION = 3
"""1 had another network, of plain convolutions; 2 took fewer energies, and as they were."""

PARTS = ("network", "weights", "first", "second")
"""Prefixes of the tensors: the averaged weights, and what going on with training needs (TrainingState's names)."""

register_folder(FOLDER, str(SHIPPED))


def predictor_names() -> list[str]:
    """Files that Load Time Predictor offers."""
    return file_names(FOLDER)


def save_predictor(predictor: TimePredictor, filename_prefix: str) -> Path:
    """Write to models/time_predictors under a new number; nothing that is there is touched. Gives the file's path.

    Raises:
        ValueError: the predictor holds NaN or infinite values, or the name is none.
    """
    broken = [name for name, weight in predictor.network.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(
            f"time_predictor: {broken[0]} holds NaN or infinite values, so it was not saved. Its training went wrong: train it "
            "again with a lower learning_rate."
        )
    return Path(save_model_file(FOLDER, filename_prefix, KIND, *state_of(predictor)))


def load_predictor(name: str) -> TimePredictor:
    """The predictor of this name under models/time_predictors, or of those that come with the pack.

    Raises:
        ValueError: no such file, or one that is no whole time predictor.
    """
    tensors, about = load_model_file(FOLDER, name, KIND)
    version = about.get("version")
    if version != VERSION:
        older = isinstance(version, int) and version < VERSION
        advice = "Its network is no longer used: train and save a new one." if older else "Update the pack."
        raise ValueError(f"{name} is of version {version}, this pack reads {VERSION}. {advice}")
    try:
        return from_state(tensors, about)
    except (KeyError, TypeError, ValueError, IndexError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name} is not a whole time predictor: {error}. Train and save a new one.") from error


def state_of(predictor: TimePredictor, dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, settings) of a file. In another dtype than fp32 without what going on with training needs, and but for the
    map of the energies: it takes small differences of large values."""
    state = {"network": predictor.network.state_dict()}
    if predictor.training is not None and dtype == torch.float32:
        state |= {part: getattr(predictor.training, part) for part in PARTS[1:]}
    tensors = {f"{part}.{name}": weight for part, weights in state.items() for name, weight in weights.items()}
    about = {"version": VERSION, "classes": len(predictor.levels), "condition_dim": predictor.condition_dim}
    about |= {"levels": [float(predictor.levels[0]), float(predictor.levels[-1])], "size": list(predictor.size)}
    about |= {"steps": predictor.steps, "model": asdict(predictor.kind)}
    return {
        name: weight.detach().to(torch.float32 if ".even." in name else dtype) for name, weight in tensors.items()
    }, about


def from_state(tensors: dict[str, torch.Tensor], about: dict) -> TimePredictor:
    """A predictor from a file's tensors and settings.

    Raises:
        KeyError, TypeError, ValueError: they are not those of a whole time predictor.
    """
    parts = {part: {} for part in PARTS}
    for name, weight in tensors.items():
        part, _, rest = name.partition(".")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        parts[part][rest] = weight
    told = about["model"]
    schedule = tuple(float(value) for value in told["schedule"])
    kind = ModelKind(str(told["latent_format"]), int(told["channels"]), str(told["prediction_type"]), schedule)
    shape = (kind.channels, int(about["classes"]), int(about["condition_dim"]))
    low, high = map(float, about["levels"])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"its levels go from {low} to {high}")
    if len(schedule) != len(SCHEDULE_TIMES) or not all(map(math.isfinite, schedule)):
        raise ValueError(f"its schedule has {len(schedule)} entries where {len(SCHEDULE_TIMES)} numbers are wanted")
    with torch.inference_mode(False):
        network = build_network(parts["network"], *shape)
        training = None
        if parts["weights"]:
            states = ({k: v.float().clone() for k, v in parts[part].items()} for part in PARTS[1:])
            training = TrainingState(*states)
            for part in PARTS[1:]:
                build_network(parts[part], *shape)
        levels = torch.linspace(low, high, shape[1])
    return TimePredictor(network, levels, kind, int(about["steps"]), tuple(map(int, about["size"])), training)
