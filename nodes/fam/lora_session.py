"""A flaw-aware training run as the node makes it: what it will cost, what is seen of it, and nothing lost when it ends."""

import logging
import time
from dataclasses import dataclass

import torch

import comfy.model_management
import comfy.utils

from ..told import saved_as, show_last, tell
from .flaw_aware import Diverged, FlawAwareTraining, Watcher
from .flaw_batch import FlawBatch
from .lora_pictures import preview
from .lora_settings import DTYPES, step_seed
from .lora_state import RunFile
from .train_steps import UnlikePrompts

PREVIEW_SECONDS = 2.0
GIGABYTE = 1024**3


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch, CUDA or the system say when there is no memory left."""
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    told = "allocate memory" in words or "out of memory" in words
    return told or isinstance(error, (comfy.model_management.OOM_EXCEPTION, MemoryError))


def in_words(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass
class Cost:
    """What one step took, in seconds, the memory in use at the most, in bytes, of `memory_total`, and what a map took."""

    step: float
    memory: int
    memory_total: int
    map: float = 0.0

    def words(self, training: FlawAwareTraining) -> str:
        """What the run will take."""
        steps = training.settings.steps - training.progress.step
        maps = training.phases.maps(training.progress.step) if training.uses_map else 0
        values = sum(parameter.numel() for parameter in training.parameters.values())
        return (
            f"{steps} steps of about {self.step:.2g} s and {maps} maps of about {self.map:.2g} s: about "
            f"{in_words(steps * self.step + maps * self.map)}. {values / 1e6:.2g} million values are trained. Memory in use: "
            f"{self.memory / GIGABYTE:.1f} of {self.memory_total / GIGABYTE:.1f} GB." + self.precision(training)
        )

    @staticmethod
    def precision(training: FlawAwareTraining) -> str:
        """Said where the calculation is not in what was asked for."""
        asked, dtype = training.settings.training_dtype, training.settings.dtype_on(training.model.load_device)
        return "" if dtype == DTYPES[asked] else f" This processor has no arithmetic for {asked}: fp32 instead, which is faster here."


def memory_in_use(device: torch.device) -> int:
    """Bytes: with CUDA the most that were reserved since the counting began, else what is taken of the device's memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return comfy.model_management.get_total_memory(device) - comfy.model_management.get_free_memory(device)


def measure_cost(training: FlawAwareTraining) -> Cost:
    """Two trial steps, the second one timed: the first also loads the model. What AdamW keeps of each value is added, since
    a trial takes no step.

    Raises:
        ValueError: no step can be done with these inputs, with what the usual causes are.
    """
    device = training.model.load_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        training.trial()
        start = time.perf_counter()
        training.trial()
        seconds = time.perf_counter() - start
    except Exception as error:
        if isinstance(error, (comfy.model_management.InterruptProcessingException, UnlikePrompts)):
            raise
        if out_of_memory(error):
            raise ValueError(
                f"There is not enough memory for a single step ({error}). Lower batch_size or rank, turn gradient_checkpointing "
                "on, or train on smaller images."
            ) from error
        if "inplace operation" in str(error):
            raise ValueError(
                f"A patch on the model writes into activations that its gradient needs ({error}). Train the model without it, or turn "
                "gradient_checkpointing off; with the LoRA it can be used as before."
            ) from error
        raise ValueError(
            f"The model could not take a training step with these latents and prompts ({type(error).__name__}: {error}). "
            "positive from the text encoder of another model, or latents of another model's VAE, are the usual causes; a patch "
            "on the model that does not let gradients through is another."
        ) from error
    moments = 0 if training.optimizer.state else sum(2 * parameter.nbytes for parameter in training.parameters.values())
    return Cost(seconds, memory_in_use(device) + moments, comfy.model_management.get_total_memory(device))


class Session:
    """One run with everything around it.

    Attributes:
        first: the batch that the untrained model made; `latest` the newest one.
        cancelled: whether the user ended it.
    """

    def __init__(self, training: FlawAwareTraining, file: RunFile, save_every: int = 0, node_id: str | None = None):
        self.training, self.file, self.save_every, self.node_id = training, file, save_every, node_id
        self.first: FlawBatch | None = None
        self.latest: FlawBatch | None = None
        self.cancelled, self.drawn, self.bar = False, 0.0, None

    def look(self) -> float:
        """Sample and judge a batch of the model as it is; the seconds it took.

        Raises:
            ValueError: there is not enough memory for it, or it cannot be done with these inputs.
        """
        start = time.perf_counter()
        try:
            self.first = self.latest = self.training.sample(step_seed(self.training.settings.seed, -1))
        except Exception as error:
            if isinstance(error, comfy.model_management.InterruptProcessingException):
                raise
            if not out_of_memory(error):
                raise ValueError(
                    f"The pictures for a flaw map could not be made ({type(error).__name__}: {error}). They are sampled with positive and "
                    "negative and decoded by vae: is each of them the model's own, and is the highlighter a sound one?"
                ) from error
            raise ValueError(
                f"There is not enough memory to sample and decode {self.training.sampling.images} images for a flaw map ({error}). "
                "Lower map_images, or train on smaller images."
            ) from error
        return time.perf_counter() - start

    def run(self) -> None:
        """Train to the end, or until the user cancels. What was learned is in a file in any case.

        Raises:
            InterruptProcessingException: cancelled before a single step was done.
            ValueError: the loss or its gradient was not a number.
            RuntimeError: out of memory, or whatever else ended it. All name the file that what was learned is in.
        """
        training = self.training
        self.bar = comfy.utils.ProgressBar(training.settings.steps)
        begun = training.progress.step
        self.show(force=True)
        try:
            training.run(Watcher(self.before_step, self.after_step, self.after_map))
        except comfy.model_management.InterruptProcessingException:
            if training.progress.step == begun:
                raise
            self.cancelled = True
        except BaseException as error:
            kept = self.save()[1] if training.progress.step > begun else "Nothing was learned yet."
            done = f"{training.progress.step} of {training.settings.steps} steps"
            logging.warning("Artifact Guard: training stopped after %s. %s", done, kept)
            if out_of_memory(error):
                raise RuntimeError(
                    f"Out of memory after {done}. {kept} Lower batch_size or map_images, or turn gradient_checkpointing on, first."
                ) from error
            if isinstance(error, Diverged):
                raise Diverged(f"{error} {kept}") from error
            if isinstance(error, Exception):
                raise RuntimeError(f"Training stopped after {done}: {type(error).__name__}: {error} {kept}") from error
            raise
        how = "Cancelled" if self.cancelled else "Done"
        tell(self.node_id, f"{how} after {training.progress.step} of {training.settings.steps} steps. {self.save()[1]}")
        show_last(self.bar, training.progress.step, training.settings.steps, self.picture())

    def save(self) -> tuple[bool, str]:
        """Save the run: whether it could be, and in words where it is. A disk that is full does not end the training."""
        try:
            return True, f"The run is saved as {saved_as(self.file.save(self.training))}. Choose it at resume to go on."
        except Exception as error:
            return False, f"The run could not be saved ({error})."

    def before_step(self, step: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def after_step(self, step: int, loss: float) -> None:
        if self.save_every and (step + 1) % self.save_every == 0 and step + 1 < self.training.settings.steps:
            saved, words = self.save()
            if not saved:
                tell(self.node_id, words)
        self.show()

    def after_map(self, step: int, batch: FlawBatch) -> None:
        self.latest = batch
        mean = batch.probabilities.mean().item()
        tell(self.node_id, f"New flaw map at step {step}: its samples look generated with {mean:.0%}.")
        self.show(force=True)

    def show(self, force: bool = False) -> None:
        """Bar and picture on the page; a picture every two seconds at most."""
        now, picture = time.perf_counter(), None
        if force or now - self.drawn > PREVIEW_SECONDS:
            picture, self.drawn = self.picture(), now
        self.bar.update_absolute(self.training.progress.step, self.training.settings.steps, picture)

    def picture(self) -> tuple:
        """Curves and newest batch, in the form in which ComfyUI shows previews."""
        training, done = self.training, self.training.progress.step
        phase = "refinement phase" if training.phases.refining(max(0, done - 1)) else "base phase"
        title = f"Training loss, step {done} of {training.settings.steps}, {'cancelled' if self.cancelled else phase}"
        return preview(training.progress, training.phases, self.latest, title)
