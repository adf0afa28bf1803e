"""The node contract by hand: ids, sockets, types, order, defaults and choices that workflows people saved depend on.

Written out, not read from the pack: a change here is a change of what users have saved. The unit tests hold the schemas to it,
the server tests what a running ComfyUI tells the page.
"""

from typing import NamedTuple


class Listed(NamedTuple):
    """Choices that somebody else lists: core, or the files of a models folder at the moment."""

    what: str


class Input(NamedTuple):
    """kind: the type of a socket or widget, or the choices of a combo. default: None if there is none."""

    name: str
    kind: str | list[str] | Listed
    default: object = None
    optional: bool = False


class Node(NamedTuple):
    """outputs: (name, type) of each."""

    display_name: str
    category: str
    inputs: list[Input]
    outputs: list[tuple[str, str]]
    output_node: bool = False


SAMPLERS, SCHEDULERS = Listed("samplers"), Listed("schedulers")
TIME_PREDICTORS, FLAW_HIGHLIGHTERS, TRAINING_RUNS = Listed("time_predictors"), Listed("flaw_highlighters"), Listed("fam_training")
CLOTHES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]

NODES = {
    "ASCEDGuard": Node(
        "ASCED Artifact Guard", "Artifact Guard/ASCED",
        [
            Input("model", "MODEL"), Input("mode", ["correct", "detect only"], "correct"),
            Input("sensitivity", "FLOAT", 1.0), Input("strength", "FLOAT", 1.0), Input("window", ["auto", "manual"], "auto"),
            Input("detect_from", "FLOAT", 0.1), Input("correct_at", "FLOAT", 0.4),
            Input("options", "ASCED_OPTIONS", optional=True), Input("region", "MASK", optional=True),
        ],
        [("model", "MODEL"), ("report", "ARTIFACT_REPORT")],
    ),
    "ASCEDOptions": Node(
        "ASCED Options", "Artifact Guard/ASCED",
        [
            Input("detector", ["clean estimate", "weighted score", "score dynamics"], "score dynamics"),
            Input("correction", ["targeted", "state replacement", "score clipping", "surroundings"], "surroundings"),
            Input("reverse_step", "INT", 1), Input("blur", "FLOAT", 2 / 256), Input("min_area", "FLOAT", 0.0015),
            Input("max_area", "FLOAT", 0.15), Input("min_width", "FLOAT", 5 / 256), Input("dilate", "FLOAT", 5 / 256),
            Input("rounds", "INT", 1), Input("noise_seed", "INT", 0),
            Input("keep_unguarded", "BOOLEAN", False, optional=True),
        ],
        [("options", "ASCED_OPTIONS")],
    ),
    "ASCEDKSampler": Node(
        "KSampler (ASCED)", "Artifact Guard/ASCED",
        [
            Input("model", "MODEL"), Input("seed", "INT", 0), Input("steps", "INT", 20), Input("cfg", "FLOAT", 8.0),
            Input("sampler_name", SAMPLERS), Input("scheduler", SCHEDULERS), Input("positive", "CONDITIONING"),
            Input("negative", "CONDITIONING"), Input("latent_image", "LATENT"), Input("denoise", "FLOAT", 1.0),
            Input("mode", ["correct", "detect only"], "correct"), Input("sensitivity", "FLOAT", 1.0),
            Input("strength", "FLOAT", 1.0), Input("options", "ASCED_OPTIONS", optional=True),
        ],
        [("latent", "LATENT"), ("artifact_mask", "MASK"), ("report", "ARTIFACT_REPORT")],
    ),
    "ASCEDReport": Node(
        "ASCED Report", "Artifact Guard/ASCED",
        [
            Input("report", "ARTIFACT_REPORT"), Input("latent", "LATENT"), Input("image", "IMAGE", optional=True),
        ],
        [("artifact_mask", "MASK"), ("overlay", "IMAGE"), ("curves", "IMAGE"), ("artifact_fraction", "FLOAT"), ("summary", "STRING")],
        output_node=True,
    ),
    "ASCEDUnguarded": Node(
        "ASCED Unguarded Result", "Artifact Guard/ASCED",
        [
            Input("report", "ARTIFACT_REPORT"), Input("latent", "LATENT"),
        ],
        [("latent", "LATENT")],
    ),
    "FAMTrainFlawHighlighter": Node(
        "Train Flaw Highlighter (FAM)", "Artifact Guard/FAM",
        [
            Input("real", "IMAGE"), Input("generated", "IMAGE"), Input("epochs", "INT", 10), Input("batch_size", "INT", 64),
            Input("learning_rate", "FLOAT", 2e-5), Input("image_size", "INT", 256), Input("seed", "INT", 0),
            Input("backbone", ["vgg16", "small"], "vgg16"), Input("flaw_highlighter", "FLAW_HIGHLIGHTER", optional=True),
        ],
        [("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("curves", "IMAGE"), ("accuracy", "FLOAT")],
    ),
    "FAMSaveFlawHighlighter": Node(
        "Save Flaw Highlighter", "Artifact Guard/FAM",
        [
            Input("flaw_highlighter", "FLAW_HIGHLIGHTER"), Input("filename_prefix", "STRING", "highlighter"),
        ],
        [], output_node=True,
    ),
    "FAMLoadFlawHighlighter": Node(
        "Load Flaw Highlighter", "Artifact Guard/FAM",
        [
            Input("name", FLAW_HIGHLIGHTERS),
        ],
        [("flaw_highlighter", "FLAW_HIGHLIGHTER")],
    ),
    "FAMFlawMap": Node(
        "Flaw Map (FAM)", "Artifact Guard/FAM",
        [
            Input("flaw_highlighter", "FLAW_HIGHLIGHTER"), Input("image", "IMAGE"),
            Input("reduce", ["each image", "batch mean"], "each image"),
        ],
        [("flaw_map", "MASK"), ("overlay", "IMAGE"), ("generated_probability", "FLOAT")],
    ),
    "FAMAttentionPatch": Node(
        "Flaw Attention Patch (FAM)", "Artifact Guard/FAM",
        [
            Input("model", "MODEL"), Input("flaw_map", "MASK"), Input("strength", "FLOAT", 0.025),
            Input("target", ["key and value", "key", "value"], "key and value"), Input("start_percent", "FLOAT", 0.0),
            Input("end_percent", "FLOAT", 1.0), Input("blocks", "STRING", ""),
        ],
        [("model", "MODEL")],
    ),
    "FAMNoise": Node(
        "Flaw Noise (FAM)", "Artifact Guard/FAM",
        [
            Input("noise", "NOISE"), Input("flaw_map", "MASK"), Input("strength", "FLOAT", 0.01),
        ],
        [("noise", "NOISE")],
    ),
    "FAMRefine": Node(
        "Refine Flaws (FAM)", "Artifact Guard/FAM",
        [
            Input("model", "MODEL"), Input("vae", "VAE"), Input("flaw_highlighter", "FLAW_HIGHLIGHTER"),
            Input("positive", "CONDITIONING"), Input("negative", "CONDITIONING"), Input("latent", "LATENT"),
            Input("seed", "INT", 0), Input("steps", "INT", 20), Input("cfg", "FLOAT", 8.0), Input("sampler_name", SAMPLERS),
            Input("scheduler", SCHEDULERS), Input("denoise", "FLOAT", 0.35), Input("rounds", "INT", 1),
            Input("attention_strength", "FLOAT", 0.025), Input("noise_strength", "FLOAT", 0.0),
            Input("threshold", "FLOAT", 0.5), Input("start_from", ["surroundings", "image"], "surroundings", optional=True),
            Input("grow", "FLOAT", 0.03, optional=True),
        ],
        [("latent", "LATENT"), ("flaw_map", "MASK"), ("probabilities", "STRING")],
    ),
    "FAMTrainLoRA": Node(
        "Train Flaw-aware LoRA (FAM)", "Artifact Guard/FAM",
        [
            Input("model", "MODEL"), Input("vae", "VAE"), Input("flaw_highlighter", "FLAW_HIGHLIGHTER"),
            Input("latents", "LATENT"), Input("positive", "CONDITIONING"), Input("steps", "INT", 1000),
            Input("base_fraction", "FLOAT", 0.5), Input("map_every", "INT", 100),
            Input("attention_strength", "FLOAT", 0.025), Input("noise_strength", "FLOAT", 0.01), Input("rank", "INT", 8),
            Input("learning_rate", "FLOAT", 5e-4), Input("batch_size", "INT", 1), Input("seed", "INT", 0),
            Input("negative", "CONDITIONING", optional=True), Input("map_images", "INT", 8, optional=True),
            Input("map_steps", "INT", 20, optional=True), Input("map_cfg", "FLOAT", 4.0, optional=True),
            Input("training_dtype", ["bf16", "fp32"], "bf16", optional=True),
            Input("gradient_checkpointing", "BOOLEAN", True, optional=True), Input("save_every", "INT", 250, optional=True),
            Input("resume", TRAINING_RUNS, "new run", optional=True),
        ],
        [("lora", "LORA_MODEL"), ("curves", "IMAGE"), ("flaw_map", "MASK")],
    ),
    "TAGTrainTimePredictor": Node(
        "Train Time Predictor (TAG)", "Artifact Guard/TAG",
        [
            Input("model", "MODEL"), Input("latents", "LATENT"), Input("steps", "INT", 3000),
            Input("batch_size", "INT", 128), Input("learning_rate", "FLOAT", 1e-4), Input("seed", "INT", 0),
            Input("conditioning", "CONDITIONING", optional=True), Input("time_predictor", "TIME_PREDICTOR", optional=True),
        ],
        [("time_predictor", "TIME_PREDICTOR"), ("loss_curve", "IMAGE"), ("time_gap", "FLOAT")],
    ),
    "TAGSaveTimePredictor": Node(
        "Save Time Predictor", "Artifact Guard/TAG",
        [
            Input("time_predictor", "TIME_PREDICTOR"), Input("filename_prefix", "STRING", "time_predictor"),
        ],
        [], output_node=True,
    ),
    "TAGLoadTimePredictor": Node(
        "Load Time Predictor", "Artifact Guard/TAG",
        [
            Input("name", TIME_PREDICTORS),
        ],
        [("time_predictor", "TIME_PREDICTOR")],
    ),
    "TemporalAlignmentGuidance": Node(
        "Temporal Alignment Guidance (TAG)", "Artifact Guard/TAG",
        [
            Input("model", "MODEL"), Input("strength", "FLOAT", 1.0),
            Input("mode", ["relative", "score", "shift"], "relative"), Input("start_percent", "FLOAT", 0.0),
            Input("end_percent", "FLOAT", 1.0), Input("time_predictor", "TIME_PREDICTOR", optional=True),
            Input("estimate", ["closed form", "published gradient"], "closed form", optional=True),
            Input("ask_at", ["sample's level", "step's level"], "sample's level", optional=True),
        ],
        [("model", "MODEL"), ("report", "TIME_GAP_REPORT")],
    ),
    "TAGTimeGap": Node(
        "Time Gap (TAG)", "Artifact Guard/TAG",
        [
            Input("report", "TIME_GAP_REPORT"), Input("latent", "LATENT"),
        ],
        [("time_gap", "FLOAT"), ("curve", "IMAGE"), ("summary", "STRING")], output_node=True,
    ),
    "ArtifactGuard": Node(
        "Artifact Guard (all in one)", "Artifact Guard",
        [
            Input("model", "MODEL"), Input("strength", "FLOAT", 1.0), Input("use_asced", "BOOLEAN", True),
            Input("use_tag", "BOOLEAN", True), Input("time_predictor", "TIME_PREDICTOR", optional=True),
            Input("flaw_map", "MASK", optional=True),
        ],
        [("model", "MODEL"), ("artifacts", "ARTIFACT_REPORT"), ("time_gaps", "TIME_GAP_REPORT")],
    ),
    "ArtifactGuardDemoModel": Node(
        "Load Demo Model", "Artifact Guard/Demo",
        [],
        [("model", "MODEL"), ("vae", "VAE")],
    ),
    "ArtifactGuardDemoCondition": Node(
        "Demo Class", "Artifact Guard/Demo",
        [
            Input("label", CLOTHES, "t-shirt"),
        ],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
    ),
}
