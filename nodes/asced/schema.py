"""The ASCED nodes: what a user wires and turns."""

import json

from comfy_api.latest import io, ui

import nodes as core_nodes

from ..sampler_inputs import sampler_inputs
from .guard import guard_model
from .options import CORRECTIONS, DETECTORS, MODES, WINDOWS, AscedOptions, GuardSettings
from .pictures import draw_curves, draw_overlay
from .report import RunRecord

CATEGORY = "Artifact Guard/ASCED"

LENGTH_STEP, LENGTH_DECIMALS = 0.001, 3

ArtifactReportType = io.Custom("ARTIFACT_REPORT")
AscedOptionsType = io.Custom("ASCED_OPTIONS")


def mode_input() -> io.Input:
    return io.Combo.Input(
        "mode", options=list(MODES), default="correct",
        tooltip="correct: repair what is found. detect only: look and report, the result is that of the bare model.",
    )


def sensitivity_input() -> io.Input:
    return io.Float.Input(
        "sensitivity", default=1.0, min=0.01, max=10.0, step=0.01,
        tooltip="Higher finds more and weaker artifacts, and more false ones; a region that grows beyond max_area is "
        "dropped. The limits of the detector are divided by it; of the published ones, k = 3 / sensitivity.",
    )


def strength_input() -> io.Input:
    return io.Float.Input(
        "strength", default=1.0, min=0.0, max=10.0, step=0.01,
        tooltip="How far a region that is not doubted is pushed away from what was there. Up to 5 frees artifacts more surely, and "
        "harms sound parts taken for one. 0 switches the guard off, bit for bit.",
    )


def report_inputs() -> list[io.Input]:
    """What a node needs to read a report after sampling."""
    return [
        ArtifactReportType.Input("report", tooltip="The guard's report."),
        io.Latent.Input(
            "latent", tooltip="The output of the sampler that used the guarded model: so the report is read after it."
        ),
    ]


def add_to_metadata(hidden, record: RunRecord) -> None:
    """Add a run's settings and verdict to what core writes into the images that this prompt saves from now on."""
    extra_pnginfo = getattr(hidden, "extra_pnginfo", None)
    if isinstance(extra_pnginfo, dict):
        runs = extra_pnginfo.setdefault("artifact_guard", [])
        summary = record.summary()
        if summary not in runs:
            runs.append(summary)


class ASCEDGuard(io.ComfyNode):
    """Patches a MODEL so that every sampler run of it is watched and repaired."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASCEDGuard",
            display_name="ASCED Artifact Guard",
            category=CATEGORY,
            description="Finds regions that go wrong while sampling and renoises just those. Put it between the model "
            "and any sampler.",
            search_aliases=["artifact", "artifact fix", "artifact guard", "asced", "score trap", "fix artifacts", "repair"],
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to guard. It is not changed; the guarded one comes out."),
                mode_input(),
                sensitivity_input(),
                strength_input(),
                io.Combo.Input(
                    "window", options=list(WINDOWS), default="auto",
                    tooltip="auto: when to look and when to repair follow from the noise schedule. manual: the two "
                    "fractions below.",
                ),
                io.Float.Input(
                    "detect_from", default=0.1, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="manual window: fraction of this run's steps after which looking begins. 0 is the first "
                    "step. Earlier sees more of the layout, later only what changes last.",
                ),
                io.Float.Input(
                    "correct_at", default=0.4, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="manual window: fraction of this run's steps at which regions are repaired. Later sees more "
                    "and leaves less time to redraw.",
                ),
                AscedOptionsType.Input("options", optional=True, tooltip="Finer settings, from ASCED Options."),
                io.Mask.Input(
                    "region", optional=True,
                    tooltip="Where repair is allowed, at the size of the image. What is found elsewhere is only reported.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The guarded model: connect it to the sampler."),
                ArtifactReportType.Output(
                    "report", display_name="report", tooltip="What the guard finds: connect it to ASCED Report."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, mode, sensitivity, strength, window, detect_from, correct_at, options=None, region=None
    ) -> io.NodeOutput:
        settings = GuardSettings(
            mode, sensitivity, strength, window, detect_from, correct_at, options or AscedOptions()
        )
        return io.NodeOutput(*guard_model(model, settings, region))


class ASCEDOptions(io.ComfyNode):
    """Finer settings of the guard."""

    @classmethod
    def define_schema(cls):
        defaults = AscedOptions()

        def fraction(name: str, maximum: float, step: float, tooltip: str) -> io.Input:
            return io.Float.Input(name, default=getattr(defaults, name), min=0.0, max=maximum, step=step, tooltip=tooltip)

        return io.Schema(
            node_id="ASCEDOptions",
            display_name="ASCED Options",
            category=CATEGORY,
            description="Finer settings for the ASCED Artifact Guard: how to detect, what counts as a region, how to repair.",
            search_aliases=["asced settings", "artifact options"],
            inputs=[
                io.Combo.Input(
                    "detector", options=list(DETECTORS), default=defaults.detector,
                    tooltip="What counts as wrong. score dynamics: bursts that freeze, regions still moving when the rest has "
                    "settled or settled long before it, weighed by a small network. clean estimate and weighted score: any fast "
                    "change, as in the paper's code and print.",
                ),
                io.Combo.Input(
                    "correction", options=list(CORRECTIONS), default=defaults.correction,
                    tooltip="What is renoised in a region, for the model to redraw. surroundings: what lies around it; where the "
                    "detector has doubts, what was there before its onset. targeted: "
                    "what is in it, as published. state replacement: what was there before the window. score clipping: "
                    "only limits the change, adds no noise.",
                ),
                io.Int.Input(
                    "reverse_step", default=defaults.reverse_step, min=1, max=100,
                    tooltip="targeted: how many steps back to take the image that is renoised. 1 is the latest; larger "
                    "goes further back before the artifact, and loses detail.",
                ),
                fraction("blur", 0.5, LENGTH_STEP, "clean estimate and weighted score: smoothing of the changes before they are "
                         "judged, as a fraction of the shorter side (at least one latent pixel). Larger ignores finer artifacts. 0: none."),
                fraction("min_area", 1.0, 0.0001, "Regions must be larger than this fraction of the image."),
                fraction("max_area", 1.0, 0.001, "Regions must be smaller than this fraction of the image."),
                fraction("min_width", 0.5, LENGTH_STEP, "Regions must be at least this wide, as a fraction of the shorter "
                         "side. 0: thin lines count too."),
                fraction("dilate", 0.5, LENGTH_STEP, "How far repair reaches beyond a region, as a fraction of the shorter "
                         "side (at least one latent pixel). 0: not at all."),
                io.Int.Input(
                    "rounds", default=defaults.rounds, min=1, max=10,
                    tooltip="How often to look and repair in one run. Each round that repairs costs one model call. From 2 on the "
                    "steps after a repair are watched too, and a region that clearly came back is renoised once more.",
                ),
                io.Int.Input(
                    "noise_seed", default=defaults.noise_seed, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="Varies the noise of the repair, and nothing else.",
                ),
                io.Boolean.Input(
                    "keep_unguarded", default=defaults.keep_unguarded, optional=True, advanced=True,
                    tooltip="Also finish the run without its repairs, for ASCED Unguarded Result to show. Costs the rest of "
                    "the run once more, when something is repaired.",
                ),
            ],
            outputs=[AscedOptionsType.Output("options", display_name="options", tooltip="Connect it to the guard's options.")],
        )

    @classmethod
    def execute(
        cls, detector, correction, reverse_step, blur, min_area, max_area, min_width, dilate, rounds, noise_seed,
        keep_unguarded=None,
    ) -> io.NodeOutput:
        blur, min_width, dilate = (as_published(*length) for length in (("blur", blur), ("min_width", min_width), ("dilate", dilate)))
        return io.NodeOutput(AscedOptions(
            detector, correction, reverse_step, blur, min_area, max_area, min_width, dilate, rounds, noise_seed,
            bool(keep_unguarded),
        ))


def as_published(name: str, value: float) -> float:
    """A length in fractions of the side; the default itself for what the page makes of it. Published are pixels of 256, and once a
    widget was touched, fed by a primitive or loaded from an API file, the page keeps no more decimals than its steps have."""
    default = getattr(AscedOptions(), name)
    return default if value == round(default, LENGTH_DECIMALS) else value


class ASCEDKSampler(io.ComfyNode):
    """Core's KSampler with a guard built in."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASCEDKSampler",
            display_name="KSampler (ASCED)",
            category=CATEGORY,
            description="KSampler with the ASCED Artifact Guard built in: samples, finds artifacts, repairs them.",
            search_aliases=["asced sampler", "artifact ksampler", "guarded sampler"],
            hidden=[io.Hidden.extra_pnginfo],
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising."),
                *sampler_inputs(
                    "The seed of the noise. The same seed gives the same result.", "Number of steps; the guard needs 3."
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="1 makes a new image; lower keeps more of the latent (image to image).",
                ),
                mode_input(),
                sensitivity_input(),
                strength_input(),
                AscedOptionsType.Input("options", optional=True, tooltip="Finer settings, from ASCED Options."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The denoised latent."),
                io.Mask.Output("artifact_mask", display_name="artifact_mask", tooltip="The regions found, one mask an image."),
                ArtifactReportType.Output("report", display_name="report", tooltip="What the guard found: for ASCED Report."),
            ],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, mode,
        sensitivity, strength, options=None,
    ) -> io.NodeOutput:
        settings = GuardSettings(mode, sensitivity, strength, options=options or AscedOptions())
        guarded, report = guard_model(model, settings)
        (latent,) = core_nodes.common_ksampler(
            guarded, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        if not report.runs and strength > 0:
            report.add_unsampled(latent)
        record = report.find(latent)
        add_to_metadata(cls.hidden, record)
        return io.NodeOutput(latent, record.artifact_mask(), report)


class ASCEDReport(io.ComfyNode):
    """Reads a report after sampling."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASCEDReport",
            display_name="ASCED Report",
            category=CATEGORY,
            description="Shows what the guard found and did: regions over the image, curves, a mask, and a summary.",
            search_aliases=["artifact report", "artifact mask", "asced mask", "score curves"],
            is_output_node=True,
            inputs=[
                *report_inputs(),
                io.Image.Input(
                    "image", optional=True, tooltip="The decoded image, to draw on. Without it a rough preview is used."
                ),
            ],
            outputs=[
                io.Mask.Output("artifact_mask", display_name="artifact_mask", tooltip="The regions found, at image size, one mask an image."),
                io.Image.Output("overlay", display_name="overlay", tooltip="The regions drawn on the image."),
                io.Image.Output("curves", display_name="curves", tooltip="Score speed and acceleration inside and outside the regions."),
                io.Float.Output("artifact_fraction", display_name="artifact_fraction", tooltip="Share of the pixels that lie in regions, 0 to 1."),
                io.String.Output("summary", display_name="summary", tooltip="Everything that was found, done and spent, as JSON."),
            ],
        )

    @classmethod
    def execute(cls, report, latent, image=None) -> io.NodeOutput:
        record = report.find(latent)
        add_to_metadata(cls.hidden, record)
        mask = record.artifact_mask()
        overlay, curves = draw_overlay(record, latent, image), draw_curves(record)
        pictures = [p for tensor in (overlay, curves) for p in ui.PreviewImage(tensor, cls=cls).as_dict()["images"]]
        summary = json.dumps(record.summary(), indent=2, allow_nan=False)
        return io.NodeOutput(mask, overlay, curves, mask.mean().item(), summary, ui={"images": pictures})


class ASCEDUnguarded(io.ComfyNode):
    """Gives what a guarded run would have given without its repairs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ASCEDUnguarded",
            display_name="ASCED Unguarded Result",
            category=CATEGORY,
            description="What the same run gives without the guard's repairs, to compare before and after. Switch "
            "keep_unguarded on in ASCED Options.",
            search_aliases=["asced before after", "compare guard", "unguarded latent"],
            inputs=[
                *report_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent",
                    tooltip="The latent without repairs; the sampler's own output if nothing was repaired.",
                ),
            ],
        )

    @classmethod
    def execute(cls, report, latent) -> io.NodeOutput:
        return io.NodeOutput(report.find(latent).without_repairs(latent))


NODES = [ASCEDGuard, ASCEDOptions, ASCEDKSampler, ASCEDReport, ASCEDUnguarded]
