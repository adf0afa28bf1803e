"""`python dev.py demo --template fam`: runs workflows/fam.json in a real ComfyUI and tells what was found and refined."""

import json
import subprocess
from pathlib import Path

from .client import ExecutionFailed, PromptRejected
from .demo import CONTACT_SHEET, RUN_SECONDS, new_folder, write
from .environment import Environment
from .graph import graph_to_prompt
from .quickstart import ROOT, find, pictures
from .server import ComfyServer

WORKFLOW = ROOT / "workflows" / "fam.json"
ROLES = ("fam_flawed", "fam_maps", "fam_refined")


def run_fam_demo(environment: Environment, output_dir: Path, update_docs: bool = False) -> int:
    """Runs the template; 0 when every picture is there. Pictures go to a new numbered folder in `output_dir`.

    `update_docs` also renews the picture of the workflow's template entry.
    """
    folder = new_folder(output_dir)
    try:
        with ComfyServer(environment) as server:
            print(f"ComfyUI is up ({'CPU' if server.cpu else 'GPU'}). Running {WORKFLOW.name} ...", flush=True)
            prompt = graph_to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
            entry = server.run(prompt, RUN_SECONDS)
            files = {role: write(folder, role, pictures(server, prompt, entry, role)) for role in ROLES}
    except (ExecutionFailed, PromptRejected, TimeoutError) as failure:
        print(f"The demo did not get through: {failure}")
        return 1
    (text,) = entry["outputs"][find(prompt, "PreviewAny")]["text"]
    images = json.loads(text)["images"]
    tell_rounds(images)
    sheets = [folder / "sheet.jpg", *([WORKFLOW.with_suffix(".jpg")] if update_docs else ())]
    subprocess.run([environment.python, CONTACT_SHEET, folder, *sheets], check=True)
    paths = [*(path for role in ROLES for path in files[role]), *sheets]
    print("\nPictures:", *paths, sep="\n  ")
    complete = all(len(files[role]) == len(images) for role in ROLES)
    return 0 if complete and all(path.is_file() for path in paths) else 1


def tell_rounds(images: list[dict]) -> None:
    """One line a picture: how surely the highlighter takes it for generated, before, after each round, and at the end."""
    print("\nHow surely each picture is generated, in the highlighter's eyes (undone rounds in brackets):")
    for image in images:
        rounds = [f"{r['probability']:.2f}" if r["kept"] else f"({r['probability']:.2f})" for r in image["rounds"]]
        steps = " -> ".join([f"{image['before']:.2f}", *rounds])
        print(f"  {image['sample'] + 1:2}  {steps}  {image.get('note') or ''}".rstrip())
