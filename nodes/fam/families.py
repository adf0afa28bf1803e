"""Model families: through which hook a family's self-attention is reached, and which of its tokens are the image.

Read in ComfyUI's code and measured on small models of every family (tests/unit/test_fam_families.py, which also keeps
the table of the help page true). A network is known by its class, not by guessing: a class that is not in the table
was not measured, and is refused in words.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

PATCH, OVERRIDE = "attn1_patch", "attention override"

def patch_of(network) -> tuple[int, int, int]:
    """(frames, height, width) of one token in latent pixels, read off the network."""
    for name in ("patch_size", "patch"):
        size = getattr(network, name, None)
        if size is not None:
            size = (size,) if isinstance(size, int) else tuple(size)
            return (1, size[0], size[0]) if len(size) == 1 else (1, *size) if len(size) == 2 else size
    return 1, 1, 1


@dataclass(frozen=True)
class Family:
    """How one family is patched.

    networks: full class names. hook: PATCH or OVERRIDE.
    image: where the image's tokens are among the keys: "all", "first", "last", or, for a PATCH that is told where the
        image part begins, "first of slice" or "last of slice" (reference images lie on the other side).
    token: (network) -> (frames, height, width) of a token.
    cross: the network has cross-attention of its own, which must be told from self-attention.
    joint: only calls that hold image and text together are scaled; refiners of one of the two are left alone.
    splits: self-attention may be asked in parts, some of its queries at a time, always with all keys.
    numbered: block kinds that a user can choose among -> the network's list of them. Empty: it does not tell.
    """

    name: str
    networks: tuple[str, ...]
    hook: str
    image: str
    token: Callable = patch_of
    cross: bool = False
    joint: bool = False
    splits: bool = False
    numbered: dict[str, str] = field(default_factory=dict)


LDM = "comfy.ldm."

UNET = Family(
    "Stable Diffusion 1.x, 2.x, SDXL, SVD", (LDM + "modules.diffusionmodules.openaimodel.UNetModel",), PATCH, "all",
    numbered={"input": "input_blocks", "middle": "", "output": "output_blocks"},
)
CASCADE = Family("Stable Cascade", (LDM + "cascade.stage_c.StageC", LDM + "cascade.stage_b.StageB"), OVERRIDE, "first")

TWO_KINDS = {"double": "double_blocks", "single": "single_blocks"}
FAMILIES = (
    UNET,
    Family("Flux", (LDM + "flux.model.Flux",), PATCH, "first of slice", numbered=TWO_KINDS),
    Family("Chroma", (LDM + "chroma.model.Chroma", LDM + "chroma_radiance.model.ChromaRadiance"), PATCH,
           "first of slice", numbered=TWO_KINDS),
    Family("HunyuanVideo", (LDM + "hunyuan_video.model.HunyuanVideo",), PATCH, "last of slice", numbered=TWO_KINDS),
    Family("Qwen-Image", (LDM + "qwen_image.model.QwenImageTransformer2DModel",), PATCH, "first of slice",
           token=lambda network: (1, network.patch_size, network.patch_size),
           numbered={"double": "transformer_blocks"}),
    Family("Krea 2", (LDM + "krea2.model.SingleStreamDiT",), PATCH, "first of slice", numbered={"single": "blocks"}),
    Family("Wan 2.1, 2.2", (LDM + "wan.model.WanModel", LDM + "wan.model.VaceWanModel"), OVERRIDE, "first", cross=True,
           numbered={"double": "blocks"}),
    Family("Cosmos Predict 2, Anima", (LDM + "cosmos.predict2.MiniTrainDIT", LDM + "anima.model.Anima"), OVERRIDE,
           "first", cross=True, numbered={"": "blocks"},
           token=lambda network: (network.patch_temporal, network.patch_spatial, network.patch_spatial)),
    Family("Stable Diffusion 3, 3.5", (LDM + "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",), OVERRIDE, "last"),
    Family("AuraFlow", (LDM + "aura.mmdit.MMDiT",), OVERRIDE, "last"),
    Family("CogVideoX", (LDM + "cogvideo.model.CogVideoXTransformer3DModel",), OVERRIDE, "last",
           token=lambda network: (network.patch_size_t or 1, network.patch_size, network.patch_size)),
    Family("Lumina 2, Z-Image", (LDM + "lumina.model.NextDiT", LDM + "lumina.model.NextDiTPixelSpace"), OVERRIDE, "last",
           joint=True, numbered={"double": "layers"}),
    Family("OmniGen 2", (LDM + "omnigen.omnigen2.OmniGen2Transformer2DModel",), OVERRIDE, "last", joint=True),
    Family("HiDream", (LDM + "hidream.model.HiDreamImageTransformer2DModel",), OVERRIDE, "first"),
    Family("Mochi", (LDM + "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",), OVERRIDE, "first"),
    Family("LTX-Video", (LDM + "lightricks.model.LTXVModel",), OVERRIDE, "first", cross=True,
           splits=True, token=lambda network: (1, 1, 1)),
    Family("Kandinsky 5", (LDM + "kandinsky5.model.Kandinsky5",), OVERRIDE, "first", cross=True,
           numbered={"double": "visual_transformer_blocks"}),
    CASCADE,
)

NO_HOOK = {
    LDM + "hydit.models.HunYuanDiT": "HunyuanDiT",
    LDM + "pixart.pixartms.PixArtMS": "PixArt",
    LDM + "ernie.model.ErnieImageModel": "Ernie-Image",
    LDM + "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain": "Hunyuan3D 2.1",
    LDM + "seedvr.model.NaDiT": "SeedVR 2",
}
"""Networks that call no hook around their attention: nothing outside ComfyUI's own code can reach it."""


def class_name(network) -> str:
    """The full name of the network's class: module and name."""
    return f"{type(network).__module__}.{type(network).__qualname__}"


def mentions(network, word: str) -> bool:
    """Whether the code of a network's own layers has this word: ComfyUI's releases differ in the hooks that they call."""
    modules = {type(part).__module__ for part in network.modules()}
    own = {name for name in modules if name.startswith(LDM) and name != LDM + "modules.attention"}  # that one is the UNets'
    return any(word in _source(name) for name in own)


@functools.lru_cache(maxsize=None)
def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


def family_of(network) -> Family:
    """The family of a diffusion network, as this release of ComfyUI has it.

    Raises:
        ValueError: the network calls no hook, or is of a kind that was not measured.
    """
    name = class_name(network)
    for family in FAMILIES:
        if name in family.networks:
            if family.hook == PATCH and family is not UNET and not mentions(network, PATCH):
                raise ValueError(
                    f"model: {family.name} lets nobody reach its attention in this release of ComfyUI; newer ones do (0.20.1 "
                    "was seen to). Update ComfyUI, or use this patch on a model of another family."
                )
            if family.numbered and family is not UNET and not mentions(network, "block_index"):
                return replace(family, numbered={})
            return family
    advice = "Refine Flaws works with it all the same, without the patch; for the patch itself use a model of another family."
    if name in NO_HOOK:
        raise ValueError(
            f"model: {NO_HOOK[name]} lets nobody reach its attention (it calls no hook), so this patch cannot work on it. "
            + advice
        )
    raise ValueError(
        f"model: {type(network).__name__} is of a kind this patch was not tried on, so it does not guess which of its "
        f"tokens are the image. {advice} Known are: {', '.join(f.name for f in FAMILIES)}."
    )
