"""`python dev.py demo --template fam` or `fam_lora`: runs FAM's workflow in a real ComfyUI, tells what came of it, keeps its pictures."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import ExecutionFailed, PromptRejected
from .demo import CONTACT_SHEET, RUN_SECONDS, new_folder, write
from .environment import Environment
from .graph import graph_to_prompt
from .quickstart import ROOT, find, pictures
from .server import ComfyServer

REFINED = ("fam_flawed", "fam_maps", "fam_refined")
TRAINED_SHOWN = 8


def tell_refined(server: ComfyServer, prompt: dict, entry: dict) -> int:
    """One line a picture: how surely the highlighter takes it for generated, before, after each round, and at the end."""
    (text,) = entry["outputs"][find(prompt, "PreviewAny")]["text"]
    images = json.loads(text)["images"]
    print("\nHow surely each picture is generated, in the highlighter's eyes (undone rounds in brackets):")
    for image in images:
        rounds = [f"{r['probability']:.2f}" if r["kept"] else f"({r['probability']:.2f})" for r in image["rounds"]]
        steps = " -> ".join([f"{image['before']:.2f}", *rounds])
        print(f"  {image['sample'] + 1:2}  {steps}  {image.get('note') or ''}".rstrip())
    return len(images)


def tell_trained(server: ComfyServer, prompt: dict, entry: dict) -> int:
    """What the training told on its way."""
    told = [line.partition("Artifact Guard:")[2].strip() for line in server.log().splitlines() if "Artifact Guard:" in line]
    print("\nWhat the training told:", *told, sep="\n  ")
    return TRAINED_SHOWN


@dataclass(frozen=True)
class Template:
    """A workflow and what is kept of it.

    roles: what it saves, and what the files are called. tell: prints what came of it, gives how many pictures each of
    the roles `counted` must have. documents: pictures beside the workflow's own that show it.
    """

    workflow: Path
    roles: dict[str, str]
    counted: tuple[str, ...]
    tell: Callable[[ComfyServer, dict, dict], int]
    documents: tuple[Path, ...] = ()
    shown: int | None = None


TEMPLATES = {
    "fam": Template(
        ROOT / "workflows" / "fam.json", {name: name for name in REFINED}, REFINED, tell_refined,
    ),
    "fam_lora": Template(
        ROOT / "workflows" / "fam_lora.json",
        {"fam_lora_images": "fam_lora_images", "fam_lora_without": "fam_lora_without", "fam_lora_with": "fam_lora_with",
         "fam_lora_curves": "curves"}, ("fam_lora_without", "fam_lora_with"), tell_trained,
        (ROOT / "web" / "docs" / "images" / "fam_lora.jpg",), TRAINED_SHOWN,
    ),
}


def run_fam_demo(name: str, environment: Environment, output_dir: Path, update_docs: bool = False) -> int:
    """Runs the template; 0 when every picture is there. Pictures go to a new numbered folder in `output_dir`.

    `update_docs` also renews the picture of the workflow's template entry and those of the help pages.
    """
    template, folder = TEMPLATES[name], new_folder(output_dir)
    workflow = template.workflow
    try:
        with ComfyServer(environment) as server:
            print(f"ComfyUI is up ({'CPU' if server.cpu else 'GPU'}). Running {workflow.name} ...", flush=True)
            prompt = graph_to_prompt(json.loads(workflow.read_text(encoding="utf-8")), server.object_info())
            entry = server.run(prompt, RUN_SECONDS)
            made = {role: pictures(server, prompt, entry, role)[: template.shown] for role in template.roles}
            wanted = template.tell(server, prompt, entry)
    except (ExecutionFailed, PromptRejected, TimeoutError) as failure:
        print(f"The demo did not get through: {failure}")
        return 1
    files = [path for role, called in template.roles.items() for path in write(folder, called, made[role])]
    sheets = [folder / "sheet.jpg", *([workflow.with_suffix(".jpg"), *template.documents] if update_docs else ())]
    subprocess.run([environment.python, CONTACT_SHEET, folder, *sheets], check=True)
    print("\nPictures:", *files, *sheets, sep="\n  ")
    complete = all(made.values()) and all(len(made[role]) == wanted for role in template.counted)
    return 0 if complete and all(path.is_file() for path in sheets) else 1
