"""The training node: checks what came, trains with progress on the page, keeps what was learned when cancelled."""

import logging

import numpy as np
import torch
from PIL import Image

from comfy_api.latest import io

import comfy.model_management
import comfy.utils

from ..cancelled import CancelledRuns
from ..latents import FrameLayout, check_latent
from ..plots import Panel, draw_chart
from ..run_reports import image_part
from ..told import id_of, keep, show_last
from .compatibility import check_predictor, kind_of
from .levels import TIMES, Schedule
from .predictor import TimePredictor
from .predictor_files import save_predictor
from .training import Trainer, TrainingData, TrainingSettings, held_out_time_gap, new_predictor

TimePredictorType = io.Custom("TIME_PREDICTOR")

CANCELLED = CancelledRuns()
PREVIEW_EVERY = 50
GUESS = TIMES / 4
"""The mean gap of who says the middle of the schedule every time."""
LARGEST = 1e4
"""Of what a model works on, in its own latent space."""
CURVE_POINTS = 200


def clean_frames(model, latents: dict) -> tuple[torch.Tensor, int]:
    """The frames (B * T, C, H, W) of a LATENT in the model's own latent space, and how many of them each sample has, T.

    Raises:
        ValueError: no image part, NaN, or a LATENT of another model.
    """
    layout, samples = image_part(latents)
    if layout is None or len(samples) == 0:
        raise ValueError("latents: an empty batch, or one without an image part, came. Clean latents of images are wanted.")
    latent_format = model.get_model_object("latent_format")
    check_latent(samples, latent_format, nested=False)
    if samples.ndim == 4 and getattr(latent_format, "latent_dimensions", 2) == 3:
        samples = samples.unsqueeze(2)  # one frame each
        layout = FrameLayout.of([samples.shape])
    samples = model.model.process_latent_in(samples.float().cpu())
    largest = samples.abs().amax().item()
    if largest > LARGEST:
        raise ValueError(f"latents: values up to {largest:.3g} came; those of images stay within about 30. Encode the images again.")
    return layout.frames(samples).clone(), layout.frames_per_sample


def training_data(model, latents: list[dict], conditioning: list | None) -> TrainingData:
    """What the node was given as training data, in the model's own latent space, all in one.

    Args:
        latents: one LATENT with a batch, or many, as from a folder of pictures.
        conditioning: the entries of all conditions in order, or None.

    Raises:
        ValueError: too few latents, empty ones, NaN in them, latents of another model or of several sizes, or conditions that do not
            fit them.
    """
    if not latents:
        raise ValueError("latents: an empty list came. Clean latents of images are wanted.")
    parts, lengths = zip(*(clean_frames(model, latent) for latent in latents))
    if len({part.shape[1:] for part in parts}) > 1:
        one, other = sorted({f"{part.shape[-1]}x{part.shape[-2]}" for part in parts})[:2]
        raise ValueError(
            f"latents: several sizes came, such as {one} and {other} latent pixels. Crop or scale the pictures to one size "
            f"before they are encoded; the predictor then works at others near it too."
        )
    frames = torch.cat(parts)
    if len(frames) < 2:
        raise ValueError(
            "latents: a single one came. At least two are wanted, one of which is held out; hundreds make a predictor "
            "good. Batch them (Rebatch Latents, VAE Encode of an image batch), or sample many with the model."
        )
    if frames.amin() == frames.amax():
        raise ValueError("latents: they hold one value everywhere, as an Empty Latent does. Latents of images are wanted (VAE Encode).")
    frames_of = torch.tensor([length for part, length in zip(parts, lengths) for _ in range(len(part) // length)])
    clips = torch.arange(len(frames_of)).repeat_interleave(frames_of)
    if conditioning is None:
        return TrainingData(frames, None, clips)
    means = condition_means(conditioning)
    if len(means) == len(frames_of):
        means = means.repeat_interleave(frames_of, dim=0)
    if len(means) not in (1, len(frames)):
        raise ValueError(
            f"conditioning: {len(means)} conditions came for {len(frames_of)} latents. Give one for all of them, or one "
            f"each, in the same order (as a list, or put together by Conditioning (Combine))."
        )
    return TrainingData(frames, means.expand(len(frames), -1).clone(), clips)


def condition_means(conditioning: list) -> torch.Tensor:
    """The mean over tokens of each condition, (N, D).

    Raises:
        ValueError: no text encoder output, NaN in it, or conditions of several widths.
    """
    means = []
    for entry in conditioning:
        tokens = entry[0]
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3 or tokens.numel() == 0:
            raise ValueError(
                "conditioning: an entry without text encoder output came. Connect a CLIP Text Encode whose clip comes from the same "
                "checkpoint as the model, or nothing."
            )
        if not torch.isfinite(tokens).all():
            raise ValueError("conditioning: the text encoder's output holds NaN or infinite values. Run the text encoder in fp32.")
        means.append(tokens.detach().float().cpu().mean(dim=1))
    widths = sorted({mean.shape[1] for mean in means})
    if len(widths) != 1:
        told = f"widths {widths[0]} and {widths[1]}" if widths else "no condition"
        raise ValueError(f"conditioning: {told} came. Give the output of one text encoder for all latents, or leave it unconnected.")
    return torch.cat(means)


def loss_curve(losses: list[float], title: str) -> torch.Tensor:
    """The loss over the steps, each point the mean of its share of them, as an IMAGE (1, H, W, 3)."""
    if not losses:
        return draw_chart([Panel(title, {}, [], "no steps to show")])
    parts = np.array_split(np.asarray(losses), min(CURVE_POINTS, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    chart = Panel(title, {"cross-entropy, nats": [float(part.mean()) for part in parts]}, [str(end) for end in ends], "step")
    return draw_chart([chart])


def preview(curve: torch.Tensor) -> tuple:
    """The loss curve, an IMAGE, in the form in which ComfyUI shows previews."""
    pixels = (curve[0].numpy() * 255).astype(np.uint8)
    return ("JPEG", Image.fromarray(pixels), 768)


def train_steps(trainer: Trainer, steps: int, bar: comfy.utils.ProgressBar) -> tuple[list[float], bool]:
    """Train with a bar and a live curve on the page; (losses, whether the user cancelled).

    Losses are read when a preview is drawn: until then nothing waits for a GPU.

    Raises:
        InterruptProcessingException: cancelled before anything was learned.
    """
    losses, unread, cancelled = [], [], False
    try:
        for step in range(1, steps + 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            unread.append(trainer.step())
            shown = None
            if step % PREVIEW_EVERY == 0:
                losses, unread = losses + torch.stack(unread).tolist(), []
                shown = preview(loss_curve(losses, f"Step {step} of {steps}"))
            bar.update_absolute(step, steps, shown)
    except comfy.model_management.InterruptProcessingException:
        cancelled = True
        if not losses and not unread:
            raise
    return losses + [loss.item() for loss in unread], cancelled


def keep_learned(trainer: Trainer, node_id: str | None) -> None:
    """Save what a run that an error ended has learned; nothing if that is nothing."""
    if trainer.steps == trainer.start.steps:
        return
    what = f"What was learned ({trainer.steps} steps in all)"
    keep(lambda: save_predictor(trainer.result(), "interrupted"), what, node_id)


def judged(predictor: TimePredictor, held: TrainingData, schedule: Schedule) -> float:
    """The held-out time gap. A cancellation that arrives here comes too late: there is nothing left to stop."""
    try:
        return held_out_time_gap(predictor.network, predictor.levels, held, schedule)
    except comfy.model_management.InterruptProcessingException:
        return held_out_time_gap(predictor.network, predictor.levels, held, schedule)


class TAGTrainTimePredictor(io.ComfyNode):
    """Trains a time predictor for a model on clean latents."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAGTrainTimePredictor",
            display_name="Train Time Predictor (TAG)",
            category="Artifact Guard/TAG",
            description="Trains a small network to see how noisy a latent is. Cancelling keeps what was learned.",
            search_aliases=["tag training", "train tag", "time predictor training", "temporal alignment training"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the predictor is for; it gives the latent format and noise "
                               "schedule and is not run."),
                io.Latent.Input("latents", tooltip="Clean latents like those the model makes: encoded images or samples, a "
                                "batch or a list. Hundreds or more; a tenth is held out."),
                io.Int.Input("steps", default=3000, min=1, max=1000000, tooltip="Training steps. More is better, slowly."),
                io.Int.Input("batch_size", default=128, min=1, max=4096, tooltip="Noised latents a step. Higher learns "
                             "more steadily and takes longer and more memory."),
                io.Float.Input("learning_rate", default=1e-4, min=1e-7, max=1.0, step=1e-7, tooltip="How large "
                               "its steps are. The default suits; half as much again is no faster, and too high never "
                               "settles."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="The same seed gives the same predictor."),
                io.Conditioning.Input("conditioning", optional=True, tooltip="For a conditional predictor: one condition "
                                      "for each latent, or one for all."),
                TimePredictorType.Input("time_predictor", optional=True, tooltip="Go on training this one, exactly where "
                                        "it stopped. It stays as it is; a further trained one comes out."),
            ],
            outputs=[
                TimePredictorType.Output("time_predictor", display_name="time_predictor", tooltip="The trained predictor."),
                io.Image.Output("loss_curve", display_name="loss_curve", tooltip="The loss over the steps."),
                io.Float.Output("time_gap", display_name="time_gap", tooltip="Mean error on held-out latents, in "
                                "thousandths of the model's schedule; lower is better."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> int:
        return CANCELLED.fingerprint(inputs, id_of(cls))

    @classmethod
    def execute(
        cls, model, latents, steps, batch_size, learning_rate, seed, conditioning=None, time_predictor=None
    ) -> io.NodeOutput:
        """Everything comes as a list: latents and conditions of a folder are many, of the rest the first counts."""
        settings = TrainingSettings(steps[0], batch_size[0], learning_rate[0], seed[0])
        entries = None if conditioning is None else [entry for given in conditioning for entry in given]
        predictor, curve, gap, cancelled = train(model[0], latents, settings, entries, time_predictor and time_predictor[0], id_of(cls))
        if cancelled:
            CANCELLED.add({"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}, id_of(cls))
        return io.NodeOutput(predictor, curve, gap)


def train(
    model, latents: list[dict], settings: TrainingSettings, conditioning: list | None, given: TimePredictor | None,
    node_id: str | None = None,
) -> tuple[TimePredictor, torch.Tensor, float, bool]:
    """(predictor, loss curve, held-out time gap, whether it was cancelled). given: a predictor to go on with; the rest as in training_data.

    What an error ends is saved as interrupted_*; node_id: the node that is told so.
    """
    with torch.inference_mode(False), torch.enable_grad():
        data = training_data(model, latents, conditioning)
        predictor = starting_point(model, data, settings.seed, given)
        kept, held = data.split()
        trainer = Trainer(predictor, kept, settings, comfy.model_management.get_torch_device())
        bar = comfy.utils.ProgressBar(settings.steps)
        try:
            losses, cancelled = train_steps(trainer, settings.steps, bar)
            result = trainer.result()
            gap = judged(result, held, Schedule.of(model.get_model_object("model_sampling")))
        except Exception:
            keep_learned(trainer, node_id)
            raise
    title = f"{len(losses)} steps, {result.steps} in all; held-out time gap {gap:.1f}"
    if cancelled:
        title = f"Cancelled after {len(losses)} of {settings.steps} steps; what was learned is kept. Time gap {gap:.1f}"
    if not gap < GUESS:
        title += ". No better than a guess: train longer, or with a lower learning_rate"
    logging.info("Time predictor: %s", title)
    curve = loss_curve(losses, title)
    show_last(bar, settings.steps, settings.steps, preview(curve))
    return result, curve, gap, cancelled


def starting_point(model, data: TrainingData, seed: int, given: TimePredictor | None) -> TimePredictor:
    """The predictor to go on with, or a new one for this model and these data.

    Raises:
        ValueError: the given one is for another kind of model or condition.
    """
    dim = 0 if data.conditions is None else data.conditions.shape[1]
    if given is None:
        schedule = Schedule.of(model.get_model_object("model_sampling"))
        return new_predictor(kind_of(model), schedule, tuple(data.frames.shape[-2:]), dim, seed)
    check_predictor(given, model)
    if given.condition_dim != dim:
        raise ValueError(
            f"conditioning: the predictor to go on with takes conditions of width {given.condition_dim} (0: none), and "
            f"width {dim} came. Connect the kind of conditioning it was trained with, or train a new one."
        )
    return given
