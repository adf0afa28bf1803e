"""Small diffusion models of real architectures: ComfyUI's own classes, narrow and shallow, with seeded random weights.

    small = small_model("flux")
    small.model                                      # a ModelPatcher, as a loader node gives it
    small.latent(batch=2, height=16, width=12)       # an empty LATENT of this family
    small.conditioning(seed=1)                       # a CONDITIONING its text side accepts
    sample(small, steps=4)                           # core's KSampler: the samples

What they draw means nothing. They have the shapes, token orders, hooks and samplings of the models people use, and
sample four steps on a CPU in about a second.
"""

import pytest

import comfy.supported_models

from .base import SmallModel, sample
from .image_transformers import BUILDERS as IMAGE_TRANSFORMERS
from .unets import BUILDERS as UNETS
from .video_transformers import BUILDERS as VIDEO_TRANSFORMERS

BUILDERS = {**UNETS, **IMAGE_TRANSFORMERS, **VIDEO_TRANSFORMERS}
FAMILIES = tuple(BUILDERS)


def small_model(family: str, seed: int = 0) -> SmallModel:
    """A new small model of this family; the same seed gives the same weights. A ComfyUI that does not know the family skips
    the test that asks.

    Raises:
        KeyError: no such family; FAMILIES has their names.
    """
    try:
        return BUILDERS[family](seed)
    except AttributeError as error:
        if error.obj is not comfy.supported_models:
            raise
        pytest.skip(f"this ComfyUI has no {error.name}")


__all__ = ["FAMILIES", "SmallModel", "sample", "small_model"]
