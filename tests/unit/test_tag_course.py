"""The course of an undisturbed run: where DDIM's steps lead, whatever else happens to the sample."""

import math

import pytest
import torch
from artifact_guard.nodes.tag import energy
from artifact_guard.nodes.tag.course import Course
from artifact_guard.nodes.tag.levels import Step

from tests.unit.tag_support import KINDS, guide, model, run


class WatchedCourse(Course):
    """Keeps how far each sample lies beside the course, over its own RMS."""

    beside: list[float]

    def go_to(self, step, u, weight=None):
        super().go_to(step, u, weight)
        self.beside.append(((u - self.u).square().mean() / u.square().mean()).sqrt().item())


def beside(monkeypatch, kind, **settings):
    """For each model call of a guided run of these settings: how far its sample lies beside the course."""
    found = []
    monkeypatch.setattr(energy, "Course", type("Watched", (WatchedCourse,), {"beside": found}))
    run(guide(model(kind), strength=0.0)[0], **settings)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_an_euler_run_is_its_own_course(monkeypatch, kind, cfg):
    """With and without classifier-free guidance: the course follows the estimate for the sampler, not its anchor. Up to 0.2 %
    beside it where a schedule begins with more noise than the levels do.
    """
    found = beside(monkeypatch, kind, cfg=cfg)
    assert len(found) == 8 and found[0] == 0.0 and max(found) < (1e-5 if kind in ("eps", "v") else 3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_is_added_lies_beside_it(monkeypatch, kind):
    """And stays there: what is added at one step is still there, less and less of it, at the next ones."""
    found = beside(monkeypatch, kind, noise=0.2)
    assert found[0] == 0.0 and min(found[1:]) > 0.15


@pytest.mark.parametrize(
    ("sampler", "most"), [("dpmpp_2m", 1e-5), ("heun", 1e-5), ("lms", 0.01), ("deis", 0.01), ("dpmpp_2m_sde", None)]
)
def test_a_higher_order_is_the_courses_own(monkeypatch, sampler, most):
    """Multiples of the last two differences of D: all of a second order, most of a third or fourth. Heun's second call at a
    level begins at the step before. The fresh noise of a stochastic sampler is no such multiple."""
    found = beside(monkeypatch, "eps", sampler=sampler, steps=12)
    assert len(found) >= 12 and (max(found) > 0.1 if most is None else max(found) < most)


def test_noise_is_no_turn_of_the_estimate():
    """Of noise that was added the course takes as its own what happens to lie along two directions, and no more."""
    for side, most in ((16, 0.01), (6, 0.0)):  # 768 values, and 108: too few to tell a direction from chance
        course, random = Course(), torch.Generator().manual_seed(0)
        steps = [Step.at(torch.tensor([level] * 2)) for level in (0.0, 1.0, 2.0, 3.0)]
        for step in steps[:3]:
            course.go_to(step, torch.zeros(2, 3, side, side))
            course.keep(step, torch.randn(2, 3, side, side, generator=random), None)
        noise = 100.0 * torch.randn(2, 3, side, side, generator=random)
        course.go_to(steps[3], noise)
        taken = course.u.square().sum() / noise.square().sum()
        assert taken < 2e-3 + most, side


def point(course, level, denoised=None, u=None, change=0.0):
    """The course's sample at a call of this level."""
    shape, step = (2, 3, 4, 4), Step.at(torch.tensor([level] * 2))
    course.go_to(step, torch.zeros(shape) if u is None else u)
    course.keep(step, torch.zeros(shape) if denoised is None else denoised, torch.full((2,), change))
    return course.u


def test_a_sampler_that_goes_far_back_begins_again():
    """Two calls are kept, and neither had more noise."""
    course, u = Course(), torch.randn(2, 3, 4, 4)
    for level in (-1.0, 1.0, 3.0):
        assert not torch.equal(point(course, level, u=u), u) or level == -1.0
    assert torch.equal(point(course, 0.0, u=u), u)


def test_each_sample_goes_its_own_way():
    """The first sample's noise falls, the second one's rises."""
    course, u = Course(), torch.randn(2, 3, 4, 4)
    point(course, 1.0)
    course.go_to(Step.at(torch.tensor([2.0, 0.0])), u)
    assert torch.equal(course.u[1], u[1]) and not course.u[0].any()


def test_leeway_is_what_the_estimate_changed_by():
    """All at the start; then less and less of that, and each step the change by the share in which it goes on."""
    course, left = Course(), math.exp(-1)  # sigma falls by exp(-1) a step: so much stays where it was
    point(course, 0.0, change=0.5)
    assert course.leeway.tolist() == [1.0, 1.0]
    point(course, 2.0, change=0.0)
    second = left + (1 - left) * 0.5
    assert course.leeway.tolist() == pytest.approx([second] * 2, rel=1e-4)
    point(course, 4.0)
    assert course.leeway.tolist() == pytest.approx([left * second] * 2, rel=1e-4)


def test_a_run_of_another_size_begins_a_new_one():
    course, other = Course(), torch.randn(1, 3, 8, 8)
    point(course, 0.0)
    course.go_to(Step.at(torch.tensor([1.0])), other)
    assert torch.equal(course.u, other)
