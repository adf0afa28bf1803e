"""The guard: one wrapper around a sampler run that watches it and, if it finds artifacts, restarts it repaired.

The sampler itself runs untouched. If at the correction step nothing was found it simply goes on, so that an idle guard
changes no bit and costs no model call. If something was found, the sampler is left with a private exception that
carries the repaired sample, and the same sampler is run again on the rest of the schedule.
"""

import copy
import functools
import math
import time

import torch

import comfy.model_patcher
import comfy.samplers
from comfy.patcher_extension import WrapperExecutor, WrappersMP, add_wrapper_with_key

from ..coordinates import coefficients, coefficients_of_all, ratio_of
from ..latents import FrameLayout, check_latent, mask_to_frames, temporal_ratio
from .estimate import Estimate
from .options import GuardSettings
from .probe import Answer, ModelProbe, keeps_to_schedule
from .report import ArtifactReport, RunRecord
from .watch import Watch, detector_class
from .window import plan_window

WRAPPER_KEY = "artifact_guard.asced"

SEED_STEP = 1_000_003
"""Times the step's number, added to the seed at a restart: a stochastic sampler must not draw its first leg's noise
once more, nor that of another guard's restart."""

LATE_STEP, GUARD_STEP = 0x9FB21C651E98DF25, 0xD6E8FEB86659FD93
"""The same for the seeds of repairs, see `repair_seed`; odd and large, so that no other seed of a user is met."""

SAME_SIGMA = 1e-4
"""A sigma that differs from one of the schedule by this share alone is that one: adaptive solvers compute theirs."""


class Restart(Exception):
    """Leaves a sampler at a step. It belongs to one run: guards inside each other catch only their own.

    x: the sample to go on from at sigma. denoised: the model's estimate of it, if it is known.
    """

    def __init__(self, run: "GuardedRun", x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor | None = None):
        super().__init__("A guarded sampler was left to go on from a repaired sample.")
        self.run, self.x, self.sigma, self.denoised = run, x, sigma, denoised


class GuardedRun:
    """The guard's state in one call of a sampler: made when sampling starts, gone when it ends.

    schedule: the run's sigmas, on the CPU. steps: the coefficients (a, b) of all but the last.
    begun: the sample that a leg after a restart begins with, until the model was asked, and its sigma. A sampler may ask as if it
    had another.
    keep_unguarded: the first leg of a run that is repaired runs to its end, with the restart `waiting` until then; `unguarded` is
    what the sampler gave there, and the sigma it ended at.
    """

    def __init__(
        self, record: RunRecord, watch: Watch, model_sampling, schedule: torch.Tensor,
        steps: list[tuple[float, float]], keep_unguarded: bool,
    ):
        self.keep_unguarded = keep_unguarded
        self.record = record
        self.watch = watch
        self.model_sampling = model_sampling
        self.schedule = schedule
        self.coefficients = steps
        self.begun: tuple[torch.Tensor, torch.Tensor] | None = None
        self.waiting: Restart | None = None
        self.unguarded: tuple[torch.Tensor, torch.Tensor] | None = None

    def sample(self, sampler_function, model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        """The sampler function that KSAMPLER calls instead of `sampler_function`; same arguments, same result."""
        extra_args = extra_args or {}
        original = {**extra_args, "model_options": _cloned_options(extra_args)}
        shape, first_step, remaining, known = x.shape, 0, sigmas, None
        # An outer guard may have restarted the run: then these are the last of the schedule's sigmas.
        begin = len(self.schedule) - len(sigmas) if keeps_to_schedule(sampler_function, options) else None
        while True:
            self.watch.forget()
            probe = ModelProbe(model, known, extra_args.get("model_options"), self._redraw, self._judge)
            watching = self._watching_callback(probe, shape, callback, first_step, begin)
            try:
                result = sampler_function(
                    probe, x, remaining, extra_args=extra_args, callback=watching, disable=disable, **options
                )
                if self.waiting is None:
                    if remaining is not sigmas:
                        sigmas[-1] = remaining[-1]
                    if probe.last is None:
                        self.watch.give_up("this sampler asks the model past the guard")
                    self.watch.finish()
                    return result
                self.unguarded = (result, remaining[-1])
                restart = self.waiting
            except Restart as left:
                if left.run is not self:
                    raise
                restart = left.with_traceback(None)  # which holds all that the sampler had at hand
            finally:
                self.record.model_calls += probe.calls
                self.waiting = None  # it knows this run: left there by an interruption, it would hold all tensors until garbage is collected
            x, known = restart.x, None
            remaining = self._rest_of_schedule(restart.sigma, sigmas)
            self.begun = x, remaining[0]
            if restart.denoised is not None:
                known = Answer(x, remaining[0], restart.denoised)
            first_step = len(sigmas) - len(remaining)
            extra_args = {**original, "model_options": _without_cached_answers(_cloned_options(original), self.model_sampling)}
            if original.get("seed") is not None:
                step = len(self.schedule) - len(remaining)
                extra_args["seed"] = (original["seed"] + SEED_STEP * (step + 1)) % 2**64

    def _asked_of_repair(self, x: torch.Tensor) -> bool:
        """Whether a question to the model is one about the repaired sample: an unguarded run goes on to its end first."""
        repair = self.watch.repair
        return self.waiting is None and repair is not None and repair.x.shape == x.shape

    def _redraw(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Before the model is asked about the next step of the schedule: draw again what of a repair fell back.

        The question that is about to be asked is then asked of the redrawn sample, so that it costs no model call. Two steps at
        least are left to the sampler: uni_pc takes none at all where one is.
        """
        if not self._asked_of_repair(x) or self.watch.repair.falling is None:
            return
        sigma = sigma.reshape(-1)[0].cpu()
        step = int((self.schedule - sigma).abs().argmin())
        if abs(self.schedule[step] - sigma) > SAME_SIGMA * sigma or step >= len(self.coefficients) - 1:
            return
        raise Restart(self, self.watch.redraw(x, *self.coefficients[step]), self.schedule[step])

    def _judge(self, x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> None:
        """Have a repair judged by the model's answers to it, and put back what it made worse."""
        begun, self.begun = self.begun, None
        if begun is not None and x is begun[0]:
            sigma = begun[1]
        if not self._asked_of_repair(x) or self.watch.repair.settled:
            return
        sigma = sigma.reshape(-1)[0]
        put_back = self.watch.judge(Estimate(x, denoised, *coefficients(self.model_sampling, sigma)))
        if put_back is not None:
            raise Restart(self, put_back[0], sigma, put_back[1])

    def _rest_of_schedule(self, sigma: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """The sigmas still to come, from the present one on.

        Read from a copy of the schedule: uni_pc writes into the sigmas it is given.
        """
        below = self.schedule[self.schedule < sigma.cpu() * (1 - SAME_SIGMA)]
        return torch.cat([sigma.cpu().reshape(1), below]).to(sigmas)

    def _watching_callback(self, probe: ModelProbe, shape: torch.Size, callback, first_step: int, begin: int | None):
        """The callback given to the sampler: tells the user's own, with steps counted on, and then looks.

        begin: where in the schedule the sampler's own sigmas begin; None if it does not keep to them.
        """

        def watching(info):
            step = info["i"] + first_step
            if callback is not None:
                callback({**info, "i": step} if first_step else info)
            if self.watch.done or self.waiting is not None:
                return
            if probe.last is None:  # some report where they begin, before they ask
                return
            if probe.last[0].shape != shape or info["x"].shape != shape:
                self.watch.give_up("this sampler changes the size of the latent while it runs")
                return
            x, sigma, denoised = probe.accepted(info)
            sigma, a, b, steps_left = self._place(None if begin is None else begin + step, sigma)
            repaired = self.watch.look(Estimate(x, denoised, a, b), steps_left, adaptive="n_accept" in info)
            if repaired is None:
                return
            restart = Restart(self, repaired, sigma)
            if not self.keep_unguarded or self.unguarded is not None:
                raise restart
            self.waiting = restart

        return watching

    def _place(self, step: int | None, sigma: torch.Tensor) -> tuple[torch.Tensor, float, float, int]:
        """Where a step lies: its sigma, a CPU scalar; its coefficients a and b; how many sigmas are below it.

        step: its index in the schedule; None reads `sigma` off the device, and the host waits for it.
        """
        if step is not None:
            return self.schedule[step], *self.coefficients[step], len(self.schedule) - 1 - step
        sigma = sigma.reshape(-1)[0].cpu()
        below = int((self.schedule < sigma).sum())
        return sigma, *coefficients(self.model_sampling, sigma), below


def _cloned_options(extra_args: dict) -> dict:
    """The run's model options as they were before the first leg: CFG++ samplers add their functions to them."""
    return comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))


def _without_cached_answers(model_options: dict, model_sampling) -> dict:
    """The options with an empty cache in place of what EasyCache or LazyCache holds: they answer from an earlier sample where the
    new one differs little, and the noise of a repair would stay in the picture."""
    options = model_options.get("transformer_options", {})
    if "easycache" in options:
        options["easycache"] = options["easycache"].clone().prepare_timesteps(model_sampling)
    return model_options


def reason_not_to_guard(sampler, model_sampling, sigmas: list[float], layout: FrameLayout | None) -> str | None:
    """Why a run cannot be guarded, in words; None if it can."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        return f"the sampler {type(sampler).__name__} is not of ComfyUI's common kind and cannot be restarted"
    if layout is None:
        return "the latent has no image part (no two spatial axes of two pixels or more)"
    if len(sigmas) < 2:
        return "a run of 0 steps has nothing to guard"
    if not all(map(math.isfinite, sigmas)):
        return "the noise schedule holds values that are no numbers"
    if any(now <= after for now, after in zip(sigmas, sigmas[1:])):
        return "the noise schedule does not fall from step to step"
    if coefficients(model_sampling, sigmas[0])[1] == 0:
        return "this model's sampling adds no noise, so nothing can be renoised"
    return None


def have_keyframes(conds: dict[str, list[dict]]) -> bool:
    """Whether a hook on some prompt of a run changes its strength on the way."""
    groups = (cond["hooks"] for entries in conds.values() for cond in entries if cond.get("hooks") is not None)
    return any(len(hook.hook_keyframe.keyframes) > 1 for group in groups for hook in group.hooks)


def may_restart(wrapper) -> bool:
    """Whether a wrapper around a sampler is that of a guard that repairs."""
    method = getattr(wrapper, "func", None)
    return getattr(method, "__func__", None) is GuardPatch.sampler_sample and method.__self__.settings.mode == "correct"


def guards_before(executor) -> int:
    """How many guards that repair are around the one whose wrapper is called with this executor."""
    return sum(map(may_restart, executor.wrappers[: executor.idx]))


def repair_seed(run_seed: int, begins: float, sigma_max: float, guards: int) -> int:
    """From which the seeds of repairs are made: the run's; another one for legs that begin late, since KSampler (Advanced) has the
    same for all legs, and for each guard of a model. What two of them renoise in one place is not the same noise.

    begins: the schedule's first sigma. guards: that are around this one.
    """
    late = 0 if begins > (1 - SAME_SIGMA) * sigma_max else 1 + round(begins / SAME_SIGMA)
    return run_seed + LATE_STEP * late + GUARD_STEP * guards


def guard_model(
    model: comfy.model_patcher.ModelPatcher, settings: GuardSettings, region: torch.Tensor | None = None
) -> tuple[comfy.model_patcher.ModelPatcher, ArtifactReport]:
    """A clone of the model that is guarded whenever it is sampled, and the report of what is found.

    Args:
        region: MASK (M, h, w) at image size, optional: where repair is allowed.

    At strength 0 the clone is not patched at all.
    """
    report = ArtifactReport(settings, model.get_model_object("latent_format"))
    patched = model.clone()
    if settings.strength > 0:
        patch = GuardPatch(settings, region, report)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, patch.outer_sample)
    return patched, report


class GuardPatch:
    """The two wrappers of a guarded model. What belongs to one run is made in the outer one and dies with the run."""

    def __init__(self, settings: GuardSettings, region: torch.Tensor | None, report: ArtifactReport):
        self.settings = settings
        self.region = region
        self.report = report

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Wrapper around one whole run: checks the input, hands the sampler a guard of its own, files the record."""
        guider = executor.class_obj
        model = guider.model_patcher.model
        shapes = kwargs.get("latent_shapes") or [latent_image.shape]
        layout = FrameLayout.of(shapes)
        check_latent(latent_image, model.latent_format, nested=len(shapes) > 1)
        region = None
        if layout is not None and self.region is not None:
            region = mask_to_frames(self.region, layout, "region", temporal_ratio(model.latent_format))
            region = region.to(guider.model_patcher.load_device)

        record = RunRecord(self.settings, layout, model.latent_format)
        wrapper = functools.partial(self.sampler_sample, record=record, region=region)
        transformer_options = guider.model_options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY, wrapper, transformer_options)
        start = time.perf_counter()
        try:
            output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            # Another pack's wrapper around this one may run the sampling again with the same options.
            wrappers = transformer_options["wrappers"][WrappersMP.SAMPLER_SAMPLE][WRAPPER_KEY]
            wrappers.remove(wrapper)
        record.seconds = time.perf_counter() - start
        self.report.add(record, output)
        return output

    def sampler_sample(
        self, executor, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
        disable_pbar=False, *, record: RunRecord, region: torch.Tensor | None,
    ):
        """Wrapper around the sampler inside a run: swaps its function for the guarded one, on a copy of the sampler."""
        sampler, layout = executor.class_obj, record.layout
        arguments = (model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        model_sampling = model_wrap.inner_model.model_sampling
        schedule = sigmas.detach().cpu().clone()
        reason = reason_not_to_guard(sampler, model_sampling, schedule.tolist(), layout)
        if reason is None:
            steps = coefficients_of_all(model_sampling, schedule[:-1])
            ratios = [ratio_of(a, b) for a, b in steps]
            settings = self.settings
            kind = detector_class(settings.options)
            window = plan_window(
                ratios, settings.window, settings.detect_from, settings.correct_at, kind.auto_window, kind.lead
            )
            reason = window if isinstance(window, str) else None
        if reason is not None:
            record.refuse(reason)
            return executor(*arguments)

        record.plan(window, ratios)
        valid = None
        if denoise_mask is not None:
            valid = layout.frames(denoise_mask.expand(noise.shape))[:, 0] > 0
        seed = repair_seed(extra_args.get("seed") or 0, schedule[0].item(), float(model_sampling.sigma_max), guards_before(executor))
        watch = Watch(self.settings, record, region, valid, seed)
        keep_unguarded = self.settings.options.keep_unguarded
        if keep_unguarded and self.settings.mode == "correct" and sum(map(may_restart, executor.wrappers)) > 1:
            keep_unguarded = False
            record.refuse_unguarded("another guard on the same model may restart the run before it is there")
        elif keep_unguarded and self.settings.mode == "correct" and have_keyframes(model_wrap.conds):
            keep_unguarded = False
            record.refuse_unguarded("hooks with keyframes are on the prompts, and ComfyUI goes through these only once in a run")
        run = GuardedRun(record, watch, model_sampling, schedule, steps, keep_unguarded)
        guarded = copy.copy(sampler)
        guarded.sampler_function = functools.wraps(sampler.sampler_function)(
            functools.partial(run.sample, sampler.sampler_function)
        )
        inner = WrapperExecutor.new_class_executor(guarded.sample, guarded, executor.wrappers, executor.idx + 1)
        result = inner.execute(*arguments)
        if run.unguarded is not None:
            sampled, last_sigma = run.unguarded
            clean = model_sampling.inverse_noise_scaling(last_sigma, sampled)
            record.keep_unguarded(model_wrap.inner_model.process_latent_out(clean.to(torch.float32)))
        return result
