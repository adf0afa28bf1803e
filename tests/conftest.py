"""Makes every test run beside a real ComfyUI: see tests/harness/pack.py. Started by `python dev.py test`."""

import os
import signal
import sys
import tempfile

if "--gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the answer
    # Triton asks when it is imported, and torch imports it: interpreted on the CPU here, compiled with --gpu, which has
    # ComfyUI and all models of the tests on the GPU. Without it they are on the CPU, whatever there is.
    os.environ["TRITON_INTERPRET"] = "1"

# On a shared machine more threads than processors that are free wait for each other by spinning: beside two other
# programs a test of the demo model's training took 321 s with two threads and 85 s with one, in two runs. Servers that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.harness.pack import ROOT, load_pack, prepare_comfyui
from tests.harness.server import ComfyServer

# A plain kill ends the session as Ctrl-C does, so that servers are stopped on the way out.
signal.signal(signal.SIGTERM, signal.default_int_handler)

# What a test makes ComfyUI write lands here, not beside ComfyUI's source. Removed with the process.
_base_directory = tempfile.TemporaryDirectory(prefix="artifact-guard-tests-", ignore_cleanup_errors=True)
prepare_comfyui(base_directory=_base_directory.name, cpu=os.environ.get("TRITON_INTERPRET") == "1")
load_pack()


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="also run the tests that need a CUDA device")


def pytest_configure(config):
    if config.rootpath != ROOT:
        # With another root pytest would import tests/server as `server`, and hide ComfyUI's module of that name.
        raise pytest.UsageError("start the tests with `python dev.py test`, pytest's own arguments after --")
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: this torch finds no CUDA device")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run with --gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def repeatable():
    """For tests of training that compare bits: on a GPU, gradients whose kernels add up in the same order every time."""
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def comfy_server():
    """One real ComfyUI with the pack, for all tests of the session that want one."""
    with ComfyServer() as server:
        yield server
