"""Jobs that leave one file each, done by as many processes as are started, each job once.

A worker claims a job by making its .claim file, waits where only jobs are left that need another's result, and begins
nothing after the deadline. A result is NAME.json, a failure NAME.failed; what is there is not done again.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """needs: names of jobs whose results must be there."""

    name: str
    variant: str = ""
    seed: int = 0
    needs: list[str] = field(default_factory=list, hash=False)


class JobQueue:
    """The jobs of a folder as one worker sees them. until: time.time() after which none is begun."""

    def __init__(self, folder: Path, jobs: list[Job], until: float):
        self.folder, self.jobs, self.until = folder, jobs, until

    def path(self, name: str, ending: str = "json") -> Path:
        return self.folder / f"{name}.{ending}"

    def there(self, name: str, ending: str = "json") -> bool:
        return self.path(name, ending).exists()

    def forget_the_last_call(self) -> None:
        """Claims and failures of an earlier call: before any worker begins."""
        for path in (*self.folder.glob("*.claim"), *self.folder.glob("*.failed")):
            path.unlink()

    def work(self, do: Callable[[Job], dict]) -> None:
        """Do jobs until none is left or the time is over. do: gives what goes into the job's file."""
        while time.time() < self.until:
            left = [job for job in self.jobs if not self.there(job.name) and not self.there(job.name, "failed")]
            if not left:
                return
            for job in left:
                if any(self.there(name, "failed") for name in job.needs):
                    self.path(job.name, "failed").write_text("What it needs failed.")
                elif self.abandoned(job):
                    self.path(job.name, "failed").write_text("The worker that did it ended.")
            ready = [job for job in left if all(map(self.there, job.needs))]
            if not any(self.claim(job, do) for job in ready):
                time.sleep(0.3)

    def abandoned(self, job: Job) -> bool:
        """Whether the worker that claimed this job is no more and left nothing."""
        worker = self.path(job.name, "claim").read_text() if self.there(job.name, "claim") else ""
        if not worker or sys.platform == "win32":  # there, asking for a process ends it
            return False
        try:
            os.kill(int(worker), 0)
        except ProcessLookupError:
            return not self.there(job.name)
        return False

    def claim(self, job: Job, do: Callable[[Job], dict]) -> bool:
        """Do a job, unless another worker does it; whether it was done, or failed, here."""
        try:
            with open(self.path(job.name, "claim"), "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        start = time.perf_counter()
        try:
            row = do(job)
        except Exception:
            self.path(job.name, "failed").write_text(traceback.format_exc())
            print(f"{job.name} failed: {traceback.format_exc()}", flush=True)
            return True
        row["seconds"] = round(time.perf_counter() - start, 1)
        partial = self.path(job.name, "partial")
        partial.write_text(json.dumps(row))
        os.replace(partial, self.path(job.name))
        told = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(job.name, {key: value for key, value in told.items() if not isinstance(value, (list, dict))}, flush=True)
        return True
