"""One front for developers: python dev.py demo | test | bench | serve | train-... Each command takes --help.

Each command runs in a real ComfyUI on this machine. Without --comfyui one is built in the user's cache folder, once.
"""

import sys

if sys.version_info < (3, 10):
    sys.stderr.write("dev.py needs Python 3.10 or newer\n")
    sys.exit(2)

import argparse
import signal
import subprocess
import types
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# Registered by path, because an installed package that happens to be named `tests` would hide ours.
tests = sys.modules["tests"] = types.ModuleType("tests")
tests.__path__ = [str(ROOT / "tests")]

from tests.harness.cache import EnvironmentFailed, alone, cache_folder
from tests.harness.environment import Environment, existing, prepare
from tests.harness.pins import DEFAULT_VERSION, SOURCES, TEST_PACKAGES
from tests.harness.server import ComfyServer, ServerFailed


def run(environment: Environment, command: list, cwd: Path | None = None) -> int:
    """Runs a command with the environment's Python; its exit code."""
    process = subprocess.Popen([environment.python, *command], cwd=cwd, env=environment.variables())
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            # The child got the same Ctrl-C and is tidying up.
            continue
        except SystemExit:
            process.terminate()
            process.wait()
            raise


def demo(environment: Environment, options: argparse.Namespace) -> int:
    from tests.harness.demo import run_demo
    from tests.harness.fam_demo import run_fam_demo

    chosen = run_demo if options.template == "quickstart" else partial(run_fam_demo, options.template)
    return chosen(environment, options.output.absolute(), options.update_docs)


def test(environment: Environment, options: argparse.Namespace) -> int:
    missing = environment.missing(TEST_PACKAGES)
    if missing:
        advice = f"{environment.python} -m pip install {' '.join(missing)}"
        if any(package.startswith("pytest") for package in missing):
            raise EnvironmentFailed(f"this Python lacks packages the tests need. To install them:\n    {advice}")
        print(f"Tests that need them are skipped: {' '.join(missing)}. To install them:\n    {advice}", flush=True)
    gpu = ["--gpu"] if options.gpu else []
    # One worker a processor, each with one thread; -n 0 after -- asks for none, as a debugger does by itself.
    workers = ["-n", "logical", "--maxprocesses", "4", "--dist", "worksteal"]
    # Named, because pytest would take tests/ for the root: see tests/conftest.py.
    command = ["-m", "pytest", "-c", ROOT / "tests" / "pytest.ini", "--rootdir", ROOT, *workers, *gpu, *options.rest]
    return run(environment, command, cwd=ROOT)


def bench(environment: Environment, options: argparse.Namespace) -> int:
    return run(environment, [ROOT / "tests" / "bench" / "run.py", *options.rest])


def train_demo(environment: Environment, options: argparse.Namespace) -> int:
    return run(environment, [ROOT / "tests" / "bench" / "train_demo.py", *options.rest])


def train_time_predictor(environment: Environment, options: argparse.Namespace) -> int:
    return run(environment, [ROOT / "tests" / "bench" / "train_time_predictor.py", *options.rest])


def train_highlighter(environment: Environment, options: argparse.Namespace) -> int:
    return run(environment, [ROOT / "tests" / "bench" / "train_highlighter.py", *options.rest])


def train_trap_net(environment: Environment, options: argparse.Namespace) -> int:
    return run(environment, [ROOT / "tests" / "bench" / "train_trap_net.py", *options.rest])


def serve(environment: Environment, options: argparse.Namespace) -> int:
    base = cache_folder() / "serve"
    print(f"Starting ComfyUI; its models, input and output stay in {base}", flush=True)
    busy = f"another `dev.py serve` uses {base}: end it first, or give this one a folder of its own with ARTIFACT_GUARD_CACHE"
    with alone(base.with_suffix(".lock"), busy), ComfyServer(environment, base_directory=base, port=options.port) as server:
        print(f"ComfyUI with Artifact Guard: {server.address}    (Ctrl-C ends it)", flush=True)
        try:
            return server.join()
        except KeyboardInterrupt:
            return 0


def port(text: str) -> int:
    """A port's number, for argparse, which makes an error of the ValueError."""
    number = int(text)
    if not 0 < number < 65536:
        raise ValueError(text)
    return number


def parse(arguments: list[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI folder and build nothing")
    common.add_argument("--python", metavar="EXE", help="the Python that runs it (default: this one)")
    common.add_argument(
        "--comfyui-version",
        choices=SOURCES,
        default=DEFAULT_VERSION,
        metavar="V",
        help=f"build or reuse an environment with this ComfyUI: {', '.join(SOURCES)} (default {DEFAULT_VERSION})",
    )
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def command(function, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__.replace("_", "-"), parents=[common], help=text, description=text)
        added.set_defaults(command=function)
        return added

    shown = command(demo, "run the quickstart workflow on the small model in this repository and keep its pictures")
    shown.add_argument("--template", choices=("quickstart", "fam", "fam_lora"), default="quickstart", help="or another of the templates")
    shown.add_argument("--output", type=Path, default=ROOT / "output", metavar="DIR", help="(default: output)")
    shown.add_argument("--update-docs", action="store_true", help="also renew the pictures the documentation shows")
    tested = command(test, "run the tests; arguments after -- go to pytest")
    tested.add_argument("--gpu", action="store_true", help="also run the tests that need a GPU")
    command(bench, "run benchmarks, those that are named or all; `bench -- --help` lists them and their options")
    served = command(serve, "start ComfyUI with this pack until Ctrl-C")
    served.add_argument("--port", type=port, default=8188, help="(default: 8188)")
    for function, what in (
        (train_demo, "train the demo model again"), (train_time_predictor, "train the demo model's time predictor again"),
        (train_highlighter, "train the demo model's flaw highlighter again"),
        (train_trap_net, "fit the ASCED detector's network again"),
    ):
        command(function, f"{what}; after -- come its own options, `-- --help` lists them")

    # Cut off before parsing: argparse would read options behind -- as its own.
    own, rest = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        own, rest = arguments[:cut], arguments[cut + 1 :]
    options, unknown = parser.parse_known_args(own)
    passing = (bench, train_demo, train_time_predictor, train_highlighter, train_trap_net)
    if unknown and options.command not in passing or rest and options.command not in (test, *passing):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if options.python and not options.comfyui:
        parser.error("--python goes with --comfyui")
    options.rest = unknown + rest
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    # Ended by a plain kill, we still stop what we started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.comfyui:
            environment = existing(options.comfyui, options.python)
        else:
            environment = prepare(options.comfyui_version)
        return options.command(environment, options)
    except (EnvironmentFailed, ServerFailed, OSError) as failure:
        print(f"dev.py: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
