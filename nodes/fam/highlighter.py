"""The flaw highlighter: a network that tells generated from real images, and what is known of it."""

from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F

import comfy.model_management
import comfy.model_patcher

from .backbones import BACKBONES, Backbone

REAL, GENERATED = 0, 1
"""The two classes, as columns of the logits."""

KIND = "flaw highlighter"
FOLDER = "flaw_highlighters"


@dataclass(frozen=True)
class HighlighterSettings:
    """What a highlighter is and how it came to be; goes into its file."""

    backbone: str
    image_size: int
    epochs: int = 0
    accuracy: float = 0.0
    seed: int = 0
    real_images: int = 0
    generated_images: int = 0
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self):
        for name in ("image_size", "epochs", "seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < (1 if name == "image_size" else 0):
                raise ValueError(f"its {name} is {getattr(self, name)!r}")


class FlawHighlighter:
    """A network and its settings, ready to judge images on the device ComfyUI chose."""

    def __init__(self, network: Backbone, settings: HighlighterSettings):
        self.network = network.eval().requires_grad_(False)
        self.settings = settings
        management = comfy.model_management
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )

    def load(self) -> torch.device:
        """Bring the network to its device; gives the device. Call under torch.inference_mode(False)."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.load_device

    @torch.inference_mode(False)
    @torch.no_grad()
    def generated_probability(self, image: torch.Tensor, batch: int = 16) -> torch.Tensor:
        """How surely each image is generated, (B,) float64, 0..1, on the CPU. image: IMAGE (B, H, W, C)."""
        device, images = self.load(), fit_images(image, self.settings)
        logits = [self.network(part.to(device)).float().cpu() for part in images.split(batch)]
        return torch.cat(logits).double().softmax(dim=1)[:, GENERATED]

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, settings) for a file: weights in half precision, those that it cannot hold, as the variances of a network trained
        at a high rate, as they are. Counters of training steps are left out."""
        weights = {name: value for name, value in self.network.state_dict().items() if value.is_floating_point()}
        largest = torch.finfo(torch.float16).max
        halves = {name: value if value.abs().max() > largest else value.half() for name, value in weights.items()}
        return halves, asdict(self.settings)

    @classmethod
    def from_state(cls, tensors: dict[str, torch.Tensor], settings: dict) -> "FlawHighlighter":
        """The highlighter that `state` gave.

        Raises:
            ValueError: settings or weights are not a highlighter's.
        """
        try:
            settings = HighlighterSettings(**settings | {"warnings": tuple(settings.get("warnings", ()))})
            with torch.inference_mode(False):
                network = BACKBONES[settings.backbone]()
                network.load_state_dict({name: value.float() for name, value in tensors.items()})
            if not all(value.isfinite().all() for value in tensors.values()):
                raise ValueError("its weights hold NaN or infinite values")
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"The file says that it holds a flaw highlighter, but its content does not fit the networks of this version "
                f"({str(error)[:200]}). It was changed, or trained with another version of Artifact Guard: train it again."
            ) from error
        return cls(network, settings)


def fit_images(image: torch.Tensor, settings: HighlighterSettings, name: str = "image") -> torch.Tensor:
    """An IMAGE as the highlighter sees it: (B, 3, h, w) in 0..1 on the CPU, the shorter side `image_size`.

    Grey images are repeated to three channels, an alpha channel is left out, the aspect is kept. name: what errors call the input.

    Raises:
        ValueError: not a batch of images, an empty one, other channels than 1, 3 or 4, or NaN.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or min(image.shape) < 1:
        raise ValueError(
            f"{name}: an IMAGE of shape (count, height, width, channels) with 1, 3 or 4 channels is wanted, "
            f"{tuple(image.shape)} came."
        )
    images = image[..., :3].detach().float().cpu().movedim(-1, 1).expand(-1, 3, -1, -1)
    if not torch.isfinite(images).all():
        raise ValueError(f"{name}: the image holds NaN or infinite values. A VAE in fp16 is the usual cause.")
    height, width = images.shape[-2:]
    scale = settings.image_size / min(height, width)
    size = tuple(max(settings.image_size, round(side * scale)) for side in (height, width))
    if size != (height, width):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(0, 1).contiguous()
