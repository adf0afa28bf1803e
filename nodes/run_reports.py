"""Reports of sampler runs: the record of a run is found again by the output that the run gave."""

import copy
from collections import deque
from typing import Generic, Protocol, TypeVar

import torch

from .latents import FrameLayout

FINGERPRINT_VALUES = 4096
"""Of an output, taken from places without a pattern: of 256 at even distances none lay in a fifth of the squares of 32 x 32 in a latent
of 128 x 128, and inpaintings of such a square were taken for one another. A square of 8 x 8 is missed once in ten million times."""


class RunRecord(Protocol):
    """What a report keeps of one run. `layout` is None if the latent has no image part; then there is no fingerprint. held: bytes of
    its tensors, known when it is filed."""

    layout: FrameLayout | None
    notes: list[str]
    fingerprint: torch.Tensor | None
    held: int

    def close(self, output: torch.Tensor) -> None:
        """The run is over: bring everything to the CPU and take the fingerprint of the sampler's tensor it gave."""


Record = TypeVar("Record", bound=RunRecord)

KEPT_RUNS = 1024
"""Records of one list, at most. ComfyUI samples all latents of a list before the first report of them is asked for."""

KEPT_BYTES = 2**28
"""Of all tensors in the records of one list, about: a loop over videos must not fill the memory."""

RECENT_RUNS: deque[tuple[type, object, RunRecord]] = deque(maxlen=2 * KEPT_RUNS)
"""The last runs of all patched models: (kind of report, settings, record); the all-in-one node's are of two kinds. ComfyUI may throw a
patched model out of its cache while it keeps the sampler's output; the patch is then made anew, with an empty report, and finds its run here."""


def forget_the_oldest(records: list[RunRecord]) -> int:
    """How many of the first ones, which are the oldest, to let go of so that the rest holds no more than KEPT_BYTES; the last
    one stays in any case."""
    held = 0
    for kept, record in enumerate(reversed(records)):
        held += record.held
        if held > KEPT_BYTES and kept > 0:
            return len(records) - kept
    return 0


class RunReport(Generic[Record]):
    """The runs of one patched model, newest last. Filled while sampling runs, read by a report node afterwards.

    Args:
        settings: the patch's settings; runs of an earlier patch count as this one's if theirs are equal.
        latent_format: the model's, for sizes and previews.
    """

    patched = "patched"
    """What a model with this patch is called in messages."""

    def __init__(self, settings, latent_format):
        self.settings = settings
        self.latent_format = latent_format
        self.runs: deque[Record] = deque(maxlen=KEPT_RUNS)

    def add(self, record: Record, output: torch.Tensor) -> None:
        """File the record of a finished run under the output (a sampler's tensor) that it gave."""
        record.close(output)
        record.held = sum(value.nbytes for value in vars(record).values() if isinstance(value, torch.Tensor))
        self.runs.append(record)
        RECENT_RUNS.append((type(self), self.settings, record))
        for runs, records in ((self.runs, list(self.runs)), (RECENT_RUNS, [entry[-1] for entry in RECENT_RUNS])):
            for _ in range(forget_the_oldest(records)):
                runs.popleft()

    def find(self, latent: dict) -> Record:
        """The record of the run that gave this LATENT; the newest one, with a note, if the latent was changed since.

        Raises:
            ValueError: nothing was sampled with the patched model yet.
        """
        layout, output = image_part(latent)
        if layout is not None:
            wanted = fingerprint(layout.frames(output))
            own = (type(self), self.settings)
            candidates = [record for *key, record in RECENT_RUNS if tuple(key) == own] + list(self.runs)
            for record in reversed(candidates):
                if same_output(record.fingerprint, wanted):
                    return record
        if not self.runs:
            raise ValueError(
                f"This report is empty: the {self.patched} model was not sampled yet. Connect `latent` to the output "
                f"of the sampler that uses the {self.patched} MODEL, so that the report is read after it. A run without steps "
                "(denoise 0, or a start after the last step) leaves nothing to report either."
            )
        newest = copy.copy(self.runs[-1])
        if newest.layout is not None:
            newest.notes = newest.notes + [
                f"The latent is not the {self.patched} sampler's own output, or its run is no longer kept; this is the newest run "
                f"of the {self.patched} model."
            ]
        return newest


def image_part(latent: dict) -> tuple[FrameLayout | None, torch.Tensor]:
    """The part of a LATENT that is seen as frames, by itself, and its layout; (None, first part) if there is none."""
    samples = latent["samples"]
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    layout = FrameLayout.of([part.shape for part in parts])
    if layout is None:
        return None, parts[0]
    return FrameLayout.of([layout.shape]), parts[layout.part]


def fingerprint(frames: torch.Tensor) -> torch.Tensor:
    """A few values from all over an output, by which it is known again after a change of device or dtype."""
    flat = frames.reshape(-1)
    if flat.numel() > FINGERPRINT_VALUES:
        places = torch.randint(flat.numel(), (FINGERPRINT_VALUES,), generator=torch.Generator().manual_seed(0))
        flat = flat[places.to(flat.device)]
    return flat.float().cpu()


def same_output(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Whether two fingerprints are of the same output, fp16 or bf16 rounding in between allowed."""
    if one is None or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=1e-2, atol=1e-2, equal_nan=True)
