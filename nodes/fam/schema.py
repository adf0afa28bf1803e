"""The FAM nodes: what a user wires and turns."""

import json

from comfy_api.latest import io, ui

from ..sampler_inputs import sampler_inputs
from .attention import TARGETS, AttentionSettings, patch_attention
from .grad_cam import flaw_map as make_flaw_map
from .highlighter_schema import (
    CATEGORY, FAMLoadFlawHighlighter, FAMSaveFlawHighlighter, FAMTrainFlawHighlighter, FlawHighlighterType,
)
from .noise import FlawNoise
from .pictures import draw_heat
from .refine import STARTS, Refiner, RefineSettings


class FAMFlawMap(io.ComfyNode):
    """Shows where an image looks generated."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FAMFlawMap",
            display_name="Flaw Map (FAM)",
            category=CATEGORY,
            description="Shows where an image looks generated, as a mask and as a picture, and how much it does.",
            search_aliases=["flaw activation map", "artifact map", "artifact heatmap", "grad-cam", "fam"],
            inputs=[
                FlawHighlighterType.Input("flaw_highlighter", tooltip="Trained on images like these."),
                io.Image.Input("image", tooltip="The images to look at, of any size."),
                io.Combo.Input(
                    "reduce", options=["each image", "batch mean"], default="each image",
                    tooltip="each image: one map an image. batch mean: one map for all, the flaws the images share.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "flaw_map", display_name="flaw_map",
                    tooltip="0 to 1 at image size; near 1 is the most suspect place of the image, however sound it is.",
                ),
                io.Image.Output("overlay", display_name="overlay", tooltip="The map as heat over the image."),
                io.Float.Output(
                    "generated_probability", display_name="generated_probability",
                    tooltip="How surely the images are generated, 0 to 1, the mean over the batch.",
                ),
            ],
        )

    @classmethod
    def execute(cls, flaw_highlighter, image, reduce) -> io.NodeOutput:
        maps, probabilities = make_flaw_map(flaw_highlighter, image)
        if reduce == "batch mean":
            maps = maps.mean(dim=0, keepdim=True)
        overlay = draw_heat(image, maps)
        return io.NodeOutput(maps, overlay, probabilities.mean().item(), ui=ui.PreviewImage(overlay, cls=cls))


class FAMAttentionPatch(io.ComfyNode):
    """Strengthens a model's attention where a map is high."""

    @classmethod
    def define_schema(cls):
        defaults = AttentionSettings()
        return io.Schema(
            node_id="FAMAttentionPatch",
            display_name="Flaw Attention Patch (FAM)",
            category=CATEGORY,
            description="Strengthens a model's self-attention where a map is high, so that more care goes into these places.",
            search_aliases=["fam attention", "attention mask", "self-attention boost", "regional attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. It is not changed; the patched one comes out."),
                io.Mask.Input(
                    "flaw_map", tooltip="Where, 0 to 1, at image size: one mask for all, one an image, or one a frame."
                ),
                io.Float.Input(
                    "strength", default=defaults.strength, min=0.0, max=1.0, step=0.001,
                    tooltip="Keys and values are scaled by 1 + strength x map. Higher acts more, and distorts above about "
                    "0.1. 0 switches the patch off, bit for bit.",
                ),
                io.Combo.Input(
                    "target", options=list(TARGETS), default=defaults.target, advanced=True,
                    tooltip="key: these places are looked at more. value: what they say counts more. Published: both.",
                ),
                io.Float.Input(
                    "start_percent", default=defaults.start_percent, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="Fraction of the noise schedule at which the patch sets in. 0 is the beginning.",
                ),
                io.Float.Input(
                    "end_percent", default=defaults.end_percent, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="Fraction of the noise schedule at which the patch ends. 1 is the end.",
                ),
                io.String.Input(
                    "blocks", default=defaults.blocks, advanced=True,
                    tooltip="Which blocks, such as middle, output.3-5 or double.0-9. Empty: all.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The patched model: connect it to the sampler.")],
        )

    @classmethod
    def execute(cls, model, flaw_map, strength, target, start_percent, end_percent, blocks) -> io.NodeOutput:
        settings = AttentionSettings(strength, target, start_percent, end_percent, blocks)
        return io.NodeOutput(patch_attention(model, flaw_map, settings))


class FAMNoise(io.ComfyNode):
    """Amplifies noise where a map is high."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FAMNoise",
            display_name="Flaw Noise (FAM)",
            category=CATEGORY,
            description="Adds a flaw map to any noise, so that flawed places start from more of it.",
            search_aliases=["fam noise", "noise mask", "amplify noise"],
            inputs=[
                io.Noise.Input("noise", tooltip="Any noise, from RandomNoise for instance."),
                io.Mask.Input("flaw_map", tooltip="Where, 0 to 1, at image size."),
                io.Float.Input(
                    "strength", default=0.01, min=0.0, max=1.0, step=0.001,
                    tooltip="The noise gains strength x map. Higher acts more. 0 is the wrapped noise, bit for bit.",
                ),
            ],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise, flaw_map, strength) -> io.NodeOutput:
        return io.NodeOutput(FlawNoise(noise, flaw_map, strength))


class FAMRefine(io.ComfyNode):
    """Redraws flawed regions and keeps what got better."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FAMRefine",
            display_name="Refine Flaws (FAM)",
            category=CATEGORY,
            description="Finds flawed regions, redraws just those, and keeps the result where it looks less generated.",
            search_aliases=["fam refine", "fix artifacts", "detailer", "repair regions", "inpaint flaws"],
            inputs=[
                io.Model.Input("model", tooltip="The model that redraws; any checkpoint."),
                io.Vae.Input("vae", tooltip="Its VAE: the highlighter judges decoded images."),
                FlawHighlighterType.Input("flaw_highlighter", tooltip="Trained on images like these."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent", tooltip="The images to refine. A noise mask on it limits where."),
                *sampler_inputs("The seed of the noise; each round uses the next one.", "Number of steps a round."),
                io.Float.Input(
                    "denoise", default=0.35, min=0.01, max=1.0, step=0.01,
                    tooltip="How much of what a region is redrawn from is forgotten: higher redraws more freely. Its own content "
                    "goes anyway, unless start_from is image.",
                ),
                io.Int.Input(
                    "rounds", default=1, min=1, max=20,
                    tooltip="How often to look and redraw. A round that made an image worse is undone.",
                ),
                io.Float.Input(
                    "attention_strength", default=0.025, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="Strength of the attention patch while redrawing. 0: without it, as are models that it cannot patch.",
                ),
                io.Float.Input(
                    "noise_strength", default=0.0, min=0.0, max=1.0, step=0.001, advanced=True,
                    tooltip="How much of the map is added to the noise. Published for pixel models: 0.01. 0: none.",
                ),
                io.Float.Input(
                    "threshold", default=0.5, min=0.01, max=1.0, step=0.01, advanced=True,
                    tooltip="A region is where the map reaches this. Lower takes in more of the image; near 1 nothing is found.",
                ),
                io.Combo.Input(
                    "start_from", options=list(STARTS), default=STARTS[0], optional=True, advanced=True,
                    tooltip="What a region is redrawn from. surroundings: their smooth continuation, so that nothing of the "
                    "flaw is left. image: the flawed image itself, which keeps more of the picture, and of the flaw.",
                ),
                io.Float.Input(
                    "grow", default=RefineSettings.grow, min=0.0, max=0.5, step=0.001, optional=True, advanced=True,
                    tooltip="Widens the regions on all sides, as a fraction of the shorter side. Higher redraws more. 0: as marked.",
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The refined images."),
                io.Mask.Output("flaw_map", display_name="flaw_map", tooltip="The flaw maps of the refined images."),
                io.String.Output(
                    "probabilities", display_name="probabilities",
                    tooltip="Of each image how surely it is generated, before and after each round, as JSON.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, flaw_highlighter, positive, negative, latent, seed, steps, cfg, sampler_name, scheduler, denoise,
        rounds, attention_strength, noise_strength, threshold, start_from=None, grow=None,
    ) -> io.NodeOutput:
        settings = RefineSettings(
            seed, steps, cfg, sampler_name, scheduler, denoise, rounds, attention_strength, noise_strength, threshold,
            STARTS[0] if start_from is None else start_from, RefineSettings.grow if grow is None else grow,
        )
        refined, maps, report = Refiner(model, vae, flaw_highlighter, positive, negative, latent, settings).run()
        return io.NodeOutput(refined, maps, json.dumps(report, indent=2))


NODES = [
    FAMTrainFlawHighlighter, FAMSaveFlawHighlighter, FAMLoadFlawHighlighter, FAMFlawMap, FAMAttentionPatch, FAMNoise,
    FAMRefine,
]
