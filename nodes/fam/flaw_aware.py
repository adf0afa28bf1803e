"""FAM training (arXiv 2512.08774): ordinary steps, then steps under a map of the flaws the model has at that moment.

The one loop for LoRAs and for whole networks. In the refinement phase a batch is sampled with the averaged weights
every `map_every` steps, and its mean flaw map M acts on the steps until the next one:
    reverse part:  K (1 + lambda M), V (1 + lambda M) in self-attention, by this pack's attention patch;
    forward part:  the noise is eps + lambda M, and the network learns to predict that (models on pixels only).
The paper samples the map's batch with the averaged weights too; how many images it has, it does not say.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

import comfy.model_management
from comfy_extras.nodes_train import TrainGuider

from .attention import AttentionSettings, patch_attention
from .checkpointing import checkpointed, watched, with_checkpointed_patches
from .flaw_batch import FlawBatch, FlawSampling
from .lora_settings import FlawAwareSettings, decay_at, step_seed
from .train_steps import TrainSteps, without_guidance
from .training_data import LatentData, short_name
from .weight_average import WeightAverage

BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01
"""AdamW's own, as in core's training node."""


class Diverged(ValueError):
    """The loss or its gradient was not a number: this step was not taken."""


def works_on_pixels(model) -> bool:
    """Whether a model's latents are the picture itself, so that a map at image size is one at the noise's size."""
    latent_format = model.get_model_object("latent_format")
    return getattr(latent_format, "spacial_downscale_ratio", 8) == 1 and latent_format.latent_channels == 3


def names_of(model, sampling: FlawSampling) -> dict[str, str]:
    """Short names of what a run is made of, so that it is noticed when it goes on with something else. To be asked before the
    model is loaded, which puts its patches into the weights.
    """
    frozen = [value for value in model.model.parameters() if not value.requires_grad]
    patches = {
        key: [[patch[0], getattr(patch[1], "weights", patch[1])] for patch in patches] for key, patches in model.patches.items()
    }
    process = model.get_model_object("model_sampling")
    schedule = [float(process.percent_to_sigma(part)) for part in (0.0, 0.5, 1.0)]
    kinds = [kind.__name__ for kind in type(process).__mro__]
    decoder = getattr(sampling.vae, "first_stage_model", None)
    return {
        "model": short_name([frozen, patches, schedule, kinds]), "positive": short_name(sampling.conditions), "negative": short_name(sampling.negative),
        "vae": short_name([] if decoder is None else list(decoder.parameters())),
        "flaw_highlighter": short_name(list(sampling.highlighter.network.parameters())),
    }


def optimizer_of(parameters, rate: float, betas=BETAS) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=WEIGHT_DECAY)


@dataclass
class Watcher:
    """Who is told how a run goes. What one of these raises ends the run, at a step's border.

    before_step: (step). after_step: (step, loss). after_map: (step, batch).
    """

    before_step: Callable[[int], None] = lambda step: None
    after_step: Callable[[int, float], None] = lambda step, loss: None
    after_map: Callable[[int, FlawBatch], None] = lambda step, batch: None


@dataclass
class Progress:
    """What a run has done so far; with weights, average and optimizer it is all that going on takes.

    judged: (step, mean probability of being generated) of every map's batch.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)
    flaw_map: torch.Tensor | None = None


class FlawAwareTraining:
    """A run. `run` goes on from wherever `progress` stands; stopped at any step, nothing of the earlier ones is lost.

    Args:
        model: the patcher that is trained, private to this run; a gradient can pass through its weights.
        parameters: name -> what is trained of it.
        rate: learning rate by step; settings.learning_rate without it.

    Every draw depends on (seed, step) only, so that a run in pieces is the same run.

    Raises:
        ValueError: the attention of this kind of model cannot be reached and attention_strength is not 0, in a run that refines.
    """

    def __init__(
        self, model, parameters: dict[str, torch.nn.Parameter], data: LatentData, sampling: FlawSampling,
        settings: FlawAwareSettings, rate: Callable[[int], float] | None = None, betas=BETAS,
    ):
        self.model, self.parameters, self.data, self.sampling, self.settings = model, parameters, data, sampling, settings
        self.phases = settings.phases
        self.noise_strength = settings.noise_strength if works_on_pixels(model) else 0.0
        self.rate = rate or (lambda step: settings.learning_rate)
        self.optimizer = optimizer_of(parameters.values(), settings.learning_rate, betas)
        self.average = WeightAverage(parameters)
        self.progress, self.watcher = Progress(), Watcher()
        self.writes_in_place: bool | None = None  # a trial shows it; till then torch's guard is on, which costs time
        self.names = names_of(model, sampling)
        self.attention = AttentionSettings(settings.attention_strength)
        self.check_attention()

    @property
    def uses_map(self) -> bool:
        return self.settings.attention_strength > 0 or self.noise_strength > 0

    def keep_phase_border(self, base_steps: int) -> None:
        """Let the base phase end after this many steps, as it was to when the run began."""
        self.phases = replace(self.phases, base_steps=base_steps)
        self.check_attention()

    def check_attention(self) -> None:
        """That the maps can act in the attention of this kind of model, if the run comes to have maps and they are to."""
        if self.attention.strength and self.phases.maps(0):
            try:
                patch_attention(self.model, torch.ones(1, 1, 1), self.attention)
            except ValueError as reason:
                raise ValueError(f"{reason} Or set attention_strength to 0, or base_fraction to 1.") from reason

    def run(self, watcher: Watcher | None = None) -> None:
        """Train to the end of the run."""
        self.watcher = watcher or Watcher()
        while self.progress.step < self.settings.steps:
            step = self.progress.step
            missing = self.phases.refining(step) and self.progress.flaw_map is None
            if self.uses_map and (missing or self.phases.map_due(step)):
                self.renew_map(step)
            self.stretch(step, self.phases.stretch_end(step), self.after_backward)

    def renew_map(self, step: int) -> None:
        """The map of the model's flaws as it is now, by its averaged weights."""
        batch = self.sample(step_seed(self.settings.seed, step))
        self.progress.flaw_map = batch.mean_map
        earlier = [entry for entry in self.progress.judged if entry[0] != step]
        self.progress.judged = [*earlier, (step, batch.probabilities.mean().item())]
        self.watcher.after_map(step, batch)

    @torch.no_grad()
    def sample(self, seed: int) -> FlawBatch:
        """A judged batch from the averaged weights, without any map acting."""
        device = self.model.load_device
        dtype = self.settings.dtype_on(device)
        with self.average.standing_in(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            samples = self.sampling.samples(self.model, seed)
        return self.sampling.judge_samples(samples)

    def stretch(self, first: int, end: int, update: Callable[[int, float], None]) -> None:
        """The steps first..end, all under the same map."""
        settings, model, flaw_map = self.settings, without_guidance(self.model), None
        if self.phases.refining(first):
            flaw_map = self.progress.flaw_map
        if flaw_map is not None and self.attention.strength:
            model = patch_attention(model, flaw_map, self.attention)
        if settings.gradient_checkpointing:
            model = with_checkpointed_patches(model)
        steps = TrainSteps(
            self.data, lambda step: step_seed(settings.seed, step), settings.batch_size,
            settings.dtype_on(model.load_device), first, end, update, flaw_map, self.noise_strength,
        )
        guider = TrainGuider(model)
        guider.set_conds([entry for condition in self.data.conditions for entry in condition])
        shown = torch.ones(1, *self.data.latents.shape[1:])
        before = comfy.model_management.in_training
        with ExitStack() as stack:
            stack.enter_context(checkpointed(model.model.diffusion_model, settings.gradient_checkpointing))
            stack.enter_context(torch.enable_grad())
            if self.writes_in_place is not False and not settings.gradient_checkpointing:
                stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
            stack.callback(setattr, comfy.model_management, "in_training", before)
            comfy.model_management.in_training = True
            self.watcher.before_step(first)
            guider.sample(shown, shown, steps, torch.arange(2), seed=0)

    def after_backward(self, step: int, loss: float) -> None:
        """Take a step with the gradients that are there."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            what = "loss" if not math.isfinite(loss) else "gradient"
            value = loss if not math.isfinite(loss) else norm
            raise Diverged(f"The {what} became {value} at step {step + 1}. Lower learning_rate, or set training_dtype to fp32.")
        self.optimizer.param_groups[0]["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(decay_at(step, self.settings.ema_decay))
        self.progress.step = step + 1
        self.progress.losses.append(loss)
        self.watcher.after_step(step, loss)
        if step + 1 < self.settings.steps:
            self.watcher.before_step(step + 1)

    def trial(self) -> None:
        """The first step without its effect: shows whether it can be done, how long it takes and what memory."""
        with watched(self.model.model.diffusion_model) as watch:
            self.stretch(self.progress.step, self.progress.step + 1, lambda step, loss: None)
        self.writes_in_place = watch.seen
        self.optimizer.zero_grad(set_to_none=True)
