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
            ("detector", ["clean estimate", "weighted score"]),
            ("correction", ["targeted", "state replacement", "score clipping"]),
            ("reverse_step", "INT"),
            ("blur", "FLOAT"),
            ("min_area", "FLOAT"),
            ("max_area", "FLOAT"),
            ("min_width", "FLOAT"),
            ("dilate", "FLOAT"),
            ("rounds", "INT"),
            ("noise_seed", "INT"),
        ],
        [],
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
    "ASCEDGuard": {"mode": "correct", "sensitivity": 1.0, "strength": 1.0, "window": "auto"},
    "ASCEDOptions": {"detector": "clean estimate", "correction": "targeted", "reverse_step": 1, "rounds": 1},
    "ASCEDKSampler": {"mode": "correct", "sensitivity": 1.0, "strength": 1.0},
}
"""Values the contract fixes; a graph saved before a widget was added gets its default."""
