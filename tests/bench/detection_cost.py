"""P3: detection by the published rule, ours against numpy + scipy, on the same trajectories and with equal masks.

8 images of 128x128 latents of 4 channels, a window of 10 steps. One thread on both sides; ours also on the GPU.
"""

from pathlib import Path

import numpy as np
import torch

from tests.quality import published

from .timing import in_turns, on_gpu

IMAGES, CHANNELS, SIDE, WINDOW, REPEATS = 8, 4, 128, 10, 15


def trajectories(seed: int) -> list[torch.Tensor]:
    """Clean estimates of the window's steps: pictures that emerge, with patches that jump now and then."""
    random = torch.Generator().manual_seed(seed)
    picture = torch.nn.functional.interpolate(torch.randn(IMAGES, CHANNELS, 16, 16, generator=random), SIDE, mode="bicubic")
    steps = [picture * (1 - 0.8**n) + 0.03 * 0.8**n * torch.randn(picture.shape, generator=random) for n in range(WINDOW)]
    for image in range(0, IMAGES, 2):
        at, top, left, side = (int(torch.randint(low, high, (1,), generator=random)) for low, high in
                               ((3, WINDOW - 2), (0, SIDE - 30), (0, SIDE - 30), (10, 30)))
        for step in steps[at:]:
            step[image, :, top : top + side, left : left + side] += 1.5
    return steps


def run(pack, output: Path, data: Path | None) -> dict:
    from artifact_guard.kernels.score_dynamics import change_maps
    from artifact_guard.nodes.asced.estimate import Estimate
    from artifact_guard.nodes.asced.learned import LearnedDetector
    from artifact_guard.nodes.asced.options import AscedOptions
    from artifact_guard.nodes.asced.published import CleanEstimateDetector

    def detect(kind, steps):
        detector = kind(AscedOptions(), 1.0, SIDE)
        estimates = [Estimate(x, x, 1.0, 8 * 0.85**n) for n, x in enumerate(steps)]
        for previous, current in zip(estimates, estimates[1:]):
            detector.observe(previous, current, None)
            if kind is LearnedDetector:
                detector.accompany(change_maps(current.denoised, previous.denoised)[1])
        return detector.findings().regions

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpu() else "cpu")
    runs = [trajectories(seed) for seed in range(4)]
    moved = [[x.to(device) for x in steps] for steps in runs]
    arrays = [np.stack([x.numpy() for x in steps]) for steps in runs]
    differing = sum(
        int((detect(CleanEstimateDetector, steps).cpu().numpy() != published.detect(array)).sum())
        for steps, array in zip(moved, arrays)
    )
    flagged = sum(int(published.detect(array).sum()) for array in arrays)
    told = in_turns({
        "numpy + scipy": lambda n: published.detect(arrays[n % 4]),
        "published rule, ours": lambda n: detect(CleanEstimateDetector, moved[n % 4]),
        "default detector": lambda n: detect(LearnedDetector, moved[n % 4]),
    }, REPEATS, "numpy + scipy")
    torch.set_num_threads(threads)
    return {
        "pixels_flagged": flagged, "pixels_that_differ": differing, "cases": told,
        "times_faster": round(1 / told["published rule, ours"]["ratio"], 2),
    }
