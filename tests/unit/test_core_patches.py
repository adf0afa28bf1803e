"""Guard and guidance beside core's own model patches: caches, guidance, attention, schedules, windows of a video."""

import pytest
import torch
from artifact_guard.nodes.asced.guard import guard_model
from artifact_guard.nodes.asced.options import GuardSettings
from artifact_guard.nodes.tag.guidance import guide_model
from artifact_guard.nodes.tag.settings import TagSettings
from comfy.patcher_extension import WrappersMP
from comfy_extras import (
    nodes_apg, nodes_cfg, nodes_context_windows, nodes_differential_diffusion, nodes_easycache, nodes_eps, nodes_freelunch, nodes_fresca,
    nodes_hypertile, nodes_mahiro, nodes_model_advanced, nodes_model_downscale, nodes_nag, nodes_pag, nodes_sag, nodes_tcfg, nodes_tomesd,
)

from tests.small_models import sample, small_model
from tests.unit.trapped_models import EVERYTHING, SQUARE, STEPS, TRAP_AT, trapped


def core(node, **changed):
    """What a core node makes of a model, with its widgets as they stand."""
    def patch(model):
        widgets = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        return node.execute(model, **{**widgets, **changed})[0]

    return patch


PATCHES = {
    "APG": core(nodes_apg.APG),
    "CFGNorm": core(nodes_cfg.CFGNorm),
    "CFGZeroStar": core(nodes_cfg.CFGZeroStar),
    "Epsilon Scaling": core(nodes_eps.EpsilonScaling),
    "FreSca": core(nodes_fresca.FreSca),
    "FreeU_V2": core(nodes_freelunch.FreeU_V2),
    "HyperTile": core(nodes_hypertile.HyperTile),
    "Mahiro": core(nodes_mahiro.Mahiro),
    "NAGuidance": core(nodes_nag.NAGuidance),
    "PatchModelAddDownscale": core(
        nodes_model_downscale.PatchModelAddDownscale, block_number=1, downscale_method="bicubic", upscale_method="bicubic"
    ),
    "PerturbedAttentionGuidance": core(nodes_pag.PerturbedAttentionGuidance),
    "RescaleCFG": lambda model: nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0],
    "SelfAttentionGuidance": core(nodes_sag.SelfAttentionGuidance),
    "TCFG": core(nodes_tcfg.TCFG),
    "TemporalScoreRescaling": core(nodes_eps.TemporalScoreRescaling),
    "TomePatchModel": core(nodes_tomesd.TomePatchModel),
    "zero terminal SNR": lambda model: nodes_model_advanced.ModelSamplingDiscrete().patch(model, "v_prediction", True)[0],
}
CACHES = {"EasyCache": core(nodes_easycache.EasyCacheNode), "LazyCache": core(nodes_easycache.LazyCacheNode)}
ORDERS = ("before it", "after it")


def both(order, patch, ours, model):
    """(model, report) with core's patch before or after what `ours` makes of a model."""
    if order == "before it":
        return ours(patch(model))
    patched, report = ours(model)
    return patch(patched), report


def watched(model):
    """A model that is guarded and measured, and changed by neither; both reports."""
    model, report = guard_model(model, GuardSettings(sensitivity=0.01))
    model, gaps = guide_model(model, TagSettings(strength=0.0))
    return model, (report, gaps)


def repaired(model):
    return guard_model(model, GuardSettings())


@pytest.mark.parametrize("name", PATCHES)
def test_beside_a_core_patch(name):
    """Whether core's patch comes first or last: idle, guard and guidance change no bit; an artifact is found and repaired."""
    small, patch = small_model("sd15"), PATCHES[name]
    bare = sample(small, patch(small.model), steps=STEPS)
    for order in ORDERS:
        idle, (report, gaps) = both(order, patch, watched, small.model)
        assert torch.equal(sample(small, idle, steps=STEPS), bare)
        assert report.runs[0].reason is None and len(report.runs) == len(gaps.runs) == 1
        guarded, report = both(order, patch, repaired, small.model)
        output = sample(small, trapped(guarded), steps=STEPS)
        (record,) = report.runs
        assert record.reason is None and record.restarts == 1 and torch.isfinite(output).all()
        assert record.regions[0][SQUARE].float().mean() > 0.9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_repaired_sample_is_not_answered_from_a_cache(cache, order):
    """EasyCache and LazyCache answer from an earlier sample where the new one hardly differs; of a repaired one they know nothing,
    so that after a restart the network itself is asked, twice, until there is again something to compare with."""
    small = small_model("sd15")
    questions, runs = [], []  # (sigma, whether the network ran)

    def watch_question(executor, x, timestep, *args, **kwargs):
        before = len(runs)
        answer = executor(x, timestep, *args, **kwargs)
        questions.append((float(timestep.flatten()[0]), len(runs) > before))
        return answer

    watched = small.model.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", watch_question)
    guarded, report = both(order, CACHES[cache], lambda model: guard_model(model, GuardSettings(options=EVERYTHING)), watched)
    hook = small.model.model.diffusion_model.out.register_forward_hook(lambda *_: runs.append(1))
    try:
        output = sample(small, trapped(guarded, at=TRAP_AT), steps=20)
    finally:
        hook.remove()
    assert report.runs[0].restarts == 1 and torch.isfinite(output).all()
    sigmas, asked = zip(*questions)
    again = next(n for n in range(1, len(sigmas)) if sigmas[n] == sigmas[n - 1])
    assert not all(asked[:again]) or not all(asked[again:]), "the cache is at work"
    assert all(asked[again : again + 2])


def test_beside_the_context_windows_of_a_video():
    """A model that sees five frames at a time: the guard sees all nine, finds the artifact where it is and repairs it there alone."""
    small = small_model("wan")
    windows = core(
        nodes_context_windows.ContextWindowsManualNode, context_length=5, context_overlap=2, dim=2, context_schedule="standard_uniform"
    )
    latent = small.latent(frames=9)
    bare = sample(small, windows(small.model), latent, steps=STEPS)
    assert not torch.equal(bare, sample(small, latent=latent, steps=STEPS)), "the windows are at work"
    for order in ORDERS:
        idle, _ = both(order, windows, watched, small.model)
        assert torch.equal(sample(small, idle, latent, steps=STEPS), bare)
        guarded, report = both(order, windows, repaired, small.model)
        output = sample(small, trapped(guarded, frames=slice(6, 8)), latent, steps=STEPS)
        (record,) = report.runs
        found = record.regions[(..., *SQUARE)].flatten(1).float().mean(1)
        assert record.reason is None and record.restarts == 1 and torch.isfinite(output).all()
        assert (found[6:8] > 0.9).all() and (found[:5] == 0).all()
        guided, gaps = both(order, windows, lambda model: guide_model(model, TagSettings()), small.model)
        assert torch.isfinite(sample(small, guided, latent, steps=STEPS)).all() and len(gaps.runs) == 1


def test_beside_differential_diffusion():
    """A mask that says when each pixel begins to change: what it never lets change stays as it was, and is never repaired."""
    small, patch = small_model("sd15"), core(nodes_differential_diffusion.DifferentialDiffusion)
    latent = small.latent(batch=2)
    latent["samples"] = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    latent["noise_mask"] = torch.linspace(0, 1, 16).expand(2, 1, 16, 16).clone()
    bare = sample(small, patch(small.model), latent, steps=STEPS)
    for order in ORDERS:
        idle, _ = both(order, patch, watched, small.model)
        assert torch.equal(sample(small, idle, latent, steps=STEPS), bare)
        guarded, report = both(order, patch, repaired, small.model)
        output = sample(small, trapped(guarded), latent, steps=STEPS)
        (record,) = report.runs
        assert record.reason is None and record.restarts == 1 and torch.isfinite(output).all()
        assert record.repaired[0][SQUARE].any() and not record.repaired[..., 0].any()
        torch.testing.assert_close(output[..., 0], latent["samples"][..., 0])
