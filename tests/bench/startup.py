"""What the pack adds to ComfyUI's start: seconds to import it and make its node list, after ComfyUI's own nodes."""

import statistics
import subprocess
import sys
from pathlib import Path

from tests.harness.environment import Environment
from tests.harness.pack import ROOT

REPEATS = 5
MEASURE = """
import asyncio, importlib.util, sys, time, types
tests = sys.modules["tests"] = types.ModuleType("tests"); tests.__path__ = [sys.argv[1] + "/tests"]
from tests.harness.pack import ROOT, prepare_comfyui
prepare_comfyui()
import nodes
asyncio.run(nodes.init_builtin_extra_nodes())
before, start = set(sys.modules), time.process_time()
spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
async def list_nodes():
    return await (await pack.comfy_entrypoint()).get_node_list()
count = len(asyncio.run(list_nodes()))
spent = time.process_time() - start
others = sorted({name.split(".")[0] for name in set(sys.modules) - before} - {"pack"})
print("RESULT", spent, count, ",".join(others))
"""


def run(pack, output: Path, data: Path | None) -> dict:
    seconds = []
    for _ in range(REPEATS):
        command = [sys.executable, "-c", MEASURE, str(ROOT)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=Environment.current().variables()).stdout
        spent, count, others = next(line for line in text.splitlines() if line.startswith("RESULT")).split(" ", 3)[1:]
        seconds.append(float(spent))
    return {
        "processor_seconds": round(statistics.median(seconds), 3), "from": min(seconds), "to": max(seconds),
        "nodes": int(count), "packages_that_nobody_else_had_imported": [name for name in others.split(",") if name],
    }
