"""TAG as one MODEL patch: measures at each model call how far the sample is from its step, and brings it back.

The patch stands around the guider's whole prediction (classifier-free guidance and other patches included), so that it
works with every sampler and guider. State is made when a run begins and dies with it.
"""

import functools
import logging
import math
from dataclasses import replace

import torch

from comfy.model_patcher import set_model_options_post_cfg_function
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..coordinates import between
from ..latents import FrameLayout, check_latent
from .alignment import length
from .answer import Answer
from .compatibility import check_predictor
from .course import FEWEST
from .energy import EnergyEstimator
from .judge import Judge
from .levels import Schedule
from .network_estimator import NetworkEstimator
from .posterior import column
from .predictor import TimePredictor
from .process import Process
from .settings import TagSettings
from .steering import Steering
from .time_gap import RunRecord, TimeGapReport

WRAPPER_KEY = "artifact_guard.tag"

ROUNDING = 1e-3
"""A prediction that differs from the conditional one by up to this share of it is not guided: at a scale of 1 some patches have both
predictions calculated and put together, which rounds."""

PAINTED = 0.999
"""Of an inpainting mask, from where on a place is wholly painted."""


SECOND = ("another Temporal Alignment Guidance on the same model corrects this run: two would correct twice. This one only measures, and "
          "sees the samples as the other one asks the model for them")
TOO_FEW = ("The noise mask paints fewer than {} values of sample {}: too few to tell noise from chance. Without a time predictor "
           "these are only measured.")
UNPAINTED = "the noise mask paints nothing wholly, and of what is painted in part, or from some step on, the noise cannot be told"


def guide_model(model, settings: TagSettings, predictor: TimePredictor | None = None):
    """A clone of the model that is guided whenever it is sampled, and the report of its time gaps.

    At strength 0 the run is only measured.

    Raises:
        ValueError: the predictor is for another kind of model.
    """
    if predictor is not None:
        check_predictor(predictor, model)
    report = TimeGapReport(settings, model.get_model_object("latent_format"))
    patched = model.clone()
    patch = GuidancePatch(settings, predictor, report)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, patch.outer_sample)
    return patched, report


class GuidancePatch:
    """The wrapper of a guided model around a whole run."""

    def __init__(self, settings: TagSettings, predictor: TimePredictor | None, report: TimeGapReport):
        self.settings = settings
        self.predictor = predictor
        self.report = report

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        guider = executor.class_obj
        shapes = kwargs.get("latent_shapes") or [latent_image.shape]
        layout = FrameLayout.of(shapes)
        check_latent(latent_image, guider.model_patcher.model.latent_format, nested=len(shapes) > 1)
        transformer_options = guider.model_options.setdefault("transformer_options", {})
        settings, second = self.settings, corrects(transformer_options) and self.settings.strength > 0
        if second:
            settings = replace(settings, strength=0.0)
            logging.warning("Artifact Guard: %s.", SECOND)
        record = RunRecord(settings, layout)
        record.notes += [f"{SECOND[0].upper()}{SECOND[1:]}."] * second
        arguments = (noise, latent_image, sampler, sigmas, denoise_mask, *args)
        reason = unguided_reason(layout, guider.model_patcher.get_model_object("model_sampling"), sigmas)
        if reason is None and denoise_mask is not None:
            whole = layout.frames(denoise_mask.expand(noise.shape) >= PAINTED)
            values = whole.unflatten(0, (layout.batch, -1)).flatten(1).sum(dim=1).cpu()
            record.painted = values > 0
            reason = None if record.painted.any() else UNPAINTED
            few = [str(i) for i, count in enumerate(values.tolist()) if 0 < count < FEWEST <= math.prod(layout.shape[1:])]
            record.notes += [TOO_FEW.format(FEWEST, ", ".join(few))] * bool(few)
        if reason:
            record.refuse(reason)
            output = executor(*arguments, **kwargs)
        else:
            run = GuidedRun(settings, self.predictor, record, guider, denoise_mask)
            wrappers = [(kind, functools.partial(method, run)) for kind, method in GuidedRun.WRAPPERS.items()]
            for kind, wrapper in wrappers:
                add_wrapper_with_key(kind, WRAPPER_KEY, wrapper, transformer_options)
            try:
                output = executor(*arguments, **kwargs)
            finally:
                for kind, wrapper in wrappers:
                    transformer_options["wrappers"][kind][WRAPPER_KEY].remove(wrapper)
        self.report.add(record, output)
        return output


def corrects(transformer_options: dict) -> bool:
    """Whether a guidance that corrects is at work in this run already."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.PREDICT_NOISE, {}).get(WRAPPER_KEY, [])
    return any(wrapper.args[0].settings.strength > 0 for wrapper in wrappers)


def unguided_reason(layout: FrameLayout | None, model_sampling, sigmas: torch.Tensor) -> str | None:
    """Why a run cannot be measured, or None."""
    if layout is None:
        return "the latent has no image part (no two spatial axes of two pixels or more)"
    levels = Schedule.of(model_sampling).log_snr
    if float(levels.max() - levels.min()) < 1.0:
        return "this model starts from an image and not from noise, so that its steps have no noise level"
    if bool((sigmas[1:] > sigmas[:-1]).any()):
        return "the noise schedule rises, as where an image is turned back into noise: what that gives has no noise level to be told"
    return None


class GuidedRun:
    """Guidance in one run of a sampler."""

    def __init__(self, settings: TagSettings, predictor: TimePredictor | None, record: RunRecord, guider, denoise_mask):
        self.settings = settings
        self.record = record
        self.layout: FrameLayout = record.layout
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        device = guider.model_patcher.load_device
        record.schedule = Schedule.of(model_sampling)
        self.process = Process(model_sampling, record.schedule, device)
        self.limits = [float(model_sampling.percent_to_sigma(p)) for p in (settings.start_percent, settings.end_percent)]
        image, weight, painted = FrameLayout.of([self.layout.shape]), None, None
        self.mask: torch.Tensor | None = None
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self.scheduled: torch.Tensor | None = None
        if denoise_mask is not None:
            self.mask = self.layout.image(denoise_mask).to(device)
            # Where a mask is soft the sampler goes on with a mixture of the estimate and the latent, not with the estimate.
            weight = (self.mask >= PAINTED).float()
            painted = image.frames(weight.expand(self.layout.shape)).flatten(1).amax(dim=1)
        self.weight, self.predictor_at_work = weight, predictor is not None
        energy = EnergyEstimator(weight, float(record.schedule.log_snr.min()))
        if predictor is None:
            self.steering = Steering(settings, energy)
        else:
            judge = Judge(predictor, device, image, guider, painted)
            estimator = NetworkEstimator(judge, judge.levels, energy, scales(guider))
            self.steering = Steering(settings, estimator, judge.gradient)
        # The parts of a nested latent share one sigma, and only the image part is seen: it stays the step's.
        self.steering.may_ask_elsewhere = len(self.layout.shapes) == 1

    def predict_noise(self, executor, x, timestep, model_options={}, seed=None):
        """Wrapper around one prediction: same arguments, same kind of result, the clean estimate (B, ...)."""
        guider, sigma = executor.class_obj, timestep.reshape(-1).float().expand(len(x))
        level, scale = self.process.level_and_scale(sigma)
        image, whole = self.layout.image(x), None
        u = self.process.vp(image, scale)

        def ask(u_asked: torch.Tensor, level_asked: torch.Tensor) -> Answer:
            nonlocal whole
            if level_asked is level:
                asked, moved = timestep, image if u_asked is u else u_asked * column(scale, u_asked)
            else:
                asked = self.process.noisier(sigma, level, level_asked)
                moved = u_asked * column(self.process.scale(asked), u_asked)
            asked = asked.to(timestep.dtype)
            if moved is not image and self.weight is not None:
                moved = torch.where(self.weight > 0, moved, self._as_kept(image, guider.model_patcher.model, timestep, asked, model_options))
            moved = x if moved is image else self.layout.with_image(x, moved.to(x.dtype))
            self.scheduled = None if asked is timestep else timestep
            answer = self._answer(executor, moved, asked, model_options, seed)
            self.scheduled = None
            whole = answer.denoised
            return answer._replace(denoised=self.layout.image(whole), anchor=self.layout.image(answer.anchor))

        denoised, posterior = self.steering.estimate(ask, image, u, level, self._within(timestep))
        self.record.add_step(level, posterior)
        return self.layout.with_image(whole, denoised)

    def _answer(self, executor, x, timestep, model_options, seed) -> Answer:
        """The guider's prediction and, if it guides, the conditional prediction that went into it."""
        conditional = None

        def note(arguments: dict) -> torch.Tensor:
            nonlocal conditional
            conditional = arguments.get("cond_denoised")
            return arguments["denoised"]

        options = set_model_options_post_cfg_function(model_options.copy(), note)
        denoised = executor(x, timestep, options, seed)
        anchor = (denoised if conditional is None else conditional).float()
        if self.predictor_at_work:
            return Answer(denoised, anchor, length(denoised.float() - anchor) > ROUNDING * length(anchor))
        return Answer(denoised, anchor)

    def sampler_sample(self, executor, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
        """Wrapper around the sampler inside a run: notes what an inpainting mask keeps, from which the sampler makes what the model sees there."""
        options = getattr(executor.class_obj, "inpaint_options", None)
        if options is not None and not options.get("random") and latent_image is not None and len(self.layout.shapes) == 1:
            self.kept = noise, latent_image
        try:
            return executor(model_wrap, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
        finally:
            self.kept = None

    def _as_kept(self, image: torch.Tensor, model, timestep: torch.Tensor, asked: torch.Tensor, model_options: dict) -> torch.Tensor:
        """The sample where the mask does not paint wholly, as the sampler would have made it at the sigmas that the model is asked with.

        Some video models get the frames that are kept without noise, whatever the sigma. Where that cannot be told the sample stays.
        """
        if self.kept is None or asked is timestep or "denoise_mask_function" in model_options:
            return image
        noise, latent_image = (part.to(image) for part in self.kept)
        now, then = (
            model.scale_latent_inpaint(x=image, sigma=sigma, noise=noise, latent_image=latent_image)
            for sigma in (timestep.reshape(-1).expand(len(image)), asked)
        )
        return image + (1.0 - self.mask) * (then - now)

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """Wrapper around one evaluation of all prompts: which of them are at work is told by the schedule, not by the level that the
        first sample of the batch has."""
        if self.scheduled is not None:
            conds = [group and at_work(group, self.scheduled) for group in conds]
        return executor(model, conds, x_in, timestep, model_options)

    def _within(self, timestep: torch.Tensor) -> bool:
        if self.settings.start_percent == 0 and self.settings.end_percent == 1:
            return True
        return between(float(timestep.max()), *self.limits)

    WRAPPERS = {
        WrappersMP.SAMPLER_SAMPLE: sampler_sample, WrappersMP.PREDICT_NOISE: predict_noise, WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    }


def scales(guider) -> bool:
    """Whether a guider scales beyond the conditional prediction, as far as it says: core's keep their scales as cfg, cfg1 and cfg2."""
    return any(getattr(guider, name, 1.0) != 1.0 for name in ("cfg", "cfg1", "cfg2"))


def at_work(group: list[dict], timestep: torch.Tensor) -> list[dict]:
    """The conditionings of a group that are at work at this step, without their ranges, which the sampler would compare with another level."""
    sigma, chosen = None, []
    for cond in group:
        start, end = cond.get("timestep_start"), cond.get("timestep_end")
        if start is not None or end is not None:
            # A tensor: what it is compared with is rounded to its precision, as in core.
            sigma = timestep.reshape(-1)[0].cpu() if sigma is None else sigma
            if (start is not None and sigma > start) or (end is not None and sigma < end):
                continue
            cond = {name: value for name, value in cond.items() if name not in ("timestep_start", "timestep_end")}
        chosen.append(cond)
    return chosen
