"""The Triton kernels compile for GPUs, down to machine code, on a machine without one: the interpreter forgives more."""

import os
import subprocess
import sys

import pytest

from tests.harness.pack import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

COMPILE = """
import importlib, sys, types
root, capability = sys.argv[1], int(sys.argv[2])
package = types.ModuleType("pack"); package.__path__ = [root]; sys.modules["pack"] = package
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {
    "score_dynamics": {
        "_change_maps": [("p16 p32 pf pf i i", {"BLOCK": 1024}), ("pb pb pf pf i i", {"BLOCK": 1024})],
        "_bend_map": [("pf pf pf pf i i", {"BLOCK": 1024})],
        "_blur_axis": [("p16 p16 pf pf i i i i", {"DIFFERENCE": first, "ALONG_ROWS": first, "BLOCK": 1024}) for first in (True, False)],
    },
    "robust_threshold": {
        "_median_and_mad": [("pf pu pf pf i", {"MASKED": masked, "BLOCK": size}) for masked, size in ((True, 4096), (False, 65536))],
        "_quantile": [("pf pu pf i i i", {"MASKED": masked, "BLOCK": 4096}) for masked in (True, False)],
    },
    "regions": {"_join_neighbours": [("pu pi i i", {"BLOCK": 256})], "_name_regions": [("pu pi pl i", {"BLOCK": 256})]},
    "renoise": {"_renoise": [("p16 pf pf pu p16 f f i i", {"BLOCK": 1024})]},
    "kv_scale": {"_scale_pair": [("pb pb pb pb pf i i i i i i", {"BLOCK": 1024})]},
}
TYPES = {"pf": "*fp32", "p32": "*fp32", "p16": "*fp16", "pb": "*bf16", "pu": "*u8", "pi": "*i32", "pl": "*i64", "i": "i32", "f": "fp32"}

def jitted(module):
    return {name for name, f in vars(module).items() if isinstance(f, triton.JITFunction) and f.__module__ == module.__name__}

for name, kernels in KERNELS.items():
    module = importlib.import_module(f"pack.kernels.{name}_triton")
    source = open(module.__file__).read()
    launched = {kernel for kernel in jitted(module) if f"{kernel}[" in source}
    assert launched == set(kernels), (name, launched)
    for kernel, cases in kernels.items():
        function = getattr(module, kernel)
        for types_, constants in cases:
            given = iter(types_.split())
            signature = {a: "constexpr" if a in constants else TYPES[next(given)] for a in function.arg_names}
            options = {"num_warps": module.warps(constants["BLOCK"])} if hasattr(module, "warps") else {}
            source_ = ASTSource(fn=function, signature=signature, constexprs=constants)
            built = triton.compile(source_, target=GPUTarget("cuda", capability, 32), options=options)
            assert built.asm["cubin"], kernel
print("all compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is there on Linux only")
def test_kernels_compile(tmp_path):
    """Every kernel that a launcher starts, for an A100 and its like; a kernel that is missing here fails too.

    What compiles for these compiles for newer ones; --gpu runs them on the one that is there.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", COMPILE, str(ROOT), "80"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0 and "all compiled" in result.stdout, result.stderr[-3000:]
