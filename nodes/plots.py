"""Pictures for reports, drawn with PIL: line charts with shaded phases, and regions drawn over an image."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FAINT = (255, 255, 255), (40, 40, 40), (205, 205, 205)
LINE_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167))
"""Told apart with any kind of colour vision (Okabe and Ito)."""
BAND_COLOURS = ((232, 240, 250), (253, 240, 225), (232, 246, 236))
REGION_COLOUR = (1.0, 0.25, 0.1)


@dataclass
class Panel:
    """One chart: lines over common x values, the x axis divided into named bands.

    lines: name -> y values, as many as `x_labels`; values that are not finite are left out.
    bands: (name, first, last) in positions along the x axis, 0 the first value.
    """

    title: str
    lines: dict[str, list[float]]
    x_labels: list[str]
    x_title: str = ""
    bands: list[tuple[str, float, float]] = field(default_factory=list)


def font(size: int) -> ImageFont.ImageFont:
    """Pillow's own font, at the wanted size where this Pillow can scale it."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, box: tuple[int, int, int, int]) -> None:
    """Draw one panel into the box (left, top, right, bottom) of a picture."""
    left, top, right, bottom = box[0] + 64, box[1] + 34, box[2] - 16, box[3] - 44
    values = [v for line in panel.lines.values() for v in line if math.isfinite(v)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high > low else low + 1.0
    last = max(1, len(panel.x_labels) - 1)

    def place(position: float, value: float) -> tuple[float, float]:
        return left + (right - left) * position / last, bottom - (bottom - top) * (value - low) / (high - low)

    for index, (name, first, end) in enumerate(panel.bands):
        x0, x1 = place(max(0.0, first), 0)[0], place(min(float(last), end), 0)[0]
        if x1 > x0:
            draw.rectangle((x0, top, x1, bottom), fill=BAND_COLOURS[index % len(BAND_COLOURS)])
            if x1 - x0 > draw.textlength(name, font=font(12)):
                draw.text(((x0 + x1) / 2, top + 3), name, fill=(120, 120, 120), font=font(12), anchor="ma")
    draw.rectangle((left, top, right, bottom), outline=FAINT)
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = place(0, value)[1]
        draw.line((left - 4, y, left, y), fill=FAINT)
        draw.text((left - 8, y), f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}", fill=INK, font=font(12), anchor="rm")
    every = max(1, math.ceil(len(panel.x_labels) / 10))
    for position in range(0, len(panel.x_labels), every):
        x = place(position, low)[0]
        draw.line((x, bottom, x, bottom + 4), fill=FAINT)
        draw.text((x, bottom + 6), panel.x_labels[position], fill=INK, font=font(12), anchor="ma")
    draw.text(((left + right) / 2, bottom + 24), panel.x_title, fill=INK, font=font(12), anchor="ma")
    draw.text((left, box[1] + 8), panel.title, fill=INK, font=font(15))

    key = right
    for index, (name, line) in reversed(list(enumerate(panel.lines.items()))):
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        points = [place(i, v) for i, v in enumerate(line) if math.isfinite(v)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=3, joint="curve")
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        key -= draw.textlength(name, font=font(13)) + 8
        draw.text((key, box[1] + 10), name, fill=colour, font=font(13))
        key -= 14


def draw_chart(panels: list[Panel], width: int = 768, panel_height: int = 260) -> torch.Tensor:
    """The panels one under the other, as an IMAGE (1, H, W, 3), 0..1."""
    picture = Image.new("RGB", (width, panel_height * len(panels)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for index, panel in enumerate(panels):
        draw_panel(draw, panel, (0, index * panel_height, width, (index + 1) * panel_height))
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255.0)[None]


def draw_regions(image: torch.Tensor, mask: torch.Tensor, smallest: int = 256, longest: int = 4096) -> torch.Tensor:
    """Tint the regions of a mask and outline them; small images are enlarged first, so that there is something to see.

    Args:
        image: IMAGE (B, H, W, 3 or more), 0..1. One image, or as many as masks.
        mask: MASK (B, h, w), 0..1, of any size.
        smallest: shorter side of the result in pixels at least, by a whole factor, unless its longer side were then more than `longest`:
            a minute of audio is 16 x 646.

    Returns:
        IMAGE (B, H', W', 3), float32 on the CPU.
    """
    image = image[..., :3].float().cpu().movedim(-1, 1)
    sides = image.shape[-2:]
    factor = max(1, min(math.ceil(smallest / min(sides)), longest // max(sides)))
    image = F.interpolate(image, scale_factor=factor, mode="nearest")
    inside = F.interpolate(mask.float().cpu()[:, None], size=image.shape[-2:], mode="nearest") > 0.5
    count = max(len(image), len(inside))
    image, inside = (t if len(t) == count else t[:1].expand(count, -1, -1, -1) for t in (image, inside))
    reach = max(1, factor // 4)
    rows = F.max_pool2d(inside.float(), (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    grown = F.max_pool2d(rows, (1, 2 * reach + 1), stride=1, padding=(0, reach)) > 0.5
    colour = torch.tensor(REGION_COLOUR).view(1, 3, 1, 1)
    tinted = torch.where(inside, 0.7 * image + 0.3 * colour, image)
    return torch.where(grown & ~inside, colour, tinted).movedim(1, -1).clamp(0, 1)
