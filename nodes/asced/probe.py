"""Between a sampler and its model: what the model was asked last, and at which step of the schedule the sampler is."""

from typing import NamedTuple

import torch

CORE_SAMPLERS = ("comfy.k_diffusion.sampling", "comfy.extra_samplers.uni_pc")
"""Every sampler function of these modules, unless it churns, has asked the model at sigma i of the schedule last when it
reports step i: tests/unit/test_guard_steps.py asks all of them. So their sigma need not be read off the device. One small
difference: on flow models the SDE samplers begin at 0.9999 instead of 1."""


class Answer(NamedTuple):
    """What the model says to one question: known beforehand where a restart puts samples back as they were."""

    x: torch.Tensor
    sigma: torch.Tensor
    denoised: torch.Tensor

    def fits(self, x: torch.Tensor, sigma: torch.Tensor) -> bool:
        return x.shape == self.x.shape and torch.equal(x, self.x) and bool((sigma == self.sigma).all())


class ModelProbe:
    """Stands between a sampler and its model: passes everything on and remembers the last call.

    The sampler's callback cannot be used for that: several samplers report there the initial noise, a rescaled state
    or another sigma than they gave the model.

    Args:
        known: the answer to the first question, if it is the expected one, asked with the same options: CFG++ samplers
            add functions of theirs to these and have to see the model run.
        options: the model options that `known` was got with.
        before: called with every question (x, sigma) before the model is asked; may raise Restart.
        judge: called with every answer of the model as soon as it is there; may raise Restart.
    """

    def __init__(self, model, known: Answer | None, options: dict | None, before, judge):
        self.__dict__.update(model=model, known=known, options=options, before=before, judge=judge, calls=0, last=None)

    def __call__(self, x, sigma, *more, **kwargs):
        self.before(x, sigma)
        known = self.known
        self.__dict__.update(known=None, last=None)  # no sample is kept while the model is at work
        if known is not None and not more and kwargs.get("model_options") is self.options and known.fits(x, sigma):
            denoised = known.denoised
        else:
            denoised = self.model(x, sigma, *more, **kwargs)
            self.__dict__["calls"] = self.calls + 1
        self.__dict__["last"] = (x, sigma, denoised)
        self.judge(x, sigma, denoised)
        return denoised

    def __getattr__(self, name):
        if "model" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name, value):
        setattr(self.model, name, value)

    def accepted(self, info: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x, sigma, denoised) of the step that the sampler reports by `info`.

        The model's last call tells it, but for the adaptive solver: that tries steps before it takes them, and there
        the callback has the accepted ones. And a sampler may tell the model another sigma than its sample has, so that more
        detail is drawn: where it reports the very sample that it asked about, the noise is as much as it reports.
        """
        if "n_accept" in info:
            return info["x"], torch.as_tensor(info["sigma"]), info["denoised"]
        x, sigma, denoised = self.last
        told = info.get("sigma_hat", info.get("sigma"))
        return x, sigma if told is None or info["x"] is not x else torch.as_tensor(told), denoised


def keeps_to_schedule(sampler_function, options: dict) -> bool:
    """Whether a sampler asks the model at the sigmas of its schedule and at no other when it reports a step."""
    return getattr(sampler_function, "__module__", None) in CORE_SAMPLERS and not options.get("s_churn")
