"""The node contract by hand: ids, sockets, types and order that saved workflows depend on.

Written out, not read from the pack: a change here is a change of what users have saved. An input is (name, type); a
combo is (name, its options), where None stands for a list that core owns.
"""

from typing import NamedTuple

SETTINGS = [("mode", ["correct", "detect only"]), ("sensitivity", "FLOAT"), ("strength", "FLOAT")]

LABELS = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


class Node(NamedTuple):
    display_name: str
    category: str
    required: list
    optional: list
    outputs: list
    output_node: bool = False


NODES = {
    "ASCEDGuard": Node(
        "ASCED Artifact Guard",
        "Artifact Guard/ASCED",
        [
            ("model", "MODEL"),
            *SETTINGS,
            ("window", ["auto", "manual"]),
            ("detect_from", "FLOAT"),
            ("correct_at", "FLOAT"),
        ],
        [("options", "ASCED_OPTIONS"), ("region", "MASK")],
        [("model", "MODEL"), ("report", "ARTIFACT_REPORT")],
    ),
    "ASCEDOptions": Node(
        "ASCED Options",
        "Artifact Guard/ASCED",
        [
            ("detector", ["clean estimate", "weighted score", "score dynamics"]),
            ("correction", ["targeted", "state replacement", "score clipping", "surroundings"]),
            ("reverse_step", "INT"),
            ("blur", "FLOAT"),
            ("min_area", "FLOAT"),
            ("max_area", "FLOAT"),
            ("min_width", "FLOAT"),
            ("dilate", "FLOAT"),
            ("rounds", "INT"),
            ("noise_seed", "INT"),
        ],
        [("keep_unguarded", "BOOLEAN")],
        [("options", "ASCED_OPTIONS")],
    ),
    "ASCEDKSampler": Node(
        "KSampler (ASCED)",
        "Artifact Guard/ASCED",
        [
            ("model", "MODEL"),
            ("seed", "INT"),
            ("steps", "INT"),
            ("cfg", "FLOAT"),
            ("sampler_name", None),
            ("scheduler", None),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
            ("denoise", "FLOAT"),
            *SETTINGS,
        ],
        [("options", "ASCED_OPTIONS")],
        [("latent", "LATENT"), ("artifact_mask", "MASK"), ("report", "ARTIFACT_REPORT")],
    ),
    "ASCEDReport": Node(
        "ASCED Report",
        "Artifact Guard/ASCED",
        [("report", "ARTIFACT_REPORT"), ("latent", "LATENT")],
        [("image", "IMAGE")],
        [
            ("artifact_mask", "MASK"),
            ("overlay", "IMAGE"),
            ("curves", "IMAGE"),
            ("artifact_fraction", "FLOAT"),
            ("summary", "STRING"),
        ],
        output_node=True,
    ),
    "ASCEDUnguarded": Node(
        "ASCED Unguarded Result",
        "Artifact Guard/ASCED",
        [("report", "ARTIFACT_REPORT"), ("latent", "LATENT")],
        [],
        [("latent", "LATENT")],
    ),
    "FAMTrainFlawHighlighter": Node(
        "Train Flaw Highlighter (FAM)",
        "Artifact Guard/FAM",
        [
            ("real", "IMAGE"),
            ("generated", "IMAGE"),
            ("epochs", "INT"),
            ("batch_size", "INT"),
            ("learning_rate", "FLOAT"),
            ("image_size", "INT"),
            ("seed", "INT"),
            ("backbone", ["vgg16", "small"]),
        ],
        [("flaw_highlighter", "FLAW_HIGHLIGHTER")],
        [("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("curves", "IMAGE"), ("accuracy", "FLOAT")],
    ),
    "FAMSaveFlawHighlighter": Node(
        "Save Flaw Highlighter",
        "Artifact Guard/FAM",
        [("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("filename_prefix", "STRING")],
        [],
        [],
        output_node=True,
    ),
    "FAMLoadFlawHighlighter": Node(
        "Load Flaw Highlighter",
        "Artifact Guard/FAM",
        [("name", None)],
        [],
        [("flaw_highlighter", "FLAW_HIGHLIGHTER")],
    ),
    "FAMFlawMap": Node(
        "Flaw Map (FAM)",
        "Artifact Guard/FAM",
        [("flaw_highlighter", "FLAW_HIGHLIGHTER"), ("image", "IMAGE"), ("reduce", ["each image", "batch mean"])],
        [],
        [("flaw_map", "MASK"), ("overlay", "IMAGE"), ("generated_probability", "FLOAT")],
    ),
    "FAMAttentionPatch": Node(
        "Flaw Attention Patch (FAM)",
        "Artifact Guard/FAM",
        [
            ("model", "MODEL"),
            ("flaw_map", "MASK"),
            ("strength", "FLOAT"),
            ("target", ["key and value", "key", "value"]),
            ("start_percent", "FLOAT"),
            ("end_percent", "FLOAT"),
            ("blocks", "STRING"),
        ],
        [],
        [("model", "MODEL")],
    ),
    "FAMNoise": Node(
        "Flaw Noise (FAM)",
        "Artifact Guard/FAM",
        [("noise", "NOISE"), ("flaw_map", "MASK"), ("strength", "FLOAT")],
        [],
        [("noise", "NOISE")],
    ),
    "FAMTrainLoRA": Node(
        "Train Flaw-aware LoRA (FAM)",
        "Artifact Guard/FAM",
        [
            ("model", "MODEL"),
            ("vae", "VAE"),
            ("flaw_highlighter", "FLAW_HIGHLIGHTER"),
            ("latents", "LATENT"),
            ("positive", "CONDITIONING"),
            ("steps", "INT"),
            ("base_fraction", "FLOAT"),
            ("map_every", "INT"),
            ("attention_strength", "FLOAT"),
            ("noise_strength", "FLOAT"),
            ("rank", "INT"),
            ("learning_rate", "FLOAT"),
            ("batch_size", "INT"),
            ("seed", "INT"),
        ],
        [
            ("negative", "CONDITIONING"),
            ("map_images", "INT"),
            ("map_steps", "INT"),
            ("map_cfg", "FLOAT"),
            ("training_dtype", ["bf16", "fp32"]),
            ("gradient_checkpointing", "BOOLEAN"),
            ("save_every", "INT"),
            ("resume", None),
        ],
        [("lora", "LORA_MODEL"), ("curves", "IMAGE"), ("flaw_map", "MASK")],
    ),
    "FAMRefine": Node(
        "Refine Flaws (FAM)",
        "Artifact Guard/FAM",
        [
            ("model", "MODEL"),
            ("vae", "VAE"),
            ("flaw_highlighter", "FLAW_HIGHLIGHTER"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent", "LATENT"),
            ("seed", "INT"),
            ("steps", "INT"),
            ("cfg", "FLOAT"),
            ("sampler_name", None),
            ("scheduler", None),
            ("denoise", "FLOAT"),
            ("rounds", "INT"),
            ("attention_strength", "FLOAT"),
            ("noise_strength", "FLOAT"),
            ("threshold", "FLOAT"),
        ],
        [("start_from", None), ("grow", "FLOAT")],
        [("latent", "LATENT"), ("flaw_map", "MASK"), ("probabilities", "STRING")],
    ),
    "TAGTrainTimePredictor": Node(
        "Train Time Predictor (TAG)",
        "Artifact Guard/TAG",
        [
            ("model", "MODEL"),
            ("latents", "LATENT"),
            ("steps", "INT"),
            ("batch_size", "INT"),
            ("learning_rate", "FLOAT"),
            ("seed", "INT"),
        ],
        [("conditioning", "CONDITIONING"), ("time_predictor", "TIME_PREDICTOR")],
        [("time_predictor", "TIME_PREDICTOR"), ("loss_curve", "IMAGE"), ("time_gap", "FLOAT")],
    ),
    "TAGSaveTimePredictor": Node(
        "Save Time Predictor",
        "Artifact Guard/TAG",
        [("time_predictor", "TIME_PREDICTOR"), ("filename_prefix", "STRING")],
        [],
        [],
        output_node=True,
    ),
    "TAGLoadTimePredictor": Node(
        "Load Time Predictor",
        "Artifact Guard/TAG",
        [("name", None)],
        [],
        [("time_predictor", "TIME_PREDICTOR")],
    ),
    "TemporalAlignmentGuidance": Node(
        "Temporal Alignment Guidance (TAG)",
        "Artifact Guard/TAG",
        [
            ("model", "MODEL"),
            ("strength", "FLOAT"),
            ("mode", ["relative", "score", "shift"]),
            ("start_percent", "FLOAT"),
            ("end_percent", "FLOAT"),
        ],
        [
            ("time_predictor", "TIME_PREDICTOR"),
            ("estimate", ["closed form", "published gradient"]),
            ("ask_at", ["sample's level", "step's level"]),
        ],
        [("model", "MODEL"), ("report", "TIME_GAP_REPORT")],
    ),
    "ArtifactGuard": Node(
        "Artifact Guard (all in one)",
        "Artifact Guard",
        [("model", "MODEL"), ("strength", "FLOAT"), ("use_asced", "BOOLEAN"), ("use_tag", "BOOLEAN")],
        [("time_predictor", "TIME_PREDICTOR"), ("flaw_map", "MASK")],
        [("model", "MODEL"), ("artifacts", "ARTIFACT_REPORT"), ("time_gaps", "TIME_GAP_REPORT")],
    ),
    "TAGTimeGap": Node(
        "Time Gap (TAG)",
        "Artifact Guard/TAG",
        [("report", "TIME_GAP_REPORT"), ("latent", "LATENT")],
        [],
        [("time_gap", "FLOAT"), ("curve", "IMAGE"), ("summary", "STRING")],
        output_node=True,
    ),
    "ArtifactGuardDemoModel": Node(
        "Load Demo Model", "Artifact Guard/Demo", [], [], [("model", "MODEL"), ("vae", "VAE")]
    ),
    "ArtifactGuardDemoCondition": Node(
        "Demo Class",
        "Artifact Guard/Demo",
        [("label", LABELS)],
        [],
        [("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
    ),
}

DEFAULTS = {
    "TAGTrainTimePredictor": {"steps": 3000, "batch_size": 128, "learning_rate": 1e-4},
    "TemporalAlignmentGuidance": {"strength": 1.0, "mode": "relative", "start_percent": 0.0, "end_percent": 1.0},
    "ASCEDGuard": {"mode": "correct", "sensitivity": 1.0, "strength": 1.0, "window": "auto"},
    "ASCEDOptions": {"detector": "score dynamics", "correction": "surroundings", "reverse_step": 1, "rounds": 1},
    "ASCEDKSampler": {"mode": "correct", "sensitivity": 1.0, "strength": 1.0},
    "FAMTrainFlawHighlighter": {"learning_rate": 2e-5, "image_size": 256},
    "FAMFlawMap": {"reduce": "each image"},
    "FAMAttentionPatch": {
        "strength": 0.025, "target": "key and value", "start_percent": 0.0, "end_percent": 1.0, "blocks": ""
    },
    "FAMNoise": {"strength": 0.01},
    "FAMTrainLoRA": {
        "base_fraction": 0.5, "map_every": 100, "attention_strength": 0.025, "noise_strength": 0.01
    },
    "FAMRefine": {"denoise": 0.35, "rounds": 1},
}
"""Values the contract fixes; a graph saved before a widget was added gets its default."""
