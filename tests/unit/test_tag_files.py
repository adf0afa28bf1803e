"""Time predictors as files: what is saved comes back; nothing is overwritten; foreign and damaged files are refused."""

import os
from pathlib import Path

import folder_paths
import pytest
import torch
from artifact_guard.nodes.demo.model import load_demo_model
from artifact_guard.nodes.model_files import KIND_KEY, SETTINGS_KEY, save_model_file
from artifact_guard.nodes.tag.compatibility import check_predictor, kind_of
from artifact_guard.nodes.tag.predictor_files import FOLDER, from_state, load_predictor, predictor_names, state_of
from artifact_guard.nodes.tag.schema import TAGLoadTimePredictor, TAGSaveTimePredictor
from safetensors.torch import load_file, save_file

from tests.unit.tag_support import fresh_predictor, model, trainer

SHIPPED = "demo_fashion_mnist.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/time_predictors in place of the user's."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def trained(steps=2):
    work = trainer(fresh_predictor(model()))
    for _ in range(steps):
        work.step()
    return work.result()


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_was_saved_comes_back_and_can_be_gone_on_with(folder):
    predictor = trained()
    with torch.inference_mode():
        TAGSaveTimePredictor.execute(predictor, "mine")
        (name,) = predictor_names()
        loaded = TAGLoadTimePredictor.execute(name)[0]
    assert loaded.identity == predictor.identity and loaded.kind == predictor.kind and loaded.steps == 2
    further = []
    for start in (predictor, loaded):
        work = trainer(start)
        work.step()
        further.append(work.result())
    assert further[0].identity == further[1].identity
    work = trainer(loaded)
    assert work.step() > 0 and work.network.head.weight.grad is not None, "a loaded predictor gives gradients"


def test_saving_never_overwrites(folder):
    predictor = trained()
    for _ in range(3):
        TAGSaveTimePredictor.execute(predictor, "mine")
    assert files(folder) == [f"mine_0000{n}_.safetensors" for n in (1, 2, 3)]
    TAGSaveTimePredictor.execute(predictor, "deep/er")
    assert "deep/er_00001_.safetensors" in files(folder)


@pytest.mark.parametrize("again", ["mine", "mine/", "./mine", "mine//"])
def test_however_the_prefix_is_written_no_file_is_overwritten(folder, again):
    first = save_model_file("time_predictors", "mine", "kind", {"x": torch.zeros(1)}, {})
    second = save_model_file("time_predictors", again, "kind", {"x": torch.ones(1)}, {})
    assert second != first and second.endswith("mine_00002_.safetensors")
    assert load_file(first)["x"] == 0 and load_file(second)["x"] == 1


def test_a_number_that_somebody_else_took_is_passed_over(folder, monkeypatch):
    """As on a disk that tells no large from small letters, where core counts wrongly."""
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda prefix, root: (root, prefix, 1, "", prefix))
    paths = [save_model_file("time_predictors", "mine", "kind", {"x": torch.full((1,), n)}, {}) for n in (1.0, 2.0, 3.0)]
    assert len(set(paths)) == 3 and [load_file(path)["x"] for path in paths] == [1, 2, 3]


@pytest.mark.parametrize("prefix", ["x" * 300, "taken_00001_.safetensors/y"])
def test_a_name_that_cannot_be_written_is_told(folder, prefix):
    save_model_file("time_predictors", "taken", "kind", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="filename_prefix is .*no file of this name can be written"):
        save_model_file("time_predictors", prefix, "kind", {"x": torch.zeros(1)}, {})


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/out", "C:\\out", "C:out", "..\\out", "", "a\nb"])
def test_names_that_leave_the_folder_are_refused(folder, name):
    with pytest.raises(ValueError, match="filename_prefix"):
        TAGSaveTimePredictor.execute(trained(0), name)
    with pytest.raises(ValueError, match="name"):
        TAGLoadTimePredictor.execute(name + ".safetensors" if name else "")
    assert files(folder) == [] and not (folder.parent / "out").exists()


def saved(folder, predictor=None):
    TAGSaveTimePredictor.execute(predictor or trained(), "mine")
    return folder / files(folder)[0]


def test_truncated_and_damaged_files(folder):
    path = saved(folder)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b"", b"\x80\x04not safetensors at all" * 9):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            load_predictor(path.name)


def test_foreign_files(folder):
    save_file({"a": torch.zeros(3)}, folder / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors is not a file that Artifact Guard saved; a time predictor"):
        load_predictor("lora.safetensors")
    (folder / "evil.safetensors").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ValueError, match="evil.safetensors cannot be read"):
        load_predictor("evil.safetensors")
    assert not os.path.exists("pwned")
    with pytest.raises(ValueError, match="no such file"):
        load_predictor("missing.safetensors")


def test_a_link_to_another_disk_is_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "real.safetensors"
    path = saved(folder)
    path.rename(elsewhere)
    try:
        (folder / "linked.safetensors").symlink_to(elsewhere)
    except OSError:
        pytest.skip("this system permits no links")
    assert load_predictor("linked.safetensors").kind == kind_of(model())


def test_settings_that_are_no_table(folder):
    save_file({"a": torch.zeros(1)}, folder / "list.safetensors", metadata={KIND_KEY: "time predictor", SETTINGS_KEY: "[]"})
    with pytest.raises(ValueError, match="list.safetensors cannot be read.*no table"):
        load_predictor("list.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda tensors, about: tensors.pop("network.head.bias"), "head.bias"),
    (lambda tensors, about: tensors.update({"network.head.bias": torch.zeros(3)}), "head.bias"),
    (lambda tensors, about: tensors["network.head.bias"].fill_(float("nan")), "holds NaN"),
    (lambda tensors, about: about.pop("levels"), "levels"),
    (lambda tensors, about: about["model"].update(channels=4), "blocks.0.weight"),
    (lambda tensors, about: tensors.update({"else.x": torch.zeros(1)}), "else"),
    (lambda tensors, about: tensors.pop("second.head.bias"), "head.bias"),
    (lambda tensors, about: about.update(levels=[float("nan"), 1.0]), "levels"),
    (lambda tensors, about: about.update(levels=[2.0, 1.0]), "levels"),
    (lambda tensors, about: about["model"].update(schedule=[]), "schedule has 0 entries"),
])
def test_incomplete_contents(change, message):
    tensors, about = state_of(trained())
    tensors = {name: weight.clone() for name, weight in tensors.items()}
    change(tensors, about)
    with pytest.raises((KeyError, ValueError), match=message):
        from_state(tensors, about)


def test_shipped_predictor_is_listed_and_fits_the_demo_model():
    assert SHIPPED in predictor_names()
    predictor = load_predictor(SHIPPED)
    assert predictor.condition_dim == 16 and predictor.steps == 6000 and predictor.training is None
    check_predictor(predictor, load_demo_model()[0])
    assert Path(folder_paths.get_full_path(FOLDER, SHIPPED)).stat().st_size < 1.2e6


@pytest.mark.parametrize("reads, message", [
    (2, "is of version 3, this pack reads 2. Update the pack"),
    (4, "is of version 3, this pack reads 4. Its network is no longer used: train and save a new one"),
])
def test_another_version_is_refused(folder, monkeypatch, reads, message):
    path = saved(folder)
    monkeypatch.setattr("artifact_guard.nodes.tag.predictor_files.VERSION", reads)
    with pytest.raises(ValueError, match=message):
        load_predictor(path.name)
