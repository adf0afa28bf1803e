"""The user's cache folder, where environments are kept, and the lock that lets one command at a time build one."""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

APPLICATION = "artifact-guard"
CACHE_VARIABLE = "ARTIFACT_GUARD_CACHE"


class EnvironmentFailed(Exception):
    """No usable environment. The message is for the person at the keyboard and says what to do."""


def cache_folder() -> Path:
    """Where the platform keeps what can be made again; the variable ARTIFACT_GUARD_CACHE names another place."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / APPLICATION
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / APPLICATION
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / APPLICATION


def _try_lock(file) -> bool:
    try:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def exclusive(path: Path, waiting: str):
    """Holds the lock file at `path`; prints `waiting` once when another process has it.

    The operating system owns the lock and drops it with the process, so a killed command leaves nothing stale behind.
    """
    with _lock_file(path) as file:
        if not _try_lock(file):
            print(waiting, flush=True)
            while not _try_lock(file):
                time.sleep(0.5)
        yield


@contextmanager
def alone(path: Path, refusal: str):
    """Holds the lock file at `path`; raises EnvironmentFailed with the refusal when another process has it."""
    with _lock_file(path) as file:
        if not _try_lock(file):
            raise EnvironmentFailed(refusal)
        yield


def _lock_file(path: Path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b")
    except OSError as error:
        raise EnvironmentFailed(
            f"nothing can be written to {path.parent} ({error}). Set {CACHE_VARIABLE} to a folder where it can."
        ) from error
