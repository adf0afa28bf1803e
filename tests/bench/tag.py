"""Q3 as a whole: every estimate against the exact one, the toy, the demo model, and what it costs (P4)."""

from . import tag_cost, tag_demo, tag_exact, tag_toy


def run(pack, output, data) -> dict:
    parts = {"exact": tag_exact, "toy": tag_toy, "cost": tag_cost, "demo": tag_demo}
    return {name: part.run(pack, output, data) for name, part in parts.items()}
