"""Puts the demo's pictures on one sheet. Run by the demo with the environment's Python, which has Pillow:

    python contact_sheet.py FOLDER SHEET [SHEET ...]

FOLDER holds pictures ROLE_*.png of some of the roles below, and perhaps curves_*.png, which go underneath. The format of a sheet follows its name; a JPEG
is kept small enough for a template's picture.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROWS = {
    "without": "without\nthe guard", "with": "with\nthe guard", "regions": "what it\nfound",
    "fam_flawed": "with a\nflaw", "fam_maps": "flaw map", "fam_refined": "refined",
    "fam_lora_images": "training\nimages", "fam_lora_without": "without\nthe LoRA", "fam_lora_with": "with\nthe LoRA",
}
TILE, GAP, LABEL = 128, 6, 96
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
JPEG_BYTES = 150_000


def tile(path: Path) -> Image.Image:
    """A picture at the size of a tile, its pixels kept square and sharp."""
    with Image.open(path) as picture:
        return picture.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)


def assemble(folder: Path) -> Image.Image:
    rows = {role: sorted(folder.glob(f"{role}_*.png")) for role in ROWS}
    rows = {role: paths for role, paths in rows.items() if paths}
    curves = Image.new("RGB", (1, 1), BACKGROUND)
    for path in sorted(folder.glob("curves_*.png"))[:1]:
        with Image.open(path) as picture:
            curves = picture.convert("RGB")
    width = max(LABEL + max(map(len, rows.values())) * (TILE + GAP), curves.width) + GAP
    top = GAP + len(rows) * (TILE + GAP)
    sheet = Image.new("RGB", (width, top + curves.height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (role, paths) in enumerate(rows.items()):
        y = GAP + index * (TILE + GAP)
        draw.multiline_text((GAP, y + TILE // 2), ROWS[role], fill=INK, font=ImageFont.load_default(15), anchor="lm")
        for column, path in enumerate(paths):
            sheet.paste(tile(path), (LABEL + column * (TILE + GAP), y))
    sheet.paste(curves, ((width - curves.width) // 2, top))
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".jpg":
        sheet.save(path, optimize=True)
        return
    for quality in range(90, 20, -10):
        sheet.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= JPEG_BYTES:
            return


def main() -> None:
    folder, *targets = map(Path, sys.argv[1:])
    sheet = assemble(folder)
    for target in targets:
        save(sheet, target)


if __name__ == "__main__":
    main()
