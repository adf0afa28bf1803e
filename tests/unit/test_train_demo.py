"""Training of the demo model: a run that was interrupted and resumed is the uninterrupted run, bit for bit."""

import json

import pytest
import torch
from artifact_guard.nodes.demo import model as demo_model
from tests.bench import train_demo, training_runs

STEPS = 4
CPU = torch.device("cpu")


@pytest.fixture
def small_run(monkeypatch):
    """train() on a few random images, four to a batch, with a checkpoint every second step."""
    monkeypatch.setattr(train_demo, "BATCH", 4)
    monkeypatch.setattr(train_demo, "SAVE_EVERY", 2)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(8)
    return lambda output, seed=0, steps=STEPS, **more: train_demo.train(
        demo_model, images, labels, output, steps, seed, CPU, **more)


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


def test_a_run_by_time_is_the_run_of_that_many_steps(small_run, monkeypatch, tmp_path):
    """The pace of its first steps says how many; gone on with, it keeps to its plan."""
    monkeypatch.setattr(training_runs, "PACE_FROM", 1)
    monkeypatch.setattr(training_runs, "PACE_TO", 2)
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(training_runs.time, "monotonic", lambda: next(clock))
    for name in ("whole", "time"):
        (tmp_path / name).mkdir()
    by_time = small_run(tmp_path / "time", steps=None, minutes=1.5)
    told = json.loads((tmp_path / "time" / train_demo.TRAINING).read_text())
    assert told["steps"] == told["planned"] > 3
    monkeypatch.undo()
    monkeypatch.setattr(train_demo, "BATCH", 4)
    whole = small_run(tmp_path / "whole", steps=told["steps"])
    assert all(torch.equal(whole[name], by_time[name]) for name in whole)
    again = small_run(tmp_path / "time", steps=None, minutes=1.5)
    assert all(torch.equal(whole[name], again[name]) for name in whole), "nothing is left to do"


def test_a_run_by_time_ends_in_time(small_run, monkeypatch, tmp_path):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(training_runs.time, "monotonic", lambda: next(clock))
    small_run(tmp_path, steps=None, minutes=1)
    told = json.loads((tmp_path / train_demo.TRAINING).read_text())
    assert 0 < told["steps"] < 10 and told["planned"] is None


def test_a_checkpoint_of_another_run_is_refused(small_run, tmp_path):
    small_run(tmp_path)
    with pytest.raises(SystemExit, match="another seed"):
        small_run(tmp_path, seed=1)
