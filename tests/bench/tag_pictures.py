"""Pictures for TAG's help pages and template: the same noise without and with guidance, disturbed in two ways."""

import comfy.sample
import comfy.samplers
import torch
from PIL import Image, ImageDraw

from ..harness.contact_sheet import save
from ..harness.pack import ROOT
from .data import load_fashion_mnist
from .tag_demo import DemoRuns, Sizes
from .tag_runs import PREDICTOR, guided

SHOWN, NOISE, TILE, GAP, LABEL = 8, 0.2, 96, 4, 150
TEMPLATE_CLASS, TEMPLATE_SEED, TEMPLATE_STEPS, TEMPLATE_CFG, TEMPLATE_NOISE = "t-shirt", 7, 20, 2.5, 1.15
"""As in workflows/tag.json."""
DOCS = ROOT / "web" / "docs" / "images"


def tiles(images: torch.Tensor) -> list[Image.Image]:
    pixels = ((images.movedim(1, -1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return [Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST) for image in pixels]


def sheet(rows: dict[str, torch.Tensor], chart: torch.Tensor | None = None) -> Image.Image:
    """Rows of pictures with their names, and a chart under them."""
    from artifact_guard.nodes.plots import BACKGROUND, INK, font

    width = LABEL + SHOWN * (TILE + GAP) + GAP
    height = GAP + len(rows) * (TILE + GAP)
    below = None if chart is None else Image.fromarray((chart[0].numpy() * 255).astype("uint8"))
    picture = Image.new("RGB", (max(width, below.width if below else 0), height + (below.height if below else 0)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for row, (name, images) in enumerate(rows.items()):
        y = GAP + row * (TILE + GAP)
        draw.multiline_text((GAP, y + TILE // 2), name, fill=INK, font=font(14), anchor="lm")
        for column, tile in enumerate(tiles(images[:SHOWN])):
            picture.paste(tile, (LABEL + column * (TILE + GAP), y))
    if below:
        picture.paste(below, ((picture.width - below.width) // 2, height))
    return picture


def run(pack, output, data) -> dict:
    from artifact_guard.nodes.tag.time_gap import draw_time_gap

    train, _ = load_fashion_mnist(data)
    runs = DemoRuns(pack.nodes.demo.model, Sizes.here())
    runs.tokens = runs.tokens[:SHOWN]

    def pair(noise: float, steps: int, predictor: str):
        model, report = guided(runs.model, train, predictor)
        measured, before = guided(runs.model, train, predictor, strength=0.0)
        return runs(measured, noise, steps), runs(model, noise, steps), before.runs[-1], report.runs[-1]

    bare, helped, before, after = pair(NOISE, 20, "")
    _, with_predictor, _, _ = pair(NOISE, 20, PREDICTOR)
    disturbed = sheet(
        {"noise added at\neach step": bare, "TAG,\ntraining-free": helped, "TAG,\nwith a predictor": with_predictor},
        draw_time_gap(before),
    )
    template = template_sheet(pack.nodes.demo.model, runs.model, train)
    curve = draw_time_gap(after)
    DOCS.mkdir(exist_ok=True)
    save(disturbed, DOCS / "tag.png")
    save(template, ROOT / "workflows" / "tag.jpg")
    save(Image.fromarray((curve[0].numpy() * 255).astype("uint8")), DOCS / "tag_time_gap.png")
    losses = training_curve(pack, runs.model, train)
    save(Image.fromarray((losses[0].numpy() * 255).astype("uint8")), DOCS / "tag_training.png")
    return {"time_gap": {"off": round(before.time_gap(), 1), "on": round(after.time_gap(), 1)}}


def template_sheet(demo_model, model, train) -> Image.Image:
    """What workflows/tag.json makes: the same noisy run without and with guidance, and the time gap."""
    from artifact_guard.nodes.tag.time_gap import draw_time_gap

    helped, report = guided(model, train, PREDICTOR)
    positive, negative = ([[demo_model.class_token(c), {}]] for c in (demo_model.LABELS.index(TEMPLATE_CLASS), None))
    rows = {}
    sampler = comfy.samplers.ksampler("euler_ancestral", {"eta": 1.0, "s_noise": TEMPLATE_NOISE})
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", TEMPLATE_STEPS)
    latent = torch.zeros(SHOWN, 3, 32, 32)
    noise = comfy.sample.prepare_noise(latent, TEMPLATE_SEED)
    for name, used in ((f"s_noise {TEMPLATE_NOISE}", model), (f"s_noise {TEMPLATE_NOISE},\nTAG", helped)):
        with torch.inference_mode():
            rows[name] = comfy.sample.sample_custom(
                used, noise, TEMPLATE_CFG, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=TEMPLATE_SEED)
    return sheet(rows, draw_time_gap(report.runs[-1]))


def training_curve(pack, model, train) -> torch.Tensor:
    """The loss curve of the training node, 400 steps on 4,000 images."""
    from artifact_guard.nodes.tag.train_node import train as train_as_node
    from artifact_guard.nodes.tag.training import TrainingSettings

    chosen = train[0][:: len(train[0]) // 4000]
    return train_as_node(model, [{"samples": chosen}], TrainingSettings(400, 64), None, None)[1]
