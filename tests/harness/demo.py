"""`python dev.py demo`: runs workflows/quickstart.json in a real ComfyUI and tells what the guard found and cost."""

import statistics
import subprocess
from pathlib import Path

from .client import ExecutionFailed, PromptRejected
from .environment import Environment
from .quickstart import CURVES, REGIONS, ROLES, ROOT, WITH, WITHOUT, WORKFLOW
from .quickstart import find, pictures, quickstart_prompt, report_summary, save_node, upstream, with_inputs
from .server import ComfyServer

CONTACT_SHEET = Path(__file__).with_name("contact_sheet.py")
DOCS_PICTURES = (WORKFLOW.with_suffix(".jpg"), ROOT / "web" / "docs" / "images" / "quickstart.png")

# Seeds of the runs that are only timed: none is the workflow's own, so that nothing comes out of the server's cache.
TIMING_SEEDS = (1001, 1002, 1003, 1004, 1005)
RUN_SECONDS = 3600


def run_demo(environment: Environment, output_dir: Path, update_docs: bool = False) -> int:
    """Runs the demo; 0 when every picture is there. Pictures go to a new numbered folder in `output_dir`.

    `update_docs` also renews the pictures the workflow's template entry, the help pages and the README show.
    """
    folder = new_folder(output_dir)
    try:
        with ComfyServer(environment) as server:
            print(f"ComfyUI is up ({'CPU' if server.cpu else 'GPU'}). Running {WORKFLOW.name} ...", flush=True)
            prompt = quickstart_prompt(server.object_info())
            entry = server.run(prompt, RUN_SECONDS)
            summary = report_summary(prompt, entry)
            files = {role: write(folder, role, pictures(server, prompt, entry, role)) for role in ROLES}
            tell_findings(summary, files)
            tell_cost(server, prompt)
    except (ExecutionFailed, PromptRejected, TimeoutError) as failure:
        print(f"The demo did not get through: {failure}")
        return 1
    sheets = [folder / "sheet.png", *(DOCS_PICTURES if update_docs else ())]
    subprocess.run([environment.python, CONTACT_SHEET, folder, *sheets], check=True)
    wanted = {WITHOUT: len(summary["images"]), WITH: len(summary["images"]), REGIONS: len(summary["images"]), CURVES: 1}
    paths = [*(path for role in ROLES for path in files[role]), *sheets]
    print("\nPictures:", *paths, sep="\n  ")
    complete = all(len(files[role]) == count for role, count in wanted.items())
    return 0 if complete and all(path.is_file() for path in paths) else 1


def new_folder(parent: Path) -> Path:
    """A folder that was not there before, numbered, so that no earlier picture is overwritten."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            folder = parent / f"{number:03}"
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def write(folder: Path, role: str, contents: list[bytes]) -> list[Path]:
    """Writes pictures under numbered names, counted from 1 as the text counts them."""
    paths = [folder / f"{role}_{number:02}.png" for number in range(1, len(contents) + 1)]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths


def place(box: list[float]) -> str:
    """Where a region lies, from its box (left, top, width, height) in fractions of the picture."""
    across = ("left", "", "right")[min(2, int(3 * (box[0] + box[2] / 2)))]
    down = ("top", "", "bottom")[min(2, int(3 * (box[1] + box[3] / 2)))]
    return f"{down} {across}".strip() or "centre"


def tell_findings(summary: dict, files: dict[str, list[Path]]) -> None:
    """One line a picture: verdict, area, where, whether repaired, and whether the two pictures are the same file."""
    print(f"\nFound ({summary['status']}; each picture is judged by itself):")
    for index, image in enumerate(summary["images"]):
        same = files[WITHOUT][index].read_bytes() == files[WITH][index].read_bytes()
        parts = []
        if image["regions"]:
            where = ", ".join(f"{place(region['box'])} {region['area']:.1%}" for region in image["regions"])
            parts.append(f"{image['artifact_fraction']:.1%} of the picture ({where})")
            parts.append(f"repaired {image['repaired_fraction']:.1%}" if image["repaired_fraction"] else "not repaired")
        parts.append("equal to the picture without the guard, bit for bit" if same else "picture changed")
        print(f"  {index + 1:2}  {image['verdict']:<9}  {'; '.join(parts)}")
    for note in filter(None, (summary["reason"], *summary["notes"])):
        print(f"  note: {note}")


def seconds(entry: dict) -> float:
    """How long the server worked on a finished prompt."""
    times = {kind: details["timestamp"] for kind, details in entry["status"]["messages"] if "timestamp" in details}
    return (times["execution_success"] - times["execution_start"]) / 1000


def sampling_only(prompt: dict, role: str) -> dict:
    """The part of the workflow that samples and decodes the pictures of a role, without enlarging and saving."""
    part = upstream(prompt, save_node(prompt, role))
    decode = find(part, "VAEDecode")
    return {**upstream(prompt, decode), "preview": {"class_type": "PreviewImage", "inputs": {"images": [decode, 0]}}}


def tell_cost(server: ComfyServer, prompt: dict) -> None:
    """Times both halves of the workflow, each pair with a seed of its own, and counts model calls from the report."""
    steps = prompt[find(upstream(prompt, save_node(prompt, WITH)), "KSampler")]["inputs"]["steps"]
    times, calls = {WITHOUT: [], WITH: []}, []
    print(f"\nMeasuring the cost: {len(TIMING_SEEDS)} pairs of runs ...", flush=True)
    for number, seed in enumerate(TIMING_SEEDS):
        seeded = with_inputs(prompt, "KSampler", seed=seed)
        # The order changes from pair to pair, so that a machine that speeds up or slows down favours neither.
        for role in (WITHOUT, WITH) if number % 2 == 0 else (WITH, WITHOUT):
            times[role].append(seconds(server.run(sampling_only(seeded, role), RUN_SECONDS)))
            if role == WITH:
                # Sampling is cached now: this only reads the report.
                reading = upstream(seeded, find(seeded, "PreviewAny"))
                calls.append(report_summary(reading, server.run(reading, RUN_SECONDS))["model_calls"])
    bare, guarded = (statistics.median(times[role]) for role in (WITHOUT, WITH))
    scatter = max(max(times[role]) - min(times[role]) for role in (WITHOUT, WITH))
    print(f"Cost (medians of {len(calls)} interleaved pairs, a new seed each, nothing cached, decoding included):")
    for role, median, counted in ((WITHOUT, bare, steps), (WITH, guarded, ", ".join(map(str, calls)))):
        span = f"from {min(times[role]):.2f} to {max(times[role]):.2f}"
        print(f"  {role + ' the guard':<18} {median:6.2f} s ({span}); model calls: {counted}")
    doubt = "" if abs(guarded - bare) > scatter else ", which is less than the runs differ among themselves"
    print(f"  the difference     {guarded - bare:+6.2f} s, {guarded / bare - 1:+.1%}{doubt}")
