"""The demo model trained as a whole by the two-phase rule: the same loop, resumable, and its weights are a demo model's."""

import gc

import pytest
import torch
from artifact_guard.nodes.demo import model as demo_model
from tests.bench import flaw_aware_demo

from tests.exact.images import shape_images
from tests.unit.fam_lora_support import Stop, rough_highlighter, settings

pytestmark = pytest.mark.usefixtures("repeatable")


@pytest.fixture
def short(monkeypatch):
    """run_flaw_aware on a few images, with small map batches."""
    data = shape_images(8, 32, 3, 0), torch.arange(8)
    monkeypatch.setattr(flaw_aware_demo, "load_fashion_mnist", lambda folder: (data, data))
    monkeypatch.setattr(flaw_aware_demo, "base_highlighter", lambda *_: rough_highlighter(size=32))
    monkeypatch.setattr(flaw_aware_demo, "MAP_IMAGES", 2)
    monkeypatch.setattr(flaw_aware_demo, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(flaw_aware_demo, "SAVE_EVERY", 1)
    setting = settings(4, training_dtype="bf16", clip=1.0)
    return lambda output, **more: flaw_aware_demo.run_flaw_aware(demo_model, setting, output, None, **more)


def test_interrupted_and_resumed_equals_uninterrupted_and_is_a_demo_model(short, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = short(tmp_path / "whole")
    from artifact_guard.nodes.fam.flaw_aware import FlawAwareTraining

    with monkeypatch.context() as patch:
        renew = FlawAwareTraining.renew_map

        def stopped(self, step):
            renew(self, step)
            raise Stop

        patch.setattr(FlawAwareTraining, "renew_map", stopped)
        with pytest.raises(Stop):
            short(tmp_path / "parts")
    gc.collect()  # or the stopped run's model goes while ComfyUI's free_memory counts the models
    resumed = short(tmp_path / "parts")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert demo_model.build_demo_model(whole)
    shipped = flaw_aware_demo.trainable_demo(demo_model).model.diffusion_model.state_dict()
    assert any(not torch.equal(shipped[name].half(), value) for name, value in whole.items())


def test_a_finished_run_gives_its_weights_again(short, tmp_path):
    first, again = short(tmp_path), short(tmp_path)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_with_other_settings_is_refused(short, tmp_path, monkeypatch):
    short(tmp_path)
    monkeypatch.setattr(flaw_aware_demo, "MAP_IMAGES", 3)
    with pytest.raises(SystemExit, match="sampling"):
        short(tmp_path)


def test_rate_rises_and_falls_to_zero():
    rate = flaw_aware_demo.falling_rate(100)
    assert rate(0) == pytest.approx(5e-6) and rate(20) == pytest.approx(1e-4) and rate(99) < 1e-7
    assert rate(60) == pytest.approx(5e-5)
