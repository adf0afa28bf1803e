"""Corrections: what takes the place of an abnormal region at the correction step (ASCED, section 3.3)."""

import torch

from ...kernels.fill import fill_from_surroundings
from ...kernels.regions import dilate_square
from ...kernels.renoise import renoise
from ..latents import pixels
from .estimate import Estimate
from .options import AscedOptions

UNIT_GAMMA = 0.1
"""gamma of the correction "targeted" at strength 1, in units of the clean sample's standard deviation. It matters little:
of 116 attractor traps (held-out split, true masks) 16 were repaired with 0 and 0.1, 18 with 0.3, 20 with 1."""

UNIT_PUSH = 0.1
"""Push at strength 1 of the correction "surroundings". Inside true masks more is better: of 55 attractor traps of the
develop split renoised at b / a 1.6, 48 were repaired with 0, 51 with 0.25, 53 with 0.5 ("targeted": 12). But a sound
region that is redrawn by mistake falls more often the further it is pushed away from what it was."""


def repair_mask(regions: torch.Tensor, allowed: torch.Tensor | None, options: AscedOptions) -> torch.Tensor:
    """Where the sample is replaced: the regions (F, H, W), dilated, within the part where the user allows repair."""
    if options.dilate > 0:
        regions = dilate_square(regions, pixels(options.dilate, min(regions.shape[-2:]), 1))
    return regions if allowed is None else regions & allowed


def draw_noise_seed(run_seed: int, noise_seed: int, round_number: int) -> int:
    """The seed of one repair's noise: from the run's seed, the user's noise_seed and the round, spread over 63 bits.

    Spreading by an odd constant keeps it off the seeds that samplers use themselves (seed, seed + 1, ...): a repair
    that drew the initial noise again would redraw the same artifact. A repair uses the number it gets and the next.
    """
    return (0x9E3779B97F4A7C15 * (run_seed + 1) + 0xBF58476D1CE4E5B9 * (noise_seed + 1) + 2 * round_number) % 2**63


def draw_noise(shape: torch.Size, seed: int, device: torch.device) -> torch.Tensor:
    """Normal noise (F, C, H, W), float32, each frame from a CPU generator of its own.

    So the noise is the same on every device, and a frame's noise does not depend on how many others there are.
    """
    frames = []
    for index in range(shape[0]):
        generator = torch.Generator().manual_seed((seed + 0x94D049BB133111EB * (index + 1)) % 2**63)
        frames.append(torch.randn(shape[1:], generator=generator))
    return torch.stack(frames).to(device)


def targeted(now: Estimate, x0: torch.Tensor, mask: torch.Tensor, gamma: float, seed: int) -> torch.Tensor:
    """Trajectory-aware targeted correction, Eq. 6 as in the released code: renoise x0 + gamma * xi.

    eps and xi are fresh noise. gamma is in units of each frame's standard deviation of x0, so that it means the same
    in every latent space.

    Args:
        now: the step's estimate, frames (F, C, H, W).
        x0: (F, C, H, W) float32, the clean estimate of `reverse_step` steps earlier (1 = this one).
        mask: (F, H, W) bool.
    """
    eps = draw_noise(now.x.shape, seed, now.x.device)
    xi = draw_noise(now.x.shape, seed + 1, now.x.device)
    scale = gamma * x0.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    return renoise(now.x, x0 + scale * xi, eps, mask, now.a, now.b)


def surroundings(
    now: Estimate, mask: torch.Tensor, push: float, seed: int, doubted: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """The pack's own correction: renoise what surrounds a region, pushed away from what is in it.

    x0 = fill + push * (fill - D), push = 0.1 at strength 1, fill being the smooth continuation of D outside the mask
    into it. The published form renoises D itself, of which a good part outlives the noise: the region falls again for
    what it was. But what is `doubted` is more often sound, and what surrounds it may win there: of that x0 is what was
    there `before` its onset, which keeps what had been drawn by then.

    Args:
        doubted: (F, H, W) bool, the regions of the mask that the detector doubts; None for none.
        before: (F, C, H, W), D before each pixel's own onset; wanted only with `doubted`.
    """
    denoised = now.denoised.float()
    fill = fill_from_surroundings(denoised, mask)
    x0 = fill + push * (fill - denoised)
    if doubted is not None:
        x0 = torch.where(doubted[:, None], before.float(), x0)
    return renoise(now.x, x0, draw_noise(now.x.shape, seed, now.x.device), mask, now.a, now.b)


def state_replacement(now: Estimate, before: torch.Tensor, mask: torch.Tensor, seed: int) -> torch.Tensor:
    """The paper's first baseline: renoise the clean estimate from before the window, without perturbation."""
    return renoise(now.x, before, draw_noise(now.x.shape, seed, now.x.device), mask, now.a, now.b)


def score_clipping(now: Estimate, clipped: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The paper's second baseline: the estimate whose changes were limited to the threshold, under the run's own noise."""
    eps = (now.x - now.a * now.denoised) / now.b
    return renoise(now.x, clipped, eps, mask, now.a, now.b)


def clip_change(clipped: torch.Tensor, previous: Estimate, current: Estimate, limit: torch.Tensor) -> torch.Tensor:
    """Go on from `clipped` by this step's change of the clean estimate, limited to `limit` (F,) in each pixel."""
    limit = limit.view(-1, 1, 1, 1).nan_to_num(torch.inf)
    return clipped + (current.denoised.float() - previous.denoised.float()).clamp(-limit, limit)
