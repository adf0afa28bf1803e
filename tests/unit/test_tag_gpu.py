"""TAG on a CUDA device: training and guidance stay there, nothing waits, and the results are a CPU's within rounding."""

import pytest
import torch
from artifact_guard.nodes.demo import model as demo_model
from artifact_guard.nodes.tag import training
from artifact_guard.nodes.tag.guidance import GuidedRun

from tests.bench import train_demo, training_runs
from tests.bench.cifar_classifier import trained_cifar_classifier
from tests.unit.tag_support import energy_posterior, fresh_predictor, guide, images, model, run

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda():
    return torch.device("cuda")


def trainer(device, steps, predictor=None, conditions=None):
    data = training.TrainingData(images(), conditions)
    dim = 0 if conditions is None else conditions.shape[1]
    settings = training.TrainingSettings(steps, 8)
    return training.Trainer(predictor or fresh_predictor(model(), condition_dim=dim), data, settings, device)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("kept", [training.KEPT_ON_GPU, 0.0])
def test_predictor_trains_there_without_waiting(cuda, conditional, kept, monkeypatch):
    """Frames on the device or on the host: the same run; gone on with, it goes on."""
    monkeypatch.setattr(training, "KEPT_ON_GPU", kept)
    conditions = torch.eye(12) if conditional else None
    work = trainer(cuda, 8, conditions=conditions)
    losses = [work.step()]
    torch.cuda.set_sync_debug_mode("error" if kept else "default")
    try:
        losses += [work.step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.device.type == "cuda" and loss.isfinite() for loss in losses)
    again = trainer(cuda, 8, work.result(), conditions)
    again.step()
    whole = trainer(cuda, 8, conditions=conditions)
    for _ in range(5):
        whole.step()
    for name, weight in whole.average.items():
        assert torch.allclose(weight, again.average[name], atol=1e-4), name


@pytest.mark.parametrize("settings", [{}, {"strength": 0.0}, {"mode": "score", "strength": 5.0}, {"mode": "shift", "strength": 0.2}])
def test_guidance_does_not_wait(settings, monkeypatch):
    """CUDA itself reports a wait in the pack's own part of every step but the first, which uploads its tables."""
    predict, calls = GuidedRun.predict_noise, []

    def strict(self, executor, *arguments):
        def leave(*given):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return executor(*given)
            finally:
                torch.cuda.set_sync_debug_mode("error" if len(calls) > 1 else "default")

        calls.append(None)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 1 else "default")
        try:
            return predict(self, leave, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(GuidedRun, "predict_noise", strict)
    guided, report = guide(demo_model.load_demo_model()[0], **settings)
    output = run(guided, shape=(2, 3, 32, 32), positive=[[demo_model.class_token(1), {}]], negative=[[demo_model.class_token(None), {}]])
    assert output.isfinite().all() and len(calls) == 8 and 0 <= report.runs[-1].time_gap() < 1000


def test_posterior_is_a_cpus(cuda):
    random = torch.Generator().manual_seed(0)
    u, anchor = torch.randn(4, 3, 32, 32, generator=random), torch.rand(4, 3, 32, 32, generator=random)
    here, there = energy_posterior(u, anchor), energy_posterior(u.to(cuda), anchor.to(cuda))
    for one, other in zip(here.log_variance(), there.log_variance()):
        assert torch.allclose(one, other.cpu(), atol=1e-3)


def test_demo_model_trains_there_by_time(cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(training_runs, "PACE_FROM", 2)
    monkeypatch.setattr(training_runs, "PACE_TO", 5)
    pictures = torch.rand(64, 3, 32, 32) * 2 - 1
    weights = train_demo.train(demo_model, pictures, torch.arange(64) % 10, tmp_path, None, 0, cuda, 16, minutes=0.2)
    assert all(weight.isfinite().all() and weight.device.type == "cpu" for weight in weights.values())


def test_cifar_classifier_trains_there(cuda, tmp_path):
    pictures, labels = torch.rand(64, 3, 32, 32) * 2 - 1, torch.arange(64) % 10
    classifier = trained_cifar_classifier(pictures, labels, tmp_path, cuda, width=8, epochs=2)
    assert classifier.features(pictures.to(cuda)).shape == (64, 128)
