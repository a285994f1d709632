"""``python -m experiments``: list, run and tabulate the studies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torchdistill_adv.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Studies of the methods. EXPERIMENTS_PACKS names the folder of the images of --source packs.",
    )
    commands = found.add_subparsers(dest="command", required=True)
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--size", default="small", help="small: two CPU cores; full: a GPU (default: small)")
    place.add_argument("--source", default="packs", help="packs, or torchvision to download CIFAR (default: packs)")
    place.add_argument("--results", type=Path, help="folder of the results (default: results)")
    place.add_argument("--state", type=Path, help="folder of checkpoints (default: resource/experiments)")
    place.add_argument("--studies", type=Path, help="folder that has studies and settings (default: experiments)")
    listed = commands.add_parser("list", parents=[place], help="the studies, and which of their runs are done")
    listed.add_argument("names", nargs="*", metavar="NAME")
    run = commands.add_parser("run", parents=[place], help="do the runs that are missing or out of date")
    run.add_argument("names", nargs="+", metavar="NAME", help="studies, or all")
    run.add_argument(
        "--budget", type=float, help="minutes, after which it stops, and the next time goes on (default: the studies')"
    )
    run.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    run.add_argument("--only", nargs="+", default=(), metavar="VARIANT")
    run.add_argument("--seeds", type=int, help="only the first so many seeds; 0: only the teachers")
    run.add_argument("--part", default="1/1", help="2/3 is the second of three parts, for several machines")
    run.add_argument("--device")
    timed = commands.add_parser("time", parents=[place], help="train the variants in turn and briefly, for their time")
    timed.add_argument("names", nargs="+", metavar="NAME", help="studies")
    timed.add_argument("--rounds", type=int, default=3, help="times that each is trained (default: 3)")
    timed.add_argument("--device")
    table = commands.add_parser(
        "table", parents=[place], help="write docs/results/NAME.md, its picture, and the README"
    )
    table.add_argument("names", nargs="+", metavar="NAME", help="studies, or all")
    one = commands.add_parser("one", parents=[place])
    one.add_argument("study")
    one.add_argument("variant")
    one.add_argument("seed", type=int)
    one.add_argument("--device")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code.
    """
    args = parser().parse_args(arguments)
    try:
        return _run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    # torch and torchdistill are slow to import: not for --help
    from experiments import commands

    command = getattr(commands, f"{args.command}_command")
    return int(command(args))


if __name__ == "__main__":
    raise SystemExit(main())
