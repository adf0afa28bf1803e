"""Guarded runs on the exact denoiser through ComfyUI's own nodes, and everything that sampler and model saw in them.

    model = trapped_model("flow", [1])                   # sample 1 of a batch of 3 falls into a trap
    guarded, report = guard(model, sensitivity=0.3)
    run = Run(guarded, "euler")                          # SamplerCustomAdvanced; Run.legs, Run.inputs, Run.output
    latent = ksampler(guarded, "euler")                  # core's KSampler
"""

from dataclasses import dataclass, field

import comfy.samplers
import nodes as core_nodes
import torch
import tqdm
from artifact_guard.nodes.asced.options import AscedOptions
from artifact_guard.nodes.asced.schema import ASCEDGuard, ASCEDOptions
from comfy_extras import nodes_custom_sampler as custom

from tests.exact.images import shape_images
from tests.exact.model import conditioning, exact_model
from tests.exact.traps import ScriptedTrap

SAMPLERS = (
    "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "ipndm", "deis", "lcm", "sa_solver",
    "dpm_adaptive",
)
KINDS = ("eps", "v", "flow")
BATCH, CHANNELS, HEIGHT, WIDTH = 3, 3, 20, 24
STEPS = 12
TRAP_AT = 6.5
"""b / a at which the trap springs: within the window that `auto` chooses for 12 steps of any of the models."""
SQUARE = (slice(8, 14), slice(12, 18))
ELSEWHERE = (slice(2, 7), slice(1, 6))
PUBLISHED_SENSITIVITY, OWN_SENSITIVITY = 0.2, 0.5
"""At these the detectors find the trap and nothing else with every sampler. At 1 an earlier network found it too, and in 3 of
120 clean samples flagged something: three of the samplers in 12 steps of a flow model."""


def images(count=120):
    return shape_images(count, max(HEIGHT, WIDTH))[..., :HEIGHT, :WIDTH]


def trap(rows, square=SQUARE, batch=BATCH, at=TRAP_AT, amplitude=10.0):
    """A scripted trap in a square of the samples `rows` of a batch: there D jumps and then nearly freezes."""
    mask = torch.zeros(batch, HEIGHT, WIDTH, dtype=torch.bool)
    mask[(rows, *square)] = True
    return ScriptedTrap(mask, torch.ones(1, CHANNELS, HEIGHT, WIDTH), amplitude, (at,))


def trapped_model(kind="eps", rows=(1,), **settings):
    """An exact model that goes wrong for the samples `rows`."""
    return exact_model(images(), kind, traps=[trap(list(rows), **settings)])


def guard(model, region=None, options=None, **settings):
    """(guarded model, report) from the guard node. `options`: changes to the options node's defaults."""
    finer = {i.id: i.default for i in ASCEDOptions.GET_SCHEMA().inputs} | {"max_area": 1.0} | (options or {})
    widgets = {i.id: i.default for i in ASCEDGuard.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    own = finer["detector"] == AscedOptions().detector
    widgets["sensitivity"] = OWN_SENSITIVITY if own else PUBLISHED_SENSITIVITY
    widgets |= settings
    return ASCEDGuard.execute(model, **widgets, options=ASCEDOptions.execute(**finer)[0], region=region).result


def empty(batch=BATCH, **more):
    """An empty LATENT."""
    return {"samples": torch.zeros(batch, CHANNELS, HEIGHT, WIDTH), **more}


def ksampler(model, sampler="euler", latent=None, seed=4, steps=STEPS, denoise=1.0, cfg=1.0):
    """The samples that core's KSampler node gives, under inference mode as ComfyUI runs nodes."""
    with torch.inference_mode():
        (latent,) = core_nodes.KSampler().sample(
            model, seed, steps, cfg, sampler, "simple", conditioning(), conditioning(), latent or empty(), denoise
        )
    return latent["samples"]


def found(record):
    """Which frames of a run have regions."""
    return record.regions.flatten(1).any(1).tolist()


def schedule(model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def same(one, other):
    """Equal bit for bit, NaN included."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))


@dataclass
class Leg:
    """One call of a sampler's function: what it was given, how many progress bars were open, what it reported."""

    x: torch.Tensor
    sigmas: torch.Tensor
    seed: int
    first_input: int
    open_bars: int
    reported: list = field(default_factory=list)


class Run:
    """One run of SamplerCustomAdvanced, with all that it shows.

    Args:
        model: guarded or not.
        sampler: a sampler's name, or a KSAMPLER's function.
        guider: made from the model, as BasicGuider unless another is given.
        model_call: stands in for the model's calls: gets number, input and a function without arguments that asks
            the model, gives the estimate.
    """

    def __init__(self, model, sampler="euler", latent=None, sigmas=None, seed=4, guider=None, model_call=None):
        self.legs, self.inputs, self.model_call = [], [], model_call or (lambda number, x, ask: ask())
        self.latent, self.seed = latent or empty(), seed
        model = model.clone()
        model.set_model_unet_function_wrapper(self._watch_model)
        function = sampler if callable(sampler) else comfy.samplers.sampler_object(sampler).sampler_function
        self.sampler = comfy.samplers.KSAMPLER(self._watch_sampler(function))
        self.sigmas = schedule(model) if sigmas is None else sigmas
        self.guider = guider(model) if guider else custom.BasicGuider.execute(model, conditioning())[0]

    def start(self):
        noise = custom.RandomNoise.execute(self.seed)[0]
        with torch.inference_mode():
            run = custom.SamplerCustomAdvanced.execute(noise, self.guider, self.sampler, self.sigmas, self.latent)
        self.output = run[0]["samples"]
        return self

    def _watch_model(self, apply_model, call):
        x = call["input"]
        self.inputs.append(kept(x))
        return self.model_call(len(self.inputs) - 1, x, lambda: apply_model(x, call["timestep"], **call["c"]))

    def _watch_sampler(self, function):
        def sampler_function(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
            leg = Leg(kept(x), kept(sigmas), extra_args.get("seed"), len(self.inputs), open_bars())
            self.legs.append(leg)

            def reporting(info):
                leg.reported.append((info["i"], kept(info["x"])))
                callback(info)

            return function(model, x, sigmas, extra_args=extra_args, callback=reporting, disable=disable, **options)

        return sampler_function

    def state_before(self, number, adaptive=False):
        """The state that leg `number` took up: the last one the model saw before, or the adaptive solver accepted."""
        return self.legs[number - 1].reported[-1][1] if adaptive else self.inputs[self.legs[number].first_input - 1]


def kept(x):
    """A copy on the CPU, where masks and reports are."""
    return x.detach().clone().cpu()


def open_bars():
    """How many of tqdm's progress bars are open."""
    return len(tqdm.tqdm._instances)


def content(value):
    """Nested dicts and lists by content, what lies in them by identity: equal as long as nothing was put in or out."""
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    return [content(item) for item in value] if isinstance(value, list) else id(value)
