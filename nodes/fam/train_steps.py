"""Training steps as a ComfyUI sampler: the guider that runs them brings the model, its patches and its conditionings.

A step noises clean latents, x = a x0 + b eps, and asks the model through the guider for the clean latent. The loss is
the mean square error of what the network itself predicts (noise, v or velocity): the error of the clean latent over
the factor that stands before the network's output in it. Core's training node leaves that factor out.
"""

from collections.abc import Callable

import torch

import comfy.samplers

from .noise import add_map
from .training_data import Draw, LatentData

GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "sampler_calc_cond_batch_function")
"""What core's guiders ask for the prediction, in model_options."""


def output_factor(sampling, sigma: torch.Tensor) -> torch.Tensor:
    """d(clean latent) / d(network output) at sigma (B,): -sigma for noise and velocity."""
    zero = torch.zeros(len(sigma), 1, 1, 1, device=sigma.device)
    at = [sampling.calculate_denoised(sigma, zero + value, zero) for value in (1.0, 0.0)]
    return (at[0] - at[1]).flatten()


def prediction_loss(sampling, sigma: torch.Tensor, denoised: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Mean square error of the network's output, from clean latents as estimated and as they are (B, C, ...)."""
    error = (denoised.float() - x0.float()).square().flatten(1).mean(dim=1)
    return (error / output_factor(sampling, sigma).square()).mean()


class UnlikePrompts(ValueError):
    """The prompts of different images cannot be in one batch."""


def check_alike(conditions: list[dict]) -> None:
    """Raises:
        UnlikePrompts: processed conditionings that cannot be in one batch, such as ones of different lengths.
    """
    names = {frozenset(condition["model_conds"]) for condition in conditions}
    if len(names) > 1:
        unlike = ", ".join(sorted(frozenset.union(*names) - frozenset.intersection(*names)))
        raise UnlikePrompts(f"positive: some prompts have {unlike} and others have not, which no batch can hold. Set batch_size to 1.")
    for name, value in conditions[0]["model_conds"].items():
        others = [condition["model_conds"][name] for condition in conditions[1:]]
        if not all(value.can_concat(other) for other in others):
            raise UnlikePrompts(
                f"positive: the prompts of different images do not fit into one batch (their {name} differ in shape). "
                "Set batch_size to 1."
            )


def merge_conditions(conditions: list[dict]) -> dict:
    """The processed conditionings of a batch as one, each row with its own.

    Core's training node runs every prompt of a batch on all of its latents and averages; this does not.
    """
    check_alike(conditions)
    first, *rest = conditions
    merged = {
        name: type(value)(value.concat([condition["model_conds"][name] for condition in rest])) if rest else value
        for name, value in first["model_conds"].items()
    }
    return first | {"model_conds": merged}


def without_guidance(model):
    """A clone of a ModelPatcher that predicts without the guidance on it (PAG, SAG, RescaleCFG and the like): what is trained is the
    network's own prediction, not what guidance makes of it."""
    model = model.clone()
    for name in GUIDANCE:
        model.model_options.pop(name, None)
    return model


class TrainSteps(comfy.samplers.Sampler):
    """A stretch of training steps.

    Args:
        update: called after each step's gradients are there, with (step, loss); it is what changes the weights.
        flaw_map: MASK (1, H, W) whose multiple of noise_strength is added to the noise: eps + lambda * M.
    """

    def __init__(
        self, data: LatentData, seed_of: Callable[[int], int], batch_size: int, dtype: torch.dtype, first: int, end: int,
        update: Callable[[int, float], None], flaw_map: torch.Tensor | None = None, noise_strength: float = 0.0,
    ):
        self.data, self.seed_of, self.batch_size, self.dtype = data, seed_of, batch_size, dtype
        self.first, self.end, self.update = first, end, update
        self.flaw_map, self.noise_strength = flaw_map, noise_strength

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """Train on steps first..end; what a guider calls, with the noise of a single latent: the pictures that belong to a prompt then
        have one row each, as its text has."""
        conditions = model_wrap.conds["positive"]
        if self.batch_size > 1:
            check_alike(conditions)
        for step in range(self.first, self.end):
            draw = self.data.draw(self.batch_size, self.seed_of(step))
            model_wrap.conds["positive"] = [self.conditions_of(conditions, draw)]
            loss = self.loss(model_wrap, draw, extra_args, noise.device)
            loss.backward()
            self.update(step, loss.item())
        return torch.zeros_like(noise)

    def conditions_of(self, conditions: list[dict], draw: Draw) -> dict:
        """The conditioning of a drawn batch; one that all share is not repeated."""
        numbers = draw.conditions.tolist()
        if len(set(numbers)) == 1:
            return conditions[numbers[0]]
        return merge_conditions([conditions[number] for number in numbers])

    def loss(self, model_wrap, draw: Draw, extra_args: dict, device: torch.device) -> torch.Tensor:
        """The loss of a drawn batch, with a gradient."""
        sampling = model_wrap.inner_model.model_sampling
        clean = self.data.latents[draw.indices].to(device)
        noise = draw.noise
        if self.flaw_map is not None and self.noise_strength:
            noise = add_map(noise, self.flaw_map, self.noise_strength)
        noise = noise.to(device)
        sigma = torch.tensor([float(sampling.percent_to_sigma(time)) for time in draw.times.tolist()], device=device)
        x = sampling.noise_scaling(sigma, noise, clean, False)
        x0 = sampling.noise_scaling(torch.zeros_like(sigma), torch.zeros_like(noise), clean, False)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            denoised = model_wrap(x, sigma, **extra_args)
        return prediction_loss(sampling, sigma, denoised, x0)
