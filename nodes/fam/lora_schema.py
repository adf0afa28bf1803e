"""The node that trains a LoRA by FAM's two-phase rule."""

import gc
import logging

import torch

import comfy.model_management
from comfy_api.latest import io

from ..cancelled import CancelledRuns
from ..told import id_of, tell
from .flaw_aware import FlawAwareTraining, works_on_pixels
from .flaw_batch import FlawSampling
from .highlighter_schema import CATEGORY, FlawHighlighterType
from .lora_adapters import LoRAWeights, training_copy
from .lora_checks import check_highlighter, check_negative, check_rank, training_data
from .lora_pictures import draw_curves
from .lora_session import Session, measure_cost, memory_in_use
from .lora_settings import DTYPES, FlawAwareSettings
from .lora_state import NEW_RUN, RunFile, changes, read_run, restore, run_names
from .training_data import LatentData
from .vae import check_vae

SAVE_EVERY = 250
CANCELLED = CancelledRuns()


def given(**settings) -> dict:
    """The settings that were made; optional widgets that a saved graph does not have are None."""
    return {name: value for name, value in settings.items() if value is not None}


def zeroed(conditions: list) -> list:
    """The CONDITIONING of an empty prompt, as core's ConditioningZeroOut makes it of any."""
    tokens, more = conditions[0][0]
    parts = [name for name in ("pooled_output", "conditioning_lyrics") if more.get(name) is not None]
    zeros = {name: torch.zeros_like(more[name]) for name in parts}
    return [[torch.zeros_like(tokens), more | zeros]]


class FAMTrainLoRA(io.ComfyNode):
    """Trains a LoRA, in its second half under maps of the flaws the model has by then."""

    @classmethod
    def define_schema(cls):
        defaults = FlawAwareSettings(steps=1000)
        return io.Schema(
            node_id="FAMTrainLoRA",
            display_name="Train Flaw-aware LoRA (FAM)",
            category=CATEGORY,
            description="Trains a LoRA on your images; in its second half it looks at its own flaws and works harder there.",
            search_aliases=["fam lora", "train lora", "flaw aware training", "artifact lora", "lora training"],
            inputs=[
                io.Model.Input("model", tooltip="The model that learns. It is copied; yours stays as it is, bit for bit."),
                io.Vae.Input("vae", tooltip="Its VAE: the highlighter judges decoded images."),
                FlawHighlighterType.Input("flaw_highlighter", tooltip="Trained on real images like yours against images "
                                          "that this model made. Look at its maps (Flaw Map) first."),
                io.Latent.Input("latents", tooltip="The training images, encoded by the model's own VAE, all of one size, "
                               "in one batch. ComfyUI starts a whole training for every entry of a list: make a batch of it (Rebatch "
                               "Latents)."),
                io.Conditioning.Input("positive", tooltip="One prompt for all images, or one each in the same order "
                                      "(core's Conditioning (Combine)). Reference pictures of an editing model: one for all, "
                                      "or one for each image."),
                io.Int.Input("steps", default=defaults.steps, min=1, max=1000000, tooltip="Training steps of the whole run, "
                             "both phases. More learns more of your images, and forgets more of the rest."),
                io.Float.Input("base_fraction", default=defaults.base_fraction, min=0.0, max=1.0, step=0.01,
                               tooltip="How much of the run is ordinary training before flaw maps set in. Published: 0.5. "
                               "1: no maps at all."),
                io.Int.Input("map_every", default=defaults.map_every, min=1, max=100000, tooltip="Steps a flaw map lasts. Lower "
                             "follows the model more closely and takes more time for sampling."),
                io.Float.Input("attention_strength", default=defaults.attention_strength, min=0.0, max=1.0, step=0.001,
                               tooltip="How much the map strengthens self-attention while learning. Higher acts more and "
                               "destabilises above about 0.1. 0: not at all."),
                io.Float.Input("noise_strength", default=defaults.noise_strength, min=0.0, max=1.0, step=0.001,
                               tooltip="How much of the map is added to the noise. For models that work on pixels; with latent "
                               "models it does nothing, as published. 0: none."),
                io.Int.Input("rank", default=8, min=1, max=1024, tooltip="Size of the LoRA. Higher can hold more and "
                             "overfits sooner; 4 to 32 are usual."),
                io.Float.Input("learning_rate", default=defaults.learning_rate, min=1e-7, max=1.0, step=1e-7,
                               tooltip="AdamW's step size. Higher learns faster; too high ruins the images."),
                io.Int.Input("batch_size", default=defaults.batch_size, min=1, max=4096, tooltip="Images a step. Higher learns "
                             "more steadily and takes more memory and time."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="The same seed gives the same run, also when it was interrupted and resumed."),
                io.Conditioning.Input("negative", optional=True, tooltip="Negative prompt for the maps' images. Without it: an "
                                      "empty one."),
                io.Int.Input("map_images", default=8, min=1, max=256, optional=True, advanced=True, tooltip="How many images a "
                             "map is the mean of. Higher is steadier and takes longer."),
                io.Int.Input("map_steps", default=20, min=1, max=1000, optional=True, advanced=True, tooltip="Sampling steps of the "
                             "maps' images. Set as you sample with this model."),
                io.Float.Input("map_cfg", default=4.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True, advanced=True,
                               tooltip="CFG of the maps' images. Set as you sample with this model; 1 for Flux and other "
                               "distilled models."),
                io.Combo.Input("training_dtype", options=list(DTYPES), default=defaults.training_dtype, optional=True,
                               advanced=True, tooltip="Precision of the calculation. bf16 takes half the memory; the LoRA "
                               "itself is kept in fp32 either way. A processor without bf16 calculates in fp32."),
                io.Boolean.Input("gradient_checkpointing", default=defaults.gradient_checkpointing, optional=True, advanced=True,
                                 tooltip="On: much less memory, about a third slower."),
                io.Int.Input("save_every", default=SAVE_EVERY, min=0, max=100000, optional=True, advanced=True, tooltip="Steps after "
                             "which the run is saved under models/fam_training, so that a crash loses no more. 0: at the end only."),
                io.Combo.Input("resume", options=run_names(), default=NEW_RUN, optional=True, tooltip="Go on with a run that was "
                               "interrupted, exactly where it stopped. Leave the other widgets as they were."),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output("lora", display_name="lora", tooltip="The LoRA, its weights averaged over the last "
                                               "steps: for Load LoRA Model and Save LoRA Weights."),
                io.Image.Output("curves", display_name="curves", tooltip="Loss, and how generated the samples look, over the run."),
                io.Mask.Output("flaw_map", display_name="flaw_map", tooltip="The last flaw map, 0 to 1 at image size; of a run "
                               "without maps, that of the model before training."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> int:
        return CANCELLED.fingerprint(inputs, id_of(cls))

    @classmethod
    def execute(
        cls, model, vae, flaw_highlighter, latents, positive, steps, base_fraction, map_every, attention_strength,
        noise_strength, rank, learning_rate, batch_size, seed, negative=None, map_images=None, map_steps=None, map_cfg=None,
        training_dtype=None, gradient_checkpointing=None, save_every=None, resume=None,
    ) -> io.NodeOutput:
        inputs = {name: value for name, value in locals().items() if name != "cls"}
        settings = FlawAwareSettings(
            steps, base_fraction, map_every, attention_strength, noise_strength, learning_rate, batch_size, seed,
            **given(training_dtype=training_dtype, gradient_checkpointing=gradient_checkpointing),
        )
        check_rank(rank)
        node_id = id_of(cls)
        free_what_is_done_with()
        with torch.inference_mode(False):
            data, samples = training_data(model, latents, positive)
            check_vae(model, vae)
            earlier = None if resume in (None, NEW_RUN) else read_run(resume, rank)
            sampling = FlawSampling(
                vae, flaw_highlighter, data.conditions, zeroed(data.conditions) if negative is None else check_negative(negative, positive),
                tuple(samples.shape[1:]), **given(images=map_images, steps=map_steps, cfg=map_cfg),
            )
            every = SAVE_EVERY if save_every is None else save_every
            lora, curves, flaw_map, cancelled = learn(model, data, samples, sampling, settings, rank, every, node_id, earlier, resume)
        free_what_is_done_with()
        if cancelled:
            CANCELLED.add(inputs, node_id)
        return io.NodeOutput(lora, curves, flaw_map)


def free_what_is_done_with() -> None:
    """Give back the copy of a model that a run was made on: it is part of reference cycles, and as large as the model."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def learn(
    model, data: LatentData, samples: torch.Tensor, sampling: FlawSampling, settings: FlawAwareSettings, rank: int, save_every: int,
    node_id: str | None, earlier: tuple | None, resume: str | None,
) -> tuple[dict, torch.Tensor, torch.Tensor, bool]:
    """Train on a copy of the model; what the node gives, LORA_MODEL, IMAGE of the curves and MASK, and whether it was cancelled."""
    copy = training_copy(model)
    copy.model.requires_grad_(False)
    copy.set_model_compute_dtype(settings.dtype_on(copy.load_device))
    with LoRAWeights(copy, rank, settings.seed).attached() as weights:
        training = FlawAwareTraining(copy, weights.parameters, data, sampling, settings)
        session = Session(training, RunFile(rank), save_every, node_id)
        prepare(session, samples, earlier, resume)
        session.run()
        lora = weights.lora(training.average.values)
    progress, stopped = training.progress, ", cancelled" if session.cancelled else ""
    title = f"Training loss, {progress.step} of {settings.steps} steps{stopped}"
    flaw_map = session.first.mean_map if progress.flaw_map is None else progress.flaw_map
    return lora, draw_curves(progress, training.phases, title), flaw_map, session.cancelled


def prepare(session: Session, samples: torch.Tensor, earlier: tuple | None, name: str) -> None:
    """All that comes before the first step: can it be done, does the highlighter see, what will it cost, what was done.

    Raises:
        ValueError: a step or a map cannot be made, the highlighter answers the same for everything, or the run does not fit.
    """
    training, node_id = session.training, session.node_id
    if earlier is not None:
        restore(training, *earlier, name)
        different = changes(training, session.file.rank, earlier[1])
        if different:
            tell(node_id, f"Not the run that {name} began any more, for this was changed: {', '.join(different)}.")
    cost = measure_cost(training)
    cost.map = session.look()
    cost.memory = max(cost.memory, memory_in_use(training.model.load_device))
    if training.uses_map and training.phases.maps(training.progress.step):
        for doubt in check_highlighter(training.sampling, samples, session.first):
            tell(node_id, f"flaw_highlighter: {doubt}")
    if training.settings.noise_strength and not works_on_pixels(training.model):
        logging.info("Artifact Guard: noise_strength is off: this model works on latents, where a map of the picture has no place "
                     "in the noise. The attention part acts alone, as published for latent models.")
    tell(node_id, cost.words(training))


NODES = [FAMTrainLoRA]
