"""The exact denoiser as a ComfyUI model: a BaseModel and ModelPatcher that every sampler, guider and node can run.

    model = exact_model(images, "flow")                       # images (N, C, H, W) or (N, C, T, H, W) in [-1, 1]
    result = sample(model, "euler", "simple", steps=25, latent=(4, 3, 32, 32))

Latents are the pixels themselves (latent format of scale 1). The model is asked at the sampler's true sigma:
`model_sampling.timestep()`, which real networks see, rounds it by up to 19 % near 0.03.
"""

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models_base
import torch
from comfy.patcher_extension import CallbacksMP

from .denoiser import ExactDenoiser
from .traps import mixture_with_traps

MODEL_TYPES = {
    "eps": comfy.model_base.ModelType.EPS,
    "v": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
    "edm": comfy.model_base.ModelType.EDM,
}


class NoNetwork(torch.nn.Module):
    """Stands where ComfyUI expects the network: it asks for a dtype and for weights to load, nothing runs it."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


class ExactModel(comfy.model_base.BaseModel):
    """BaseModel whose `_apply_model` is the exact denoiser, with planted traps.

    `calls` counts model evaluations and `call_sigmas` lists their sigma (a cond/uncond pair run as one batch is one
    call). `states` holds what scripted traps remember; it is emptied whenever a sampling run begins.
    """

    def __init__(self, config, model_type, denoiser, traps):
        super().__init__(config, model_type)
        self.diffusion_model = NoNetwork()
        self.denoiser = denoiser
        self.attractors = [trap for trap in traps if trap.kind == "attractor"]
        self.scripted = [trap for trap in traps if trap.kind == "scripted"]
        self.forget_calls()
        self.begin_run()

    def forget_calls(self):
        self.calls, self.call_sigmas = 0, []

    def begin_run(self):
        self.states = {}

    def coefficients(self, sigma):
        """(a, b), each (B, 1), of x = a*x0 + b*eps as this model's own noise_scaling makes it."""
        ones = torch.ones(len(sigma), 1, dtype=torch.float64, device=sigma.device)
        noise_scaling, sigma = self.model_sampling.noise_scaling, sigma.double()
        return noise_scaling(sigma, 0 * ones, ones), noise_scaling(sigma, ones, 0 * ones)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        """D(x, sigma), float32, shape of x; t is the sampler's sigma (B,)."""
        self.calls += 1
        self.call_sigmas.append(float(t.flatten()[0]))
        a, b = self.coefficients(t.expand(len(x)))
        token = torch.zeros(len(x), 1, 1, device=x.device) if c_crossattn is None else c_crossattn
        label = token[:, 0, 0].round().long() - 1
        self.denoiser.to(x.device)
        conds = transformer_options.get("uuids") or [None]  # cond and uncond come as one batch, traps are per sample
        parts = zip(conds, *(tensor.chunk(len(conds)) for tensor in (x, a, b, label)))
        return torch.cat([self._denoise(*part) for part in parts]).float()

    def _denoise(self, cond, x, a, b, label):
        """The trapped estimate of one cond's samples; scripted traps have a state for each cond."""
        if self.attractors:
            denoised = mixture_with_traps(self.denoiser, self.attractors, x, a, b, label)
        else:
            denoised = self.denoiser.denoise(x, a, b, label)
        for number, trap in enumerate(self.scripted):
            denoised = trap.play(denoised, b / a, self.states.setdefault((cond, number), []))
        return denoised


def exact_model(images, parameterization="eps", kernel_width=0.05, traps=(), labels=None, sampling_settings=None,
                denoiser=None):
    """A ModelPatcher around the exact denoiser of `images`, or another one that stands in for it (local.py).

    parameterization: eps, v (both x = x0 + sigma*eps on SD's noise schedule), edm (the same on EDM's) or flow
    (x = (1 - sigma)*x0 + sigma*eps).
    labels: (N,) integers that `conditioning(label)` selects by. sampling_settings: ComfyUI's, e.g. {"shift": 3.0}.
    traps: see traps.py.
    """
    class PixelFormat(comfy.latent_formats.LatentFormat):
        latent_channels = images.shape[1]
        latent_dimensions = images.ndim - 2
        spacial_downscale_ratio = 1
        latent_rgb_factors = [[1.0 * (i == j) for j in range(3)] for i in range(3)] if images.shape[1] == 3 else None

    class PixelConfig(comfy.supported_models_base.BASE):
        latent_format = PixelFormat

    config = PixelConfig({"disable_unet_model_creation": True})
    config.sampling_settings = dict(sampling_settings or {})
    denoiser = denoiser or ExactDenoiser(images, kernel_width, labels)
    model = ExactModel(config, MODEL_TYPES[parameterization], denoiser, traps)
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu"))
    patcher.add_callback(CallbacksMP.ON_PRE_RUN, begin_run)
    return patcher


def begin_run(patcher):
    """ON_PRE_RUN callback: scripted traps forget the last run. Finds the model through the patcher, so clones work."""
    patcher.model.begin_run()


def conditioning(label=None):
    """CONDITIONING for the exact model: one token holding label + 1; 0, as ConditioningZeroOut makes it, means all."""
    return [[torch.full((1, 1, 1), 0.0 if label is None else label + 1.0), {}]]


def sample(model, sampler_name="euler", scheduler="normal", steps=25, cfg=1.0, seed=0, latent=(1, 3, 32, 32),
           denoise=1.0, positive=None, negative=None, noise_mask=None, callback=None):
    """comfy.sample.sample with the usual noise: `latent` is a tensor to start from, or a shape for an empty one.

    Returns (B, C, H, W) or (B, C, T, H, W). callback(step, denoised, x, steps), as KSampler's.
    """
    latent = latent if torch.is_tensor(latent) else torch.zeros(latent)
    return comfy.sample.sample(
        model, comfy.sample.prepare_noise(latent, seed), steps, cfg, sampler_name, scheduler,
        positive or conditioning(), negative or conditioning(), latent, denoise=denoise, noise_mask=noise_mask,
        callback=callback, disable_pbar=True, seed=seed)


def resume(model, x, sigmas, sampler_name="euler", cfg=1.0, seed=0, positive=None, negative=None, callback=None):
    """Go on sampling from the state x = a*x0 + b*eps at sigmas[0] (a > 0), e.g. one that a test has renoised."""
    a, _ = model.model.coefficients(sigmas[:1])
    return comfy.sample.sample_custom(
        model, torch.zeros_like(x), cfg, comfy.samplers.sampler_object(sampler_name), sigmas,
        positive or conditioning(), negative or conditioning(), (x / a.item()).float(), callback=callback,
        disable_pbar=True, seed=seed)


class Trajectory:
    """A sampling callback that keeps every step's state and clean estimate: lists `x` and `denoised`."""

    def __init__(self):
        self.x, self.denoised = [], []

    def __call__(self, step, denoised, x, steps):
        self.x.append(x.detach().cpu().clone())
        self.denoised.append(denoised.detach().cpu().clone())

    def stack(self):
        """The clean estimates as one tensor (S, B, C, H, W)."""
        return torch.stack(self.denoised)
