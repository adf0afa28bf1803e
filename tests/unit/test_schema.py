"""The contract with saved workflows, ComfyUI and the registry: what nodes look like, and how the pack is packed."""

import ast
import asyncio
import inspect
import math
import re
import sys
from fnmatch import fnmatch

import artifact_guard
import comfy.samplers
import folder_paths
import nodes as core_nodes
import pytest
from artifact_guard.nodes import NODES
from artifact_guard.nodes.fam.lora_state import run_names

from tests.contract import NODES as CONTRACT
from tests.contract import SAMPLERS, SCHEDULERS, TRAINING_RUNS, Input, Listed
from tests.harness.pack import ROOT

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF

BY_ID = {node.GET_SCHEMA().node_id: node for node in NODES}
each_node = pytest.mark.parametrize("node", BY_ID.values(), ids=BY_ID)


def described(value) -> Input:
    """An input of a schema in the form of the contract."""
    kind = list(value.options) if value.get_io_type() == "COMBO" else value.get_io_type()
    return Input(value.id, kind, getattr(value, "default", None), bool(value.optional))


def listed(kind):
    """What the contract's choices are here and now; a type as it is."""
    if not isinstance(kind, Listed):
        return kind
    if kind == TRAINING_RUNS:
        return run_names()
    core = {SAMPLERS: comfy.samplers.KSampler.SAMPLERS, SCHEDULERS: comfy.samplers.KSampler.SCHEDULERS}
    return core[kind] if kind in core else folder_paths.get_filename_list(kind.what)


def test_the_pack_has_these_nodes_and_no_others():
    """ComfyUI gets every node of the contract from comfy_entrypoint, which a NODE_CLASS_MAPPINGS would switch off."""
    listed = asyncio.run(asyncio.run(artifact_guard.comfy_entrypoint()).get_node_list())
    assert listed == NODES and len(BY_ID) == len(NODES)
    assert set(BY_ID) == set(CONTRACT)
    assert not hasattr(artifact_guard, "NODE_CLASS_MAPPINGS")
    assert not set(BY_ID) & set(core_nodes.NODE_CLASS_MAPPINGS), "core's ids win a collision"


@each_node
def test_sockets_and_widgets_are_the_contract(node):
    """Ids, types, order, defaults and choices of everything a saved workflow refers to."""
    schema, wanted = node.GET_SCHEMA(), CONTRACT[node.GET_SCHEMA().node_id]
    assert (schema.display_name, schema.category, schema.is_output_node) == (
        wanted.display_name, wanted.category, wanted.output_node
    )
    assert [described(i) for i in schema.inputs] == [i._replace(kind=listed(i.kind)) for i in wanted.inputs]
    assert [(o.id, o.get_io_type()) for o in schema.outputs] == wanted.outputs


@each_node
def test_execute_takes_the_inputs(node):
    """execute's parameters are the schema's inputs, optional ones with default None and last."""
    parameters = list(inspect.signature(node.execute).parameters.values())
    inputs = node.GET_SCHEMA().inputs
    assert [p.name for p in parameters] == [i.id for i in inputs]
    assert [p.default for p in parameters] == [None if i.optional else p.empty for i, p in zip(inputs, parameters)]
    assert sorted(inputs, key=lambda i: i.optional) == inputs


@each_node
def test_everything_is_explained(node):
    """A one-line description, search aliases, and a tooltip and a name on every input and output."""
    schema = node.GET_SCHEMA()
    assert re.fullmatch(r"[A-Z][^\n]{20,140}\.", schema.description)
    assert schema.search_aliases and len(set(schema.search_aliases)) == len(schema.search_aliases)
    unexplained = [v.id for v in [*schema.inputs, *schema.outputs] if not (v.tooltip or "").strip().endswith(".")]
    assert not unexplained
    assert [o.display_name for o in schema.outputs] == [o.id for o in schema.outputs]


@each_node
def test_defaults_lie_in_their_ranges(node):
    """A number's default is one its own widget accepts; seeds reach as far as core's."""
    for widget in node.GET_SCHEMA().inputs:
        if widget.get_io_type() in ("INT", "FLOAT"):
            assert widget.min <= widget.default <= widget.max, widget.id
        if "seed" in widget.id:
            assert (widget.min, widget.max) == (0, LARGEST_SEED)


PUBLISHED_LENGTHS = {"blur": 1 / 128, "min_width": 5 / 256, "dilate": 5 / 256}


@each_node
def test_the_page_leaves_defaults_and_ends_as_they_are(node):
    """The page keeps as many decimals of a number as its widget's step has, once somebody touches it or an API file is loaded."""
    for widget in node.GET_SCHEMA().inputs:
        if widget.get_io_type() == "FLOAT":
            decimals = max(0, -math.floor(math.log10(widget.step)))
            ends = [widget.min, widget.max] if widget.id in PUBLISHED_LENGTHS else [widget.default, widget.min, widget.max]
            assert [round(value, decimals) for value in ends] == ends, widget.id


def test_published_lengths_come_back_from_the_page():
    """Whole pixels of 256 have more decimals than a person wants to turn: what the page makes of such a default is the default."""
    inputs = {i.id: i.default for i in BY_ID["ASCEDOptions"].GET_SCHEMA().inputs}
    assert {name: inputs[name] for name in PUBLISHED_LENGTHS} == PUBLISHED_LENGTHS
    rounded = {name: round(value, 3) for name, value in PUBLISHED_LENGTHS.items()}
    (meant,) = BY_ID["ASCEDOptions"].execute(**inputs).result
    assert BY_ID["ASCEDOptions"].execute(**inputs | rounded).result == (meant,)
    (other,) = BY_ID["ASCEDOptions"].execute(**inputs | {"blur": 0.009, "dilate": 0.0, "min_width": 0.021}).result
    assert (other.blur, other.dilate, other.min_width) == (0.009, 0.0, 0.021)


def test_a_trained_highlighter_is_not_trained_anew_at_every_run():
    """Its seed is followed by a control in saved graphs, which must stay; it does not begin with another seed each time."""
    (seed,) = (i for i in BY_ID["FAMTrainFlawHighlighter"].GET_SCHEMA().inputs if i.id == "seed")
    assert seed.control_after_generate == "fixed"


def test_flags():
    """Two guards never share a cached report."""
    assert BY_ID["ASCEDGuard"].GET_SCHEMA().not_idempotent
    assert BY_ID["TemporalAlignmentGuidance"].GET_SCHEMA().not_idempotent


def test_the_sampler_node_begins_like_cores():
    """Everything core's KSampler asks for, in its order, with its defaults and limits."""
    wanted = core_nodes.KSampler.INPUT_TYPES()["required"]
    ours = {i.id: i for i in BY_ID["ASCEDKSampler"].GET_SCHEMA().inputs}
    assert list(ours)[: len(wanted)] == list(wanted)
    for name, (kind, settings) in wanted.items():
        assert ours[name].get_io_type() == ("COMBO" if isinstance(kind, list) else kind)
        for limit in {"default", "min", "max", "step", "round"} & set(settings):
            assert getattr(ours[name], limit) == settings[limit], (name, limit)


# How it is packed

SOURCES = sorted(path for folder in ("nodes", "kernels") for path in (ROOT / folder).rglob("*.py"))
SHARED = {"torch", "numpy", "PIL", "kornia", "safetensors"}
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "latent_preview", "nodes", "folder_paths", "server"}


def imports(path):
    """(module, level) of every import statement of a file, those inside functions too."""
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            yield from ((alias.name, 0) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield statement.module or "", statement.level


@pytest.mark.parametrize("path", SOURCES, ids=[path.relative_to(ROOT).as_posix() for path in SOURCES])
def test_imports(path):
    """Our modules by relative imports within the pack, others from a short list; kernels know nothing of ComfyUI.

    Triton is imported by the files that only the dispatcher imports, and by it alone.
    """
    folders = path.relative_to(ROOT).parts[:-1]
    kernel, form = folders[0] == "kernels", path.stem.endswith("_triton")
    allowed = SHARED | sys.stdlib_module_names | (set() if kernel else COMFYUI) | ({"triton"} if form else set())
    for module, level in imports(path):
        assert not module.endswith("_triton"), f"{module}: to be imported by the dispatcher, when it is chosen"
        if level == 0:
            assert module.split(".")[0] in allowed, module
            assert not module.startswith("nodes."), f"{module}: `nodes` is ComfyUI's module here"
        else:
            assert level <= (len(folders) if kernel else len(folders) + 1), f"{module}: leaves its part of the pack"


def test_requirements_equal_the_projects_dependencies():
    """Manager installs requirements.txt, the registry shows pyproject's list: they have to be the same."""
    listed = re.search(r"^dependencies = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(ast.literal_eval(listed[1])) == sorted(line for line in lines if line and not line.startswith("#"))


def test_what_the_registry_gets():
    """.comfyignore keeps tests and developers' tools out, and nothing that users need."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()

    def ignored(name):
        return any(fnmatch(name, line.strip("/")) for line in lines)

    needed = "__init__.py nodes kernels web workflows pyproject.toml requirements.txt README.md LICENSE".split()
    assert all(map(ignored, ("tests", "dev.py", ".ci", "output")))
    assert not [name for name in needed if ignored(name)]
