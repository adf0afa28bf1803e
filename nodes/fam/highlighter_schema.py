"""The nodes that make, keep and load flaw highlighters."""

from comfy_api.latest import io

from ..model_files import file_names, load_model_file, save_model_file
from ..told import id_of, saved_as, tell
from .backbones import BACKBONES
from .highlighter import FOLDER, KIND, FlawHighlighter
from .pictures import draw_training
from .session import train_highlighter
from .training import RATE_FACTOR, TrainingSettings

CATEGORY = "Artifact Guard/FAM"

FlawHighlighterType = io.Custom("FLAW_HIGHLIGHTER")


class FAMTrainFlawHighlighter(io.ComfyNode):
    """Trains a highlighter on real and generated images."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FAMTrainFlawHighlighter",
            display_name="Train Flaw Highlighter (FAM)",
            category=CATEGORY,
            description="Learns from real and generated images what looks generated. A few hundred of each are of use.",
            search_aliases=["fam train", "train artifact detector", "real fake classifier", "flaw highlighter"],
            inputs=[
                io.Image.Input("real", tooltip="Real images, at least 8, of the same size as the generated ones."),
                io.Image.Input("generated", tooltip="What your model makes of the same subjects, at least 8."),
                io.Int.Input("epochs", default=10, min=1, max=10000, tooltip="How often all images are gone through."),
                io.Int.Input("batch_size", default=64, min=2, max=4096, tooltip="Images a step, half of them real."),
                io.Float.Input(
                    "learning_rate", default=2e-5, min=1e-8, max=1.0, step=1e-8,
                    tooltip="The published rate, for vgg16. The small backbone, which starts from nothing, takes "
                    f"{RATE_FACTOR['small']:g} times this.",
                ),
                io.Int.Input(
                    "image_size", default=256, min=32, max=2048, step=8,
                    tooltip="Images are judged with their shorter side at this. Larger sees finer flaws and is slower. small looks "
                    "at 46 pixels around each place: 64 to 128 shows it whole limbs, 256 texture and small parts.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the weights, of the order and of which images are held out. A highlighter that is gone on with "
                    "has those held out that were before, if there are as many.",
                ),
                io.Combo.Input(
                    "backbone", options=list(BACKBONES), default="vgg16",
                    tooltip="vgg16: as published; takes a vgg16 file from models/flaw_highlighters as a start, if there is "
                    "one. small: trains in minutes.",
                ),
                FlawHighlighterType.Input(
                    "flaw_highlighter", optional=True,
                    tooltip="Go on training this one, with its backbone and image size. Of as many images as before it is kept where "
                    "no epoch is better.",
                ),
            ],
            outputs=[
                FlawHighlighterType.Output("flaw_highlighter", display_name="flaw_highlighter", tooltip="The best epoch."),
                io.Image.Output("curves", display_name="curves", tooltip="Loss and held-out accuracy of each epoch."),
                io.Float.Output(
                    "accuracy", display_name="accuracy",
                    tooltip="On held-out images; 0.5 is guessing, and a good generator makes it low.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, real, generated, epochs, batch_size, learning_rate, image_size, seed, backbone, flaw_highlighter=None
    ) -> io.NodeOutput:
        settings = TrainingSettings(epochs, batch_size, learning_rate, image_size, seed % 2**64, backbone)
        highlighter, training = train_highlighter(real, generated, settings, flaw_highlighter, node_id=id_of(cls))
        curves = draw_training(training.losses, training.accuracies, training.best_epoch)
        best = f"epoch {training.best_epoch} of {epochs}" if training.best_epoch else "no epoch was better than the one it began with"
        words = [f"Held-out accuracy {training.accuracy:.1%}, {best}."]
        words += highlighter.settings.warnings or ["No spurious cue found: the verdicts follow the marked spots."]
        tell(id_of(cls), "\n".join(words))
        return io.NodeOutput(highlighter, curves, training.accuracy, ui={"text": words})


class FAMSaveFlawHighlighter(io.ComfyNode):
    """Saves a highlighter."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FAMSaveFlawHighlighter",
            display_name="Save Flaw Highlighter",
            category=CATEGORY,
            description="Saves a flaw highlighter under models/flaw_highlighters, as a new file each time.",
            search_aliases=["fam save", "save highlighter", "export flaw detector"],
            is_output_node=True,
            inputs=[
                FlawHighlighterType.Input("flaw_highlighter", tooltip="The highlighter to save."),
                io.String.Input(
                    "filename_prefix", default="highlighter",
                    tooltip="Name of the file; a number is added, so that no file is ever overwritten. May name a folder.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, flaw_highlighter, filename_prefix) -> io.NodeOutput:
        path = save_model_file(FOLDER, filename_prefix, KIND, *flaw_highlighter.state())
        tell(id_of(cls), f"Saved as {saved_as(path)}")
        return io.NodeOutput(ui={"text": [path]})


class FAMLoadFlawHighlighter(io.ComfyNode):
    """Loads a highlighter."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FAMLoadFlawHighlighter",
            display_name="Load Flaw Highlighter",
            category=CATEGORY,
            description="Loads a flaw highlighter from models/flaw_highlighters, or the one that comes with the demo model.",
            search_aliases=["fam load", "load highlighter", "flaw detector"],
            inputs=[
                io.Combo.Input(
                    "name", options=file_names(FOLDER),
                    tooltip="Files under models/flaw_highlighters. demo_clothes belongs to the demo model.",
                ),
            ],
            outputs=[
                FlawHighlighterType.Output("flaw_highlighter", display_name="flaw_highlighter", tooltip="The highlighter."),
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        return io.NodeOutput(FlawHighlighter.from_state(*load_model_file(FOLDER, name, KIND)))
