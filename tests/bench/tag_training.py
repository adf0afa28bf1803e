"""P7: how long the node Train Time Predictor (TAG) takes to a held-out time gap of 1.2 times the exact posterior's.

    python dev.py bench tag_training

The node itself with its defaults on the 60,000 training images of Fashion-MNIST and the demo model, without conditions and
with each image's class; then three times as many steps, by going on. Gaps are those of noised test images. Seconds are the
node's, its previews and its own held-out gap included. Without a GPU once only: minutes each.
"""

import time

import torch

from .train_time_predictor import LATEST, exact_gap, gap, new, training_data

ROUNDS = 3
"""Times the node runs, each going on with the predictor of the one before."""

DRAWS = 4096
GOAL = 1.2


def defaults() -> dict:
    from artifact_guard.nodes.tag.schema import TAGTrainTimePredictor

    return {i.id: i.default for i in TAGTrainTimePredictor.define_schema().inputs if getattr(i, "default", None) is not None}


def trained(model, frames: torch.Tensor, conditioning: list | None, rounds: int):
    """(predictor, seconds so far) after each run of the node's work."""
    from artifact_guard.nodes.tag.train_node import train
    from artifact_guard.nodes.tag.training import TrainingSettings

    seconds, predictor, settings = 0.0, None, TrainingSettings(**defaults())
    for _ in range(rounds):
        begun = time.perf_counter()
        predictor = train(model, [{"samples": frames}], settings, conditioning, predictor)[0]
        seconds += time.perf_counter() - begun
        yield predictor, seconds


def told(predictor, seconds: float, model, test, exact: dict[float, float]) -> dict:
    found = {latest: gap(predictor, model, test, latest, DRAWS) for latest in LATEST}
    return {"steps": predictor.steps, "seconds": round(seconds, 1), "gap": found,
            "over_exact": {latest: round(found[latest] / exact[latest], 3) for latest in LATEST}}


def run(pack, output, data, rounds: int | None = None) -> dict:
    from artifact_guard.nodes.tag.training import TrainingData

    demo_model = pack.nodes.demo.model
    model, _ = demo_model.load_demo_model()
    train, test = training_data(demo_model, data)
    on_gpu = torch.cuda.is_available()
    rounds = rounds or (ROUNDS if on_gpu else 1)
    like_shipped = new(model, test, 0)
    exact = {latest: exact_gap(like_shipped, model, test, latest, DRAWS) for latest in LATEST}
    figures = {"goal": GOAL, "defaults": defaults(), "draws": DRAWS, "exact": exact}
    for case in ("unconditional", "conditional"):
        conditioning = [[train.conditions[:, None], {}]] if case == "conditional" else None
        asked = test if case == "conditional" else TrainingData(test.frames)
        rows = figures[case] = []
        for predictor, seconds in trained(model, train.frames, conditioning, rounds):
            rows.append(told(predictor, seconds, model, asked, exact))
            print(case, rows[-1], flush=True)
        reached = [row for row in rows if row["over_exact"][LATEST[0]] <= GOAL]
        figures[f"{case}: seconds to the goal"] = reached[0]["seconds"] if reached else None
    return figures
