"""`python dev.py demo --template fam_lora`: runs workflows/fam_lora.json in a real ComfyUI and keeps its pictures."""

import json
import subprocess
from pathlib import Path

from .client import ExecutionFailed, PromptRejected
from .demo import CONTACT_SHEET, RUN_SECONDS, new_folder, write
from .environment import Environment
from .graph import graph_to_prompt
from .quickstart import ROOT, pictures
from .server import ComfyServer

WORKFLOW = ROOT / "workflows" / "fam_lora.json"
ROLES = {"fam_lora_images": "fam_lora_images", "fam_lora_without": "fam_lora_without", "fam_lora_with": "fam_lora_with",
         "fam_lora_curves": "curves"}
"""What the workflow saves, and what the sheet calls it."""
SHOWN = 8
HELP_PICTURE = ROOT / "web" / "docs" / "images" / "fam_lora.jpg"


def run_fam_lora_demo(environment: Environment, output_dir: Path, update_docs: bool = False) -> int:
    """Runs the template; 0 when every picture is there. Pictures go to a new numbered folder in `output_dir`.

    `update_docs` also renews the picture of the workflow's template entry and of the help page.
    """
    folder = new_folder(output_dir)
    try:
        with ComfyServer(environment) as server:
            print(f"ComfyUI is up ({'CPU' if server.cpu else 'GPU'}). Running {WORKFLOW.name} ...", flush=True)
            prompt = graph_to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
            entry = server.run(prompt, RUN_SECONDS)
            made = {role: pictures(server, prompt, entry, role)[:SHOWN] for role in ROLES}
            told = [line for line in server.log().splitlines() if "Artifact Guard:" in line]
    except (ExecutionFailed, PromptRejected, TimeoutError) as failure:
        print(f"The demo did not get through: {failure}")
        return 1
    files = [path for role, name in ROLES.items() for path in write(folder, name, made[role])]
    print("\nWhat the training told:", *(line.partition("Artifact Guard:")[2].strip() for line in told), sep="\n  ")
    sheets = [folder / "sheet.jpg", *([WORKFLOW.with_suffix(".jpg"), HELP_PICTURE] if update_docs else ())]
    subprocess.run([environment.python, CONTACT_SHEET, folder, *sheets], check=True)
    print("\nPictures:", *files, *sheets, sep="\n  ")
    return 0 if all(path.is_file() for path in [*files, *sheets]) and len(made["fam_lora_with"]) == SHOWN else 1
