"""What a long training needs beside its steps: checkpoints that replace each other in one move, and a plan by time."""

import math
import os
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PACE_FROM, PACE_TO = 20, 120
"""Steps by whose pace the number of steps is chosen when a time is given; warm-up, and so the same whatever comes out."""

SPARE = 0.96
"""Share of the given time that is planned; the rest is for slower steps and the last checkpoint."""


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 where the device has no arithmetic for it."""
    from artifact_guard.nodes.fam.lora_settings import emulates_bfloat16

    return torch.float32 if emulates_bfloat16(device) else torch.bfloat16


def quick_autocast(device: torch.device) -> torch.autocast:
    dtype = quick_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Plan:
    """How many steps a run has: a number that was given, or as many as fit into the minutes that were.

    By time, the pace of the first steps decides, and `deadline` ends the run in any case. The learning rate of those
    steps does not depend on the number, so that the run is the one which that number gives.
    """

    def __init__(self, steps: int | None, minutes: float | None, device: torch.device):
        self.steps, self.device, self.began = steps, device, time.monotonic()
        self.deadline = math.inf if minutes is None else self.began + 60 * minutes
        self.paced = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def before(self, step: int, first: int) -> bool:
        """Called before each step; False ends the run. `first` is the step that this run began with."""
        if self.steps is None and step == first + PACE_FROM:
            self.paced = self._now()
        if self.steps is None and step == first + PACE_TO:
            now = self._now()
            left = self.began + SPARE * (self.deadline - self.began) - now
            self.steps = step + max(1, int(left / (now - self.paced) * (PACE_TO - PACE_FROM)))
        return (self.steps is None or step < self.steps) and time.monotonic() < self.deadline


def save_checkpoint(path: Path, step: int, planned: int | None, run: dict, network, ema, optimizer) -> None:
    """Write the whole state of training, as safetensors, replacing the last checkpoint in one move.

    planned: how many steps the run has in all, if that is known already.
    """
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "planned": str(planned or "")} | {k: str(v) for k, v in run.items()})
    os.replace(partial, path)


def load_checkpoint(path: Path, run: dict, network, ema, optimizer) -> tuple[int, int | None]:
    """Restore what `save_checkpoint` wrote; gives the number of steps done, and that of the plan if it has one."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        differing = [k for k, v in run.items() if metadata.get(k) != str(v)]
        if differing:
            raise SystemExit(f"{path} is of a run with another {', '.join(differing)}: choose another --output.")
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    for prefix, module in (("network.", network), ("ema.", ema)):
        module.load_state_dict({k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)})
    for name, parameter in network.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"].clone() for key in keys}
        for key in keys[1:]:
            optimizer.state[parameter][key] = optimizer.state[parameter][key].to(parameter.device)
    return int(metadata["step"]), int(metadata.get("planned") or 0) or None
