"""TAG in a real ComfyUI server: the template runs, the shipped predictor is offered, training saves a loadable file."""

import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from tests.harness.client import ExecutionFailed
from tests.harness.graph import graph_to_prompt
from tests.harness.quickstart import WORKFLOW, find, pictures, upstream, with_inputs

pytestmark = pytest.mark.server

SHIPPED = "demo_fashion_mnist.safetensors"
LONG = 100_000
VAE_OUTPUT = 1
"""Of the demo model's loader."""


@pytest.fixture(scope="module")
def workflow(object_info) -> dict:
    """workflows/tag.json as a prompt, with two pictures."""
    text = (WORKFLOW.parent / "tag.json").read_text(encoding="utf-8")
    return with_inputs(graph_to_prompt(json.loads(text), object_info), "EmptyChromaRadianceLatentImage", batch_size=2)


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def summary(prompt: dict, entry: dict) -> dict:
    (text,) = entry["outputs"][find(prompt, "PreviewAny")]["text"]
    return json.loads(text)


def test_template_guides_and_measures(comfy_server, workflow):
    entry = comfy_server.run(workflow)
    without, guided, curve = (pictures(comfy_server, workflow, entry, role) for role in ("tag_without", "tag_with", "tag_curve"))
    assert len(without) == len(guided) == 2 and len(curve) == 1
    assert not any(np.array_equal(pixels(a), pixels(b)) for a, b in zip(without, guided))
    told = summary(workflow, entry)
    steps = workflow[find(workflow, "BasicScheduler")]["inputs"]["steps"]
    assert told["status"] == "guided" and told["estimate_of_time"] == "time predictor" and len(told["steps"]) == steps
    assert 0 < told["time_gap"] < 200


def test_strength_0_makes_both_rows_equal(comfy_server, workflow):
    still = with_inputs(workflow, "TemporalAlignmentGuidance", strength=0.0)
    entry = comfy_server.run(still)
    one, other = ([pixels(p) for p in pictures(comfy_server, still, entry, role)] for role in ("tag_without", "tag_with"))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert summary(still, entry)["status"] == "measured only"


def test_the_shipped_predictor_is_offered(object_info):
    told, options = object_info["TAGLoadTimePredictor"]["input"]["required"]["name"]
    assert SHIPPED in (told if isinstance(told, list) else options["options"])


def training(workflow: dict, **settings) -> dict:
    """A graph that trains on the template's own pictures and saves the result."""
    bare = next(i for i, node in workflow.items() if node["class_type"] == "SamplerCustom")
    part = with_inputs(upstream(workflow, bare), "EmptyChromaRadianceLatentImage", batch_size=4)
    part = with_inputs(part, "BasicScheduler", steps=2)
    model = find(part, "ArtifactGuardDemoModel")
    widgets = {"steps": 2, "batch_size": 2, "learning_rate": 1e-4, "seed": 0} | settings
    part["train"] = {"class_type": "TAGTrainTimePredictor", "inputs": {"model": [model, 0], "latents": [bare, 0], **widgets}}
    part["save"] = {
        "class_type": "TAGSaveTimePredictor", "inputs": {"time_predictor": ["train", 0], "filename_prefix": "tests/mine"}}
    return part


def test_training_saves_a_predictor_that_loads(comfy_server, workflow):
    comfy_server.run(training(workflow))
    folder = comfy_server.base_directory / "models" / "time_predictors" / "tests"
    (path,) = folder.glob("mine_*.safetensors")
    prompt = with_inputs(workflow, "TAGLoadTimePredictor", name=f"tests/{path.name}")
    assert summary(prompt, comfy_server.run(prompt))["estimate_of_time"] == "time predictor"
    path.unlink()


def test_a_folder_of_pictures_trains(comfy_server, workflow):
    """Core's loader gives a list, VAE Encode a latent for each: together they are what is trained on."""
    folder = comfy_server.base_directory / "input" / "tag_training"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        Image.fromarray(np.full((32, 32, 3), 40 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    prompt = training(workflow)
    demo = find(prompt, "ArtifactGuardDemoModel")
    prompt["folder"] = {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": folder.name}}
    prompt["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["folder", 0], "vae": [demo, VAE_OUTPUT]}}
    prompt["train"]["inputs"]["latents"] = ["encode", 0]
    comfy_server.run(prompt)
    assert "2 steps, 2 in all; held-out time gap" in comfy_server.log()
    (path,) = (comfy_server.base_directory / "models" / "time_predictors" / "tests").glob("mine_*.safetensors")
    path.unlink()


def test_cancelled_training_goes_on_to_save(comfy_server, workflow):
    """Cancel in the page: training stops, what was learned is saved."""
    folder = comfy_server.base_directory / "models" / "time_predictors" / "tests"
    for seconds in (6, 20, 60):  # on a busy machine the first step may take its time; cancelled before it is an error
        waiting = comfy_server.queue(training(workflow, steps=LONG))
        time.sleep(seconds)
        comfy_server.interrupt()
        entry = comfy_server.wait(waiting)
        if entry["status"]["status_str"] == "success":
            break
    assert entry["status"]["status_str"] == "success"
    assert re.search(rf"Cancelled after \d+ of {LONG} steps; what was learned is kept", comfy_server.log())
    (path,) = folder.glob("mine_*.safetensors")
    path.unlink()


@pytest.mark.parametrize("kind, inputs, message", [
    ("TAGSaveTimePredictor", {"filename_prefix": "../out"}, "no name inside models/time_predictors"),
    ("EmptyChromaRadianceLatentImage", {"batch_size": 1}, "At least two are wanted"),
])
def test_bad_input_is_told_at_the_node(comfy_server, workflow, kind, inputs, message):
    with pytest.raises(ExecutionFailed, match=message):
        comfy_server.run(with_inputs(training(workflow, seed=5), kind, **inputs))
