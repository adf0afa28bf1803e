"""The help pages' tables come from results: what they say, and where they go."""

import json

from tests.bench import tag_tables

ROW = {"KID": 10.0, "FD_endless": 50.0, "KID_ratio": [0.5, 0.4, 0.6], "FD_endless_ratio": [0.7, 0.6, 0.8],
       "log_probability_gain": [0.123, 0.05], "time_gap": 12.4}
NEAR = ROW | {"KID": -0.2, "KID_ratio": [None, None, None]}


def case(default=ROW):
    return {"off": {"KID": 20.0, "FD_endless": 70.0, "pairs": 64}, "training-free (default)": default, "predictor": ROW}


def results(folder):
    demo = {"cases": {"10 steps": case(), "1 steps": case(), "CFG 2.5, noise 0.1": case(), "noise 0.2": case(NEAR),
                      "noise 0.2, other forms": {"off": case()["off"], "poor": ROW}}}
    cost = {"demo model": {"CFG 1": {"off": {"ratio": 1.0, "interval_95": [1, 1]}, "TAG": {"ratio": 1.02, "interval_95": [1.0, 1.04]}}}}
    off = {"W1": [4.0, 5.0, 6.0], "ratio": 1.0, "interval_95": [1.0, 1.0]}
    steered = {"W1": [1.0, 1.5, 1.2], "ratio": 0.25, "interval_95": [0.2, 0.31]}
    toy = {"off": off, "default": steered, "noise 0.1, off": off, "noise 0.1, default": steered, "3 steps, off": off,
           "exact model, off": off, "real points against others": off}
    points = {f"t {t}, s {s}": {"cosine": 0.9 + s, "length": t / 100} for t in (50, 100, 250, 400, 500, 700) for s in (0.0, 0.1)}
    whole = {"cost": cost, "demo": demo, "toy": toy, "exact": {"closed form": points}}
    (folder / "tag.json").write_text(json.dumps(whole))
    (folder / "tag_cifar10.json").write_text(json.dumps({"cases": {"noise 0.2": case()}}))
    row = {"steps": 3000, "seconds": 12.3, "gap": {"500.0": 4.9, "1000.0": 12.0}, "over_exact": {"500.0": 1.19, "1000.0": 1.2}}
    timed = {"exact": {"500.0": 4.1, "1000.0": 10.0}, "conditional": [row], "unconditional": [row]}
    (folder / "tag_training.json").write_text(json.dumps(timed))


def test_every_result_has_its_table(tmp_path):
    results(tmp_path)
    told = dict((text.split("|")[1].strip(), text) for _, text in tag_tables.tables(tmp_path))
    lines = told["case"].split("\n")
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["noise 0.2", "1 step", "10 steps", "CFG 2.5, noise 0.1"]
    assert "| 0.00 (KID within chance of 0) | 0.50 (0.40 to 0.60) | 0.70 (0.60 to 0.80) | +0.12 ± 0.05 |" in lines[2]
    assert "| poor | 0.50 (0.40 to 0.60) |" in told["at noise 0.2"]
    assert "| closed form | 1.00 | 0.50 to 5.00 | 1.00 | 7.00 |" in told["estimate of the time-linked score"]
    assert "| TAG | 1.020 | 1.000 to 1.040 |" in told["time of a run over that without: demo model"]
    assert "| default | 1.00, 1.50, 1.20 | 0.25 (0.20 to 0.31) |" in told["toy: W1 after drift"]
    apart = told["toy: W1 with noise at each of 25 steps, or few steps"]
    assert "| noise 0.1, default | 1.00, 1.50, 1.20 | 0.25 (0.20 to 0.31) |\n| 3 steps, off | 4.00, 5.00, 6.00 | 1.00 |" in apart
    exact = told["toy with the exact score"].split("\n")[2:]
    assert [line.split(" | ")[0] for line in exact] == ["| off", "| real points against others"] and exact[1].endswith("6.00 |  |")
    assert "CIFAR-10" in told and "| 3,000 steps, with classes | 12 | 4.90 | 1.19 | 12.00 | 1.20 |" in told["predictor, by the node's defaults"]
    assert tag_tables.tables(tmp_path / "nothing") == []


def test_a_table_replaces_the_one_that_begins_alike():
    new = tag_tables.table(["case", "b"], [["x", None]])
    page = "Text.\n\n| case | a |\n| --- | --- |\n| old | 1 |\n\nMore.\n"
    assert tag_tables.renewed(page, new, None) == f"Text.\n\n{new}\n\nMore.\n"
    other = tag_tables.table(["other"], [["y"]])
    assert tag_tables.renewed(page, other, page) == page.replace("| old | 1 |", f"| old | 1 |\n\n{other}")
    assert tag_tables.renewed("Text.", other, None).endswith(other)


def test_the_guidance_page_has_a_place_for_each():
    page = (tag_tables.DOCS / tag_tables.GUIDANCE).read_text(encoding="utf-8").split("\n")
    for first in ("time of a run over that without: demo model", "case", "at noise 0.2", "toy: W1 after drift",
                  "toy with the exact score", "estimate of the time-linked score"):
        assert tag_tables.place(page, tag_tables.table([first], [])) is not None, first
