"""The figures of `fam_training` from what its jobs left, and the help page's tables from the figures."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from .distances import blocks, frechet, jackknife_ratio, over_seeds, statistics
from .fam_training_plan import ARMS, PUBLISHED, SWEEPS, Size

MEANS = ("FD", "FD_from_mean", "FD_of_means", "precision", "recall", "as_asked", "brightness", "judged_generated", "loss")


class Results:
    """What is in the folder of the jobs."""

    def __init__(self, folder: Path, size: Size):
        self.folder, self.size = folder, size
        self.rows = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        self.failed = {path.stem: path.read_text().strip().splitlines()[-1] for path in sorted(folder.glob("*.failed"))}
        self.parts: dict[str, torch.Tensor] = {}

    def seeds(self, arm: str) -> list[int]:
        """The seeds of which both this arm and the base are done."""
        return [seed for seed in self.size.seeds if {f"{arm} {seed}", f"base {seed}"} <= set(self.rows)]

    def distances(self, name: str) -> torch.Tensor:
        """FD of all samples of a run, then without each block of them."""
        if name not in self.parts:
            features = load_file(self.folder / f"{name}.safetensors")["features"].double()
            real = statistics(load_file(self.folder / "real.safetensors")["features"].double())
            self.parts[name] = torch.tensor([frechet(statistics(features[rows]), real) for rows in blocks(len(features))])
        return self.parts[name]

    def arm(self, arm: str) -> dict | None:
        """Means over seeds; FD over the base's, of the sums over seeds with the pictures' interval, and seed by seed."""
        seeds = self.seeds(arm)
        if not seeds:
            return None
        rows = [self.rows[f"{arm} {seed}"] for seed in seeds]
        found = {key: sum(row[key] for row in rows) / len(rows) for key in MEANS if key in rows[0]}
        found |= {"seeds": seeds, "FD_each_seed": [row["FD"] for row in rows]}
        if rows[0].get("maps"):
            maps = [entry for row in rows for entry in row["maps"]]
            found |= {f"map_{key}": sum(entry[key] for entry in maps) / len(maps) for key in ("mean", "largest", "generated")}
        if arm == "base":
            return found
        totals = [sum(self.distances(f"{name} {seed}") for seed in seeds).tolist() for name in ("base", arm)]
        whole, low, high = jackknife_ratio(*totals)
        each, from_mean = (
            [row[key] / self.rows[f"base {seed}"][key] for row, seed in zip(rows, seeds) if key in row] for key in ("FD", "FD_from_mean")
        )
        found |= {"ratio": whole, "pictures": [low, high], "each_seed": each, "seeds_interval": over_seeds(each)}
        return found | ({"from_mean_each_seed": from_mean, "from_mean_interval": over_seeds(from_mean)} if from_mean else {})

    def summary(self) -> dict:
        found = {name: self.arm(name) for name in (*ARMS, *SWEEPS)}
        found = {name: row for name, row in found.items() if row is not None}
        for name in found.keys() & PUBLISHED.keys():
            found[name] |= {"published": PUBLISHED[name], "published_ratio": PUBLISHED[name] / PUBLISHED["base"]}
        return {
            "base_model": self.rows.get("base model"), "highlighter": self.rows.get("highlighter"),
            "arms": {name: found[name] for name in found if name in ARMS},
            "sweeps": {name: found[name] for name in found if name not in ARMS},
            "runs": self.rows, "failed": self.failed,
        }


def interval(values: list | None) -> str:
    return "" if not values or values[0] is None else f"{values[0]:.3f} to {values[1]:.3f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def told(row: dict) -> list[str]:
    """The ratio of an arm in words: of the mean, the intervals over seeds and over pictures, seed by seed, from the mean image."""
    if "ratio" not in row:
        from_mean = f"FD {row['FD_from_mean']:.2f}" if "FD_from_mean" in row else ""
        return ["", "", "", ", ".join(f"{value:.2f}" for value in row["FD_each_seed"]), from_mean]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
    from_mean = ""
    if "from_mean_each_seed" in row:
        from_mean = f"{sum(row['from_mean_each_seed']) / len(row['seeds']):.3f} {interval(row['from_mean_interval'])}".strip()
    each = ", ".join(f"{value:.3f}" for value in row["each_seed"])
    return [ratio, interval(row["seeds_interval"]), interval(row["pictures"]), each, from_mean]


def tables(record: dict) -> str:
    """The help page's tables as Markdown."""
    parts, base = [], record["base_model"]
    if base:
        parts.append(table(["step of the base's training", *(str(step) for step, _ in base["FD_by_step"])],
                           [["FD", *(f"{value:.2f}" for _, value in base["FD_by_step"])]]))
    rows = [
        [name, f"{row['FD']:.2f}", *told(row), f"{row['precision']:.3f}, {row['recall']:.3f}", f"{row['judged_generated']:.3f}",
         f"{row['published']:g}", f"{row['published_ratio']:.3f}"]
        for name, row in record["arms"].items()
    ]
    parts.append(table(["", "FD", "over base", "95 %, seeds", "95 %, pictures", "seed by seed (base: FD)",
                        "from the mean image (seeds)", "precision, recall", "judged generated", "published FID", "over base"], rows))
    if record["sweeps"]:
        rows = [[name, *told(row), f"{row['brightness']:.4f}"] for name, row in record["sweeps"].items()]
        parts.append(table(["", "FD over base", "95 %, seeds", "95 %, pictures", "seed by seed", "from the mean image (seeds)",
                            "mean brightness"], rows))
    if record["highlighter"]:
        parts.append(f"Highlighter: {record['highlighter']['accuracy']:.1%} of held-out pictures told rightly. "
                     + " ".join(record["highlighter"]["warnings"]))
    empty = [name for name, row in (record["arms"] | record["sweeps"]).items() if row.get("map_largest") == 0]
    if empty:
        parts.append(f"The maps were empty, so that nothing acted, in: {', '.join(empty)}.")
    if record["failed"]:
        parts.append("Failed: " + "; ".join(f"{name}: {why}" for name, why in record["failed"].items()))
    return "\n\n".join(parts)
