"""Run what is missing: several runs at a time, teachers before their students, until it is done or time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.runs import Run
from experiments.study import ROOT

BUSY = 75  # exit code of a run that another process is at
RETRY_SECONDS = 30.0


@dataclass
class Job:
    """A run that is to be done.

    Args:
        study: that it is of.
        run: the run.
        process: that does it; None while it waits.
        started: when that began.
        not_before: when it may be tried again.
    """

    study: str
    run: Run
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    not_before: float = 0.0

    def start(self, threads: int, device: str | None) -> None:
        """Do the run in a process of its own, which prints to :func:`log_file`."""
        place = self.run.place
        command = [sys.executable, "-m", "experiments", "one", self.study, self.run.variant.name, str(self.run.seed)]
        command += ["--size", place.size, "--source", place.source]
        command += ["--results", str(place.results), "--state", str(place.state), "--studies", str(place.studies)]
        command += ["--device", device] if device else []
        log = log_file(self.run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env=environment)
        self.started = time.monotonic()


def run_all(
    runs: Sequence[tuple[str, Run]], jobs: int = 2, budget: float | None = None, device: str | None = None
) -> int:
    """Do the runs that have no valid result.

    Args:
        runs: each with the name of its study, in the order in which they should be done.
        jobs: runs at a time, which share the cores.
        budget: minutes; what is then under way is stopped, and goes on where it was the next time.
        device: of training and measuring.

    Returns:
        How many failed.
    """
    start = time.monotonic()
    left = with_teachers(runs)
    total, failed = len(left), 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    print(f"{total} runs to do, {jobs} at a time", flush=True)
    with stopped_at_the_end(left):
        while left:
            if budget is not None and time.monotonic() - start > 60 * budget:
                print(f"the budget of {budget:g} minutes is over: {len(left)} runs are left", flush=True)
                break
            unfinished = {job.run.result_file for job in left}
            for job in left:
                if sum(other.process is not None for other in left) >= jobs:
                    break
                teacher = job.run.teacher
                can_start = teacher is None or teacher.result_file not in unfinished
                if job.process is None and can_start and time.monotonic() >= job.not_before:
                    job.start(threads, device)
            time.sleep(0.2)
            for job in [job for job in left if job.process is not None and job.process.poll() is not None]:
                assert job.process is not None
                code, seconds = job.process.returncode, time.monotonic() - job.started
                job.process = None
                if code == BUSY:
                    job.not_before = time.monotonic() + RETRY_SECONDS
                    continue
                left.remove(job)
                outcome = f"done, {seconds:.0f} s"
                if code != 0:
                    lost = [other for other in left if _needs(other.run, job.run)]
                    left[:] = [other for other in left if other not in lost]
                    failed += 1 + len(lost)
                    outcome = f"failed, see {log_file(job.run)}" + (f"; {len(lost)} students need it" if lost else "")
                print(f"[{total - len(left)}/{total}] {job.run.name}: {outcome}", flush=True)
    return failed


def with_teachers(runs: Sequence[tuple[str, Run]]) -> list[Job]:
    """The runs that are not done, each once, and before it the teacher that it needs."""
    each_once: dict[Path, Job] = {}
    for study, run in runs:
        for each in (run.teacher, run):
            if each is not None:
                each_once.setdefault(each.result_file, Job(study, each))
    return [job for job in each_once.values() if not job.run.is_done]


def log_file(run: Run) -> Path:
    """What a run prints."""
    return run.checkpoint.with_suffix(".log")


@contextmanager
def stopped_at_the_end(jobs: Sequence[Job]) -> Iterator[None]:
    """Stop the processes that are still at work, however the context is left; SIGTERM leaves it too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for job in jobs:
            if job.process is not None:
                job.process.terminate()
        for job in jobs:
            if job.process is not None:
                job.process.wait()


def _needs(run: Run, other: Run) -> bool:
    return run.teacher is not None and run.teacher.result_file == other.result_file
