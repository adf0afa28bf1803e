"""Does a highlighter judge by the flaw, or by something else that happens to differ between the classes?

Each check takes pairs of held-out images, one of each class and both judged rightly, gives the first one part of the
second, and asks whose class the verdict follows. A verdict that follows the border, the background, the finest texture
or the light of an image rather than all the rest has learned a spurious cue.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .backbones import Backbone
from .grad_cam import grad_cam, scale_to_one
from .highlighter import GENERATED, REAL

MOSTLY = 0.5
"""Share of the verdicts that may follow the exchanged part before it is called a spurious cue."""
FEWEST_PAIRS = 4
MOST_PAIRS = 64
BORDER = 1 / 12
"""Width of the border, as a fraction of each side."""
HOT = 0.3
"""The background is where the map of the generated image is below this."""
LOW_BAND = 1.5
"""Cycles an image: light and colour are what changes more slowly than this."""
HIGH_BAND = 0.75
"""Of the highest frequency: the finest texture is what changes faster."""

ADVICE = {
    "border": "by the border of the images. Crop the borders off, or remove frames and padding from one of the sets.",
    "background": "by the background, not by the spots it marks. Use real and generated images of the same kind of scene.",
    "finest texture": "by the finest texture, as resizing, sharpening or compression leave it. Give both sets the same "
    "treatment: the same source size, the same file format.",
    "light and colour": "by light and colour. Use sets of the same exposure and white balance, or convert both to the same.",
}


@dataclass(frozen=True)
class Cue:
    """One check: the part that was exchanged, the share of verdicts that followed it, and of how many."""

    part: str
    followed: float
    pairs: int

    @property
    def spurious(self) -> bool:
        return self.pairs >= FEWEST_PAIRS and self.followed > MOSTLY

    @property
    def words(self) -> str:
        """The warning, for a person."""
        return (
            f"Spurious cue: {self.followed:.0%} of the verdicts follow the {self.part}. The highlighter judges "
            + ADVICE[self.part]
        )


def border_mask(height: int, width: int) -> torch.Tensor:
    """(H, W) bool: the border."""
    mask = torch.ones(height, width, dtype=torch.bool)
    rows, columns = max(1, round(BORDER * height)), max(1, round(BORDER * width))
    mask[rows : height - rows, columns : width - columns] = False
    return mask


def band_mask(height: int, width: int, lowest: float, highest: float) -> torch.Tensor:
    """(H, W // 2 + 1) bool: frequencies from `lowest` to `highest` cycles a pixel, for torch.fft.rfft2."""
    vertical, horizontal = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = torch.maximum(vertical.abs(), horizontal.abs())
    return (frequency >= lowest) & (frequency <= highest)


def exchange_band(own: torch.Tensor, other: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) with one band of frequencies taken from others."""
    spectrum = torch.where(band, torch.fft.rfft2(other), torch.fft.rfft2(own))
    return torch.fft.irfft2(spectrum, s=own.shape[-2:]).clamp(0, 1)


def exchanges(hot: torch.Tensor) -> dict[str, Callable]:
    """part -> f(own, other): own with that part of other. hot (N, 1, H, W) bool: the marked spots of each pair."""
    height, width = hot.shape[-2:]
    border = border_mask(height, width)
    low = band_mask(height, width, 0.0, LOW_BAND / min(height, width))
    high = band_mask(height, width, HIGH_BAND * 0.5, 1.0)
    return {
        "border": lambda own, other: torch.where(border, other, own),
        "background": lambda own, other: torch.where(hot, own, other),
        "finest texture": lambda own, other: exchange_band(own, other, high),
        "light and colour": lambda own, other: exchange_band(own, other, low),
    }


def check_cues(network: Backbone, images: torch.Tensor, classes: torch.Tensor, device: torch.device, at_once: int = 16) -> list[Cue]:
    """All checks on held-out images.

    Args:
        images: (N, 3, H, W) in 0..1. classes: (N,). at_once: images that are judged side by side.

    Returns:
        One Cue a check; with fewer than four pairs of rightly judged images none was made, see `warnings_of`.
    """
    def verdicts(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat([network(part.clone().to(device)).argmax(dim=1).cpu() for part in batch.split(at_once)])

    right = verdicts(images) == classes
    real, generated = images[right & (classes == REAL)], images[right & (classes == GENERATED)]
    pairs = min(len(real), len(generated), MOST_PAIRS)
    if pairs < FEWEST_PAIRS:
        return [Cue(part, 0.0, pairs) for part in ADVICE]
    real, generated = real[:pairs], generated[:pairs]
    maps = torch.cat([grad_cam(network, part.to(device))[0].cpu() for part in generated.split(at_once)])
    hot = F.interpolate(scale_to_one(maps)[:, None], size=images.shape[-2:], mode="bilinear") > HOT
    found = []
    for part, exchange in exchanges(hot).items():
        followed = [verdicts(exchange(generated, real)) == REAL, verdicts(exchange(real, generated)) == GENERATED]
        found.append(Cue(part, torch.cat(followed).float().mean().item(), 2 * pairs))
    return found


def warnings_of(cues: list[Cue]) -> tuple[str, ...]:
    """What a person has to be told of all checks; nothing if they were made and found nothing."""
    pairs = min(cue.pairs for cue in cues)
    if pairs < FEWEST_PAIRS:
        return (
            f"Spurious cues could not be looked for: it judged {pairs} pairs of held-out images rightly, and at least {FEWEST_PAIRS} "
            "are wanted. Train it on more images.",
        )
    return tuple(cue.words for cue in cues if cue.spurious)
