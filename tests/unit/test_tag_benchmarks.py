"""The benchmarks of TAG that need a GPU or data of the user's run through, at a tiny size."""

import io
import itertools
import json
import types
import zipfile

import artifact_guard
import numpy as np
import pytest
import torch
from artifact_guard.nodes.tag.training import TrainingData
from PIL import Image
from tests.bench import tag_cifar10, tag_cost, tag_demo, tag_toy, tag_training, train_time_predictor
from tests.bench.tag_cost import sd15_sized

CLASSES = [f"class{i}" for i in range(10)]


@pytest.fixture
def archive(tmp_path):
    """As much of a CIFAR-10 zip as is read."""
    random, path = np.random.default_rng(0), tmp_path / "cifar10.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split in ("train", "test"):
            for name in CLASSES:
                for number in range(64):
                    data = io.BytesIO()
                    Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(data, "JPEG")
                    file.writestr(f"{split}/{name}/{number:03}.jpg", data.getvalue())
    return path


def test_cifar10_model_is_trained_and_compared(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(tag_cifar10, "NOISES", (0.2,))
    monkeypatch.setattr(tag_cifar10, "FEW_STEPS", (1,))
    monkeypatch.setattr(tag_cifar10, "STEPS", 2)
    figures = tag_cifar10.run(artifact_guard, tmp_path / "out", None, archive, size=tag_cifar10.TINY)
    assert figures["training"]["steps"] == 2 and 0 <= figures["classifier_accuracy"] <= 1
    for case in ("1 steps", "noise 0.2"):
        assert set(figures["cases"][case]) == {"off", "training-free (default)", "predictor"}
        assert len(figures["cases"][case]["predictor"]["KID_ratio"]) == 3
        assert figures["cases"][case]["off"]["pairs"] == 16
    json.dumps(figures)
    assert (tmp_path / "out" / "cifar10-32" / "checkpoint.safetensors").exists()


def test_cifar10_without_data_says_what_to_pass(capsys):
    assert "skipped" in tag_cifar10.run(artifact_guard, None, None, None)
    assert "pass --cifar10 ZIP" in capsys.readouterr().out


def test_cost_compares_with_cores_guidance(monkeypatch, capsys):
    monkeypatch.setattr(tag_cost, "STEPS", 2)
    monkeypatch.setattr(tag_cost, "REPEATS", 1)
    figures = tag_cost.compared(*sd15_sized(32, 16, torch.float32))
    assert set(figures) == {"CFG 1", "CFG 4"} and figures["CFG 1"]["off"]["ratio"] == 1.0
    assert any("SelfAttention" in name for name in figures["CFG 4"])
    if not torch.cuda.is_available():
        monkeypatch.setattr(tag_cost, "compared", lambda *a: {})
        assert "SD 1.5-shaped" in list(tag_cost.run(artifact_guard, None, None))[1]
        assert "No GPU" in capsys.readouterr().out


def test_exact_toy_has_the_exact_score():
    """Its clean estimate against the mean of many draws, its judge against the density, at one point."""
    from artifact_guard.nodes.tag import levels, steering  # noqa: F401

    toy = tag_toy.ExactToy(artifact_guard.nodes.tag)
    level = torch.tensor([0.3])
    alpha, v = levels.alpha_and_variance(level)
    draws = tag_toy.real_points(400_000, torch.Generator().manual_seed(0))
    u = torch.tensor([[6.8, 7.2]])
    weights = (-(u - alpha * draws).square().sum(1) / (2 * v)).softmax(0)
    estimate = toy.ask(u.reshape(1, 2, 1, 1), level).flatten()
    assert torch.allclose(estimate, (weights[:, None] * draws).sum(0), atol=0.05)


def test_toys_cases_are_compared_with_the_same_condition():
    """Each case with the same run unguided; what is done to a run, and the start, is the same."""
    assert tag_toy.baseline("predictor of 1 layers, relative") == "off"
    assert tag_toy.baseline("noise 0.05, predictor of 3 layers, relative") == "noise 0.05, off"
    assert tag_toy.baseline("3 steps, training-free (default)") == "3 steps, off"
    assert tag_toy.baseline("exact model, no drift, off") == "exact model, no drift, off"
    assert tag_toy.baseline("exact model, exact posterior, relative") == "exact model, off"
    toy = tag_toy.ExactToy(artifact_guard.nodes.tag)
    one, again = (toy.sample(seed=1, noise=0.2, steps=5) for _ in range(2))
    assert torch.equal(one, again) and not torch.equal(one, toy.sample(seed=1, steps=5))
    assert torch.equal(toy.sample(seed=1, steps=1), toy.sample(seed=1, steps=1, noise=0.2, drift=0.5))


def test_demo_runs_take_another_model():
    runs = tag_demo.DemoRuns(artifact_guard.nodes.demo.model, tag_demo.ON_CPU, marker := types.SimpleNamespace())
    assert runs.model is marker


def test_training_is_timed_with_the_nodes_defaults(monkeypatch):
    """P7's benchmark on a few images: both cases, gaps over the exact posterior's, going on where it stopped."""
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = TrainingData(images, torch.eye(10).repeat(4, 1))
    monkeypatch.setattr(tag_training, "training_data", lambda *_: (data, data))
    monkeypatch.setattr(train_time_predictor, "EXACT_IMAGES", 40)
    monkeypatch.setattr(tag_training, "defaults", lambda: {"steps": 2, "batch_size": 4, "learning_rate": 1e-4, "seed": 0})
    monkeypatch.setattr(tag_training, "DRAWS", 8)
    ticks = itertools.count(step=10.0)
    monkeypatch.setattr(tag_training, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    figures = tag_training.run(artifact_guard, None, None, rounds=2)
    for case in ("unconditional", "conditional"):
        assert [row["steps"] for row in figures[case]] == [2, 4]
        assert [row["seconds"] for row in figures[case]] == [10.0, 20.0]
        assert figures[case][1]["over_exact"][500.0] > 1
    json.dumps(figures)


def test_training_node_has_these_defaults():
    assert {"steps": 3000, "batch_size": 128, "learning_rate": 1e-4, "seed": 0}.items() <= tag_training.defaults().items()
