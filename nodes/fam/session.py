"""A training run as the node makes it: progress with a live curve, the cue check, and nothing lost on a cancel."""

import logging
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

import comfy.model_management
import comfy.utils
import folder_paths

from ..model_files import register_folder, save_model_file, saved_kind
from ..told import keep
from .backbones import SMALLEST_SIDE, Backbone, new_network, take_vgg16_weights
from .highlighter import FOLDER, KIND, FlawHighlighter
from .pictures import draw_training
from .spurious import check_cues, warnings_of
from .training import Training, TrainingSettings

SHIPPED = os.path.join(os.path.dirname(__file__), "highlighters")
PREVIEW_PIXELS = 768

register_folder(FOLDER, SHIPPED)


def starting_network(settings: TrainingSettings) -> Backbone:
    """A fresh network; for vgg16 with the convolutions of a vgg16*.safetensors of the user's, if there is one."""
    network = new_network(settings.backbone, settings.seed)
    if settings.backbone != "vgg16":
        return network
    for name in (n for n in folder_paths.get_filename_list(FOLDER) if os.path.basename(n).lower().startswith("vgg16")):
        path = folder_paths.get_full_path_or_raise(FOLDER, name)
        if saved_kind(path) is not None:  # a highlighter of the user's that only has that name
            continue
        try:
            with torch.inference_mode(False):
                take_vgg16_weights(network, comfy.utils.load_torch_file(path, safe_load=True))
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name} in models/{FOLDER} is to be the start of a vgg16, but cannot be used: {error} Put a whole file there, "
                "or give it a name that does not begin with vgg16."
            ) from error
        logging.info("Artifact Guard: the highlighter starts from %s", path)
        return network
    logging.info("Artifact Guard: there is no vgg16*.safetensors in models/%s: the highlighter starts from nothing", FOLDER)
    return network


def go_on_settings(settings: TrainingSettings, start: FlawHighlighter) -> TrainingSettings:
    """The node's settings with the backbone and image size of the highlighter that is trained on."""
    return replace(settings, backbone=start.settings.backbone, image_size=start.settings.image_size)


class LiveCurve:
    """Tells ComfyUI how far a training run is, with its curves as the preview; raises when the user cancels."""

    def __init__(self, training: Training):
        self.training, self.drawn = training, -1
        self.bar = None

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total)
        training, preview = self.training, None
        if len(training.losses) != self.drawn and training.losses:
            self.drawn = len(training.losses)
            curves = draw_training(training.losses, training.accuracies, training.best_epoch)[0]
            preview = ("JPEG", Image.fromarray((curves.numpy() * 255).astype(np.uint8)), PREVIEW_PIXELS)
        self.bar.update_absolute(done, total, preview)


def train_highlighter(
    real: torch.Tensor, generated: torch.Tensor, settings: TrainingSettings, start: FlawHighlighter | None = None,
    progress: type[LiveCurve] = LiveCurve, node_id: str | None = None,
) -> tuple[FlawHighlighter, Training]:
    """Train, check for spurious cues, and give the best epoch's highlighter and the run.

    A run that is cancelled or fails saves its best epoch so far as a file, says where, on the node `node_id` too, and raises.

    Raises:
        ValueError: images or settings that cannot work.
    """
    if start is not None:
        settings = go_on_settings(settings, start)
    if settings.image_size < SMALLEST_SIDE[settings.backbone]:
        smallest = SMALLEST_SIDE[settings.backbone]
        raise ValueError(f"image_size is {settings.image_size}; {settings.backbone} needs {smallest} or more.")
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(1e30, device)  # of what was sampled with before
    if start is None:
        training = Training(real, generated, settings, device, starting_network(settings))
    else:
        training = Training(real, generated, settings, device, start.network, start.settings)
    try:
        training.run(progress(training))
        warnings = warnings_of(check_cues(training.best, *training.held_out(), device, training.judged_at_once))
    except BaseException:
        keep_best(training, node_id)
        raise
    for warning in warnings:
        logging.warning("Artifact Guard: %s", warning)
    return finished(training, warnings), training


def finished(training: Training, warnings: tuple[str, ...] = ()) -> FlawHighlighter:
    """The highlighter of a run's best epoch."""
    with torch.inference_mode(False):
        return FlawHighlighter(training.best.cpu(), training.result(warnings))


def keep_best(training: Training, node_id: str | None) -> None:
    """Save the best epoch of a run that did not end well; nothing if it had no epoch yet that is worth it."""
    if training.best_epoch == 0:
        return
    what = f"Its best epoch ({training.best_epoch}, held-out accuracy {training.accuracy:.1%})"
    keep(lambda: save_model_file(FOLDER, "interrupted", KIND, *finished(training).state()), what, node_id)
