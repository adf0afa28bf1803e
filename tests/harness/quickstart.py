"""Reads workflows/quickstart.json and what a run of it leaves: shared by the demo and the tests."""

import json
from pathlib import Path

from .client import ComfyClient
from .graph import graph_to_prompt

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "quickstart.json"

# The last part of the prefix each SaveImage of the workflow saves under.
WITHOUT, WITH, REGIONS, CURVES = "without", "with", "regions", "curves"
ROLES = (WITHOUT, WITH, REGIONS, CURVES)


def quickstart_prompt(object_info: dict) -> dict:
    """The workflow as an API-format prompt."""
    return graph_to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), object_info)


def find(prompt: dict, kind: str) -> str:
    """The id of the one node of this type."""
    (node_id,) = (node_id for node_id, node in prompt.items() if node["class_type"] == kind)
    return node_id


def save_node(prompt: dict, role: str) -> str:
    """The id of the SaveImage whose pictures have this role."""
    saves = {i: node["inputs"]["filename_prefix"] for i, node in prompt.items() if node["class_type"] == "SaveImage"}
    (node_id,) = (node_id for node_id, prefix in saves.items() if prefix.rsplit("/", 1)[-1] == role)
    return node_id


def upstream(prompt: dict, node_id: str) -> dict:
    """The part of a prompt that one node needs: itself and everything its inputs come from."""
    part, waiting = {}, [node_id]
    while waiting:
        current = waiting.pop()
        if current not in part:
            part[current] = prompt[current]
            waiting += [value[0] for value in prompt[current]["inputs"].values() if isinstance(value, list)]
    return part


def with_inputs(prompt: dict, kind: str, **values) -> dict:
    """A copy of the prompt in which every node of this type has these inputs."""
    return {
        node_id: {**node, "inputs": {**node["inputs"], **values}} if node["class_type"] == kind else node
        for node_id, node in prompt.items()
    }


def pictures(client: ComfyClient, prompt: dict, entry: dict, role: str) -> list[bytes]:
    """The files a finished run saved in this role, in the order of the batch."""
    return [client.view(reference) for reference in entry["outputs"][save_node(prompt, role)]["images"]]


def report_summary(prompt: dict, entry: dict) -> dict:
    """The guard's report of a finished run, from the node that shows it as text."""
    (text,) = entry["outputs"][find(prompt, "PreviewAny")]["text"]
    return json.loads(text)
