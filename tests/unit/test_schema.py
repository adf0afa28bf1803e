"""The contract with saved workflows, ComfyUI and the registry: what nodes look like, and how the pack is packed."""

import ast
import asyncio
import inspect
import re
import sys
from fnmatch import fnmatch

import artifact_guard
import comfy.samplers
import folder_paths
import nodes as core_nodes
import pytest
from artifact_guard.nodes import NODES

from tests.harness.pack import ROOT

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
MODES = ["correct", "detect only"]
CLOTHES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FILES = "the files of this models folder at the moment: "
TIME_PREDICTORS = FILES + "time_predictors"
FLAW_HIGHLIGHTERS = FILES + "flaw_highlighters"
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
OPTIONAL = "optional"

# Node id: display name, folder, inputs (id, type, default or choices), outputs (id, type). A change here breaks workflows
# that people saved.
CONTRACT = {
    "ASCEDGuard": (
        "ASCED Artifact Guard", "ASCED",
        [("model", "MODEL"), ("mode", "COMBO", MODES, "correct"), ("sensitivity", "FLOAT", 1.0),
         ("strength", "FLOAT", 1.0), ("window", "COMBO", ["auto", "manual"], "auto"), ("detect_from", "FLOAT", 0.1),
         ("correct_at", "FLOAT", 0.4), ("options", "ASCED_OPTIONS", OPTIONAL), ("region", "MASK", OPTIONAL)],
        [("model", "MODEL"), ("report", "ARTIFACT_REPORT")],
    ),
    "ASCEDOptions": (
        "ASCED Options", "ASCED",
        [("detector", "COMBO", ["clean estimate", "weighted score", "score dynamics"], "score dynamics"),
         ("correction", "COMBO", ["targeted", "state replacement", "score clipping", "surroundings"], "surroundings"),
         ("reverse_step", "INT", 1), ("blur", "FLOAT", 2 / 256), ("min_area", "FLOAT", 0.0015),
         ("max_area", "FLOAT", 0.15), ("min_width", "FLOAT", 5 / 256), ("dilate", "FLOAT", 5 / 256),
         ("rounds", "INT", 1), ("noise_seed", "INT", 0), ("keep_unguarded", "BOOLEAN", OPTIONAL)],
        [("options", "ASCED_OPTIONS")],
    ),
    "ASCEDKSampler": (
        "KSampler (ASCED)", "ASCED",
        [("model", "MODEL"), ("seed", "INT", 0), ("steps", "INT", 20), ("cfg", "FLOAT", 8.0),
         ("sampler_name", "COMBO", SAMPLERS, None), ("scheduler", "COMBO", SCHEDULERS, None),
         ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent_image", "LATENT"),
         ("denoise", "FLOAT", 1.0), ("mode", "COMBO", MODES, "correct"), ("sensitivity", "FLOAT", 1.0),
         ("strength", "FLOAT", 1.0), ("options", "ASCED_OPTIONS", OPTIONAL)],
        [("latent", "LATENT"), ("artifact_mask", "MASK"), ("report", "ARTIFACT_REPORT")],
    ),
    "ASCEDReport": (
        "ASCED Report", "ASCED",
        [("report", "ARTIFACT_REPORT"), ("latent", "LATENT"), ("image", "IMAGE", OPTIONAL)],
        [("artifact_mask", "MASK"), ("overlay", "IMAGE"), ("curves", "IMAGE"), ("artifact_fraction", "FLOAT"),
         ("summary", "STRING")],
    ),
    "ASCEDUnguarded": (
        "ASCED Unguarded Result", "ASCED",
        [("report", "ARTIFACT_REPORT"), ("latent", "LATENT")],
        [("latent", "LATENT")],
    ),
    "FAMTrainFlawHighlighter": (
        "Train Flaw Highlighter (FAM)", "FAM",
        [("real", "IMAGE"), ("generated", "IMAGE"), ("epochs", "INT", 10), ("batch_size", "INT", 64),
         ("learning_rate", "FLOAT", 2e-5), ("image_size", "INT", 256), ("seed", "INT", 0),
         ("backbone", "COMBO", ["vgg16", "small"], "vgg16"), ("flaw_highlighter", "FLAW_HIGHLIGHTER", OPTIONAL)],
        [("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("curves", "IMAGE"), ("accuracy", "FLOAT")],
    ),
    "FAMSaveFlawHighlighter": (
        "Save Flaw Highlighter", "FAM",
        [("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("filename_prefix", "STRING", "highlighter")], [],
    ),
    "FAMLoadFlawHighlighter": (
        "Load Flaw Highlighter", "FAM", [("name", "COMBO", FLAW_HIGHLIGHTERS, None)],
        [("flaw_highlighter", "FLAW_HIGHLIGHTER")],
    ),
    "FAMFlawMap": (
        "Flaw Map (FAM)", "FAM",
        [("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("image", "IMAGE"),
         ("reduce", "COMBO", ["each image", "batch mean"], "each image")],
        [("flaw_map", "MASK"), ("overlay", "IMAGE"), ("generated_probability", "FLOAT")],
    ),
    "FAMAttentionPatch": (
        "Flaw Attention Patch (FAM)", "FAM",
        [("model", "MODEL"), ("flaw_map", "MASK"), ("strength", "FLOAT", 0.025),
         ("target", "COMBO", ["key and value", "key", "value"], "key and value"), ("start_percent", "FLOAT", 0.0),
         ("end_percent", "FLOAT", 1.0), ("blocks", "STRING", "")],
        [("model", "MODEL")],
    ),
    "FAMNoise": (
        "Flaw Noise (FAM)", "FAM", [("noise", "NOISE"), ("flaw_map", "MASK"), ("strength", "FLOAT", 0.01)],
        [("noise", "NOISE")],
    ),
    "FAMRefine": (
        "Refine Flaws (FAM)", "FAM",
        [("model", "MODEL"), ("vae", "VAE"), ("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("positive", "CONDITIONING"),
         ("negative", "CONDITIONING"), ("latent", "LATENT"), ("seed", "INT", 0), ("steps", "INT", 20),
         ("cfg", "FLOAT", 8.0), ("sampler_name", "COMBO", SAMPLERS, None), ("scheduler", "COMBO", SCHEDULERS, None),
         ("denoise", "FLOAT", 0.35), ("rounds", "INT", 1), ("attention_strength", "FLOAT", 0.025),
         ("noise_strength", "FLOAT", 0.0), ("threshold", "FLOAT", 0.5),
         ("start_from", "COMBO", OPTIONAL), ("grow", "FLOAT", OPTIONAL)],
        [("latent", "LATENT"), ("flaw_map", "MASK"), ("probabilities", "STRING")],
    ),
    "FAMTrainLoRA": (
        "Train Flaw-aware LoRA (FAM)", "FAM",
        [("model", "MODEL"), ("vae", "VAE"), ("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("latents", "LATENT"),
         ("positive", "CONDITIONING"), ("steps", "INT", 1000), ("base_fraction", "FLOAT", 0.5), ("map_every", "INT", 100),
         ("attention_strength", "FLOAT", 0.025), ("noise_strength", "FLOAT", 0.01), ("rank", "INT", 8),
         ("learning_rate", "FLOAT", 5e-4), ("batch_size", "INT", 1), ("seed", "INT", 0), ("negative", "CONDITIONING", OPTIONAL),
         ("map_images", "INT", OPTIONAL), ("map_steps", "INT", OPTIONAL), ("map_cfg", "FLOAT", OPTIONAL),
         ("training_dtype", "COMBO", OPTIONAL), ("gradient_checkpointing", "BOOLEAN", OPTIONAL), ("save_every", "INT", OPTIONAL),
         ("resume", "COMBO", OPTIONAL)],
        [("lora", "LORA_MODEL"), ("curves", "IMAGE"), ("flaw_map", "MASK")],
    ),
    "TAGTrainTimePredictor": (
        "Train Time Predictor (TAG)", "TAG",
        [("model", "MODEL"), ("latents", "LATENT"), ("steps", "INT", 3000), ("batch_size", "INT", 128),
         ("learning_rate", "FLOAT", 1e-4), ("seed", "INT", 0), ("conditioning", "CONDITIONING", OPTIONAL),
         ("time_predictor", "TIME_PREDICTOR", OPTIONAL)],
        [("time_predictor", "TIME_PREDICTOR"), ("loss_curve", "IMAGE"), ("time_gap", "FLOAT")],
    ),
    "TAGSaveTimePredictor": (
        "Save Time Predictor", "TAG",
        [("time_predictor", "TIME_PREDICTOR"), ("filename_prefix", "STRING", "time_predictor")], [],
    ),
    "TAGLoadTimePredictor": (
        "Load Time Predictor", "TAG", [("name", "COMBO", TIME_PREDICTORS, None)],
        [("time_predictor", "TIME_PREDICTOR")],
    ),
    "TemporalAlignmentGuidance": (
        "Temporal Alignment Guidance (TAG)", "TAG",
        [("model", "MODEL"), ("strength", "FLOAT", 1.0), ("mode", "COMBO", ["relative", "score", "shift"], "relative"),
         ("start_percent", "FLOAT", 0.0), ("end_percent", "FLOAT", 1.0),
         ("time_predictor", "TIME_PREDICTOR", OPTIONAL), ("estimate", "COMBO", OPTIONAL), ("ask_at", "COMBO", OPTIONAL)],
        [("model", "MODEL"), ("report", "TIME_GAP_REPORT")],
    ),
    "TAGTimeGap": (
        "Time Gap (TAG)", "TAG", [("report", "TIME_GAP_REPORT"), ("latent", "LATENT")],
        [("time_gap", "FLOAT"), ("curve", "IMAGE"), ("summary", "STRING")],
    ),
    "ArtifactGuard": (
        "Artifact Guard (all in one)", "",
        [("model", "MODEL"), ("strength", "FLOAT", 1.0), ("use_asced", "BOOLEAN", True), ("use_tag", "BOOLEAN", True),
         ("time_predictor", "TIME_PREDICTOR", OPTIONAL), ("flaw_map", "MASK", OPTIONAL)],
        [("model", "MODEL"), ("artifacts", "ARTIFACT_REPORT"), ("time_gaps", "TIME_GAP_REPORT")],
    ),
    "ArtifactGuardDemoModel": ("Load Demo Model", "Demo", [], [("model", "MODEL"), ("vae", "VAE")]),
    "ArtifactGuardDemoCondition": (
        "Demo Class", "Demo", [("label", "COMBO", CLOTHES, "t-shirt")],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
    ),
}

BY_ID = {node.GET_SCHEMA().node_id: node for node in NODES}
each_node = pytest.mark.parametrize("node", BY_ID.values(), ids=BY_ID)


def described(value):
    """An input or output of a schema in the form of CONTRACT."""
    entry = (value.id, value.get_io_type())
    if getattr(value, "optional", False):
        return (*entry, OPTIONAL)
    if entry[1] == "COMBO":
        return (*entry, list(value.options), value.default)
    return entry if getattr(value, "default", None) is None else (*entry, value.default)


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
    schema = node.GET_SCHEMA()
    name, folder, inputs, outputs = CONTRACT[schema.node_id]
    assert (schema.display_name, schema.category) == (name, f"Artifact Guard/{folder}".rstrip("/"))
    inputs = [
        tuple(folder_paths.get_filename_list(f[len(FILES):]) if str(f).startswith(FILES) else f for f in i) for i in inputs
    ]
    assert [described(i) for i in schema.inputs] == inputs
    assert [(o.id, o.get_io_type()) for o in schema.outputs] == outputs


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


def test_flags():
    """Two guards never share a cached report, and the report node runs without anything behind it."""
    assert BY_ID["ASCEDGuard"].GET_SCHEMA().not_idempotent
    assert BY_ID["TemporalAlignmentGuidance"].GET_SCHEMA().not_idempotent
    outputs = {name for name, node in BY_ID.items() if node.GET_SCHEMA().is_output_node}
    assert outputs == {"ASCEDReport", "TAGSaveTimePredictor", "TAGTimeGap", "FAMSaveFlawHighlighter"}


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
