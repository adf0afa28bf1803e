"""Is this predictor for this model? Says so in words and names both."""

import statistics

import torch

from ..latents import image_channels
from .levels import TIMES, Schedule
from .predictor import ModelKind, TimePredictor

SCHEDULE_TIMES = torch.linspace(0.0, TIMES, 9)

SCHEDULE_TOLERANCE = 1.25
"""Mean difference in log-SNR up to which two schedules are one."""

SHIFTED = ("FLOW", "FLUX")
"""Prediction types whose schedules are shifted for another resolution (ModelSamplingFlux, ModelSamplingSD3): all log-SNRs by as
much. Levels are log-SNRs, so that such a shift does no harm, and does not count."""


def kind_of(model) -> ModelKind:
    """The kind of a MODEL, as a predictor remembers it."""
    latent_format = model.get_model_object("latent_format")
    schedule = Schedule.of(model.get_model_object("model_sampling")).level(SCHEDULE_TIMES)
    return ModelKind(
        type(latent_format).__name__,
        image_channels(latent_format),
        model.model.model_type.name,
        tuple(round(value, 4) for value in schedule.tolist()),
    )


def check_predictor(predictor: TimePredictor, model, name: str = "time_predictor") -> None:
    """Raise ValueError unless the predictor was trained for this kind of model."""
    own, wanted = predictor.kind, kind_of(model)
    apart = [x - y for x, y in zip(own.schedule, wanted.schedule)]
    shift = statistics.median(apart) if own.prediction_type in SHIFTED else 0.0
    apart = sum(abs(each - shift) for each in apart) / len(apart)
    differences = [
        f"{what} {theirs}, while the model has {ours}"
        for what, theirs, ours, same in (
            ("latent format", own.latent_format, wanted.latent_format, own.latent_format == wanted.latent_format),
            ("latent channels", own.channels, wanted.channels, own.channels == wanted.channels),
            ("prediction type", own.prediction_type, wanted.prediction_type, own.prediction_type == wanted.prediction_type),
            ("noise schedule", told(own), told(wanted), apart <= SCHEDULE_TOLERANCE),
        )
        if not same
    ]
    if differences:
        raise ValueError(
            f"{name}: this predictor was trained for another kind of model. It is for {'; '.join(differences)}. Train "
            f"one for this model with Train Time Predictor (TAG), load another, or leave time_predictor unconnected."
        )


def told(kind: ModelKind) -> str:
    """A schedule in words."""
    first, middle, last = kind.schedule[0], kind.schedule[len(kind.schedule) // 2], kind.schedule[-1]
    return f"log-SNR {first:.1f} .. {middle:.1f} .. {last:.1f}"
