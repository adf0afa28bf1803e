"""The guard on small models of the real architectures: image and video, every sampler, schedule, size and dtype."""

import importlib.util
import inspect
import math

import comfy.samplers
import pytest
import torch
from artifact_guard.nodes.asced.guard import guard_model
from artifact_guard.nodes.asced.options import GuardSettings
from comfy_api.latest import io
from comfy_extras import nodes_custom_sampler as custom

from tests.exact.images import shape_images
from tests.exact.model import exact_model
from tests.exact.model import sample as sample_exact
from tests.small_models import sample, small_model
from tests.unit.trapped_models import EVERYTHING, SQUARE, STEPS, TRAP_AT, guarded_run, trapped

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "wan", "qwen_image", "lumina2")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_artifact_is_found_and_repaired_in_its_sample_alone(family):
    small = small_model(family)
    latent = small.latent(batch=2, frames=3 if small.frames else None)
    model = trapped(small.model)
    bare = sample(small, model, latent, steps=STEPS)
    output, record = guarded_run(model, small, latent=latent, settings={"sensitivity": 0.5})
    frames = record.layout.frames_per_sample
    regions = record.regions.unflatten(0, (2, frames))
    assert record.reason is None and record.restarts == 1
    assert regions[0][..., SQUARE[0], SQUARE[1]].float().mean() > 0.9, "the square is found"
    repaired = record.repaired.unflatten(0, (2, frames))
    assert repaired[0][..., SQUARE[0], SQUARE[1]].all() and torch.isfinite(output).all()
    if not regions[1].any():  # nothing found in the batch-mate: it goes on as if it were alone
        torch.testing.assert_close(output[1], bare[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_guard_that_finds_nothing_changes_no_bit(family):
    small = small_model(family)
    bare = sample(small, steps=STEPS)
    output, record = guarded_run(small.model, small, settings={"sensitivity": 0.01})
    assert torch.equal(output, bare) and record.reason is None and record.restarts == 0 and not record.regions.any()


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_every_sampler_of_core(sampler):
    """Either the run is guarded and repaired, or the report says why it could not be; it always ends, and finite."""
    small = small_model("sd15")
    latent = small.latent()
    output, record = guarded_run(trapped(small.model, amplitude=20.0), small, latent=latent, sampler=sampler)
    assert torch.isfinite(output).all()
    unguarded = sampler in ("lcm_upscale", "ar_video")
    assert record.restarts == (0 if record.reason else 1), record.reason
    assert bool(record.reason) <= unguarded, record.reason


def sampler_nodes() -> list:
    """Core's nodes that give a SAMPLER, but for the one that picks it by name, as the test above does, and that of causal
    videos, which takes no other models."""
    found = []
    for name in ("custom_sampler", "advanced_samplers", "ar_video", "void"):
        if importlib.util.find_spec(f"comfy_extras.nodes_{name}"):
            module = importlib.import_module(f"comfy_extras.nodes_{name}")
            nodes = [x for x in vars(module).values() if inspect.isclass(x) and issubclass(x, io.ComfyNode) and x is not io.ComfyNode]
            found += [node for node in nodes if [x.io_type for x in node.GET_SCHEMA().outputs] == ["SAMPLER"]]
    return [node for node in found if node.__name__ not in ("KSamplerSelect", "SamplerARVideo")]


@pytest.mark.parametrize("node", sampler_nodes(), ids=lambda node: node.__name__)
def test_every_sampler_node_of_core(node):
    """As above, for the SAMPLER that each node makes with its defaults, under SamplerCustom."""
    small = small_model("sd15")
    model = trapped(small.model, amplitude=20.0)
    given = {x.id: x.options[0] if x.io_type == "COMBO" else getattr(x, "default", model) for x in node.GET_SCHEMA().inputs}
    guarded, report = guard_model(model, GuardSettings(options=EVERYTHING))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    with torch.inference_mode():
        output = custom.SamplerCustom.execute(
            guarded, True, 3, 4.0, small.conditioning(1), small.conditioning(2), node.execute(**given)[0], sigmas, small.latent()
        )[0]
    record = report.find(output)
    assert torch.isfinite(output["samples"]).all()
    assert record.restarts == (0 if record.reason else 1), record.reason
    assert bool(record.reason) <= (node.__name__ in ("SamplerLCMUpscale", "VOIDSampler")), record.reason


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_every_schedule(family, scheduler):
    """Wherever a schedule leaves three steps to see the artifact by, the window holds them and it is repaired."""
    small = small_model(family)
    _, record = guarded_run(trapped(small.model), small, scheduler=scheduler, steps=16)
    assert record.reason is None
    ratios = [ratio for ratio in record.ratios if math.isfinite(ratio)]
    visible = ratios[0] > TRAP_AT and sum(1.6 <= ratio <= TRAP_AT for ratio in ratios) >= 3
    if visible:
        assert record.restarts == 1
        assert record.regions[0][SQUARE].float().mean() > 0.9
        assert 1.6 <= record.ratios[record.window.correct_at] < TRAP_AT


def test_schedules_that_show_the_artifact():
    """The condition above holds for the schedules people use: it does not excuse them all."""
    shown = []
    for family in ("sd15", "flux"):
        small = small_model(family)
        for scheduler in ("simple", "beta", "normal", "sgm_uniform"):
            _, record = guarded_run(trapped(small.model), small, scheduler=scheduler, steps=16)
            shown.append(record.restarts)
    assert shown == [1] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_half_precision(family, dtype):
    small = small_model(family)
    small.model.model.to(dtype)
    small.model.model.diffusion_model.dtype = dtype
    small.model.model.manual_cast_dtype = None
    small.model.model.model_config.set_inference_dtype(dtype, None)
    output, record = guarded_run(trapped(small.model), small)
    assert record.reason is None and record.restarts == 1 and torch.isfinite(output).all()
    assert record.regions[0][SQUARE].float().mean() > 0.9


@pytest.mark.parametrize("size", [(17, 30), (64, 96), (128, 128), (256, 256)])
def test_sizes_up_to_a_2048_pixel_image(size):
    """Lengths and areas follow the size: the same share of the image is found at every one."""
    height, width = size
    square = (slice(height // 4, height // 2), slice(width // 4, width // 2))
    model = exact_model(shape_images(12, max(size), seed=3)[..., :height, :width])
    guarded, report = guard_model(trapped(model, amplitude=10.0, square=square), GuardSettings())
    with torch.inference_mode():
        output = sample_exact(guarded, "euler", "simple", steps=STEPS, latent=(1, 3, height, width))
    record = report.find({"samples": output})
    assert output.shape[-2:] == size and record.restarts == 1
    assert record.regions[0][square].float().mean() > 0.9 and record.regions[0].float().mean() < 0.15


def test_a_region_of_a_video_is_followed_through_its_frames():
    """Strong in one frame, weak in the next: the region does not flicker out; far frames stay untouched."""
    from artifact_guard.nodes.asced.dynamics import support_in_time
    from artifact_guard.kernels.regions import grow_from

    peak = torch.zeros(2, 5, 12, 12)
    peak[0, 1:4, 3:6, 3:6] = 0.8
    peak[0, 2, 4, 4] = 1.2
    peak[1] = 0.8  # the other video is weak everywhere and strong nowhere
    flat = peak.flatten(0, 1)
    found = grow_from(support_in_time(flat > 1.0, 5), flat > 0.5).unflatten(0, (2, 5))
    assert found[0, 1:4, 3:6, 3:6].all() and not found[0, [0, 4]].any() and not found[1].any()
    assert not grow_from(flat > 1.0, flat > 0.5).unflatten(0, (2, 5))[0, 1].any(), "without it the region flickers"


def test_video_frames_are_judged_each_by_itself():
    small = small_model("wan")
    latent = small.latent(batch=1, frames=5)
    output, record = guarded_run(trapped(small.model, frames=slice(2, 3)), small, latent=latent)
    assert record.layout.frames_per_sample == 5 and record.restarts == 1 and torch.isfinite(output).all()
    assert record.regions[2][SQUARE].float().mean() > 0.9 and not record.regions[[0, 4]][(..., *SQUARE)].all()
