"""The real page in a real browser: the quickstart loads without a complaint, runs, and shows its pictures."""

import itertools
import json
import os
import shutil
import time

import pytest

from tests.harness.quickstart import WORKFLOW

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
READY = "() => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types.SaveImage)"
PAGE_SECONDS, RUN_SECONDS = 180, 900

NODES = """() => app.graph.nodes.map(node => ({
    id: Number(node.id), type: node.type, title: node.title, registered: node.type in LiteGraph.registered_node_types,
    box: [...node.boundingRect], images: node.imgs?.length ?? 0,
    text: node.widgets?.map(widget => String(widget.value)).join("\\n") ?? "",
}))"""
GROUPS = "() => app.graph.groups.map(group => ({title: group.title, box: [...group.boundingRect]}))"
DROP_FILE = """text => app.handleFile(new File([text], "quickstart.json", {type: "application/json"}))"""
FIT = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"


def missing(reason: str):
    """In CI a browser that is missing must not look like a test that passed."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        missing("no chromium, chromium-browser or google-chrome on this machine's PATH")
    try:
        import playwright.sync_api as playwright
    except ImportError:
        missing("the package playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, comfy_server):
    # A first visit would open the template browser over the graph.
    comfy_server.request("/settings", {"Comfy.TutorialCompleted": True})
    page = browser.new_page(viewport={"width": 2560, "height": 1440})
    page.set_default_timeout(PAGE_SECONDS * 1000)
    page.goto(comfy_server.address, wait_until="domcontentloaded")
    page.wait_for_function(READY)
    yield page
    page.close()


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes (x, y, width, height) share an area."""
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def inside(box: list[float], around: list[float]) -> bool:
    return all(around[i] <= box[i] and box[i] + box[i + 2] <= around[i] + around[i + 2] for i in (0, 1))


def run_to_the_end(page, server) -> dict:
    """Presses Run, in effect, and gives the history entry of what it started."""
    before = set(server.get_json("/history"))
    # What queuePrompt returns differs between versions of the page; the errors it keeps do not.
    assert not page.evaluate("async () => { await app.queuePrompt(0); return app.lastNodeErrors }")
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        for prompt_id, entry in server.get_json("/history").items():
            if prompt_id not in before:
                return entry
        time.sleep(0.5)
    raise TimeoutError(f"the workflow did not end within {RUN_SECONDS} s")


def open_workflow(page, path, screenshot) -> tuple[dict, list[dict], list[dict]]:
    """Drops a workflow's file on the page: (what is in the file, the nodes and the groups that are there then).

    Nothing complains, every node is known, and none lies on another.
    """
    text = path.read_text(encoding="utf-8")
    saved = json.loads(text)
    page.evaluate(DROP_FILE, text)
    page.wait_for_function(f"() => app.graph.nodes.length === {len(saved['nodes'])}")
    page.evaluate(FIT)
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshot)
    print(f"screenshot: {screenshot}")
    dialogs = page.locator("[role=dialog]:visible")
    assert dialogs.count() == 0, dialogs.all_inner_texts()

    nodes, groups = page.evaluate(NODES), page.evaluate(GROUPS)
    assert [node["type"] for node in nodes if not node["registered"]] == []
    for one, other in itertools.combinations(nodes, 2):
        assert not overlap(one["box"], other["box"]), f"{one['title']} overlaps {other['title']}"
    return saved, nodes, groups


@pytest.mark.parametrize("path", sorted(WORKFLOW.parent.glob("*.json")), ids=lambda path: path.stem)
def test_every_template_opens(path, page, tmp_path):
    _, nodes, groups = open_workflow(page, path, tmp_path / f"{path.stem}.png")
    for node, group in itertools.product(nodes, groups):
        assert not overlap(node["box"], group["box"]) or inside(node["box"], group["box"]), node["title"]
    assert path.with_suffix(".jpg").is_file()


def test_quickstart_in_the_page(page, comfy_server, tmp_path):
    saved, nodes, groups = open_workflow(page, WORKFLOW, tmp_path / "opened.png")
    assert [group["title"] for group in groups] == ["Without the guard", "With the guard"]
    for node, group in itertools.product(nodes, groups):
        assert not overlap(node["box"], group["box"]) or inside(node["box"], group["box"]), node["title"]

    # Another seed than the file's: other tests run that one on the same server, and a cached run tells less.
    page.evaluate("() => { app.graph.nodes.find(node => node.type === 'PrimitiveInt').widgets[0].value += 1 }")
    entry = run_to_the_end(page, comfy_server)
    assert entry["status"]["status_str"] == "success", entry["status"]
    showing = {node["id"] for node in saved["nodes"] if node["type"] in ("SaveImage", "ASCEDReport")}
    page.wait_for_function(
        "ids => ids.every(id => app.graph.getNodeById(id).imgs?.length > 0)", arg=sorted(showing)
    )
    nodes = page.evaluate(NODES)
    assert {node["id"] for node in nodes if node["images"]} == showing
    assert [node["type"] for node in nodes if '"verdict"' in node["text"]] == ["PreviewAny"]
    page.evaluate(FIT)
    page.wait_for_timeout(1000)
    screenshot = tmp_path / "quickstart.png"
    page.screenshot(path=screenshot)
    print(f"screenshot: {screenshot}")


def test_saving_shows_the_path_at_the_node(page, comfy_server):
    """The page draws the text in a node's `ui` for core's nodes alone: it has to be sent to the node."""
    built = """() => {
        app.graph.clear();
        for (const what of [["FAMLoadFlawHighlighter", "FAMSaveFlawHighlighter"], ["TAGLoadTimePredictor", "TAGSaveTimePredictor"]]) {
            const [from, to] = what.map(type => LiteGraph.createNode(type));
            app.graph.add(from); app.graph.add(to); from.connect(0, to, 0);
            to.widgets.find(widget => widget.name === "filename_prefix").value = "browser/shown";
        }
    }"""
    for _ in range(20):  # a page that starts slowly puts its first workflow over ours
        page.evaluate(built)
        page.wait_for_timeout(1000)
        if page.evaluate("() => app.graph.nodes.filter(node => /^(FAM|TAG)/.test(node.type)).length") == 4:
            break
    entry = run_to_the_end(page, comfy_server)
    assert entry["status"]["status_str"] == "success", entry["status"]
    page.wait_for_timeout(1000)
    for kind in ("FAMSaveFlawHighlighter", "TAGSaveTimePredictor"):
        shown = next(node["text"] for node in page.evaluate(NODES) if node["type"] == kind)
        assert "Saved as " in shown and "shown_00001_.safetensors" in shown, shown
