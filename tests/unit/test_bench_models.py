"""The models that are timed on a GPU have the size of the real ones, without a byte of theirs."""

import comfy.supported_models as supported
import pytest
import torch

from tests.bench import full_models

RELEASED = {
    "SD15": (full_models.SD15, 859_520_964), "SDXL": (full_models.SDXL, 2_567_463_684),
    "SD3": (full_models.SD3, 2_243_171_520), "Flux": (full_models.FLUX, 11_901_408_320),
}
"""Config of ComfyUI's -> sizes, and parameters of Stable Diffusion 1.5's UNet, SDXL's, SD 3.5 medium and Flux.1 dev."""


@pytest.mark.parametrize("name", RELEASED)
def test_full_models_have_as_many_parameters_as_the_released_ones(name):
    sizes, parameters = RELEASED[name]
    config_class = getattr(supported, name)
    config = config_class({**config_class.unet_config, **sizes})
    config.set_inference_dtype(torch.float16, None)
    network = config.get_model({}, device=torch.device("meta")).diffusion_model
    assert sum(weight.numel() for weight in network.parameters()) == parameters
