"""Small networks that nodes save and load: safetensors files in a models folder of their own, never overwritten.

A file says in its metadata what it holds, so that a file of another kind is refused in words. Loading reads tensors
and text and runs nothing.
"""

import json
import os
import re
from pathlib import PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

import comfy.utils
import folder_paths

EXTENSION = ".safetensors"
KIND_KEY = "artifact_guard"
"""Metadata entry that names the kind of network in the file."""
SETTINGS_KEY = "settings"
"""Metadata entry with everything else, as JSON."""


def register_folder(folder: str, *more_paths: str) -> None:
    """Make `folder` one of ComfyUI's model folders: models/FOLDER, and further places to load from."""
    default = os.path.join(folder_paths.models_dir, folder)
    folder_paths.add_model_folder_path(folder, default)
    for path in more_paths:
        folder_paths.add_model_folder_path(folder, path)
    paths, extensions = folder_paths.folder_names_and_paths[folder]
    folder_paths.folder_names_and_paths[folder] = (paths, extensions | {EXTENSION})


def file_names(folder: str) -> list[str]:
    """The files a user can choose from, for a COMBO."""
    return folder_paths.get_filename_list(folder)


def check_name(name: str, input_name: str, folder: str) -> None:
    """That `name` is one inside models/FOLDER.

    Raises:
        ValueError: nothing but dots and spaces, a drive letter, a path from the root, a step out by "..", control characters.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    outside = not parts or parts[0] == "/" or ".." in parts or not parts[-1].strip(". ")
    if outside or ":" in name or re.search(r"[\x00-\x1f]", name):
        raise ValueError(
            f"{input_name} is {name!r}, which is no name inside models/{folder}. Give a plain name, with folders in it "
            "if you like (sd15/portraits): no drive letter, no leading slash, no '..'."
        )


def save_model_file(folder: str, filename_prefix: str, kind: str, tensors: dict, settings: dict) -> str:
    """Write tensors and settings as a new file PREFIX_00001_.safetensors under models/FOLDER, with the next free number.

    Args:
        kind: what the file holds, in the words an error would use, such as "flaw highlighter".
        settings: plain data that the loader needs.

    Returns:
        The file's full path.

    Raises:
        ValueError: the prefix is empty or points outside the folder.
    """
    check_name(filename_prefix, "filename_prefix", folder)
    root = folder_paths.get_folder_paths(folder)[0]
    if not is_inside(os.path.join(root, filename_prefix), root):
        raise ValueError(f"filename_prefix is {filename_prefix!r}, which links lead out of models/{folder}. Give another name.")
    prefix = str(PurePosixPath(filename_prefix.replace("\\", "/")))  # without a slash at its end: the number follows the name
    try:
        path_folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
        path = free_path(path_folder, name, counter)
        write_model_file(path, kind, tensors, settings)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"filename_prefix is {filename_prefix!r}: no file of this name can be written under models/{folder} ({error}). Give a "
            "shorter name, or one whose folders are no files, and see that the disk is not full."
        ) from error
    return path


def free_path(folder: str, name: str, counter: int) -> str:
    """A file that was not there, NAME_00001_.safetensors or with the next free number. It is made here, empty, in one move: nobody
    else can take the name meanwhile, and no file is ever overwritten, however the disk tells names apart."""
    while True:
        path = os.path.join(folder, f"{name}_{counter:05}_{EXTENSION}")
        try:
            open(path, "xb").close()
            return path
        except FileExistsError:
            counter += 1


def write_model_file(path: str, kind: str, tensors: dict, settings: dict) -> None:
    """Write one file at this very path, what is there or not, in one move: it is whole, or as it was before."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    partial = path + ".partial"
    try:
        comfy.utils.save_torch_file(tensors, partial, metadata={KIND_KEY: kind, SETTINGS_KEY: json.dumps(settings)})
        os.replace(partial, path)
    finally:
        for left in (partial, path):
            if os.path.exists(left) and (left == partial or os.path.getsize(left) == 0):
                os.remove(left)


def load_model_file(folder: str, name: str, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors (on the CPU) and settings of a file that `save_model_file` wrote.

    Raises:
        ValueError: no such file, a name that points outside the folder, a damaged file, or one of another kind.
    """
    check_name(name, "name", folder)
    path = folder_paths.get_full_path(folder, name)  # which may be a link, as many keep their models on another disk
    if path is None:
        raise ValueError(f"name is {name!r}: there is no such file under models/{folder}. Choose one from the list.")
    return read_model_file(path, name, kind)


def read_model_file(path: str, name: str, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and settings of a file; `name` is what errors call it.

    Raises:
        ValueError: a damaged file, or one of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        settings = json.loads(metadata.get(SETTINGS_KEY, "{}"))
        if not isinstance(settings, dict):
            raise ValueError("its settings are no table")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be read as a safetensors file ({error}). It is damaged or of another format: copy or save it again."
        ) from error
    found = metadata.get(KIND_KEY)
    if found != kind:
        what = f"a {found}" if found else "not a file that Artifact Guard saved"
        raise ValueError(f"{name} is {what}; a {kind} is wanted here. Choose another file.")
    return tensors, settings


def saved_kind(path: str) -> str | None:
    """What a file that this pack saved holds; None of any other file, a damaged one included."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(KIND_KEY)
    except (SafetensorError, OSError):
        return None


def is_inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, once links and `..` are resolved."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    try:
        return os.path.commonpath([path, folder]) == folder
    except ValueError:
        return False
