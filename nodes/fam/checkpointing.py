"""Gradient checkpointing: a block's activations are not kept but computed again on the way back.

The blocks are found by ComfyUI's own find_modules_at_depth. Two things differ from core's. A block that is computed again
sees the transformer_options as they were the first time: models write into them as they go, and attention patches read
there which block is running. And blocks may write in place into activations that their gradient needs, as Flux's single
blocks do with `x += y`: when a block is computed again, torch does not notice, and gradients are wrong by several percent.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from comfy_extras.nodes_train import find_modules_at_depth

DEPTH = 2
"""The network's blocks; depth 1 is the network as a whole, which would save nothing."""

BETWEEN = ("input_block_patch", "input_block_patch_after_skip", "output_block_patch")
"""Kinds of patches that a UNet calls between its blocks."""


def written(function, args: tuple) -> torch.Tensor | None:
    """The tensor on the way to a gradient that this call of a torch function writes in place, if it does."""
    name = getattr(function, "__name__", "")
    target = args[0] if args else None
    writes = name == "__setitem__" or name.endswith("_") and not name.startswith("__")
    if not writes or not isinstance(target, torch.Tensor):
        return None
    return target if torch.is_grad_enabled() and target.requires_grad and not target.is_leaf else None


class WritesInPlace(TorchFunctionMode):
    """Notes whether anything inside writes in place into a tensor on the way to a gradient."""

    seen = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen |= written(function, args) is not None
        return function(*args, **(kwargs or {}))


@contextmanager
def watched(network: torch.nn.Module):
    """A WritesInPlace that sees what the network does when it is called inside the block of this context."""
    watch, forward, bare = WritesInPlace(), network.forward, network.__dict__.get("forward")

    def run(*args, **kwargs):
        with watch:
            return forward(*args, **kwargs)

    try:
        network.forward = run
        yield watch
    finally:
        put_back(network, bare)


def put_back(module: torch.nn.Module, bare) -> None:
    """Give a module the forward again that stood in its __dict__, None for none."""
    if bare is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = bare


class KeepWhatWasSaved(TorchFunctionMode):
    """Inside, a tensor with a gradient moves to new memory before it is written in place: what was saved of it stays.

    Views stay where they are, or their base would not see what is written.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        target = written(function, args)
        if target is not None and not target._is_view():
            target.data = target.data.clone()
        return function(*args, **(kwargs or {}))


def own(value):
    """A tensor on the way to a gradient as a clone, for a block that writes into what it is given."""
    return value.clone() if isinstance(value, torch.Tensor) and value.requires_grad else value


def checkpointed_forward(forward, whole: bool = False):
    """A module's forward, checkpointed. whole: what is computed again goes on to its end, where torch would stop it by an exception
    as soon as it has all that it needs: FreeU catches every exception, and would take that for a device without fft."""
    def run(*args, **kwargs):
        given = [*args, *kwargs.values()]
        before = [dict(value) if isinstance(value, dict) else value for value in given]
        calls, failed = [], []

        def block(*_):
            again = bool(calls)
            values = list(map(own, before if again else given))
            calls.append(True)
            try:
                with KeepWhatWasSaved():
                    return forward(*values[: len(args)], **dict(zip(kwargs, values[len(args) :])))
            except BaseException as error:
                # Torch before 2.13 leaves its hooks on saved tensors in place for as long as an exception lives that came
                # out of here, and another network's gradient then goes through this block.
                if again:
                    raise
                failed.append(error)

        # Handed over for torch to notice a tensor that was changed in between: computing again would then be wrong.
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        with set_checkpoint_early_stop(not whole):
            result = checkpoint(block, *tensors, use_reentrant=False)
        if failed:
            raise failed.pop()
        return result

    return run


@contextmanager
def checkpointed(network: torch.nn.Module, on: bool):
    """The network with checkpointed blocks inside the block of this context; as it was after it."""
    modules = find_modules_at_depth(network, depth=DEPTH) if on else []
    bare = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = checkpointed_forward(module.forward)
        yield
    finally:
        for module, forward in zip(modules, bare):
            put_back(module, forward)


def with_checkpointed_patches(model):
    """A clone of a ModelPatcher whose patches between blocks are checkpointed like these: FreeU's writes into what it has multiplied,
    whose gradient needs it as it was. Patches that hold tensors, which move with the model, stay as they are."""
    model = model.clone()
    patches = model.model_options.get("transformer_options", {}).get("patches", {})
    for name in BETWEEN:
        if name in patches:
            patches[name] = [patch if hasattr(patch, "to") else checkpointed_forward(patch, whole=True) for patch in patches[name]]
    return model
