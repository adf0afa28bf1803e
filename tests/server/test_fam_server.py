"""FAM in a real ComfyUI server: the template runs, the shipped highlighter is offered, training saves a loadable file."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.harness.client import ExecutionFailed
from tests.harness.graph import graph_to_prompt
from tests.harness.quickstart import WORKFLOW, find, pictures, upstream, with_inputs

pytestmark = pytest.mark.server

SHIPPED = "demo_clothes.safetensors"


@pytest.fixture(scope="module")
def workflow(object_info) -> dict:
    """workflows/fam.json as a prompt, with four pictures and fewer steps and rounds, which tell as much here."""
    text = (WORKFLOW.parent / "fam.json").read_text(encoding="utf-8")
    prompt = graph_to_prompt(json.loads(text), object_info)
    prompt = with_inputs(prompt, "EmptyChromaRadianceLatentImage", batch_size=4)
    return with_inputs(with_inputs(prompt, "KSampler", steps=6), "FAMRefine", steps=8, rounds=2)


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def test_template_shows_and_refines(comfy_server, workflow):
    """All pictures come out, and outside the regions the refined ones are the flawed ones."""
    entry = comfy_server.run(workflow)
    made = {role: [pixels(p) for p in pictures(comfy_server, workflow, entry, role)] for role in
            ("fam_flawed", "fam_maps", "fam_refined")}
    assert all(len(found) == 4 and found[0].shape == (256, 256, 3) for found in made.values())
    (text,) = entry["outputs"][find(workflow, "PreviewAny")]["text"]
    images = json.loads(text)["images"]
    assert [image["sample"] for image in images] == [0, 1, 2, 3]
    assert all(0 <= image["after"] <= image["before"] <= 1 for image in images)
    for image, flawed, refined in zip(images, made["fam_flawed"], made["fam_refined"]):
        kept = any(tried["kept"] for tried in image["rounds"])
        assert np.array_equal(flawed, refined) != kept
        assert (flawed == refined).all(axis=2).mean() > 0.3


def test_the_shipped_highlighter_is_offered(object_info):
    told, options = object_info["FAMLoadFlawHighlighter"]["input"]["required"]["name"]
    assert SHIPPED in (told if isinstance(told, list) else options["options"])


def small_training(workflow: dict, **settings) -> dict:
    """A graph that trains on the template's own pictures, sound against flawed, and saves the result."""
    flawed = find(workflow, "ImageCompositeMasked")
    decode = workflow[flawed]["inputs"]["destination"][0]
    part = with_inputs(upstream(workflow, flawed), "EmptyChromaRadianceLatentImage", batch_size=10)
    part = with_inputs(part, "KSampler", steps=3)
    widgets = {"epochs": 1, "batch_size": 4, "learning_rate": 2e-5, "image_size": 32, "seed": 0, "backbone": "small"}
    part["train"] = {
        "class_type": "FAMTrainFlawHighlighter",
        "inputs": {"real": [decode, 0], "generated": [flawed, 0], **widgets, **settings},
    }
    part["save"] = {
        "class_type": "FAMSaveFlawHighlighter",
        "inputs": {"flaw_highlighter": ["train", 0], "filename_prefix": "server/test"},
    }
    return part


def test_trained_saved_and_loaded(comfy_server, workflow):
    entry = comfy_server.run(small_training(workflow))
    (path,) = entry["outputs"]["save"]["text"]
    assert path.endswith("test_00001_.safetensors")
    assert "Held-out accuracy" in entry["outputs"]["train"]["text"][0]
    told, options = comfy_server.object_info()["FAMLoadFlawHighlighter"]["input"]["required"]["name"]
    name = next(n for n in (told if isinstance(told, list) else options["options"]) if "test_00001_" in n)
    prompt = with_inputs(workflow, "FAMLoadFlawHighlighter", name=name)
    maps = next(i for i, node in prompt.items() if node["inputs"].get("filename_prefix") == "artifact_guard/fam_maps")
    prompt = upstream(prompt, maps)
    assert len(pictures(comfy_server, prompt, comfy_server.run(prompt), "fam_maps")) == 4


def test_errors_are_told_in_words_at_the_node(comfy_server, workflow):
    prompt = small_training(workflow, epochs=1)
    prompt = with_inputs(prompt, "EmptyChromaRadianceLatentImage", batch_size=2)
    with pytest.raises(ExecutionFailed, match="real: 2 images came; at least 8 of each class") as failure:
        comfy_server.run(prompt)
    assert failure.value.details["node_type"] == "FAMTrainFlawHighlighter"
