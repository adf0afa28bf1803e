"""The course of an undisturbed run: where DDIM's steps lead, whatever else happens to the sample."""

import pytest
import torch
from artifact_guard.nodes.tag import energy
from artifact_guard.nodes.tag.course import Course
from artifact_guard.nodes.tag.levels import Step

from tests.unit.tag_support import KINDS, guide, model, run


class WatchedCourse(Course):
    """Keeps how far each sample lies beside the course, over its own RMS."""

    beside: list[float]

    def go_to(self, step, u):
        super().go_to(step, u)
        self.beside.append(((u - self.u).square().mean() / u.square().mean()).sqrt().item())


def beside(monkeypatch, kind, **settings):
    """For each model call of a guided run of these settings: how far its sample lies beside the course."""
    found = []
    monkeypatch.setattr(energy, "Course", type("Watched", (WatchedCourse,), {"beside": found}))
    run(guide(model(kind))[0], **settings)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_an_euler_run_is_its_own_course(monkeypatch, kind, cfg):
    """Guided, with and without classifier-free guidance: the course follows the estimate that the sampler was given. Up to
    0.2 % where a schedule begins with more noise than the levels do.
    """
    found = beside(monkeypatch, kind, cfg=cfg)
    assert len(found) == 8 and found[0] == 0.0 and max(found) < (1e-5 if kind in ("eps", "v") else 3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_is_added_lies_beside_it(monkeypatch, kind):
    """And stays there: what is added at one step is still there, less and less of it, at the next ones."""
    found = beside(monkeypatch, kind, noise=0.2)
    assert found[0] == 0.0 and min(found[1:]) > 0.15


def test_a_higher_order_stays_near_it(monkeypatch):
    found = beside(monkeypatch, "eps", sampler="dpmpp_2m", steps=20)
    assert 1e-3 < max(found) < 0.1


def test_the_signal_stays_where_noise_rises():
    """A sampler that steps back: u changes by the ratio of the alphas, so that x0 in it stays the same."""
    course, u, given = Course(), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    low, high = (Step.at(torch.tensor([level] * 2)) for level in (3.0, 1.0))
    course.go_to(low, u)
    course.keep(given)
    course.go_to(high, u)
    assert torch.allclose(course.u, u * (high.alpha / low.alpha).reshape(2, 1, 1, 1), atol=1e-6)


def test_a_run_of_another_size_begins_a_new_one():
    course, step = Course(), Step.at(torch.tensor([0.0]))
    course.go_to(step, torch.randn(1, 3, 4, 4))
    course.keep(torch.randn(1, 3, 4, 4))
    other = torch.randn(1, 3, 8, 8)
    course.go_to(step, other)
    assert torch.equal(course.u, other)
