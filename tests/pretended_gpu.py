"""A GPU that is not there: tensors that say they are on cuda:0 and hold their values on the CPU.

    with PretendedGpu() as gpu:
        latent = ksampler(gpu.take(patcher))     # a whole run: the model and all tensors of the sampler are "there"
    gpu.waits                                    # where the pack's code made the host wait for the device
    gpu.not_on_apple                             # what it asked that Apple's GPUs do not do, or do wrongly

What runs on a CPU cannot show: the branches for GPUs, tensors of two devices in one operation (MixedDevices, as torch would
refuse it), and every read and blocking copy. Not shown: what a GPU's kernels round differently, and Triton's.
"""

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path
from unittest import mock

import comfy.model_management
import torch
from artifact_guard.kernels.dispatch import VARIABLE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.harness.pack import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {"_to_copy", "copy_"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "bincount"}
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class MixedDevices(RuntimeError):
    """An operation was given tensors of two devices."""


class OnGpu(torch.Tensor):
    """Says it is on a GPU; `held` has the values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device = GPU):
        with torch.inference_mode(False):  # views of what was made before inference began have to be such as well
            return torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
            )

    def __init__(self, held: torch.Tensor, device: torch.device = GPU):
        self.held = held

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return Operation(function, arguments, keywords or {}).result()


def tensors_in(given: list) -> list[torch.Tensor]:
    """Those of an operation's arguments, of lists of tensors too."""
    flat = [y for x in given for y in (x if isinstance(x, (list, tuple)) else (x,))]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def on_cpu(given):
    """An argument with the values in place of what is on a GPU."""
    if isinstance(given, (list, tuple)):
        return [on_cpu(x) for x in given]
    return given.held if isinstance(given, OnGpu) else given


@functools.lru_cache(maxsize=None)
def made_of_others(function) -> bool:
    """Whether an operation is other ones in a row. In inference mode it comes whole to those that look."""
    return function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


class Operation:
    """One call of torch's: `there` and `here` are the tensors it was given on a GPU and on the CPU."""

    def __init__(self, function, arguments: tuple, keywords: dict):
        self.function, self.arguments, self.keywords = function, arguments, keywords
        self.name = function.overloadpacket.__name__
        tensors = tensors_in([*arguments, *keywords.values()])
        self.there = [x for x in tensors if isinstance(x, OnGpu)]
        self.here = [x for x in tensors if not isinstance(x, OnGpu)]
        asked = next((x for x in (keywords.get("device"), *arguments) if isinstance(x, torch.device)), None)
        self.to = asked if asked is not None else self.there[0].device if self.there else CPU
        if self.name == "copy_":
            self.to = arguments[0].device
        self.of_gpu = bool(self.there) or self.to.type != "cpu"

    def result(self):
        """What it gives, calculated on the CPU. Raises MixedDevices if a GPU would refuse the tensors."""
        if not self.of_gpu:
            return self.function(*self.arguments, **self.keywords)
        self.check()
        keywords = {name: on_cpu(x) for name, x in self.keywords.items()}
        if keywords.get("device") is not None:
            keywords["device"] = CPU
        result = self.function(*map(on_cpu, self.arguments), **keywords)
        known = {id(x.held): x for x in self.there}  # what is written in place, or into `out`, comes back as itself
        device = GPU if self.to == torch.device("cuda") else self.to

        def placed(x: torch.Tensor) -> torch.Tensor:
            return known[id(x)] if id(x) in known else x if device == CPU else OnGpu(x, device)

        return tree_map_only(torch.Tensor, placed, result)

    def check(self) -> None:
        """Numbers on the CPU fit all that is done value by value, but for what is written; indices may be there too."""
        generator = self.keywords.get("generator")
        if generator is not None and generator.device.type != self.to.type:
            raise MixedDevices(f"{self.function}: a generator on {generator.device} draws for {self.to}")
        if self.name in COPIES or not self.there:
            return
        written = self.name.endswith("_") and isinstance(self.arguments[0], OnGpu) is False
        by_value = torch.Tag.pointwise in self.function.tags or self.name in BY_INDEX | {"fill_"}
        indices = [id(x) for x in self.arguments[1]] if self.name in BY_INDEX else []
        wrong = [x for x in self.here if id(x) not in indices and (x.ndim > 0 or written or not by_value)]
        if wrong or len({x.device for x in self.there}) > 1:
            tensors = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in (*self.there, *self.here))
            raise MixedDevices(f"{self.function}: {tensors}")

    def not_blocking(self) -> bool:
        return bool(self.keywords.get("non_blocking") or self.name == "copy_" and len(self.arguments) > 2 and self.arguments[2])

    def wait(self) -> str | None:
        """How it makes the host wait for the GPU; None if it does not."""
        name = self.name
        if name in COPIES:
            if self.there and self.to == CPU:
                return "copied to the host"
            return "copied there, blocking" if self.here and not self.not_blocking() else None
        if name in READS or name == "repeat_interleave" and self.keywords.get("output_size") is None:
            return name
        if name in BY_INDEX:
            indices = [x for x in self.arguments[1] if x is not None]
            fills = name != "index" and self.arguments[2].numel() == 1
            if any(x.dtype == torch.bool and not fills or not isinstance(x, OnGpu) for x in indices):
                return name
        return None

    def not_on_apple(self) -> str | None:
        """What of it Apple's GPUs do not do: float64; means over cells of unequal sizes (torch 2.13); and copies that the host does
        not wait for may read its memory when that is another tensor's by then (pytorch issue 189690)."""
        types = {x.dtype for x in self.there} | ({self.keywords["dtype"]} if self.keywords.get("dtype") else set())
        if torch.float64 in types:
            return "float64"
        if self.name in COPIES and self.here and self.not_blocking():
            return "copied there, not blocking"
        if self.name == "_adaptive_avg_pool2d":
            sizes = zip(self.arguments[0].shape[-2:], self.arguments[1])
            return "cells of unequal sizes" if any(side % cells for side, cells in sizes) else None
        return None


def let_torch_enter_gpus() -> None:
    """torch goes to a tensor's device before it indexes or reads it. Where it was built without CUDA this is how it learns that for
    this there is nothing to do, as with the CPU; for good, in this process."""
    torch._C._ensureCUDADeviceGuardSet()  # the same, as FakeTensorMode has it, where it was built with CUDA and finds no GPU
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # CPU, CUDA, ...
    guards[1] = guards[1] or guards[0]


class PretendedGpu(TorchDispatchMode):
    """In this context cuda:0 is there. Places are file:line, function and kind, in the pack's own code."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.not_on_apple: list[str] = []
        self.undo = contextlib.ExitStack()
        self.entered = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # nothing is compiled here, and asking takes a third of the time
        return False

    def __enter__(self):
        self.entered += 1
        if self.entered == 1:
            self.begin()
        return super().__enter__()

    def begin(self) -> None:
        let_torch_enter_gpus()
        self.undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self.undo.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module that goes there gets new parameters
        replaced = {
            "load_models_gpu": lambda *_, **__: None, "cuda_device_context": contextlib.nullcontext,
            "get_free_memory": lambda device=None, torch_free_too=False: (2**34, 2**34) if torch_free_too else 2**34,
        }
        replaced = {name: stand_in for name, stand_in in replaced.items() if hasattr(comfy.model_management, name)}  # 0.16.3 lacks one
        self.undo.enter_context(mock.patch.multiple(comfy.model_management, **replaced))
        self.undo.enter_context(mock.patch.object(torch.cuda, "_lazy_init", lambda: None))
        self.undo.enter_context(mock.patch.dict(os.environ, {VARIABLE: "torch"}))

    def __exit__(self, *error):
        super().__exit__(*error)
        self.entered -= 1
        if self.entered == 0:
            self.undo.close()

    def take(self, patcher):
        """A clone of a ModelPatcher that is sampled there. The model itself goes there for good."""
        for module in patcher.model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: OnGpu(x.detach()) for name, x in tensors.items() if x is not None})
        patcher = patcher.clone()
        patcher.load_device = GPU
        return patcher

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        operation = Operation(function, arguments, keywords or {})
        if operation.of_gpu and made_of_others(function):
            with self:
                return function.decompose(*operation.arguments, **operation.keywords)
        result = operation.result()
        if operation.of_gpu:
            for places, kind in ((self.waits, operation.wait()), (self.not_on_apple, operation.not_on_apple())):
                if kind is not None:
                    places += own_place(kind)
        return result


@functools.lru_cache(maxsize=None)
def whose(file: str) -> str | None:
    """The name of a file of the pack's own code; "" of torch's and this one; None of others."""
    path = Path(file)
    if path == Path(__file__) or "torch" in path.parts:
        return ""
    return path.name if ROOT in path.parents and path.relative_to(ROOT).parts[0] in ("nodes", "kernels") else None


def own_place(kind: str) -> list[str]:
    """Whose code asks: the first that is neither torch's nor this file's, if it is the pack's."""
    frame = sys._getframe(1)
    while (name := whose(frame.f_code.co_filename)) == "":
        frame = frame.f_back
    return [f"{name}:{frame.f_lineno} {frame.f_code.co_name}: {kind}"] if name else []
