"""The all-in-one node: what most graphs need, with one strength."""

from comfy_api.latest import io

from ..asced.guard import guard_model
from ..asced.options import GuardSettings
from ..asced.schema import ArtifactReportType
from ..fam.attention import AttentionSettings, patch_attention
from ..tag.guidance import guide_model
from ..tag.schema import TimeGapReportType, TimePredictorType
from ..tag.settings import TagSettings

FAM_STRENGTH = AttentionSettings().strength
"""The published strength of the flaw attention patch; the node's strength multiplies it."""


class ArtifactGuard(io.ComfyNode):
    """Patches a MODEL with the ASCED guard, temporal alignment guidance and, given a map, the flaw attention patch."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ArtifactGuard",
            display_name="Artifact Guard (all in one)",
            category="Artifact Guard",
            description="All three methods on one model: repairs what goes wrong while sampling and keeps samples on their path.",
            search_aliases=["artifact guard", "artifact fix", "fix artifacts", "asced", "tag", "fam"],
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to guard. It is not changed; the guarded one comes out."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.01,
                    tooltip="Strength of all that is used. Higher changes more. 0 is the bare model, bit for bit.",
                ),
                io.Boolean.Input(
                    "use_asced", default=True,
                    tooltip="Find regions that go wrong while sampling and renoise just those (ASCED).",
                ),
                io.Boolean.Input(
                    "use_tag", default=True,
                    tooltip="Bring samples back that carry more noise than their step should have (TAG). Off: time gaps are "
                    "still measured.",
                ),
                TimePredictorType.Input(
                    "time_predictor", optional=True, tooltip="For TAG. Without one the noise is read off the run itself."
                ),
                io.Mask.Input(
                    "flaw_map", optional=True,
                    tooltip="For FAM, from Flaw Map: where attention is strengthened, at the size of the image.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The guarded model: connect it to the sampler."),
                ArtifactReportType.Output(
                    "artifacts", display_name="artifacts", tooltip="What the guard finds: connect it to ASCED Report."
                ),
                TimeGapReportType.Output(
                    "time_gaps", display_name="time_gaps", tooltip="What TAG measures: connect it to Time Gap (TAG)."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, strength, use_asced, use_tag, time_predictor=None, flaw_map=None) -> io.NodeOutput:
        asced = GuardSettings(strength=strength if use_asced else 0.0)
        identity = time_predictor.identity if time_predictor is not None else ""
        tag = TagSettings(strength=strength if use_tag else 0.0, predictor=identity)
        if flaw_map is not None:
            model = patch_attention(model, flaw_map, AttentionSettings(FAM_STRENGTH * strength))
        model, time_gaps = guide_model(model, tag, time_predictor)
        model, artifacts = guard_model(model, asced)
        return io.NodeOutput(model, artifacts, time_gaps)


NODES = [ArtifactGuard]
