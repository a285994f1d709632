"""Run what is missing: several runs at a time, teachers before their students, until it is done or time is up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.runs import Run
from experiments.study import ROOT

BUSY = 75  # exit code of a run that another process is at


@dataclass
class Worker:
    """A run in a process of its own."""

    run: Run
    process: subprocess.Popen[bytes]
    started: float


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
    waiting = with_teachers(runs)
    total, failed = len(waiting), 0
    workers: list[Worker] = []
    print(f"{total} runs to do, {jobs} at a time", flush=True)
    try:
        while waiting or workers:
            if budget is not None and time.monotonic() - start > 60 * budget:
                print(
                    f"the budget of {budget:g} minutes is over: {len(waiting) + len(workers)} runs are left", flush=True
                )
                break
            under_way = [worker.run for worker in workers]
            for study, run in list(waiting):
                teacher = run.teacher
                if len(workers) >= jobs:
                    break
                if teacher is not None and (_same(teacher, [r for _, r in waiting]) or _same(teacher, under_way)):
                    continue
                waiting.remove((study, run))
                if teacher is not None and not teacher.is_done:
                    print(f"{run.name}: its teacher failed", flush=True)
                    failed += 1
                    continue
                workers.append(Worker(run, _start(study, run, jobs, device), time.monotonic()))
                under_way.append(run)
            time.sleep(0.2)
            for worker in list(workers):
                code = worker.process.poll()
                if code is None:
                    continue
                workers.remove(worker)
                failed += code not in (0, BUSY)
                outcome = {0: "done", BUSY: "another process is at it"}.get(code, f"failed, see {log_file(worker.run)}")
                left = len(waiting) + len(workers)
                seconds = time.monotonic() - worker.started
                print(f"[{total - left}/{total}] {worker.run.name}: {outcome}, {seconds:.0f} s", flush=True)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.wait()
    return failed


def with_teachers(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, Run]]:
    """The runs that are not done, each once, and before them those of the teachers that they need."""
    found: list[tuple[str, Run]] = []
    seen: set[Path] = set()
    for study, run in runs:
        for each in (run.teacher, run):
            if each is not None and each.result_file not in seen:
                seen.add(each.result_file)
                found += [] if each.is_done else [(study, each)]
    # teachers first, so that a second process can go on with students as soon as one is there
    return sorted(found, key=lambda pair: not pair[1].is_teacher)


def log_file(run: Run) -> Path:
    """What a run prints."""
    return run.checkpoint.with_suffix(".log")


def _same(run: Run, others: Sequence[Run]) -> bool:
    return any(other.result_file == run.result_file for other in others)


def _start(study: str, run: Run, jobs: int, device: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments", "one", study, run.variant.name, str(run.seed)]
    command += ["--size", run.place.size, "--source", run.place.source]
    command += ["--results", str(run.place.results), "--state", str(run.place.state)]
    command += ["--device", device] if device else []
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    log = log_file(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env=environment)
