"""One condition, several, or none: which of a run's conditions a conditional predictor is asked with, and what it does."""

import pytest
import torch
from artifact_guard.nodes.demo.model import class_token, load_demo_model
from artifact_guard.nodes.latents import FrameLayout
from artifact_guard.nodes.tag.judge import Judge
from artifact_guard.nodes.tag.levels import Schedule
from artifact_guard.nodes.tag.predictor_files import load_predictor
from artifact_guard.nodes.tag.training import TrainingData, held_out_time_gap

from nodes import ConditioningCombine
from tests.unit.tag_support import SIZE, fresh_predictor, guide, model, run, trainer

SHIPPED = "demo_fashion_mnist.safetensors"


def prompt(label):
    return [[class_token(label), {}]]


def combined(*labels):
    """What Conditioning (Combine) makes of these classes."""
    conditions = prompt(labels[0])
    for label in labels[1:]:
        (conditions,) = ConditioningCombine().combine(conditions, prompt(label))
    return conditions


class Guider:
    """As much of a guider as a judge reads: its positive conditions."""

    def __init__(self, *labels):
        self.original_conds = {"positive": [{"cross_attn": class_token(label)} for label in labels]}


@pytest.fixture
def asked(monkeypatch):
    """The classes a judge was asked with, in order; None stands for no condition."""
    real, seen = Judge.logits, []

    def logits(self, u, condition):
        seen.append(None if condition is None else int(condition.argmax()))
        return real(self, u, condition)

    monkeypatch.setattr(Judge, "logits", logits)
    return seen


def sampled(positive, steps=2, **settings):
    """A run of the demo model, disturbed, with the shipped predictor."""
    bare, _ = load_demo_model()
    guided, report = guide(bare, load_predictor(SHIPPED), **settings)
    options = {"shape": (2, 3, 32, 32), "noise": 0.2, "steps": steps, "negative": prompt(None), "cfg": 2.0}
    return run(guided, positive=positive, **options), report.runs[-1]


@pytest.mark.parametrize("labels", [(3,), (3, 7), (1, 5, 8)])
def test_closed_form_asks_with_every_positive_condition(asked, labels):
    sampled(combined(*labels))
    assert asked == list(labels) * 2


def test_without_a_positive_condition_of_that_width_none_is_given(asked):
    sampled([[torch.zeros(1, 1, 16), {}]], steps=1)
    bare, _ = load_demo_model()
    guided, _ = guide(bare, load_predictor(SHIPPED))
    before = len(asked)
    run(guided, shape=(1, 3, 32, 32), steps=1, positive=[], negative=[])
    assert asked[before:] == [None]


@pytest.mark.parametrize("labels, order", [((3,), [3]), ((3, 7), [3, 7, None]), ((7, 3), [7, 3, None])])
def test_published_gradient_shifts_by_each_condition_in_turn_and_then_by_none(asked, labels, order):
    sampled(combined(*labels), mode="score", strength=5.0, estimate="published gradient", steps=1)
    shifts = asked[len(labels):] if len(asked) > len(order) else asked
    assert shifts == order


def test_a_second_condition_changes_the_result():
    settings = {"mode": "score", "strength": 5.0, "estimate": "published gradient"}
    one, both = sampled(combined(3), **settings)[0], sampled(combined(3, 7), **settings)[0]
    assert both.isfinite().all() and not torch.allclose(one, both)


def test_the_mean_of_several_answers_is_used():
    predictor = load_predictor(SHIPPED)
    judge = Judge(predictor, torch.device("cpu"), FrameLayout.of([(2, 3, 32, 32)]), Guider(3, 7))
    u = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = [predictor.network(u, class_token(label)[:, 0]) for label in (3, 7)]
    assert not torch.allclose(*alone) and torch.allclose(judge(u), (alone[0] + alone[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 4, 32, 32)])
def test_samples_with_conditions_of_their_own_are_asked_with_them(shape):
    """One entry a sample, as the model takes them; more samples than entries begin again at the first."""
    predictor, layout = load_predictor(SHIPPED), FrameLayout.of([shape])
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    class Each:
        original_conds = {"positive": [{"cross_attn": torch.cat([class_token(3), class_token(7), class_token(1)])}]}

    told = Judge(predictor, torch.device("cpu"), layout, Each())(u)
    for sample, label in enumerate((3, 7)):
        alone = Judge(predictor, torch.device("cpu"), layout, Guider(label))(u)
        assert torch.allclose(told[sample], alone[sample], atol=1e-5)
    assert not torch.allclose(told[1], Judge(predictor, torch.device("cpu"), layout, Guider(3))(u)[1], atol=1e-3)


def test_a_conditional_predictor_uses_its_condition():
    """Smooth pictures of one class, grainy ones of another: grain and noise look alike, only the class tells them apart."""
    bare, random = model(), torch.Generator().manual_seed(0)
    grain = 0.5 * torch.randn(64, 3, SIZE, SIZE, generator=random)
    frames, conditions = torch.cat([0 * grain, grain]), torch.eye(2).repeat_interleave(64, dim=0)
    work = trainer(fresh_predictor(bare, condition_dim=2), frames, conditions, batch=64)
    with torch.enable_grad():
        for _ in range(200):
            work.step()
    predictor, schedule = work.result(), Schedule.of(bare.get_model_object("model_sampling"))

    def gap(told):
        return held_out_time_gap(predictor.network, predictor.levels, TrainingData(frames, told), schedule, latest=500.0)

    right, none, wrong = gap(conditions), gap(None), gap(conditions.flip(0))
    assert right < 0.6 * none and right < 0.4 * wrong
