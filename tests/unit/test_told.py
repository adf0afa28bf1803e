"""What nodes say on the page: it is sent to the node itself, for ComfyUI draws the text in `ui` for core's nodes alone."""

import os
from types import SimpleNamespace

import pytest
import torch
from artifact_guard.nodes import told
from artifact_guard.nodes.fam.highlighter_schema import FAMSaveFlawHighlighter, FAMTrainFlawHighlighter
from artifact_guard.nodes.tag.schema import TAGSaveTimePredictor
from comfy_api.latest import io

from tests.unit.fam_support import highlighter, images
from tests.unit.tag_support import fresh_predictor, model


@pytest.fixture
def page(monkeypatch):
    """(node id, text) of all that is sent to the page that runs the prompt."""
    sent = []

    def send(text, node_id, page=None):
        assert page == "mine"
        sent.append((node_id, text))

    server = SimpleNamespace(send_progress_text=send, client_id="mine")
    monkeypatch.setattr(told, "PromptServer", SimpleNamespace(instance=server))
    return sent


def execute(node, *inputs):
    """Run a node as ComfyUI does: as a class of its own that knows its id, if it asks for it."""
    known = {io.Hidden.unique_id: "7"} if io.Hidden.unique_id in node.GET_SCHEMA().hidden else {}
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE({"hidden_inputs": known}).execute(*inputs)


def test_told_at_the_node_and_in_the_log(page, caplog):
    caplog.set_level("INFO")
    told.tell("7", "words")
    told.tell(None, "words of no node")
    assert page == [("7", "words")] and "Artifact Guard: words of no node" in caplog.text


def test_saving_tells_name_and_folder(page):
    """The name first: a node shows about two lines. A program is given the path."""
    saved = ((FAMSaveFlawHighlighter, highlighter()), (TAGSaveTimePredictor, fresh_predictor(model())))
    for number, (node, made) in enumerate(saved):
        (path,) = execute(node, made, "unit/told").ui["text"]
        folder, name = os.path.split(path)
        assert os.path.isfile(path) and page[number] == ("7", f"Saved as {name} in {folder}")


def test_a_highlighters_training_tells_accuracy_and_warnings(page):
    words = execute(FAMTrainFlawHighlighter, images(16), images(16, seed=3), 1, 8, 2e-5, 32, 0, "small").ui["text"]
    assert len(words) == 2 and page[-1] == ("7", "\n".join(words))
