"""Small models of real architectures with an artifact in what they predict, and guarded runs of them."""

from artifact_guard.nodes.asced.guard import guard_model
from artifact_guard.nodes.asced.options import AscedOptions, GuardSettings
from artifact_guard.nodes.coordinates import coefficients

from tests.small_models import sample

STEPS = 10
SQUARE = (slice(4, 9), slice(6, 11))
TRAP_AT = 5.0
EVERYTHING = AscedOptions(max_area=1.0)


def trapped(model, amplitude=50.0, row=0, square=SQUARE, frames=None, at=TRAP_AT):
    """The model with an artifact: from b / a `at` on, a square of one sample of what it predicts is far off and frozen.

    frames: of a video, those that have it; None for all.
    """
    patched, frozen = model.clone(), {}
    sampling = model.get_model_object("model_sampling")

    def plant(args):
        denoised = args["denoised"]
        a, b = coefficients(sampling, args["sigma"].flatten()[0])
        if a == 0 or b / a > at:
            frozen.clear()
            return denoised
        where = (row, slice(None), *((frames if frames is not None else slice(None),) if denoised.ndim == 5 else ()), *square)
        if "artifact" not in frozen:
            frozen["artifact"] = denoised[where] + amplitude * denoised.std()
        denoised = denoised.clone()
        denoised[where] = frozen["artifact"]
        return denoised

    patched.set_model_sampler_post_cfg_function(plant)
    return patched


def guarded_run(model, small, options=EVERYTHING, settings=None, **run):
    """(samples, record) of the model under a guard."""
    guarded, report = guard_model(model, GuardSettings(options=options, **(settings or {})))
    samples = sample(small, guarded, steps=run.pop("steps", STEPS), **run)
    return samples, report.find({"samples": samples})
