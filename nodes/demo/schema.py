"""The demo nodes: a small model that ships with the pack, and its prompts."""

from comfy_api.latest import io

from .model import LABELS, class_token, load_demo_model

CATEGORY = "Artifact Guard/Demo"


class ArtifactGuardDemoModel(io.ComfyNode):
    """Loads the embedded demo model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ArtifactGuardDemoModel",
            display_name="Load Demo Model",
            category=CATEGORY,
            description="A small model of clothes, 32x32 pixels, that comes with the pack: try every node without a download.",
            search_aliases=["artifact guard demo", "fashion mnist", "test model", "tiny model"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model", display_name="model",
                    tooltip="The demo model. Its latents are 3x32x32: use EmptyChromaRadianceLatentImage at 32x32.",
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Turns its latents into images; it only scales."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model())


class ArtifactGuardDemoCondition(io.ComfyNode):
    """The demo model's prompt: a class."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ArtifactGuardDemoCondition",
            display_name="Demo Class",
            category=CATEGORY,
            description="What the demo model should draw.",
            search_aliases=["artifact guard demo prompt", "demo label"],
            inputs=[io.Combo.Input("label", options=list(LABELS), default=LABELS[0], tooltip="The piece of clothing.")],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="The chosen class."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="Any class: what guidance moves away from."),
            ],
        )

    @classmethod
    def execute(cls, label) -> io.NodeOutput:
        positive, negative = class_token(LABELS.index(label)), class_token(None)
        return io.NodeOutput([[positive, {}]], [[negative, {}]])


NODES = [ArtifactGuardDemoModel, ArtifactGuardDemoCondition]
