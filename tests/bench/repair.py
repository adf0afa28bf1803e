"""Q2: repair of attractor traps on the exact denoiser, every correction beside the others on the same runs.

A trap has a weight of 0.1, so that a fair redraw escapes it; counted are the samples whose unguarded run fell into
theirs. Repaired: the region is again as probable under the clean mixture as in clean runs (their first percentile).
Harmed: the sample was clean in the unguarded run and is not any more. The masks come from the guard's own detection,
and once from the truth, which shows the repair by itself.
"""

from pathlib import Path
from unittest import mock

import torch

from ..exact.denoiser import ExactDenoiser
from ..exact.model import exact_model
from ..exact.truth import fell, repaired
from .exact_runs import data_sets, guarded_run, trapped_batch

TRAP_WEIGHT = 0.1
SEEDS = range(12)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


def cases(pack) -> dict:
    """Name -> settings of every correction that is compared."""
    options = pack.nodes.asced.options

    def guard(strength=1.0, **finer):
        return options.GuardSettings(strength=strength, options=options.AscedOptions(**finer))

    cases = {f"targeted, strength {strength}": guard(strength or 1e-9) for strength in GAMMAS}
    cases["targeted, reverse_step 3"] = guard(reverse_step=3)
    for correction in ("state replacement", "score clipping"):
        cases[correction] = guard(correction=correction)
    return cases


def run(pack, output: Path, data: Path | None) -> dict:
    watch = pack.nodes.asced.watch
    figures = {}
    for data_name, images in data_sets(data).items():
        denoiser = ExactDenoiser(images, 0.05)
        for parameterization in ("eps", "flow"):
            counts: dict = {}
            detect_only = pack.nodes.asced.options.GuardSettings(mode="detect only")
            clean = torch.cat([
                guarded_run(pack, exact_model(images, parameterization), detect_only, 10_000 + s).result for s in range(8)
            ])
            for seed in SEEDS:
                traps, truth = trapped_batch("attractor", "held out", seed, images, weight=TRAP_WEIGHT)
                model = exact_model(images, parameterization, traps=traps)
                unguarded = guarded_run(pack, model, detect_only, seed)
                fallen = fell(traps[0], denoiser, unguarded.result)
                sound = repaired(denoiser, unguarded.result, truth, clean)
                for name, settings in cases(pack).items():
                    for masks in ("found", "true"):
                        # The truth stands in for detection where fallen: the same restart, only its mask differs.
                        known = mock.patch.object(watch, "keep_regions", lambda *_: truth & fallen[:, None, None])
                        with known if masks == "true" else mock.patch.object(watch, "keep_regions", watch.keep_regions):
                            result = guarded_run(pack, model, settings, seed).result
                        good = repaired(denoiser, result, truth, clean)
                        row = counts.setdefault((name, masks), [0, 0, 0, 0])
                        row[0] += int((good & fallen).sum())
                        row[1] += int(fallen.sum())
                        row[2] += int((~good & sound).sum())
                        row[3] += int(sound.sum())
            for (name, masks), (good, fallen_count, harmed, sound_count) in counts.items():
                figures.setdefault(f"{data_name}, {parameterization}", {})[f"{name}, {masks} masks"] = {
                    "repaired": good / max(1, fallen_count), "fallen": fallen_count,
                    "harmed": harmed / max(1, sound_count),
                }
    return figures
