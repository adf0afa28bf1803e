"""Flaw-aware training in a real ComfyUI server: the template trains, core loads and saves the LoRA, errors are told."""

import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from tests.harness.client import ExecutionFailed
from tests.harness.graph import graph_to_prompt
from tests.harness.quickstart import WORKFLOW, find, pictures, upstream, with_inputs

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def workflow(object_info) -> dict:
    """workflows/fam_lora.json as a prompt, shortened: fewer images and steps, a higher learning rate."""
    text = (WORKFLOW.parent / "fam_lora.json").read_text(encoding="utf-8")
    prompt = graph_to_prompt(json.loads(text), object_info)
    prompt = with_inputs(prompt, "EmptyChromaRadianceLatentImage", batch_size=4)
    prompt = with_inputs(prompt, "EmptyImage", batch_size=4)
    prompt = with_inputs(prompt, "KSampler", steps=6)
    return with_inputs(
        prompt, "FAMTrainLoRA", steps=30, map_every=10, batch_size=2, map_images=2, map_steps=4, learning_rate=5e-3
    )


def colours(client, workflow, entry, role: str) -> np.ndarray:
    """Mean red, green and blue of the pictures of a role."""
    found = [np.asarray(Image.open(io.BytesIO(picture))).reshape(-1, 3) for picture in pictures(client, workflow, entry, role)]
    return np.concatenate(found).mean(axis=0)


def test_template_trains_and_the_lora_acts(comfy_server, workflow):
    """Grey bags become orange by core's loader; curves and the map come out; core saves the LoRA; the run has a file."""
    entry = comfy_server.run(workflow, 240)
    grey, orange = (colours(comfy_server, workflow, entry, role) for role in ("fam_lora_without", "fam_lora_with"))
    assert abs(grey[0] - grey[2]) < 20 < orange[0] - orange[2]
    (curves,), (flaw_map,) = (pictures(comfy_server, workflow, entry, role) for role in ("fam_lora_curves", "fam_lora_map"))
    assert Image.open(io.BytesIO(curves)).size == (768, 520)
    assert Image.open(io.BytesIO(flaw_map)).size == (256, 256)
    base = comfy_server.base_directory
    assert len(list((base / "output" / "loras").glob("orange_bags_120_steps_*_.safetensors"))) == 1
    assert len(list((base / "models" / "fam_training").glob("fam_lora_*_.safetensors"))) == 1
    log = comfy_server.log()
    assert "30 steps of about" in log and "New flaw map at step 15" in log and "Done after 30 of 30 steps" in log


def test_errors_are_told_in_words_at_the_node(comfy_server, workflow):
    train = find(workflow, "FAMTrainLoRA")
    prompt = with_inputs(upstream(workflow, train), "FAMTrainLoRA", rank=["none", 0])  # a widget itself stops at 1
    prompt["none"] = {"class_type": "PrimitiveInt", "inputs": {"value": 0}}
    prompt["show"] = {"class_type": "PreviewImage", "inputs": {"images": [train, 1]}}
    with pytest.raises(ExecutionFailed, match="rank is 0; a whole number of 1 or more") as failure:
        comfy_server.run(prompt)
    assert failure.value.details["node_type"] == "FAMTrainLoRA"


def test_run_after_cancel_trains_again(comfy_server, workflow):
    """ComfyUI keeps what a cancelled node gave; the next Run must not be answered from there."""
    train = find(workflow, "FAMTrainLoRA")
    prompt = with_inputs(upstream(workflow, train), "FAMTrainLoRA", steps=15, base_fraction=1.0, seed=5)
    prompt["show"] = {"class_type": "PreviewImage", "inputs": {"images": [train, 1]}}

    def wait_for(words: str) -> None:
        for _ in range(600):
            if words in comfy_server.log():
                return
            time.sleep(0.1)
        raise AssertionError(f"{words!r} did not come")

    first = comfy_server.queue(prompt)
    wait_for("15 steps of about")
    time.sleep(1.0)
    comfy_server.interrupt()
    assert comfy_server.wait(first, 120)["status"]["status_str"] == "success"
    assert "of 15 steps. The run is saved as" in comfy_server.log() and "Done after 15 of 15" not in comfy_server.log()
    comfy_server.run(prompt, 120)
    assert comfy_server.log().count("Done after 15 of 15 steps") == 1
    comfy_server.run(prompt, 120)
    assert comfy_server.log().count("Done after 15 of 15 steps") == 1, "what is done is not done again"
