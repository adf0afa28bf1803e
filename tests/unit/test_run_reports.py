"""Records of runs are found again, and the oldest are let go of before they fill the memory."""

from collections import deque

import pytest
import torch
from artifact_guard.nodes import run_reports
from artifact_guard.nodes.latents import FrameLayout
from artifact_guard.nodes.run_reports import RunReport, fingerprint, same_output


class Record:
    """Holds a tensor of so many megabytes."""

    def __init__(self, megabytes: int = 0):
        self.layout, self.notes, self.fingerprint = FrameLayout.of([(1, 4, 8, 8)]), [], None
        self.maps, self.nothing, self.words = torch.empty(megabytes, 2**20, dtype=torch.uint8, device="meta"), None, "words"

    def close(self, output):
        self.fingerprint = fingerprint(self.layout.frames(output))


@pytest.fixture
def recent(monkeypatch):
    runs = deque(maxlen=run_reports.RECENT_RUNS.maxlen)
    monkeypatch.setattr(run_reports, "RECENT_RUNS", runs)
    return runs


def filled(sizes):
    """A report of runs of so many megabytes each, and their outputs."""
    report, outputs = RunReport(("settings",), None), [torch.randn(1, 4, 8, 8) for _ in sizes]
    for size, output in zip(sizes, outputs):
        report.add(Record(size), output)
    return report, outputs


@pytest.mark.parametrize(
    ("sizes", "kept"), [([75] * 5, 3), ([1] * 5, 5), ([5000], 1), ([1, 5000], 1), ([5000, 1], 1), ([250, 6, 1], 2), ([250, 5], 2)]
)
def test_the_oldest_are_let_go_of(sizes, kept, recent):
    report, outputs = filled(sizes)
    assert len(report.runs) == len(recent) == kept
    assert report.find({"samples": outputs[-1]}) is report.runs[-1] is recent[-1][-1]
    assert len(report.find({"samples": outputs[0]}).notes) == (kept < len(sizes)), "one that is gone is not taken for another"


def test_every_picture_of_a_long_list_finds_its_run(recent):
    """ComfyUI samples all latents of a list first; the all-in-one node files two records of each."""
    class Other(RunReport):
        pass

    report, other, outputs = RunReport(("settings",), None), Other(("settings",), None), torch.randn(300, 1, 4, 8, 8)
    records = [(Record(), Record()) for _ in outputs]
    for pair, output in zip(records, outputs):
        report.add(pair[0], output)
        other.add(pair[1], output)
    for one in (report, RunReport(("settings",), None)):
        assert all(one.find({"samples": output}) is pair[0] for pair, output in zip(records, outputs))
    assert all(other.find({"samples": output}) is pair[1] for pair, output in zip(records, outputs))


@pytest.mark.parametrize("side", [8, 20, 42])
@pytest.mark.parametrize("shape", [(4, 128, 128), (16, 128, 128), (4, 96, 144), (4, 64, 64)])
def test_runs_that_differ_in_a_square_alone_are_told_apart(shape, side):
    """Two seeds of an inpainting. Wherever the square lies."""
    kept, generator = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    for _ in range(25):
        top, left = (int(torch.randint(0, size - side + 1, (), generator=generator)) for size in shape[1:])
        drawn = []
        for _ in range(2):
            output = kept.clone()
            output[:, top : top + side, left : left + side] = torch.randn(shape[0], side, side, generator=generator)
            drawn.append(fingerprint(output[None]))
        assert not same_output(*drawn)
    assert same_output(drawn[1], fingerprint(output[None].half()))


def test_a_run_is_found_by_a_report_that_was_made_anew(recent):
    _, outputs = filled([1, 1])
    anew = RunReport(("settings",), None)
    assert anew.find({"samples": outputs[0]}) is recent[0][-1]
    with pytest.raises(ValueError, match="This report is empty"):
        RunReport(("other settings",), None).find({"samples": outputs[0]})
