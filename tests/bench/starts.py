"""How many kernels some work would start on a GPU, counted without one."""

from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STARTS = {
    "change_speed": 2, "median_and_mad": 1, "label_regions": 4, "sample_quantile": 1, "change_maps": 1, "bend_map": 1,
    "renoise": 1, "scale_pair": 1,
}
"""Kernels that a Triton form starts, what it makes before them included."""


class Starts(TorchDispatchMode):
    """Counts the operations that would start a kernel on a GPU: no views, no bare memory."""

    NONE = {"empty", "empty_like", "new_empty", "lift_fresh", "detach", "_local_scalar_dense", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.counted, self.paused = Counter(), False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if not (self.paused or function.is_view or name in self.NONE):
            self.counted[name] += 2 if "pad" in name else 1
        return function(*arguments, **(keywords or {}))

    def form(self, name, reference):
        """Stands in for the Triton form of a kernel: gives what its reference gives, and counts what it would start."""

        def run(*arguments, **keywords):
            self.paused = True
            try:
                return reference(*arguments, **keywords)
            finally:
                self.paused = False
                self.counted[name] += STARTS[name]

        return run


def starts_of(work):
    """Kernels that `work` would start on a GPU with Triton, by operation, and what it gives."""
    from artifact_guard.kernels import dispatch, robust_threshold, score_dynamics
    from artifact_guard.nodes.asced import waiting

    starts = Starts()
    forms = SimpleNamespace(**{name: starts.form(name, dispatch.KERNELS[name].reference) for name in STARTS})
    with (
        mock.patch.object(dispatch, "obstacle", lambda tensors, dtypes, unfit: unfit and unfit(tensors)),
        mock.patch.object(dispatch.importlib, "import_module", lambda *_: forms),
        mock.patch.object(robust_threshold, "NUMPY_DEVICES", ()), mock.patch.object(waiting, "ONE_BY_ONE", ()),
        mock.patch.object(score_dynamics, "PRODUCT_DEVICES", ()),
        torch.inference_mode(), starts,
    ):
        result = work()
    return starts.counted, result
