"""The pack in a real ComfyUI server: what it offers, that the quickstart runs, and that failures are told in words."""

import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from tests.contract import NODES, Listed
from tests.harness.client import ExecutionFailed
from tests.harness.quickstart import CURVES, REGIONS, WITH, WITHOUT, WORKFLOW
from tests.harness.quickstart import find, pictures, report_summary, save_node, upstream, with_inputs
from tests.harness.server import PACK_NAME


pytestmark = pytest.mark.server

READY = "To see the GUI go to"
LONG = 2000
TEMPLATE_PICTURE_BYTES = 150_000


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def test_pack_loads_quietly(comfy_server):
    deadline = time.monotonic() + 60
    while READY not in comfy_server.log() and time.monotonic() < deadline:
        time.sleep(0.2)
    start, ready, _ = comfy_server.log().partition(READY)
    assert ready
    assert "Traceback" not in start
    assert "IMPORT FAILED" not in start
    # Not the bare name: the environment's own path has it too, and torchvision warns with that path.
    ours = [line for line in start.splitlines() if f"custom_nodes/{PACK_NAME}" in line.replace("\\", "/")]
    assert any(re.search(r"[\d.]+ seconds:.*custom_nodes", line) for line in ours), "the pack is not in the import list"
    assert not [line for line in ours if re.search("warning|error|unable|cannot", line, re.IGNORECASE)]


def test_pack_offers_the_nodes_of_the_contract(object_info):
    assert {i for i, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"} == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_node_is_as_contracted(object_info, node_id):
    info, expected = object_info[node_id], NODES[node_id]
    assert (info["display_name"], info["category"], info["output_node"]) == (
        expected.display_name,
        expected.category,
        expected.output_node,
    )
    for group, optional in (("required", False), ("optional", True)):
        wanted = [i for i in expected.inputs if i.optional == optional]
        assert info["input_order"].get(group, []) == [i.name for i in wanted]
        for name, kind, default, _ in wanted:
            told, options = info["input"][group][name]
            assert told == (kind if isinstance(kind, str) else "COMBO"), name
            assert not isinstance(kind, list) or options["options"] == kind, name
            assert isinstance(kind, Listed) or options.get("default") == default, name
            assert options.get("tooltip"), f"{name} has no tooltip"
    assert list(zip(info["output_name"], info["output"])) == expected.outputs
    assert all(info["output_tooltips"])
    assert info["description"] and "\n" not in info["description"]
    assert info["search_aliases"]


def test_sampler_begins_with_all_that_core_has(object_info):
    core, ours = object_info["KSampler"], object_info["ASCEDKSampler"]
    names = core["input_order"]["required"]
    assert ours["input_order"]["required"][: len(names)] == names
    for name in ("sampler_name", "scheduler"):
        options = core["input"]["required"][name]
        core_names = options[0] if isinstance(options[0], list) else options[1]["options"]
        assert ours["input"]["required"][name][1]["options"] == core_names


def test_quickstart_makes_all_pictures(quickstart_run, quickstart):
    count = quickstart[find(quickstart, "EmptyChromaRadianceLatentImage")]["inputs"]["batch_size"]
    made = quickstart_run.pictures
    counts = {WITHOUT: count, WITH: count, REGIONS: count, CURVES: 1}
    assert {role: len(found) for role, found in made.items()} == counts
    assert all(pixels(picture).shape == (256, 256, 3) for role in (WITHOUT, WITH, REGIONS) for picture in made[role])
    summary = quickstart_run.summary
    assert summary["status"] == "guarded", summary["reason"]
    assert len(summary["images"]) == count
    assert summary["model_calls"] == summary["window"]["steps"] + summary["restarts"]


def test_settings_and_verdicts_are_in_the_saved_picture(comfy_server, quickstart):
    """Written by the report, which runs before the picture is decoded where it is not given the picture."""
    report = find(quickstart, "ASCEDReport")
    inputs = {name: value for name, value in quickstart[report]["inputs"].items() if name != "image"}
    prompt = quickstart | {report: quickstart[report] | {"inputs": inputs}}
    prompt = upstream(prompt, save_node(prompt, WITH)) | upstream(prompt, find(prompt, "PreviewAny"))
    prompt = with_inputs(prompt, "PrimitiveInt", value=77)  # a seed of its own: pictures that are known are not saved again
    entry = comfy_server.wait(comfy_server.queue(prompt, extra_data={"extra_pnginfo": {}}), 600)
    for picture in pictures(comfy_server, prompt, entry, WITH):
        (run,) = json.loads(Image.open(io.BytesIO(picture)).info["artifact_guard"])
        assert run["status"] == "guarded" and run["settings"]["sensitivity"] == prompt[find(prompt, "ASCEDGuard")]["inputs"]["sensitivity"]
        assert [image["verdict"] for image in run["images"]] == [image["verdict"] for image in report_summary(prompt, entry)["images"]]


def largest_region(image: dict) -> float:
    return max((region["area"] for region in image["regions"]), default=0.0)


def test_pictures_without_findings_are_equal_bit_for_bit(comfy_server, object_info, quickstart, quickstart_run):
    # A batch in which only some pictures are repaired: regions below the middle of the largest ones do not count.
    areas = sorted(map(largest_region, quickstart_run.summary["images"]))
    prompt = with_inputs(quickstart, "ASCEDGuard", options=["options", 0])
    widgets = object_info["ASCEDOptions"]["input"]["required"]
    settings = {name: options["default"] for name, (_, options) in widgets.items()}
    settings["min_area"] = (areas[0] + areas[-1]) / 2
    prompt["options"] = {"class_type": "ASCEDOptions", "inputs": settings}
    entry = comfy_server.run(prompt)
    images = report_summary(prompt, entry)["images"]
    assert {image["verdict"] for image in images} == {"clean", "artifacts"}
    without = map(pixels, quickstart_run.pictures[WITHOUT])
    guarded = map(pixels, pictures(comfy_server, prompt, entry, WITH))
    for image, bare, repaired in zip(images, without, guarded, strict=True):
        assert image["verdict"] == "artifacts" or image["repaired_fraction"] == 0
        assert (image["repaired_fraction"] == 0) == np.array_equal(bare, repaired)  # a repair may have been put back
    assert any(image["repaired_fraction"] > 0 for image in images)


def test_interrupted_guard_leaves_nothing_behind(comfy_server, quickstart):
    # The seed comes over a link first and as a plain value later: for the server that is another sampler run, while
    # the guard keeps its inputs and is the very one that was interrupted.
    small = upstream(quickstart, save_node(quickstart, WITH))
    small = with_inputs(small, "EmptyChromaRadianceLatentImage", batch_size=2)
    small = with_inputs(small, "KSampler", steps=6)
    sampler, guard = find(small, "KSampler"), find(small, "ASCEDGuard")
    source = small[sampler]["inputs"]["seed"]
    before = pictures(comfy_server, small, comfy_server.run(small), WITH)

    long = comfy_server.queue(with_inputs(small, "KSampler", steps=LONG))
    deadline = time.monotonic() + 300
    while not re.search(rf"\b[1-9]\d*/{LONG}\b", comfy_server.log()):
        assert time.monotonic() < deadline, "the long run did not begin to sample"
        time.sleep(0.2)
    comfy_server.interrupt()
    status = comfy_server.wait(long)["status"]
    assert "execution_interrupted" in [kind for kind, _ in status["messages"]]

    again = with_inputs(small, "KSampler", seed=small[source[0]]["inputs"]["value"])
    entry = comfy_server.run(again)
    cached = next(details["nodes"] for kind, details in entry["status"]["messages"] if kind == "execution_cached")
    assert guard in cached and sampler not in cached
    after = pictures(comfy_server, again, entry, WITH)
    assert len(after) == len(before) == 2
    for one, other in zip(before, after):
        assert np.array_equal(pixels(one), pixels(other))


def test_window_that_ends_before_it_begins_is_refused_at_the_guard(comfy_server, quickstart):
    prompt = with_inputs(quickstart, "ASCEDGuard", window="manual", detect_from=0.5, correct_at=0.4)
    prompt = upstream(prompt, save_node(prompt, WITH))
    with pytest.raises(ExecutionFailed, match="detect_from is 0.5 and correct_at 0.4: .* Lower detect_from") as failure:
        comfy_server.run(prompt)
    assert failure.value.details["node_type"] == "ASCEDGuard"


def test_report_read_before_sampling_says_so(comfy_server, quickstart):
    report = find(quickstart, "ASCEDReport")
    empty = find(quickstart, "EmptyChromaRadianceLatentImage")
    prompt = json.loads(json.dumps(quickstart))
    prompt[report]["inputs"] = {"report": prompt[report]["inputs"]["report"], "latent": [empty, 0]}
    # A setting of its own, so that this guard has no earlier run in the cache.
    prompt = with_inputs(upstream(prompt, report), "ASCEDGuard", sensitivity=1.23)
    with pytest.raises(ExecutionFailed, match="not sampled yet. Connect `latent`") as failure:
        comfy_server.run(prompt)
    assert failure.value.details["node_type"] == "ASCEDReport"


WORKFLOWS = sorted(WORKFLOW.parent.glob("*.json"))


def test_templates_are_listed(comfy_server):
    listed = comfy_server.get_json("/workflow_templates")[PACK_NAME]
    assert sorted(listed) == [path.stem for path in WORKFLOWS]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_template_is_served(comfy_server, workflow):
    address = f"/api/workflow_templates/{PACK_NAME}/{workflow.stem}"
    assert comfy_server.get_json(address + ".json") == json.loads(workflow.read_text(encoding="utf-8"))
    picture = comfy_server.request(address + ".jpg")
    assert len(picture) <= TEMPLATE_PICTURE_BYTES
    assert Image.open(io.BytesIO(picture)).format == "JPEG"


@pytest.mark.parametrize("node_id", NODES)
def test_help_page_is_where_the_page_looks_for_it(comfy_server, node_id):
    folder = f"/extensions/{PACK_NAME}/docs/"
    text = comfy_server.request(f"{folder}{node_id}.md").decode()
    assert text.startswith(f"# {NODES[node_id].display_name}\n")
    for name, *_ in NODES[node_id].inputs + NODES[node_id].outputs:
        assert f"`{name}`" in text, f"{name} is not explained"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert Image.open(io.BytesIO(comfy_server.request(folder + picture))).size
