"""Networks that were compiled (torch.compile), and hooks that come after."""

import sys
import threading
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_stance = None


@contextmanager
def as_written():
    """In this context compiled networks run as they were written, without compiled code.

    ComfyUI's TorchCompileModel tells the compiler not to look at transformer_options. So what was traced without an
    attention hook, or with another one, is run again as if nothing had changed, and the hook has no effect, without a
    word. Where a hook of ours is to act, compiled code is therefore passed by.

    The stance is one of the whole process. ComfyUI samples on several GPUs in as many threads: the first one inside takes
    it, and the last one out puts back what was there.
    """
    global _inside, _stance
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with _lock:
        _inside += 1
        if _inside == 1:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _stance.__exit__(None, None, None)
