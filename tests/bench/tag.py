"""Q3 as a whole: every estimate against the exact one, the toy, the demo model, and what it costs (P4)."""

import time

from . import tag_cost, tag_demo, tag_exact, tag_toy


def run(pack, output, data) -> dict:
    figures, seconds = {}, {}
    for name, part in {"exact": tag_exact, "toy": tag_toy, "cost": tag_cost, "demo": tag_demo}.items():
        begun = time.perf_counter()
        figures[name] = part.run(pack, output, data)
        seconds[name] = round(time.perf_counter() - begun)
        print(f"{name}: {seconds[name]} s", flush=True)
    return figures | {"seconds": seconds}
