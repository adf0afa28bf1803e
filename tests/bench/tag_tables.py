"""TAG's help pages from results: every table as markdown, printed, or put in the pages' place of the old one.

    python tests/bench/tag_tables.py output/bench             # print
    python tests/bench/tag_tables.py output/bench --write     # renew web/docs

Reads tag.json, or the parts of it that are there (tag_cost, tag_demo, tag_toy, tag_exact), tag_cifar10.json and
tag_training.json, as many as are there (`dev.py bench tag tag_cifar10 tag_training`).
A table is known by its first cell; one that a page does not have yet comes after the one before it. Sentences around the
tables are a person's.
"""

import argparse
import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
GUIDANCE, TRAINING = "TemporalAlignmentGuidance.md", "TAGTrainTimePredictor.md"
DEFAULT, PREDICTOR = "training-free (default)", "predictor"
PUBLISHED = {
    "noise 0.0": 1.00, "noise 0.05": 0.79, "noise 0.1": 0.60, "noise 0.2": 0.66, "noise 0.3": 0.54,
    "1 steps": 0.52, "3 steps": 0.64, "5 steps": 0.84,
}
RECORD = ("benchmark", "when", "device", "threads", "torch")
"""What tests/bench/run.py adds to a benchmark's figures."""
LATE = ("t 50", "t 100", "t 250", "t 400", "t 500")


def table(header: list[str], rows: list[list]) -> str:
    """Markdown; None is an empty cell."""
    lines = [header, ["---"] * len(header), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio(row: dict, off: dict, distance: str) -> str:
    """A ratio of distances with its 95 % interval, or without one where the distance is within chance of zero."""
    value, low, high = row[f"{distance}_ratio"]
    if value is not None:
        return f"{value:.2f} ({low:.2f} to {high:.2f})"
    name = distance.partition("_")[0]
    if off[distance] <= 0:
        return f"({name} off within chance of 0)"
    return f"{max(0.0, row[distance]) / off[distance]:.2f} ({name} within chance of 0)"


def gain(row: dict) -> str:
    value, error = row["log_probability_gain"]
    return f"{value:+.2f} ± {error:.2f}"


def cases(figures: dict, first: str) -> str:
    """The table of noise and few steps. `first` heads it: it tells one model's table from another's."""
    header = [first, "pairs", "KID off", "default: KID ratio", "with the predictor: KID ratio", "default: FD ratio",
              "log-probability, default", "with the predictor", "published ratio (FID)"]
    rows = []
    for name in sorted(figures["cases"], key=order):
        case = figures["cases"][name]
        if DEFAULT not in case or PREDICTOR not in case:
            continue
        off, default, trained = case["off"], case[DEFAULT], case[PREDICTOR]
        published = PUBLISHED.get(name)
        rows.append([
            "1 step" if name == "1 steps" else name, off["pairs"], f"{off['KID']:.1f}",
            ratio(default, off, "KID"), ratio(trained, off, "KID"), ratio(default, off, "FD_endless"), gain(default),
            gain(trained), None if published is None else f"{published:.2f}"])
    return table(header, rows)


def order(name: str) -> tuple:
    """Noise first, then few steps, then guidance by classes, each by size."""
    kind = ("noise", "steps", "CFG").index(next(word for word in ("CFG", "steps", "noise") if word in name))
    number = name.split()[0] if kind == 1 else name.split()[-1]
    return kind, float(number) if number.replace(".", "").isdigit() else 0.0, name


def forms(figures: dict) -> str:
    """Every form at the same noise, the two defaults of the main table first."""
    name = next(name for name in figures["cases"] if name.endswith("other forms"))
    noise = name.split(",")[0]
    main, others = figures["cases"][noise], figures["cases"][name]
    rows = {case: (main[case], main["off"]) for case in (DEFAULT, PREDICTOR)}
    rows |= {case: (row, others["off"]) for case, row in others.items() if case != "off"}
    return table(["at " + noise, "KID ratio", "FD ratio", "log-probability", "time gap"], [
        [case, ratio(row, off, "KID"), ratio(row, off, "FD_endless"), gain(row), f"{row['time_gap']:.0f}"]
        for case, (row, off) in rows.items()])


def costs(figures: dict) -> list[str]:
    """A table a model."""
    tables = []
    for model, by_cfg in figures.items():
        rows = [
            [f"{case}{'' if cfg == 'CFG 1' else ', ' + cfg}", f"{row['ratio']:.3f}", "{:.3f} to {:.3f}".format(*row["interval_95"])]
            for cfg, cases_of in by_cfg.items() for case, row in cases_of.items() if case != "off"]
        tables.append(table([f"time of a run over that without: {model}", "ratio", "95 % interval"], rows))
    return tables


def toys(figures: dict) -> list[str]:
    """The trained toy after a drift, with noise or few steps (of predictors that of 3 layers), and the one with the exact score."""
    names = "toy: W1 after drift", "toy: W1 with noise at each of 25 steps, or few steps", "toy with the exact score"
    drift, others, exact = groups = [], [], []
    for case, row in figures.items():
        ratio, interval = f"{row['ratio']:.2f}", "{:.2f} to {:.2f}".format(*row["interval_95"])
        if case.startswith("real points"):
            ratio = None
        elif not case.endswith("off"):
            ratio = f"{ratio} ({interval})"
        apart = case.startswith("noise") or " steps, " in case
        if apart and "predictor of" in case and "of 3 layers" not in case:
            continue
        of = exact if case.startswith(("exact model", "real points")) else others if apart else drift
        of.append([case.removeprefix("exact model, "), ", ".join(f"{w:.2f}" for w in row["W1"]), ratio])
    return [table([name, "W1, seed by seed", "ratio"], rows) for name, rows in zip(names, groups)]


def estimates(figures: dict) -> str:
    """Ranges over noises of 0.1 and more."""
    def span(points: dict, what: str, times: tuple) -> str:
        values = [p[what] for at, p in points.items() if at.split(",")[0] in times and not at.endswith("s 0.0")]
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return low if low == high else f"{low} to {high}"

    header = ["estimate of the time-linked score", "cosine, t to 500", "length, t to 500", "cosine, t 700", "length, t 700"]
    return table(header, [
        [name, *(span(points, what, times) for times in (LATE, ("t 700",)) for what in ("cosine", "length"))]
        for name, points in figures.items()])


def training(figures: dict) -> str:
    header = ["predictor, by the node's defaults", "seconds", "times up to 500", "over the exact posterior", "all times",
              "over the exact posterior"]
    exact = [f"{value:.2f}" for value in figures["exact"].values()]
    rows = [["exact posterior", None, exact[0], "1.00", exact[1], "1.00"]]
    for case, how in (("conditional", "with classes"), ("unconditional", "without")):
        for row in figures[case]:
            gap, over = list(row["gap"].values()), list(row["over_exact"].values())
            rows.append([f"{row['steps']:,} steps, {how}", f"{row['seconds']:.0f}", f"{gap[0]:.2f}", f"{over[0]:.2f}",
                         f"{gap[1]:.2f}", f"{over[1]:.2f}"])
    return table(header, rows)


def tables(folder: Path) -> list[tuple[str, str]]:
    """(page, table) of every result in the folder."""
    def read(name: str) -> dict:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def part(name: str) -> dict:
        """Of `tag`, or as a run by itself wrote it, beside what was measured on and when."""
        return whole.get(name) or {key: value for key, value in read(f"tag_{name}").items() if key not in RECORD}

    whole, cifar, timed = map(read, ("tag", "tag_cifar10", "tag_training"))
    told = [(GUIDANCE, new) for new in costs(part("cost"))]
    if demo := part("demo"):
        told += [(GUIDANCE, cases(demo, "case")), (GUIDANCE, forms(demo))]
    if toy := part("toy"):
        told += [(GUIDANCE, new) for new in toys(toy)]
    if exact := part("exact"):
        told.append((GUIDANCE, estimates(exact)))
    if "cases" in cifar:
        told.append((GUIDANCE, cases(cifar, "CIFAR-10")))
    if timed:
        told.append((TRAINING, training(timed)))
    return told


def place(lines: list[str], of: str) -> tuple[int, int] | None:
    """First line of the table that begins with the same cell, and the line after its last; None if there is none."""
    start = next((i for i, line in enumerate(lines) if line.startswith(f"|{of.split('|')[1]}|")), None)
    if start is None:
        return None
    return start, next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))


def renewed(page: str, new: str, before: str | None) -> str:
    """The page with this table in place of its old one, or else after the table `before`, or else at the end."""
    lines = page.split("\n")
    own = place(lines, new)
    if own is not None:
        return "\n".join([*lines[: own[0]], *new.split("\n"), *lines[own[1] :]])
    after = None if before is None else place(lines, before)
    end = len(lines) if after is None else after[1]
    return "\n".join([*lines[:end], "", *new.split("\n"), *lines[end:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where `dev.py bench` wrote its JSON files")
    parser.add_argument("--write", action="store_true", help="put them in the help pages")
    arguments = parser.parse_args()
    before = {}
    for name, new in tables(arguments.folder):
        print(f"\n{name}\n\n{new}")
        if arguments.write:
            path = DOCS / name
            path.write_text(renewed(path.read_text(encoding="utf-8"), new, before.get(name)), encoding="utf-8")
            before[name] = new


if __name__ == "__main__":
    main()
