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
from comfyui_version import __version__ as RELEASE

from ..harness.pins import DEFAULT_VERSION
from .base import SmallModel, sample
from .image_transformers import BUILDERS as IMAGE_TRANSFORMERS
from .unets import BUILDERS as UNETS
from .unets import shallow_sd15
from .video_transformers import BUILDERS as VIDEO_TRANSFORMERS

BUILDERS = {**UNETS, **IMAGE_TRANSFORMERS, **VIDEO_TRANSFORMERS}
FAMILIES = tuple(BUILDERS)


def not_in_this_release(what: str):
    """Skips a test on a ComfyUI older than the one that the tests are written for, which has all they ask for: there it fails."""
    older = [int(n) for n in RELEASE.split(".")] < [int(n) for n in DEFAULT_VERSION.split(".")]
    (pytest.skip if older else pytest.fail)(f"ComfyUI {RELEASE} {what}")


def small_model(family: str, seed: int = 0) -> SmallModel:
    """A new small model of this family; the same seed gives the same weights. On a ComfyUI too old
    to know the family the test that asks is skipped.

    Raises:
        KeyError: no such family; FAMILIES has their names.
    """
    try:
        return BUILDERS[family](seed)
    except AttributeError as error:
        if error.obj is not comfy.supported_models:
            raise
        not_in_this_release(f"has no {error.name}")


__all__ = ["FAMILIES", "SmallModel", "not_in_this_release", "sample", "shallow_sd15", "small_model"]


def reachable(small: SmallModel) -> SmallModel:
    """The model, if a patch can reach its attention in this release."""
    from artifact_guard.nodes.fam.families import family_of

    try:
        family_of(small.model.get_model_object("diffusion_model"))
    except ValueError as refusal:
        if "in this release" not in str(refusal):
            raise
        not_in_this_release(f"lets nobody reach the attention of {small.family}: {refusal}")
    return small
