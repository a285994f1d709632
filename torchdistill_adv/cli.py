"""The command line: ``torchdistill-adv train``, ``evaluate``, ``add``, ``check`` and the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchdistill.common.constant import LOGGING_FORMAT
from torchdistill.misc.log import setup_log_file

from torchdistill_adv import __version__
from torchdistill_adv.catalogue import KINDS, listing
from torchdistill_adv.checks import number
from torchdistill_adv.completion import INSTALL, SHELLS, completion_script
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.runner import run
from torchdistill_adv.runner.config import parse_overrides
from torchdistill_adv.runner.memory import keep_freed_memory
from torchdistill_adv.runner.processes import ends_all_together

logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = argparse.ArgumentParser(prog="torchdistill-adv", description="Adversarial distillation for torchdistill")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="train a student, then test it and its teacher"))
    _add_evaluate(commands.add_parser("evaluate", help="accuracy on clean images and under attack"))
    _add_metrics(commands.add_parser("metrics", help="how alike teacher and student are: boundaries, ranks, particles"))
    _add_report(commands.add_parser("report", help="one HTML page of finished runs, with their pictures"))
    _add_add(commands.add_parser("add", help="put an adversarial loss into a YAML of torchdistill, as a new file"))
    _add_check(commands.add_parser("check", help="build everything, take a step of every stage, say what looks wrong"))
    _add_list(commands.add_parser("list", help="names of losses, adversaries, objectives, models and configurations"))
    raw = argparse.RawDescriptionHelpFormatter
    short = "print a script with which the Tab key completes commands"
    _add_completion(commands.add_parser("completion", help=short, description=INSTALL, formatter_class=raw))
    return parser


def _add_set(parser: argparse.ArgumentParser) -> None:
    """The option of every command that reads a configuration."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="another value for an entry of the YAML, such as train.num_epochs=2; as often as needed",
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    """The options of torchdistill's example runner."""
    add = parser.add_argument
    add("--config", required=True, help="YAML file")
    _add_set(parser)
    add("--device", help="such as cpu or cuda:1; by default a GPU where there is one")
    add("--run_log", help="write the log to this file too")
    add("--resume", action="store_true", help="go on where the run was interrupted; from the beginning if it was not")
    add("--save_steps", type=int, metavar="N", help="keep the state of the run every N steps too")
    add("--amp", choices=("bf16", "fp16"), help="mixed precision; fp16 scales the loss")
    add("--grad_accum_step", type=int, metavar="N", help="batches from one step of the optimizer to the next")
    add("--channels_last", action="store_true", help="lay images and convolutions out with the channels last")
    add("--compile", action="store_true", help="compile the networks")
    add("--tensorboard", action="store_true", help="write the curves for TensorBoard next to the run's records")
    add("--start_epoch", default=0, type=int, metavar="N", help="go on from this epoch with the student's src_ckpt")
    add("--seed", type=int, help="seed of the random numbers")
    add("-disable_cudnn_benchmark", action="store_true", help="do not let cuDNN choose its algorithms by trying them")
    add("-test_only", action="store_true", help="train nothing, test the models")
    add("-student_only", action="store_true", help="do not test the teacher")
    add("-log_config", action="store_true", help="log the configuration")
    add("--world_size", default=1, type=int, help="number of processes, where torchrun does not set it")
    add("--dist_url", default="env://", help="how processes find each other")
    add("-adjust_lr", action="store_true", help="multiply the learning rate by the number of processes")
    parser.set_defaults(function=_train)


def _add_measured(parser: argparse.ArgumentParser) -> None:
    """What ``evaluate`` and ``metrics`` have in common."""
    add = parser.add_argument
    add("--config", required=True, help="YAML file that the networks and the test set are of")
    _add_set(parser)
    add("--ckpt", help="the student's weights; by default those of its dst_ckpt")
    add("--seed", default=0, type=int, help="seed of the images drawn and of the random starts")
    add("--batch_size", help="images at once; halved by itself where memory runs out")
    add("--mean", nargs="+", help="per-channel mean of the data's Normalize, where the YAML does not tell")
    add("--std", nargs="+", help="per-channel standard deviation, likewise")
    add("--device", help="such as cpu or cuda:1; by default a GPU where there is one")
    add("--run_log", help="write the log to this file too")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    add = parser.add_argument
    add("--num_images", metavar="N", help="draw this many test images with --seed; by default all")
    add("--model", default="student", choices=("student", "teacher"), help="which network of the YAML")
    add(
        "--attacks",
        default="clean,fgsm,pgd20,cw30",
        help="clean, fgsm, pgd<steps>, cw<steps>, cwl2 and autoattack, between commas (default: %(default)s)",
    )
    add("--norm", default="linf", choices=("linf", "l2"), help="norm of the ball (default: %(default)s)")
    add(
        "--eps",
        help="radius in pixels of [0, 1], or several between commas; by default that of the YAML's "
        "robust_validation, else 8/255, or 0.5 in l2",
    )
    add("--step_size", help="of pgd and cw, in pixels; by default a quarter of eps")
    add("--restarts", default="1", help="random starts of pgd and cw (default: %(default)s)")
    add("--out", type=Path, help="JSON file; by default evaluation.json in the folder of the checkpoint's name")
    parser.set_defaults(function=_evaluate)


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    add = parser.add_argument
    add("--num_images", metavar="N", default=1000, help="draw this many test images with --seed (default: %(default)s)")
    add("--particles", default="2,4,8", help="particles an image, between commas (default: %(default)s)")
    add("--eps", help="l-infinity radius of PGD in pixels of [0, 1]; by default that of robust_validation, else 8/255")
    add("--out", type=Path, help="JSON file; by default similarity.json in the folder of the checkpoint's name")
    parser.set_defaults(function=_metrics)


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run: its checkpoint's path without extension")
    add("--out", type=Path, default=Path("report.html"), help="HTML file (default: %(default)s)")
    add("--no_pictures", action="store_true", help="leave out what needs the networks: seconds instead of a minute")
    add("--device", help="such as cpu or cuda:1; by default a GPU where there is one")
    add("--run_log", help="write the log to this file too")
    parser.set_defaults(function=_report)


def _add_add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("loss", help="such as TALDLoss")
    add("config", type=Path, help="YAML file, which stays as it is")
    add("-o", "--out", required=True, type=Path, help="the new YAML file")
    _add_set(parser)
    add("--stage", help="such as stage2; by default the last one")
    add("--name", help="of the term; by default that of the loss in small letters")
    add("--weight", help="of the term; by default the paper's or its code's, or 1")
    parser.set_defaults(function=_add, run_log=None)


def _add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", help="YAML file")
    add("--device", help="such as cpu or cuda:1; by default a GPU where there is one")
    _add_set(parser)
    add("--seed", default=0, type=int, help="seed of the weights, the batch and the search (default: %(default)s)")
    add("--run_log", help="write the log to this file too")
    parser.set_defaults(function=_check)


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=tuple(KINDS), help="by default all")
    parser.set_defaults(function=_list, run_log=None)


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(function=_completion, run_log=None)


def _train(args: argparse.Namespace) -> None:
    keep_freed_memory()
    run(
        args.config,
        test_only=args.test_only,
        student_only=args.student_only,
        start_epoch=args.start_epoch,
        seed=args.seed,
        device=args.device,
        adjust_lr=args.adjust_lr,
        cudnn_benchmark=not args.disable_cudnn_benchmark,
        log_config=args.log_config,
        world_size=args.world_size,
        dist_url=args.dist_url,
        resume=args.resume,
        save_steps=args.save_steps,
        amp=args.amp,
        channels_last=args.channels_last,
        compile=args.compile,
        grad_accum_step=args.grad_accum_step,
        tensorboard=args.tensorboard,
        overrides=parse_overrides(args.set),
    )


def _evaluate(args: argparse.Namespace) -> None:
    keep_freed_memory()
    from torchdistill_adv.evaluation import evaluate
    from torchdistill_adv.evaluation.blocks import weights_digest

    experiment = _experiment(args, (args.model,))
    network = experiment.on_pixels(args.model)
    out = _out(args.out, experiment.folder(args.model) / "evaluation.json")
    found = evaluate(
        network,
        experiment.data,
        attacks=args.attacks,
        norm=args.norm,
        eps=args.eps.split(",") if args.eps else experiment.radius(args.norm),
        step_size=args.step_size,
        restarts=args.restarts,
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=experiment.num_workers,
        journal=out.with_suffix(".journal.jsonl"),
    )
    found = found.with_facts(
        model={
            "who": args.model,
            "config": args.config,
            "overrides": parse_overrides(args.set),
            "checkpoint": experiment.checkpoints[args.model],
            "sha256": weights_digest(experiment.networks[args.model]),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        data={"dataset": experiment.dataset_id, **found.facts["data"]},
    )
    _tell_replaced(out, found.as_json())
    found.write(out)
    print(f"{found.table()}\n\n{out}")


def _metrics(args: argparse.Namespace) -> None:
    from torchdistill_adv.evaluation.results import write_json
    from torchdistill_adv.runner.measures import as_table, measure

    experiment = _experiment(args, ("student", "teacher"))
    out = _out(args.out, experiment.folder("student") / "similarity.json")
    found = measure(
        experiment,
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        particles=args.particles.split(","),
        eps=args.eps or experiment.radius("linf") or "8/255",
    )
    write_json(found, out)
    print(f"{as_table(found)}\n\n{out}")


def _report(args: argparse.Namespace) -> None:
    from torchdistill_adv.report import write_report

    # the toy problem is trained anew for every report
    logging.getLogger("torchdistill_adv.binding").setLevel(logging.WARNING)
    print(write_report(args.runs, args.out, pictures=not args.no_pictures, device=args.device))


def _add(args: argparse.Namespace) -> None:
    from torchdistill_adv.yaml import add_to_file

    options = {"stage": args.stage, "name": args.name, "weight": args.weight, "overrides": args.set}
    diff, notes = add_to_file(args.loss, args.config, args.out, **options)
    print(f"{diff}\n\n{args.out}\nnext: torchdistill-adv check {shlex.quote(str(args.out))}")
    for note in notes:
        print(f"torchdistill-adv: note: {note}", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    from torchdistill_adv.runner.trial import try_out

    # what is logged while a stage is built is in the table
    own = logging.getLogger("torchdistill_adv")
    level = own.level
    own.setLevel(logging.WARNING)
    try:
        print(try_out(args.config, device=args.device, seed=args.seed, overrides=parse_overrides(args.set)))
    finally:
        own.setLevel(level)


def _list(args: argparse.Namespace) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(listing([args.kind] if args.kind else list(KINDS), width))


def _completion(args: argparse.Namespace) -> None:
    print(completion_script(make_parser(), args.shell))


def _out(chosen: Path | None, default: Path) -> Path:
    """Where the results go; a folder is refused before anything is measured."""
    if chosen is None:
        return default
    out = chosen.expanduser()
    if out.is_dir():
        raise ConfigError(f"found the folder {out}; write a file, such as {out / default.name}", "--out")
    return out


def _tell_replaced(out: Path, found: Mapping[str, Any]) -> None:
    """Say that results of other attacks or images are replaced."""

    def scope(evaluation: Mapping[str, Any]) -> str:
        attacks = dict.fromkeys(f"{r['attack']} {r['eps']:.4g}" if r["eps"] else "clean" for r in evaluation["results"])
        return f"{evaluation['data']['num_images']} images under {', '.join(attacks)}"

    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        before = json.loads(out.read_text(encoding="utf-8"))
        if scope(before) != scope(found):
            logger.warning("%s had %s; the journal beside it keeps that, and --out another file", out, scope(before))


def _experiment(args: argparse.Namespace, networks: tuple[str, ...]) -> Any:
    from torchdistill_adv.runner.loading import load_experiment

    normalization = None
    if args.mean is not None or args.std is not None:
        if args.mean is None or args.std is None:
            raise ConfigError("found one without the other; give both", "--mean, --std")
        mean, std = (tuple(number(v, f"--{name}") for v in getattr(args, name)) for name in ("mean", "std"))
        normalization = mean, std
    return load_experiment(
        args.config,
        ckpt=args.ckpt,
        networks=networks,
        device=args.device,
        normalization=normalization,
        overrides=parse_overrides(args.set),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a wrong configuration or a loss that is not finite is one line on the standard error.

    Returns:
        The exit code: 0, 1 for a loss that became NaN or infinite, 2 for a wrong configuration, 130 for Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        format=LOGGING_FORMAT, datefmt="%Y/%m/%d %H:%M:%S", level=logging.INFO if is_first else logging.WARNING
    )
    if args.run_log and is_first:
        setup_log_file(os.path.expanduser(args.run_log))
    if args.function is not _train:
        # torchdistill logs every object of a configuration, which what is measured of it need not repeat
        logging.getLogger("torchdistill").setLevel(logging.WARNING)
    try:
        with ends_all_together():
            if args.function is not _train and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ConfigError("runs in one process; start it without torchrun", args.command)
            args.function(args)
    except (ConfigError, NonFiniteError) as error:
        # messages of other libraries can have several lines
        print("torchdistill-adv: error:", *str(error).split(), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("torchdistill-adv: interrupted", file=sys.stderr)
        return 130
    return 0
