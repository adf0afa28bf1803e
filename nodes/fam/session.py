"""A training run as the node makes it: progress with a live curve, the cue check, and nothing lost on a cancel."""

import logging
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import comfy.model_management
import comfy.utils
import folder_paths

from ..model_files import register_folder, save_model_file
from .backbones import SMALLEST_SIDE, Backbone, new_network, take_vgg16_weights
from .highlighter import FOLDER, KIND, FlawHighlighter
from .pictures import draw_training
from .spurious import check_cues
from .training import Training, TrainingSettings

SHIPPED = os.path.join(os.path.dirname(__file__), "highlighters")
PREVIEW_PIXELS = 768

register_folder(FOLDER, SHIPPED)


def starting_network(settings: TrainingSettings) -> Backbone:
    """A fresh network; for vgg16 with the convolutions of a vgg16*.safetensors of the user's, if there is one."""
    network = new_network(settings.backbone, settings.seed)
    if settings.backbone == "vgg16":
        names = [n for n in folder_paths.get_filename_list(FOLDER) if os.path.basename(n).lower().startswith("vgg16")]
        for name in names[:1]:
            path = folder_paths.get_full_path_or_raise(FOLDER, name)
            with torch.inference_mode(False):
                take_vgg16_weights(network, comfy.utils.load_torch_file(path, safe_load=True))
            logging.info("Artifact Guard: the highlighter starts from %s", path)
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
    progress: type[LiveCurve] = LiveCurve,
) -> tuple[FlawHighlighter, Training]:
    """Train, check for spurious cues, and give the best epoch's highlighter and the run.

    A run that is cancelled or fails saves its best epoch so far as a file, says where, and raises.

    Raises:
        ValueError: images or settings that cannot work.
    """
    earlier = 0
    if start is not None:
        settings, earlier = go_on_settings(settings, start), start.settings.epochs
    if settings.image_size < SMALLEST_SIDE[settings.backbone]:
        smallest = SMALLEST_SIDE[settings.backbone]
        raise ValueError(f"image_size is {settings.image_size}; {settings.backbone} needs {smallest} or more.")
    network = starting_network(settings) if start is None else start.network
    device = comfy.model_management.get_torch_device()
    training = Training(real, generated, settings, device, network)
    try:
        training.run(progress(training))
    except BaseException:
        keep_best(training, earlier)
        raise
    cues = check_cues(training.best, *training.held_out(), device)
    warnings = tuple(cue.words for cue in cues if cue.spurious)
    for warning in warnings:
        logging.warning("Artifact Guard: %s", warning)
    return finished(training, earlier, warnings), training


def finished(training: Training, earlier_epochs: int, warnings: tuple[str, ...] = ()) -> FlawHighlighter:
    """The highlighter of a run's best epoch."""
    with torch.inference_mode(False):
        return FlawHighlighter(training.best.cpu(), training.result(earlier_epochs, warnings))


def keep_best(training: Training, earlier_epochs: int) -> None:
    """Save the best epoch of a run that did not end well; nothing if it had no epoch yet."""
    if training.best_epoch == 0:
        return
    path = save_model_file(FOLDER, "interrupted", KIND, *finished(training, earlier_epochs).state())
    logging.warning(
        "Artifact Guard: training stopped early. Its best epoch (%d, held-out accuracy %.1f %%) is saved as %s: load it to go on.",
        training.best_epoch, 100 * training.accuracy, path,
    )
