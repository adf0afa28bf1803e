"""The demo model: a class-conditional UNet on 3x32x32 images, built from ComfyUI's own classes.

It is small enough to ship with the pack and to sample on a CPU in seconds, and it is an ordinary ComfyUI MODEL: the
network is ComfyUI's UNetModel with self- and cross-attention, the noise schedule is Stable Diffusion's, the
parameterization is v-prediction, and there is no VAE (latents are RGB images in [-1, 1]). Whatever ComfyUI can do to a
Stable Diffusion model it can do to this one.
"""

from pathlib import Path

import torch

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils

WEIGHTS = Path(__file__).with_name("fashion_mnist.safetensors")

LABELS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

CONTEXT_DIM = 16
"""Width of the one context token. It is at least the number of classes: the token is the class as a unit vector."""

UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": (1, 2, 4),
    "num_res_blocks": [1, 1, 1],
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT_DIM,
    "legacy": False,
}


class PixelLatent(comfy.latent_formats.LatentFormat):
    """Latents that are the image itself: RGB, (B, 3, H, W), in [-1, 1], one latent pixel a pixel."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class DemoConfig(comfy.supported_models_base.BASE):
    """What ComfyUI needs to know to build and run the demo model."""

    unet_extra_config = {}
    latent_format = PixelLatent
    memory_usage_factor = 0.2

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self):
        return False


def build_demo_model(state_dict: dict[str, torch.Tensor], unet_config: dict = UNET_CONFIG) -> comfy.model_patcher.ModelPatcher:
    """Build the demo model around the given UNet weights, the way ComfyUI loads a diffusion model file.

    Args:
        state_dict: weights of the UNet by UNetModel's own names, in any floating dtype.
        unet_config: of the UNet, for models of other sizes trained like the demo model.

    Returns:
        A model patcher on the device ComfyUI chose, in a dtype that device can compute in.

    Raises:
        ValueError: a weight is missing or unknown, which means that the file is of another model.
    """
    management = comfy.model_management
    config = DemoConfig(unet_config)
    parameters = comfy.utils.calculate_parameters(state_dict)
    weight_dtype = comfy.utils.weight_dtype(state_dict)
    load_device = management.get_torch_device()
    dtype = management.unet_dtype(
        model_params=parameters, supported_dtypes=config.supported_inference_dtypes, weight_dtype=weight_dtype
    )
    manual_cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, manual_cast)

    model = config.get_model(state_dict, device=management.unet_offload_device())
    expected = set(model.diffusion_model.state_dict())
    if expected != set(state_dict):
        wrong = sorted(expected.symmetric_difference(state_dict))
        raise ValueError(f"These are not the demo model's weights: {len(wrong)} names differ, such as {wrong[0]}.")
    model.load_model_weights(dict(state_dict))
    return comfy.model_patcher.ModelPatcher(
        model, load_device=load_device, offload_device=management.unet_offload_device()
    )


def load_demo_model() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.VAE]:
    """Load the shipped demo model and the VAE that turns its latents into images (no network: only scaling)."""
    model = build_demo_model(comfy.utils.load_torch_file(str(WEIGHTS), safe_load=True))
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    return model, vae


def class_token(label: int | None) -> torch.Tensor:
    """The context of one class, (1, 1, CONTEXT_DIM): its unit vector, or zeros for "any class".

    Zeros are what ComfyUI's ConditioningZeroOut makes of any prompt, so that node is a valid negative here.
    """
    token = torch.zeros(1, 1, CONTEXT_DIM)
    if label is not None:
        token[..., label] = 1.0
    return token
