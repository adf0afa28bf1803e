"""How a small model is built: a config of ComfyUI's, reduced sizes, and weights drawn by a seeded generator."""

from dataclasses import dataclass, field

import torch

import comfy.model_management
import comfy.model_patcher
import comfy.ops

TOKENS = 6
"""Length of a prompt: no family's image grid at the sizes used here has as many tokens."""


@dataclass
class SmallModel:
    """A model, and what it takes to sample it.

    channels, frames: of its latents; frames is None for images, else latents are (B, C, T, H, W).
    width: of a text token. pooled: width of the pooled text, None if the family has none.
    extra: shapes of further random entries of its conditioning. masked: its conditioning has an attention mask.
    odd: it can sample sizes that are no multiple of its patch.
    """

    family: str
    model: comfy.model_patcher.ModelPatcher
    channels: int
    width: int
    pooled: int | None = None
    frames: int | None = None
    size: tuple[int, int] = (16, 16)
    extra: dict = field(default_factory=dict)
    masked: bool = False
    odd: bool = True

    def latent(self, batch: int = 1, height: int | None = None, width: int | None = None, frames: int | None = None):
        """An empty LATENT; sizes in latent pixels."""
        height, width = height or self.size[0], width or self.size[1]
        time = () if self.frames is None else (frames or self.frames,)
        return {"samples": torch.zeros(batch, self.channels, *time, height, width)}

    def conditioning(self, seed: int = 1, tokens: int = TOKENS, **more):
        """A CONDITIONING: random text tokens, (1, tokens, width)."""
        generator = torch.Generator().manual_seed(seed)
        options = {} if self.pooled is None else {"pooled_output": torch.randn(1, self.pooled, generator=generator)}
        if self.masked:
            options["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        for name, shape in self.extra.items():
            options[name] = torch.randn(*shape, generator=generator)
        return [[torch.randn(1, tokens, self.width, generator=generator), options | more]]


def initialise(network: torch.nn.Module, seed: int) -> None:
    """Fill every weight: ComfyUI's layers are made without values.

    Matrices get normal values of the usual scale, 1 / sqrt(inputs), so that signals keep their size through the
    layers; vectors of norms are 1 +- 0.1, biases and tables small.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(network.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            norm = weight.ndim == 1 and name.endswith(("weight", "scale", "gamma"))
            if norm:
                noise = 1.0 + 0.1 * noise
            elif weight.ndim > 1 and name.endswith("weight"):
                noise = noise / weight[0].numel() ** 0.5
            else:
                noise = 0.1 * noise
            weight.copy_(noise)
        for name, table in network.named_buffers():  # SD 3's table of positions: part of its checkpoints, never computed
            if name.endswith("pos_embed"):
                table.copy_(0.1 * torch.randn(table.shape, generator=generator))


def build(config_class, sizes: dict, seed: int, state_dict: dict | None = None) -> comfy.model_patcher.ModelPatcher:
    """The model of one of ComfyUI's configs (comfy.supported_models) at other sizes, float32, sampled on ComfyUI's device."""
    cpu = torch.device("cpu")
    with torch.inference_mode(False):
        config = config_class({**config_class.unet_config, **sizes})
        config.custom_operations = comfy.ops.disable_weight_init
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model(state_dict or {}, device=cpu)
        initialise(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=cpu)


def sample(small: SmallModel, model=None, latent=None, seed=3, steps=4, cfg=4.0, sampler="euler", scheduler="simple",
           denoise=1.0, positive=None, negative=None) -> torch.Tensor:
    """The samples that core's KSampler gives, under inference mode as ComfyUI runs nodes."""
    import nodes as core_nodes

    with torch.inference_mode():
        (out,) = core_nodes.common_ksampler(
            model or small.model, seed, steps, cfg, sampler, scheduler, positive or small.conditioning(1),
            negative or small.conditioning(2), latent or small.latent(), denoise=denoise,
        )
    return out["samples"]
