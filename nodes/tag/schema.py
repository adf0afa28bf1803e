"""The TAG nodes: what a user wires and turns."""

import json

from comfy_api.latest import io, ui

from ..told import id_of, saved_as, tell
from .alignment import MODES
from .guidance import guide_model
from .predictor_files import load_predictor, predictor_names, save_predictor
from .settings import ASKED_AT, ESTIMATES, LARGEST_STRENGTH, TagSettings
from .time_gap import draw_time_gap
from .train_node import TAGTrainTimePredictor, TimePredictorType

CATEGORY = "Artifact Guard/TAG"

TimeGapReportType = io.Custom("TIME_GAP_REPORT")


class TAGSaveTimePredictor(io.ComfyNode):
    """Writes a predictor to models/time_predictors."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAGSaveTimePredictor",
            display_name="Save Time Predictor",
            category=CATEGORY,
            description="Saves a time predictor under models/time_predictors, with a new number, never over another file.",
            search_aliases=["tag save predictor", "save tag", "store time predictor"],
            is_output_node=True,
            inputs=[
                TimePredictorType.Input("time_predictor", tooltip="The predictor to save, with all that going on with "
                                        "its training needs."),
                io.String.Input(
                    "filename_prefix", default="time_predictor",
                    tooltip="How the file's name begins; a number follows. Folders may be part of it: sd15/portraits.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, time_predictor, filename_prefix) -> io.NodeOutput:
        path = save_predictor(time_predictor, filename_prefix)
        tell(id_of(cls), f"Saved as {saved_as(path)}")
        return io.NodeOutput(ui={"text": [str(path)]})


class TAGLoadTimePredictor(io.ComfyNode):
    """Reads a predictor from models/time_predictors."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAGLoadTimePredictor",
            display_name="Load Time Predictor",
            category=CATEGORY,
            description="Loads a time predictor from models/time_predictors; the demo model's comes with the pack.",
            search_aliases=["tag load predictor", "load tag", "open time predictor"],
            inputs=[
                io.Combo.Input("name", options=predictor_names(), tooltip="A file that Save Time Predictor wrote.")
            ],
            outputs=[
                TimePredictorType.Output(
                    "time_predictor", display_name="time_predictor",
                    tooltip="Connect it to Temporal Alignment Guidance, or to training to go on with it.",
                )
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        return io.NodeOutput(load_predictor(name))


class TemporalAlignmentGuidance(io.ComfyNode):
    """Patches a MODEL so that a sample which left the manifold of its step is brought back."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TemporalAlignmentGuidance",
            display_name="Temporal Alignment Guidance (TAG)",
            category=CATEGORY,
            description="Brings samples back that carry more noise than their step should have. Works without training.",
            search_aliases=["tag", "temporal alignment", "time gap guidance", "off manifold", "exposure bias", "time predictor"],
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to guide. It is not changed; the guided one comes out."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=LARGEST_STRENGTH, step=0.01,
                    tooltip="How strongly to correct. relative: 1 suits every model; higher corrects more. score, shift: "
                    "the paper's omega. 0 only measures and changes nothing, bit for bit.",
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), default="relative",
                    tooltip="relative: adapts to the measured time gap and leaves aligned samples alone. score: the "
                    "paper's score guidance. shift: the paper's Algorithm 1; one more model call a step unless the "
                    "published gradient is used.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="Where in the model's schedule guidance begins: 0 is pure noise, 1 the finished image.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="Where in the model's schedule guidance ends. Later steps are only measured.",
                ),
                TimePredictorType.Input(
                    "time_predictor", optional=True,
                    tooltip="Tells how noisy a sample is. Without one that is read off the run itself.",
                ),
                io.Combo.Input(
                    "estimate", options=list(ESTIMATES), default=ESTIMATES[0], optional=True, advanced=True,
                    tooltip="Where the direction comes from. closed form: from the model's own estimate, exact where that "
                    "is, no gradient. published gradient: that of the time predictor.",
                ),
                io.Combo.Input(
                    "ask_at", options=list(ASKED_AT), default=ASKED_AT[0], optional=True, advanced=True,
                    tooltip="relative only. sample's level: the model is told the noise the sample really has. step's "
                    "level: what the schedule says, as in the paper.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The guided model: connect it to the sampler."),
                TimeGapReportType.Output(
                    "report", display_name="report", tooltip="What is measured: connect it to Time Gap (TAG)."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, strength, mode, start_percent, end_percent, time_predictor=None, estimate=None, ask_at=None
    ) -> io.NodeOutput:
        identity = time_predictor.identity if time_predictor is not None else ""
        settings = TagSettings(
            strength, mode, start_percent, end_percent, estimate or ESTIMATES[0], ask_at or ASKED_AT[0], identity
        )
        return io.NodeOutput(*guide_model(model, settings, time_predictor))


class TAGTimeGap(io.ComfyNode):
    """Reads a report of time gaps after sampling."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TAGTimeGap",
            display_name="Time Gap (TAG)",
            category=CATEGORY,
            description="Shows how far the samples were from their steps: the time gap at each step, and its mean.",
            search_aliases=["tag report", "time gap", "temporal alignment report", "tag curve"],
            is_output_node=True,
            inputs=[
                TimeGapReportType.Input("report", tooltip="The report of Temporal Alignment Guidance."),
                io.Latent.Input(
                    "latent", tooltip="The output of the sampler that used the guided model: so the report is read after it."
                ),
            ],
            outputs=[
                io.Float.Output(
                    "time_gap", display_name="time_gap",
                    tooltip="Mean gap in thousandths of the model's schedule; lower is better aligned.",
                ),
                io.Image.Output("curve", display_name="curve", tooltip="Times of steps and samples, and the gap, over the run."),
                io.String.Output("summary", display_name="summary", tooltip="Everything that was measured, as JSON."),
            ],
        )

    @classmethod
    def execute(cls, report, latent) -> io.NodeOutput:
        record = report.find(latent)
        curve = draw_time_gap(record)
        summary = json.dumps(record.summary(), indent=2, allow_nan=False)
        return io.NodeOutput(record.time_gap(), curve, summary, ui=ui.PreviewImage(curve, cls=cls))


NODES = [TAGTrainTimePredictor, TAGSaveTimePredictor, TAGLoadTimePredictor, TemporalAlignmentGuidance, TAGTimeGap]
