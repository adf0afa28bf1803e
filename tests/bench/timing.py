"""Clocks for benchmarks: cases of one process in turns, medians and spreads; and the peak of memory."""

import gc
import random
import statistics
import time

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = 2000
"""Of the bootstrap that gives a median's interval."""


def on_gpu() -> bool:
    return torch.cuda.is_available()


def seconds_of(work) -> float:
    """How long `work` takes: by the clock on a GPU, which is waited for, else in processor time of this process, which
    other programs on the machine disturb far less."""
    clock = time.perf_counter if on_gpu() else time.process_time
    if on_gpu():
        torch.cuda.synchronize()
    start = clock()
    with torch.inference_mode():
        work()
    if on_gpu():
        torch.cuda.synchronize()
    return clock() - start


def median_interval(values: list[float]) -> list[float]:
    """95 % bootstrap interval of the median."""
    numbers = torch.tensor(values)
    chosen = torch.randint(len(numbers), (DRAWS, len(numbers)), generator=torch.Generator().manual_seed(0))
    medians = numbers[chosen].median(dim=1).values
    return [round(medians.quantile(q).item(), 4) for q in (0.025, 0.975)]


def seconds_in_turns(cases: dict, repeats: int) -> dict[str, list[float]]:
    """Run cases (name -> function of the repeat's number) in turns, after one round unmeasured.

    Each round has an order of its own, the same at every call: what ran before leaves caches and memory in another state, so that
    the same case between two fixed neighbours was measured 5 to 10 % slower than at another place. Python's collector leaves alone
    what is there before: going through all of ComfyUI took 0.4 s, of whichever run it came upon.
    """
    seconds = {name: [] for name in cases}
    gc.collect()
    gc.freeze()
    try:
        for repeat in range(repeats + 1):
            for name in random.Random(repeat).sample(list(cases), len(cases)):
                spent = seconds_of(lambda: cases[name](repeat))
                if repeat:
                    seconds[name].append(spent)
    finally:
        gc.unfreeze()
    return seconds


def differences(cases: dict, repeats: int, base: str) -> dict:
    """Milliseconds that each case takes beyond the case `base` of the same round: the median and its 95 % interval, and the
    difference of the least."""
    seconds, told = seconds_in_turns(cases, repeats), {}
    for name, values in seconds.items():
        beyond = [1e3 * (value - other) for value, other in zip(values, seconds[base])]
        least = 1e3 * (min(values) - min(seconds[base]))
        told[name] = {"median": statistics.median(beyond), "interval_95": median_interval(beyond), "least": least}
    return told


def in_turns(cases: dict, repeats: int, base: str | None = None) -> dict:
    """Run cases in turns. Gives median and least seconds and, against the case `base` of the same round, the median ratio and its
    95 % interval, and the ratio of the least seconds: where something else takes the processors now and then, that one shows the work.
    """
    seconds, told = seconds_in_turns(cases, repeats), {}
    for name, values in seconds.items():
        told[name] = {"seconds": round(statistics.median(values), 5), "least_seconds": round(min(values), 5)}
        if base is not None:
            ratios = [value / other for value, other in zip(values, seconds[base])]
            told[name] |= {"ratio": round(statistics.median(ratios), 4), "interval_95": median_interval(ratios)}
            told[name]["ratio_of_least"] = round(min(values) / min(seconds[base]), 4)
    return told


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive at once; `peak` is their largest sum."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {at: (ref, size) for at, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_bytes(work) -> int:
    """Most bytes of tensors at once while `work` runs: by CUDA's own count on a GPU, else of what operations give."""
    with torch.inference_mode():
        if on_gpu():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with LiveTensors() as tensors:
            work()
        return tensors.peak
