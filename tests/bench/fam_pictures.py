"""Pictures for FAM's help pages: sound images with planted flaws, their maps, and the same refined by the demo model."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from .data import load_fashion_mnist
from .fam import shipped_highlighter
from .fam_flaws import as_image, plant_flaws
from .fam_refining import refine

COUNT, SCALE, GAP, LABEL = 10, 3, 4, 92
SEED = 21
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def enlarge(image: torch.Tensor) -> torch.Tensor:
    """IMAGE (B, 32, 32, 3), every pixel a square."""
    return F.interpolate(image.movedim(-1, 1), scale_factor=SCALE, mode="nearest").movedim(1, -1)


def sheet(rows: dict[str, torch.Tensor], captions: dict[str, list[str]], path: Path) -> None:
    """Write rows of images (B, H, W, 3) with a name before each row and captions under its images."""
    side, line = SCALE * 32, 16
    height = sum(side + GAP + (line if name in captions else 0) for name in rows)
    picture = Image.new("RGB", (LABEL + COUNT * (side + GAP), height + GAP), BACKGROUND)
    draw, font, top = ImageDraw.Draw(picture), ImageFont.load_default(13), GAP
    for name, images in rows.items():
        draw.multiline_text((GAP, top + side // 2), name, fill=INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray((image.clamp(0, 1).numpy() * 255).round().astype(np.uint8))
            left = LABEL + column * (side + GAP)
            picture.paste(tile, (left, top))
            if name in captions:
                draw.text((left + side // 2, top + side + 1), captions[name][column], fill=INK, font=font, anchor="ma")
        top += side + GAP + (line if name in captions else 0)
    picture.save(path, optimize=True, quality=85)


def run(pack, output: Path, data: Path | None) -> dict:
    from artifact_guard.nodes.fam.grad_cam import flaw_map
    from artifact_guard.nodes.fam.pictures import draw_heat

    _, (images, labels) = load_fashion_mnist(data)
    chosen = torch.cat([torch.nonzero(labels == label)[SEED : SEED + 1, 0] for label in range(COUNT)])
    flawed, _ = plant_flaws(images[chosen], "develop", SEED)
    highlighter = shipped_highlighter()
    maps, before = flaw_map(highlighter, as_image(flawed))
    heat = draw_heat(as_image(flawed), maps, smallest=32 * SCALE)
    numbers = [f"{p:.2f}" for p in before.tolist()]
    rows = {"with a\nplanted flaw": enlarge(as_image(flawed)), "flaw map": heat}
    sheet(rows, {"flaw map": numbers}, output / "fam_flaw_map.png")

    refined = as_image(refine(highlighter, flawed, labels[chosen]))
    after = [f"{p:.2f}" for p in highlighter.generated_probability(refined).tolist()]
    rows |= {"refined": enlarge(refined), "sound": enlarge(as_image(images[chosen]))}
    sheet(rows, {"flaw map": numbers, "refined": after}, output / "fam_refine.png")
    return {"pictures": ["fam_flaw_map.png", "fam_refine.png"], "before": numbers, "after": after}
