"""Makes ComfyUI and this pack importable, the way tests, benchmarks and training scripts need them.

The repository's root must never stay on sys.path: our `nodes` folder would hide ComfyUI's nodes.py. The pack is
registered by path as the package `artifact_guard` instead. A script in a folder below tests/ starts like this:

    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).resolve().parents[1])]
    from tests.harness.pack import load_pack, prepare_comfyui

    prepare_comfyui()
    load_pack()
    from artifact_guard.kernels import ...
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from .environment import Environment

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "artifact_guard"


def _is_root(entry: str) -> bool:
    return Path(entry or os.curdir).resolve() == ROOT


def prepare_comfyui(path: Path | str | None = None, base_directory: Path | str | None = None, cpu: bool = False) -> None:
    """Puts a ComfyUI folder (default: the one dev.py chose) first on sys.path, on the CPU if asked or when there is no CUDA.

    `base_directory` moves its models, input, output and user folders, so that nothing is written beside its source.
    To be called before anything of ComfyUI is imported: its choice of device is made once, at import.
    """
    import torch

    comfyui = str(Environment.current().comfyui if path is None else Path(path).absolute())
    # ComfyUI has a `tests` folder too: ours is pinned to its place before the search path changes.
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]
    sys.path[:] = [comfyui, *(entry for entry in sys.path if entry != comfyui and not _is_root(entry))]

    # ComfyUI reads sys.argv only after comfy.options.enable_args_parsing(), which only its main.py calls.
    from comfy.cli_args import args

    # As in main.py, before anything imports ComfyUI's nodes.py: that puts comfy/, with a utils.py, before this package.
    import utils  # noqa: F401

    args.cpu = cpu or not torch.cuda.is_available()
    if base_directory is not None:
        args.base_directory = str(base_directory)


def load_pack() -> ModuleType:
    """The pack's top module, imported by path as `artifact_guard`; its parts are then `artifact_guard.nodes...`."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[PACKAGE]
        raise
    return module
