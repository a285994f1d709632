"""What ``python -m experiments`` does."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from experiments.findings import seconds_of
from experiments.runs import Place, Run, runs_of
from experiments.schedule import BUSY, run_all
from experiments.study import Study, load_study, study_names
from experiments.work import perform
from torchdistill_adv.errors import ConfigError, nearest

FOLDERS = ("results", "state", "studies")


def place_of(args: argparse.Namespace) -> Place:
    """Where the command line says."""
    given = {name: getattr(args, name) for name in FOLDERS if getattr(args, name) is not None}
    return Place(args.size, args.source, **{name: path.resolve() for name, path in given.items()})


def studies_of(args: argparse.Namespace) -> list[Study]:
    """The studies that are named; all for none."""
    folder = place_of(args).studies
    names = study_names(folder) if args.names in ([], ["all"]) else args.names
    return [load_study(name, folder) for name in names]


def list_command(args: argparse.Namespace) -> int:
    """Print every study and the state of its runs."""
    place = place_of(args)
    for study in studies_of(args):
        runs = runs_of(study, place)
        print(f"{study.name}: {study.title}")
        for variant in study.variants:
            own = [run for run in runs if run.variant is variant]
            states = [run.differs() for run in own]
            done = sum(state == [] for state in states)
            seconds = [seconds_of(result) for run in own if (result := run.result()) is not None]
            stale = sorted({what for state in states for what in state or ()})
            notes = [f"about {sum(seconds) / len(seconds) / 60:.1f} min each"] if seconds else []
            notes += [f"out of date, as these changed: {', '.join(stale)}"] if stale else []
            print(f"  {done}/{len(own)} {variant.name}{': ' if notes else ''}{'; '.join(notes)}")
    return 0


def run_command(args: argparse.Namespace) -> int:
    """Do the runs of studies."""
    place = place_of(args)
    known = [variant.name for study in studies_of(args) for variant in study.variants]
    for name in args.only:
        if name not in known:
            raise ConfigError(f"found '{name}'; {nearest(name, known)}", "--only")
    try:
        part, parts = map(int, args.part.split("/"))
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError:
        raise ConfigError(f"found {args.part!r}; write 1/3, 2/3 or 3/3", "--part") from None
    runs: list[tuple[str, Run]] = []
    for study in studies_of(args):
        found = runs_of(study, place, args.only)
        if args.seeds == 0:
            found = [run.teacher for run in found if run.teacher is not None]
        elif args.seeds is not None:
            found = [run for run in found if run.seed < args.seeds]
        runs += [(study.name, run) for run in found]
    # variants that studies share are of one part
    unique = list({run.result_file: (study, run) for study, run in reversed(runs)}.values())[::-1]
    budgets = [study.budget.get(place.size) for study in studies_of(args)]
    budget = args.budget
    if budget is None and None not in budgets:
        budget = sum(minutes for minutes in budgets if minutes is not None)
    return min(1, run_all(unique[part - 1 :: parts], args.jobs, budget, args.device))


def one_command(args: argparse.Namespace) -> int:
    """Do one run, in this process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    place = place_of(args)
    study = load_study(args.study, place.studies)
    known = {variant.name: variant for variant in (*study.variants, *study.setting.teachers.values())}
    run = Run(study.setting, known[args.variant], args.seed, place)
    return 0 if perform(run, args.device) else BUSY


def time_command(args: argparse.Namespace) -> int:
    """Time the variants of studies."""
    from experiments.timing import time_study

    for study in studies_of(args):
        print(time_study(study, place_of(args), args.rounds, args.device))
    return 0


def table_command(args: argparse.Namespace) -> int:
    """Write the pages of studies."""
    from experiments.pages import write_pages

    place = place_of(args)
    where: dict[str, Any] = {} if place.is_ours else {"folder": place.results / "pages", "readme": None}
    for path in write_pages(studies_of(args), place, **where):
        print(path)
    return 0
