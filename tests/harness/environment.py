"""Finds, checks and, where needed, builds the environment the tests, the demo and the benchmarks run in.

An environment is a ComfyUI folder and a Python that runs it. One per ComfyUI version lies in the user's cache folder;
its marker file is written last, so a folder without it is half-made and is built again.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .build import build, environment_python
from .cache import EnvironmentFailed, cache_folder, exclusive
from .pins import environment_name, package_name, pins

COMFYUI_VARIABLE = "ARTIFACT_GUARD_COMFYUI"
MARKER = "environment.json"


@functools.lru_cache(maxsize=None)
def cuda_available(python: Path) -> bool:
    """Asks that Python's torch. Raises EnvironmentFailed when it does not start or has no working torch."""
    command = [str(python), "-c", "import torch; print(torch.cuda.is_available())"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFailed(f"{python} does not run: {error}") from error
    if result.returncode:
        raise EnvironmentFailed(f"{python} cannot import torch:\n{result.stderr.strip()}")
    return result.stdout.split()[-1] == "True"


@dataclass(frozen=True)
class Environment:
    """A ComfyUI folder and the Python that runs it."""

    comfyui: Path
    python: Path

    @classmethod
    def current(cls) -> "Environment":
        """The environment this process was started in by dev.py."""
        if not (comfyui := os.environ.get(COMFYUI_VARIABLE)):
            raise EnvironmentFailed(f"{COMFYUI_VARIABLE} names no ComfyUI folder: start this with dev.py")
        return cls(Path(comfyui), Path(sys.executable))

    @property
    def has_cuda(self) -> bool:
        return cuda_available(self.python)

    def variables(self) -> dict[str, str]:
        """Environment variables for a child process of ours."""
        return {**os.environ, COMFYUI_VARIABLE: str(self.comfyui)}

    def check(self) -> "Environment":
        """Itself, or EnvironmentFailed: main.py is there, the Python starts and imports torch."""
        if not (self.comfyui / "main.py").is_file():
            raise EnvironmentFailed(f"{self.comfyui} is no ComfyUI folder: it has no main.py")
        cuda_available(self.python)
        return self

    def missing(self, requirements: tuple[str, ...]) -> list[str]:
        """Those of the requirements this Python has neither as an installed package nor as a module of that name.

        Both are asked for: pytest-xdist's module is called otherwise, and builds of torch bring a Triton under names of their own.
        """
        names = {requirement: package_name(requirement) for requirement in requirements}
        find = (
            "import importlib.metadata as m, importlib.util as u, sys; "
            "print(*[n for n in sys.argv[1:] if u.find_spec(n) is None and not [*m.distributions(name=n)]])"
        )
        absent = subprocess.check_output([str(self.python), "-c", find, *names.values()], text=True).split()
        return [requirement for requirement, name in names.items() if name in absent]


def existing(comfyui: Path, python: str | None = None) -> Environment:
    """A ComfyUI the user already has, with their Python (default: the one that runs this)."""
    executable = shutil.which(python) if python else sys.executable
    if executable is None:
        raise EnvironmentFailed(f"--python {python}: there is no such program")
    # absolute, not resolve: a virtual environment's python is a link, and following it leaves the environment.
    return Environment(comfyui.expanduser().absolute(), Path(executable).absolute()).check()


def _usable(folder: Path, version: str) -> Environment | None:
    """The environment in `folder` when it was finished with these very pins and still works."""
    marker = folder / MARKER
    try:
        if json.loads(marker.read_text(encoding="utf-8")) != pins(version):
            return None
        return Environment(folder / "ComfyUI", environment_python(folder)).check()
    except (OSError, ValueError):
        return None
    except EnvironmentFailed as failure:
        print(f"The environment in {folder} is broken and is built again: {failure}", flush=True)
        return None


def prepare(version: str) -> Environment:
    """The environment for a ComfyUI version: the one in the cache, repaired or built when that is not whole."""
    name = environment_name(version)
    folder = cache_folder() / "environments" / name
    if ready := _usable(folder, version):
        return ready
    log = cache_folder() / "logs" / f"{name}.log"
    with exclusive(folder.with_name(name + ".lock"), f"Waiting for another command that is building {folder}"):
        if ready := _usable(folder, version):
            return ready
        build(folder, version, log)
        (folder / MARKER).write_text(json.dumps(pins(version), indent=2), encoding="utf-8")
    return Environment(folder / "ComfyUI", environment_python(folder)).check()
