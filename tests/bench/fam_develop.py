"""The figures of `fam` on the development images, by which highlighter and refining were chosen. They are nobody's result."""

from pathlib import Path

from ..harness.cache import cache_folder
from .data import load_fashion_mnist
from .fam import PAIRS, follow_cues, judge_flaws, shipped_highlighter
from .fam_flaws import as_image
from .fam_refining import refine_flaws
from .train_highlighter import development_images, second_opinion

JUDGED, REFINED = 1000, 50
SEED = 77
VARIANTS = (
    {"start_from": "image", "grow": 0.0, "threshold": 0.5}, {"start_from": "image"}, {}, {"denoise": 0.35},
    {"grow": 0.0}, {"grow": 0.06}, {"threshold": 0.5},
)
"""Ways to refine, as changes of what the benchmark uses. The first is what refining did before it filled regions."""


def run(pack, output: Path, data: Path | None) -> dict:
    (images, labels), _ = load_fashion_mnist(data)
    highlighter, second = shipped_highlighter(), second_opinion(images, cache_folder() / "data")
    chosen = development_images(images)
    sound, spoilt, refined = chosen[: 2 * JUDGED + REFINED].split([JUDGED, JUDGED, REFINED])
    clean = highlighter.generated_probability(as_image(images[sound]))
    figures = {
        "planted_flaws": judge_flaws(highlighter, images[spoilt], "develop", clean, SEED),
        "spurious_cues": follow_cues(highlighter, images[sound[:PAIRS]], images[spoilt[:PAIRS]], SEED),
    }
    for variant in VARIANTS:
        name = ", ".join(f"{key} {value}" for key, value in variant.items()) or "as in the benchmark"
        figures[name] = refine_flaws(highlighter, second, images[refined], labels[refined], SEED + 1, output, **variant)
        print(name, figures[name], flush=True)
    return figures
