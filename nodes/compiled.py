"""Networks that were compiled (torch.compile), and hooks that come after."""

import contextlib
import sys

import torch


def as_written():
    """A context in which compiled networks run as they were written, without compiled code.

    ComfyUI's TorchCompileModel tells the compiler not to look at transformer_options. So what was traced without an
    attention hook, or with another one, is run again as if nothing had changed, and the hook has no effect, without a
    word. Where a hook of ours is to act, compiled code is therefore passed by.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
