"""The benchmark of FAM training: its quick step is the node's, its sampler ComfyUI's, and it runs from end to end."""

import itertools
import json
import subprocess
import sys
import time

import comfy.model_management
import comfy.sample
import pytest
import torch
from artifact_guard.nodes.demo import model as demo_model
from artifact_guard.nodes.fam.attention import AttentionSettings, patch_attention
from artifact_guard.nodes.fam.train_steps import TrainSteps
from artifact_guard.nodes.fam.training_data import Draw, LatentData
from comfy_extras.nodes_train import TrainGuider
from safetensors.torch import load_file
from tests.bench import fam_training, fam_training_judge, fam_training_plan, fam_training_runs, fam_training_tables, flaw_aware_demo
from tests.bench.classifier import Classifier
from tests.bench.fam_training_plan import SIZES, VARIANTS, jobs_of
from tests.bench.distances import over_seeds
from tests.bench.fam_training_tables import tables
from tests.bench.fast_demo import FastDemo
from tests.bench.job_queue import JobQueue

from tests.exact.images import shape_images
from tests.unit.fam_lora_support import rough_highlighter

ROUNDING = 1e-3 if comfy.model_management.get_torch_device().type == "cpu" else 3e-2
"""Of gradients and pictures in float32; a GPU's convolutions round to TF32."""
IMAGES, LABELS = shape_images(40, 32, 3, 0), torch.arange(40) % 10


@pytest.fixture
def fast():
    made = FastDemo(demo_model, IMAGES, LABELS, 4, graph=False)
    made.dtype = torch.float32
    return made


def node_step(draw: Draw, flaw_map: torch.Tensor, attention: float, noise: float):
    """(loss, gradients by name) of the node's own step on a draw."""
    model = flaw_aware_demo.trainable_demo(demo_model)
    network = model.model.diffusion_model.requires_grad_(True)
    data = LatentData(IMAGES, flaw_aware_demo.conditions_of(demo_model), LABELS)
    data.draw = lambda batch, seed: draw
    found = []
    steps = TrainSteps(data, lambda step: step, 4, torch.float32, 0, 1, lambda step, loss: found.append(loss), flaw_map, noise)
    guider = TrainGuider(patch_attention(model, flaw_map, AttentionSettings(attention)))
    guider.set_conds([entry for condition in data.conditions for entry in condition])
    with torch.enable_grad():
        guider.sample(torch.ones(4, 3, 32, 32), torch.ones(4, 3, 32, 32), steps, torch.arange(2), seed=0)
    return found[0], {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("attention, noise", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_step_is_the_nodes(fast, attention, noise):
    """Same draw, same map: loss and gradients agree to rounding, and the map does change them."""
    flaw_map = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1))
    fast.draw(3)
    shown = [(IMAGES - image).abs().flatten(1).amax(dim=1).argmin() for image in fast.clean.cpu()]
    conditions = torch.tensor([int(token.argmax()) if token.any() else 10 for token in fast.context[:, 0]])
    times = 1 - fast.timesteps.cpu().double() / 999
    draw = Draw(torch.stack(shown), fast.noise.cpu(), times, conditions)
    loss, gradients = node_step(draw, flaw_map, attention, noise)
    with torch.enable_grad():
        ordinary = fast.loss().item()
        fast.set_map(flaw_map, attention, noise)
        ours = fast.loss()
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=ROUNDING / 100)
    assert (ours.item() != ordinary) == (attention + noise > 0)
    least = 1e-6 * max(gradient.norm() for gradient in gradients.values())  # some vanish but for rounding
    for name, parameter in fast.parameters.items():
        assert (parameter.grad - gradients[name]).norm() <= ROUNDING * gradients[name].norm() + least, name


@pytest.mark.usefixtures("repeatable")
def test_state_goes_on_where_it_was(fast):
    """A state put back gives the same steps bit for bit, maps and all; a map of None is no map."""
    fast.set_map(torch.rand(1, 32, 32), 0.1, 0.1)
    fast.step(1, 1e-3, 0.9)
    kept = {name: value.clone() for name, value in fast.state().items()}
    first = [fast.step(seed, 1e-3, 0.9).item() for seed in (2, 3)]
    after = {name: value.clone() for name, value in fast.state().items()}
    fast.load(kept)
    assert [fast.step(seed, 1e-3, 0.9).item() for seed in (2, 3)] == first
    assert all(torch.equal(value, after[name]) for name, value in fast.state().items())
    assert any(not torch.equal(kept[name], value) for name, value in after.items() if name.startswith("average."))
    fast.set_map(None)
    assert not fast.noise_map.any() and not any(amount.any() for amount in fast.amounts.values())


@pytest.mark.gpu
def test_graph_is_the_step():
    """Captured and launched kernel by kernel, under a map too: the same losses to bfloat16's rounding."""
    losses = []
    for graph in (True, False):
        made = FastDemo(demo_model, IMAGES, LABELS, 8, graph)
        assert (made.graph is not None) == graph
        ordinary = [made.step(seed, 1e-4, 0.9).item() for seed in range(3)]
        made.set_map(torch.ones(1, 32, 32), 0.5, 0.5)
        losses.append(ordinary + [made.step(seed, 1e-4, 0.9).item() for seed in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][0] != pytest.approx(losses[0][3], rel=0.05)


def test_sampler_is_comfyuis(fast):
    """Euler, scheduler normal, CFG 1, same noise: the same pictures to rounding."""
    labels = torch.tensor([0, 3, 9])
    ours = fast.sample(labels, 5, 6)
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5 * 1_000_003))
    tokens = torch.cat([demo_model.class_token(int(label)) for label in labels])
    with torch.no_grad():
        theirs = comfy.sample.sample(
            flaw_aware_demo.trainable_demo(demo_model), noise, 6, 1.0, "euler", "normal", [[tokens, {}]],
            [[demo_model.class_token(None), {}]], torch.zeros_like(noise), disable_pbar=True, seed=0,
        ).clamp(-1, 1).cpu()
    assert (ours - theirs).abs().max() < ROUNDING


def test_a_start_at_the_mean_image(fast):
    """The same noise, the mean of the training images on it: as much brighter or darker as that is."""
    labels, plain = torch.tensor([1, 2]), fast.mean_image
    assert torch.allclose(plain.cpu(), IMAGES.mean(dim=0), atol=1e-5)
    seen = []
    fast.averaged.register_forward_pre_hook(lambda module, given: seen.append(given[0].cpu()))
    fast.sample(labels, 5, 2)
    fast.sample(labels, 5, 2, from_mean=True)
    sigma = float(fast.sampling.sigma_max)
    assert torch.allclose(seen[2] - seen[0], plain.cpu().expand(2, -1, -1, -1) / (sigma**2 + 1) ** 0.5, atol=1e-5)


def test_changed_maps_keep_their_mean():
    flaw_map = torch.rand(1, 8, 8) * 0.3
    for name, change in fam_training_runs.CHANGES.items():
        assert change(flaw_map).mean().item() == pytest.approx(flaw_map.mean().item(), rel=1e-5), name
    assert not torch.equal(fam_training_runs.CHANGES["rolled"](flaw_map), flaw_map)
    inverted = fam_training_runs.CHANGES["inverted"](flaw_map)
    assert inverted.flatten()[flaw_map.argmax()] == 0 and inverted.argmax() == flaw_map.argmin()


def test_interval_over_seeds():
    """Ratios 0.9, 1.0, 1.1: mean of the logarithms -0.0034, deviation 0.1005, 4.303 of its standard errors 0.2496."""
    assert over_seeds([0.9, 1.0, 1.1]) == pytest.approx([0.7765, 1.2792], rel=1e-3)
    assert over_seeds([0.9]) is None


def test_jobs_need_what_comes_before_them():
    jobs = [job.name for job in jobs_of(SIZES["gpu"])]
    assert len(jobs) == len(set(jobs)) == 2 + 5 + 5 * 3 + 3 * (len(VARIANTS) - 3)
    assert all(jobs.index(need) < jobs.index(job.name) for job in jobs_of(SIZES["gpu"]) for need in job.needs)


def test_what_a_dead_worker_began_is_given_up(tmp_path):
    """So that the others neither wait for it nor for what needs it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "base model.claim").write_text(str(ended.pid))
    JobQueue(tmp_path, jobs_of(SIZES["tiny"]), time.time() + 60).work(None)
    assert len(list(tmp_path.glob("*.failed"))) == len(jobs_of(SIZES["tiny"])) and not list(tmp_path.glob("*.json"))


def test_whole_benchmark_from_end_to_end(tmp_path, monkeypatch):
    """All jobs of the tiny size in one go; called again, nothing is done twice; the tables hold every arm and sweep."""
    import artifact_guard

    data = (IMAGES, LABELS), (shape_images(20, 32, 3, 1), torch.arange(20) % 10)
    sweeps = ["forward 0.1", "both, inverted map", "both, split 4:1"]  # one of each kind
    monkeypatch.setattr(fam_training_plan, "SWEEPS", sweeps)
    monkeypatch.setattr(fam_training_tables, "SWEEPS", sweeps)
    monkeypatch.setattr(fam_training_runs, "load_fashion_mnist", lambda folder: data)
    monkeypatch.setattr(fam_training_judge, "trained_classifier", lambda *_, **__: Classifier().eval().requires_grad_(False))
    monkeypatch.setattr(fam_training_runs.Worker, "highlighter", rough_highlighter(size=32))
    options = ["--size", "tiny", "--workers", "0"]
    figures = fam_training.run(artifact_guard, tmp_path, None, options=options)
    assert not figures["left"] and not figures["failed"]
    assert [step for step, _ in figures["base_model"]["FD_by_step"]] == [0, 2, 4]
    assert figures["arms"]["both"]["seeds"] == [0, 1] and len(figures["arms"]["both"]["seeds_interval"]) == 2
    names = ("base", "forward", "reverse", "both", *sweeps)
    assert all(figures["runs"][f"{name} 0"]["loss"] > 0 for name in names)
    judged = [load_file(tmp_path / "fam_training" / "tiny" / f"{name} 0.safetensors")["features"] for name in names]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(judged, 2))
    assert [entry["step"] for entry in figures["runs"]["both 0"]["maps"]] == [2, 4]
    assert figures["runs"]["both, split 4:1 0"]["maps"][0]["step"] == 4
    text = tables(json.loads(json.dumps(figures)))
    assert all(f"| {name} |" in text for name in ("base", "both", *sweeps))
    monkeypatch.setattr(fam_training_runs.Worker, "do", None)
    assert fam_training.run(artifact_guard, tmp_path, None, options=options)["arms"] == figures["arms"]
