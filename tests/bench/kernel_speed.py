"""P8: each Triton kernel against its torch reference on a GPU: same answer, time, share of the bandwidth, and the choice.

Bandwidth is that of a copy of 64 MB on the same GPU. Bytes are those a kernel has to move: every input once, every output
once. At the end stands the table for kernels/dispatch.py: from which size on each Triton form was faster, if at all.
"""

import statistics
from pathlib import Path

import torch

from .timing import on_gpu

REPEATS, INNER = 15, 20
SIZES = {
    "SD 1.5, 512x512": (1, 4, 64, 64), "SD 1.5, batch 8": (8, 4, 64, 64), "SDXL, 1024x1024": (1, 4, 128, 128),
    "Flux, 1024x1024": (1, 16, 128, 128), "Flux, 2048x2048": (1, 16, 256, 256), "Flux, 2048x2048, batch 8": (8, 16, 256, 256),
    "Wan video, 81 frames of 832x480": (21, 16, 60, 104), "64 MB": (16, 16, 256, 256),
}
TOKENS = {"SD 1.5": (2, 4096, 320, 1), "SDXL": (2, 4096, 640, 1), "Flux": (1, 24, 4608, 128), "Flux, 2048x2048": (1, 24, 16896, 128)}


def milliseconds(work) -> float:
    """Median time of one call, from many in a row, by CUDA events."""
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(INNER):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / INNER)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a millisecond that a copy of 64 MB reads and writes."""
    source = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def cases(shape: tuple[int, ...]) -> dict:
    """Kernel -> its arguments at this size."""
    batch, channels, height, width = shape
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=random, device="cuda")

    x, y, z = normal(*shape), normal(*shape), normal(*shape)
    mask = torch.nn.functional.max_pool2d((torch.rand(batch, 1, height, width, generator=random, device="cuda") < 0.002).float(), 5, 1, 2)[:, 0] > 0
    plane = x[:, 0].contiguous()
    return {
        "change_maps": (x, y), "bend_map": (x, y, z), "change_speed": (x, y, 1.0),
        "median_and_mad": (plane, plane > -0.5), "sample_quantile": (plane, 0.85), "label_regions": (mask,), "renoise": (x, y, z, mask, 0.3, 0.9),
    }


def attention_cases() -> dict:
    """Size -> arguments of scale_pair: (rows, tokens, channels) or (rows, heads, tokens, channels), half precision."""
    told = {}
    for name, (rows, first, second, third) in TOKENS.items():
        shape, axis = ((rows, first, second), 1) if third == 1 else ((rows, first, second, third), 2)
        key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        skipped = 512 if axis == 2 else 0
        told[name] = (key, value, torch.rand(rows, shape[axis] - skipped, device="cuda"), skipped, axis)
    return told


def moved(arguments, results) -> int:
    """Bytes of all tensors in and out."""
    results = results if isinstance(results, tuple) else (results,)
    return sum(x.numel() * x.element_size() for x in (*arguments, *results) if isinstance(x, torch.Tensor))


def compare(function, arguments, copy: float) -> dict:
    """One kernel at one size."""
    wanted, result = function.reference(*arguments), function.triton(*arguments)
    pairs = zip(wanted, result) if isinstance(wanted, tuple) else ((wanted, result),)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if arguments[0].dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 2e-6}
    for one, other in pairs:
        torch.testing.assert_close(one, other, **tolerance)
    torch_ms, triton_ms = milliseconds(lambda: function.reference(*arguments)), milliseconds(lambda: function.triton(*arguments))
    return {
        "size": function.size_of([x for x in arguments if isinstance(x, torch.Tensor)]),
        "torch_us": round(1000 * torch_ms, 2), "triton_us": round(1000 * triton_ms, 2),
        "times_faster": round(torch_ms / triton_ms, 2),
        "share_of_copy_bandwidth": round(moved(arguments, result) / triton_ms / copy, 3),
    }


def faster_from(rows: list[dict]) -> int | None:
    """The smallest size from which on the Triton form was faster at every size measured; None if it is so at none."""
    least = None
    for size in sorted({row["size"] for row in rows}, reverse=True):
        if min(row["times_faster"] for row in rows if row["size"] == size) <= 1.0:
            break
        least = size
    return least


def run(pack, output: Path, data: Path | None) -> dict:
    if not on_gpu():
        reason = "not measured: Triton compiles for a GPU only, and there is none"
        print(reason, flush=True)
        return {"skipped": reason}
    from artifact_guard.kernels.dispatch import KERNELS

    copy = bandwidth()
    table = {name: {} for name in KERNELS}
    with torch.inference_mode():
        for size, shape in SIZES.items():
            for name, arguments in cases(shape).items():
                table[name][size] = compare(KERNELS[name], arguments, copy)
        for size, arguments in attention_cases().items():
            table["scale_pair"][size] = compare(KERNELS["scale_pair"], arguments, copy)
    measured = {name: faster_from(list(rows.values())) for name, rows in table.items()}
    return {
        "copy_bandwidth_GB_per_s": round(copy / 1e6, 1), "kernels": table,
        "FASTER for kernels/dispatch.py": {name: least for name, least in measured.items() if least is not None},
        "to be dropped": [name for name, least in measured.items() if least is None],
    }
