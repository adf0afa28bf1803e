"""Training of the demo model: a run that was interrupted and resumed is the uninterrupted run, bit for bit."""

import pytest
import torch
from artifact_guard.nodes.demo import model as demo_model
from tests.bench import train_demo

STEPS = 4
CPU = torch.device("cpu")


@pytest.fixture
def small_run(monkeypatch):
    """train() on a few random images, four to a batch, with a checkpoint every second step."""
    monkeypatch.setattr(train_demo, "BATCH", 4)
    monkeypatch.setattr(train_demo, "SAVE_EVERY", 2)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(8)
    return lambda output, seed=0: train_demo.train(demo_model, images, labels, output, STEPS, seed, CPU)


def test_interrupted_and_resumed_equals_uninterrupted(small_run, monkeypatch, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = small_run(tmp_path / "whole")
    step_loss, calls = train_demo.step_loss, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step_loss(*arguments)

    monkeypatch.setattr(train_demo, "step_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "parts")
    resumed = small_run(tmp_path / "parts")
    assert len(calls) == 4 + 2, "two of the four steps were kept"
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_weights_are_those_the_demo_model_loads_and_fit_the_size_limit(small_run, tmp_path):
    weights = small_run(tmp_path)
    assert all(w.dtype == torch.float16 for w in weights.values())
    assert demo_model.build_demo_model(weights).model.model_type.name == "V_PREDICTION"
    assert demo_model.WEIGHTS.stat().st_size <= 16e6
    del weights["out.2.weight"]
    with pytest.raises(ValueError, match="out.2.weight"):
        demo_model.build_demo_model(weights)


def test_a_checkpoint_of_another_run_is_refused(small_run, tmp_path):
    small_run(tmp_path)
    with pytest.raises(SystemExit, match="another seed"):
        small_run(tmp_path, seed=1)
