"""The command line: ``torchdistill-adv train`` and ``torchdistill-adv evaluate``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from torchdistill.common.constant import LOGGING_FORMAT
from torchdistill.misc.log import setup_log_file

from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.runner import run


def make_parser() -> argparse.ArgumentParser:
    """The options of torchdistill's example runner, for each command."""
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add("--config", required=True, help="YAML file")
    add("--device", help="such as cpu or cuda:1; by default a GPU where there is one")
    add("--run_log", help="write the log to this file too")
    add("--start_epoch", default=0, type=int, metavar="N", help="go on from this epoch with the student's src_ckpt")
    add("--seed", type=int, help="seed of the random numbers")
    add("-disable_cudnn_benchmark", action="store_true", help="do not let cuDNN choose its algorithms by trying them")
    add("-test_only", action="store_true", help="train nothing, test the models")
    add("-student_only", action="store_true", help="do not test the teacher")
    add("-log_config", action="store_true", help="log the configuration")
    add("--world_size", default=1, type=int, help="number of processes, where torchrun does not set it")
    add("--dist_url", default="env://", help="how processes find each other")
    add("-adjust_lr", action="store_true", help="multiply the learning rate by the number of processes")
    parser = argparse.ArgumentParser(prog="torchdistill-adv", description="Adversarial distillation for torchdistill")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", parents=[options], help="train a student, then test it and its teacher")
    commands.add_parser("evaluate", parents=[options], help="the same as train -test_only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a wrong configuration or a loss that is not finite is one line on the standard error.

    Returns:
        The exit code: 0, 1 for a loss that became NaN or infinite, 2 for a wrong configuration.
    """
    args = make_parser().parse_args(argv)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        format=LOGGING_FORMAT, datefmt="%Y/%m/%d %H:%M:%S", level=logging.INFO if is_first else logging.WARNING
    )
    if args.run_log and is_first:
        setup_log_file(os.path.expanduser(args.run_log))
    try:
        run(
            args.config,
            test_only=args.test_only or args.command == "evaluate",
            student_only=args.student_only,
            start_epoch=args.start_epoch,
            seed=args.seed,
            device=args.device,
            adjust_lr=args.adjust_lr,
            cudnn_benchmark=not args.disable_cudnn_benchmark,
            log_config=args.log_config,
            world_size=args.world_size,
            dist_url=args.dist_url,
        )
    except (ConfigError, NonFiniteError) as error:
        # messages of other libraries can have several lines
        print("torchdistill-adv: error:", *str(error).split(), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0
