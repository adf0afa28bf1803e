"""The one place that chooses how a kernel runs: by its torch reference, or by its Triton form on a GPU.

A function that is marked `with_triton(module)` is the reference, and defines the truth. The function of the same name in
that module takes and gives the same. What was chosen and why says `choose`.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

VARIABLE = "ARTIFACT_GUARD_KERNELS"
"""Environment variable: auto (as if unset), torch, or triton."""

FASTER: dict[str, int] = {
    "bend_map": 16384, "change_maps": 16384, "change_speed": 16384, "label_regions": 4096, "median_and_mad": 4096,
    "renoise": 16384, "sample_quantile": 16384, "scale_pair": 2_621_440,
}
"""Kernels whose Triton form was measured to be faster on a GPU (`dev.py bench kernels`, NVIDIA H200, torch 2.11), and from
which size on: elements of the largest tensor, or of one sample of it for the kernels that give a program to each. The
smallest size measured is SD 1.5's at 512x512. A kernel that is not here runs by torch."""

Unfit = Callable[[list[torch.Tensor]], str | None]
"""Says of tensors why a Triton form cannot take them, None if it can."""

SizeOf = Callable[[list[torch.Tensor]], int]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.bool)


NOTHING = "there is nothing to do"

OLDEST = (7, 0)
"""Compute capability: older GPUs have no atomic operation of the kind that label_regions is made of."""


class Choice(NamedTuple):
    """How a kernel runs, "torch" or "triton", and why."""

    backend: str
    reason: str


@functools.lru_cache(maxsize=None)
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU: for tests, far too slow for anything else."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=None)
def broken_on(device: torch.device) -> str | None:
    """Why Triton does not work on a GPU, None if it does. Asked once for each: the smallest kernel is compiled and run there."""
    if torch.version.hip:
        return "the Triton forms were measured on NVIDIA's GPUs only"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"the Triton forms need compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    try:
        dot = torch.zeros(1, 1, 1, 1, device=device)
        on_device(dot, "score_dynamics_triton", "change_maps")(dot, dot)
    except Exception as error:  # no C compiler, another Triton than torch's, a driver that is too old, ...
        return f"Triton does not work here ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
    return None


def on_device(tensor: torch.Tensor, module: str, name: str):
    """The Triton form of that name, run on the tensor's own GPU: Triton itself takes the current one."""
    form = getattr(importlib.import_module(f".{module}", __package__), name)

    def run(*arguments, **keywords):
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            return form(*arguments, **keywords)

    return run


def obstacle(tensors: list[torch.Tensor], dtypes: tuple[torch.dtype, ...] = DTYPES, unfit: Unfit | None = None) -> str | None:
    """Why Triton cannot take these tensors; None if it can.

    Args:
        dtypes: those that the Triton form is written for. unfit: what else it asks of the tensors.
    """
    if not _triton_found():
        return "Triton is not installed"
    devices = {x.device for x in tensors}
    if len(devices) != 1:
        return f"the tensors are on {len(devices)} devices"
    if not (tensors[0].is_cuda or interpreting() and os.environ.get(VARIABLE) == "triton"):
        return f"Triton has no backend for the device {tensors[0].device.type}"
    strange = {str(x.dtype) for x in tensors if x.dtype not in dtypes}
    if strange:
        return f"there is no Triton form for {', '.join(sorted(strange))}"
    if tensors[0].is_cuda and not interpreting() and (reason := broken_on(tensors[0].device)) is not None:
        return reason
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the Triton forms have no gradient"
    if min(x.numel() for x in tensors) == 0:
        return NOTHING
    return None if unfit is None else unfit(tensors)


def elements(tensors: list[torch.Tensor]) -> int:
    """The size that decides, of most kernels."""
    return max(x.numel() for x in tensors)


def choose(
    kernel: str, arguments, dtypes: tuple[torch.dtype, ...] = DTYPES, unfit: Unfit | None = None, size_of: SizeOf = elements
) -> Choice:
    """How `kernel` runs on these arguments, of which the tensors count.

    Raises:
        ValueError: the environment variable asks for something that is not there or cannot be.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "torch", "triton"):
        raise ValueError(f"{VARIABLE} is {wanted!r}; auto, torch or triton is wanted.")
    if wanted == "torch":
        return Choice("torch", f"{VARIABLE}=torch")
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    reason = obstacle(tensors, dtypes, unfit)
    if wanted == "triton":
        if reason is not None and reason != NOTHING:
            raise ValueError(f"{VARIABLE}=triton, but {kernel} cannot run by Triton: {reason}. Unset it, or use auto.")
        return Choice("torch", NOTHING) if reason else Choice("triton", f"{VARIABLE}=triton")
    if reason is not None:
        return Choice("torch", reason)
    least, size = FASTER.get(kernel), size_of(tensors)
    if least is None:
        return Choice("torch", "its Triton form was not measured to be faster on a GPU")
    if size < least:
        return Choice("torch", f"Triton was measured to be faster from {least} elements on, and here are {size}")
    return Choice("triton", f"measured to be faster from {least} elements on")


def with_triton(
    module: str, dtypes: tuple[torch.dtype, ...] = DTYPES, unfit: Unfit | None = None, size_of: SizeOf = elements
):
    """Marks a torch reference that has a Triton form of its name in `module`, beside it in this folder.

    The reference itself stays at hand as `reference`, the other one as `triton`.

    Args:
        dtypes, unfit: see `obstacle`.
        size_of: the size that decides whether the Triton form is faster.
    """

    def mark(reference):
        name = reference.__name__

        def triton_form(*arguments, **keywords):
            tensor = next(x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor))
            return on_device(tensor, module, name)(*arguments, **keywords)

        @functools.wraps(reference)
        def dispatched(*arguments, **keywords):
            if choose(name, [*arguments, *keywords.values()], dtypes, unfit, size_of).backend == "triton":
                return triton_form(*arguments, **keywords)
            return reference(*arguments, **keywords)

        dispatched.reference, dispatched.triton, dispatched.dtypes, dispatched.size_of = reference, triton_form, dtypes, size_of
        KERNELS[name] = dispatched
        return dispatched

    return mark


KERNELS: dict = {}
"""Every function that is marked `with_triton`, by name."""
