"""What ``python -m experiments`` does."""

from __future__ import annotations

import argparse
import logging

from experiments.runs import Place, Run, runs_of
from experiments.schedule import BUSY, run_all
from experiments.study import load_study, study_names
from experiments.work import perform
from torchdistill_adv.errors import ConfigError


def place_of(args: argparse.Namespace) -> Place:
    """Where the command line says."""
    given = {name: getattr(args, name) for name in ("results", "state") if getattr(args, name) is not None}
    return Place(args.size, args.source, **{name: path.resolve() for name, path in given.items()})


def names_of(args: argparse.Namespace) -> list[str]:
    """The studies that are named; all for none."""
    return study_names() if args.names in ([], ["all"]) else args.names


def list_command(args: argparse.Namespace) -> int:
    """Print every study and the state of its runs."""
    place = place_of(args)
    for name in names_of(args):
        study = load_study(name)
        runs = runs_of(study, place)
        print(f"{name}: {study.title}")
        for variant in study.variants:
            own = [run for run in runs if run.variant is variant]
            states = [run.differs() for run in own]
            done = sum(state == [] for state in states)
            seconds = [result["wall_seconds"] for run in own if (result := run.result()) is not None]
            stale = sorted({what for state in states for what in state or ()})
            notes = [f"about {sum(seconds) / len(seconds) / 60:.1f} min each"] if seconds else []
            notes += [f"out of date, as these changed: {', '.join(stale)}"] if stale else []
            print(f"  {done}/{len(own)} {variant.name}{': ' if notes else ''}{'; '.join(notes)}")
    return 0


def run_command(args: argparse.Namespace) -> int:
    """Do the runs of studies."""
    place = place_of(args)
    part, _, parts = args.part.partition("/")
    try:
        part, parts = int(part), int(parts)
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError:
        raise ConfigError(f"found {args.part!r}; write 1/3, 2/3 or 3/3", "--part") from None
    runs: list[tuple[str, Run]] = []
    for name in names_of(args):
        found = runs_of(load_study(name), place, args.only)
        runs += [(name, run) for run in found if args.seeds is None or run.seed < args.seeds]
    return min(1, run_all(runs[part - 1 :: parts], args.jobs, args.budget, args.device))


def one_command(args: argparse.Namespace) -> int:
    """Do one run, in this process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    study = load_study(args.study)
    known = {variant.name: variant for variant in (*study.variants, *study.setting.teachers.values())}
    run = Run(study.setting, known[args.variant], args.seed, place_of(args))
    return 0 if perform(run, args.device) else BUSY


def table_command(args: argparse.Namespace) -> int:
    """Write the pages of studies."""
    from experiments.pages import write_pages

    for path in write_pages([load_study(name) for name in names_of(args)], place_of(args)):
        print(path)
    return 0
