"""One run, from a configuration to its test results."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.backends import cudnn
from torchdistill.common.main_util import is_main_process, set_seed
from torchdistill.datasets.util import build_data_loader

from torchdistill_adv.checkpoints import whole_files
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.robust_validation import BLOCK
from torchdistill_adv.runner.building import build_box, build_model, load_weights
from torchdistill_adv.runner.check import check_config, check_destination, section, stages, student_name
from torchdistill_adv.runner.config import TaggedYAML, plain_config, prepare_config
from torchdistill_adv.runner.evaluation import accuracy, describe
from torchdistill_adv.runner.plain import normal_form
from torchdistill_adv.runner.precision import Passes, set_grad_accum_step
from torchdistill_adv.runner.processes import Place, place
from torchdistill_adv.runner.records import (
    append_record,
    as_yaml,
    keep_records,
    run_directory,
    start_records,
    without_objects,
    writing,
)
from torchdistill_adv.runner.resume import (
    LAST,
    Keeper,
    Position,
    check_identity,
    check_same_state,
    common_seed,
    only_run,
    read_state,
    refuse_unfinished,
    restore,
    tell_position,
)
from torchdistill_adv.runner.tensorboard import scalar_writer
from torchdistill_adv.runner.training import Record, catch_up, skip_to, start_from, train
from torchdistill_adv.yaml.text import config_of, flow, set_value

logger = logging.getLogger(__name__)


def run(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    test_only: bool = False,
    student_only: bool = False,
    start_epoch: int = 0,
    seed: int | None = None,
    device: str | None = None,
    adjust_lr: bool = False,
    cudnn_benchmark: bool = True,
    log_config: bool = False,
    world_size: int = 1,
    dist_url: str = "env://",
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    save_steps: int | None = None,
    amp: str | None = None,
    channels_last: bool = False,
    compile: bool = False,
    grad_accum_step: int | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train and test as torchdistill's example runner does, with checks before the first step.

    The best student goes to its ``dst_ckpt``; ``config.yaml``, ``run.json`` and ``metrics.jsonl`` go next to it, into
    the directory of that name without its extension.

    Args:
        config: YAML file, or a configuration as torchdistill loads one.
        test_only: train nothing; test the student of ``dst_ckpt``.
        student_only: do not test the teacher.
        start_epoch: epoch to go on from, with the student's ``src_ckpt``; counted over all stages.
        seed: of Python's, NumPy's and PyTorch's random numbers; by default one is drawn, and recorded.
        device: such as ``cpu`` or ``cuda:1``; by default a GPU where there is one.
        adjust_lr: multiply the learning rate by the number of processes.
        cudnn_benchmark: let cuDNN choose its algorithms by trying them, in training.
        log_config: log the configuration.
        world_size: number of processes, where ``WORLD_SIZE`` is not in the environment.
        dist_url: how processes find each other.
        overrides: other values for entries, by dotted YAML path: ``{"train.num_epochs": 2}``.
        resume: go on where the run of this checkpoint was interrupted; from the beginning where there is none.
        save_steps: keep the state of the run every so many steps too, not only after each epoch.
        amp: compute the passes of training in ``bf16`` or ``fp16`` where that is safe; ``fp16`` scales the loss.
        channels_last: lay images and convolutions out with the channels last.
        compile: compile the networks.
        grad_accum_step: batches from one step of the optimizer to the next, in every stage.
        tensorboard: write the run's curves for TensorBoard too, next to its records.

    Returns:
        ``test``: accuracies of ``student`` and ``teacher``; ``epochs``: the records of ``metrics.jsonl``; ``seconds``.

    Raises:
        ConfigError: the configuration cannot be run; with the YAML path.
        NonFiniteError: the loss became NaN or infinite.
    """
    start = time.perf_counter()
    if save_steps is not None and save_steps < 1:
        raise ConfigError(f"found {save_steps}; write 1 or more", "--save_steps")
    overrides = dict(overrides or {})
    with place(device, world_size, dist_url) as where, contextlib.ExitStack() as stack:
        state = None
        if resume and not test_only:
            if start_epoch:
                raise ConfigError("found it with --start_epoch; write one of them", "--resume")
            state = read_state(planned_directory(config, overrides))
            check_same_state(state, where)
        seed = common_seed(seed if state is None or seed is not None else state["identity"]["seed"], where)
        set_seed(seed)
        loaded, text = _load(config, overrides)
        check_config(
            loaded,
            test_only=test_only,
            student_only=student_only,
            start_epoch=start_epoch,
            binds_by_itself="torchdistill_adv.autobind" in sys.modules,
        )
        if log_config:
            logger.info(loaded)
        models = loaded["models"]
        name = student_name(models)
        dst_ckpt = models[name]["dst_ckpt"]
        directory = run_directory(dst_ckpt)
        can_write = partial(writing, dst_ckpt, f"models.{name}.dst_ckpt")
        if is_main_process():
            with can_write():
                directory.mkdir(parents=True, exist_ok=True)

        has_teacher = models.get("teacher_model") is not None and not (test_only and student_only)
        records: list[Record] = []
        if not test_only:
            with can_write():
                stack.enter_context(only_run(directory))
            board = stack.enter_context(scalar_writer(directory / "tensorboard" if tensorboard else None))
            identity = {
                "config": normal_form(text),
                "--set": str(sorted(without_objects(overrides).items())),
                "seed": seed,
                "number of processes": where.world_size,
                "adjust_lr": adjust_lr,
                "amp": amp,
                "grad_accum_step": grad_accum_step,
                "channels_last": channels_last,
                "compile": compile,
            }
            if state is None:
                refuse_unfinished(directory)
                tell_found_modules(loaded["train"])
            else:
                check_identity(state, identity)
                tell_position(state)
                if state["finished"] and not Path(dst_ckpt).exists():
                    raise ConfigError(
                        f"found a finished run, and no student of it at '{dst_ckpt}'; put that back, or remove "
                        f"'{directory / LAST}' to train anew",
                        "--resume",
                    )
                with can_write():
                    records = keep_records(directory, state["epoch"])

        def write(record: Record) -> None:
            if "epoch" in record:
                records.append(record)
            if is_main_process():
                append_record(directory, record)

        teacher = build_model(models["teacher_model"], "teacher_model", where) if has_teacher else None
        student = build_model(models[name], name, where)
        if not test_only and not (state is not None and state["finished"]):
            train_config = loaded["train"]
            _move_checkpoints(train_config, dst_ckpt, overrides)
            if grad_accum_step is not None:
                set_grad_accum_step(train_config, grad_accum_step)
            passes = Passes(where, amp, channels_last, compile)
            passes.prepare(teacher, student)
            box = build_box(teacher, student, loaded, where, where.world_size if adjust_lr else 1)
            if is_main_process():
                facts = {"seed": seed, "device": str(where.device), "overrides": overrides}
                facts |= {"processes": where.world_size, "amp": amp, "grad_accum_step": grad_accum_step}
                facts |= {"channels_last": channels_last, "compile": compile}
                shown = text if isinstance(config, Mapping) else _as_it_ran(config, text, overrides, dst_ckpt)
                with can_write():
                    start_records(directory, shown, keep=start_epoch > 0 or state is not None, **facts)
            skip_to(box, start_epoch if state is None else state["epoch"], where)
            if state is None:
                steps_before = start_epoch * length_hint(box.train_data_loader)
                best = start_from(box, models[name].get("src_ckpt"))
                position = Position(start_epoch, best=best, steps_before=steps_before)
                if start_epoch:
                    catch_up(box, start_epoch, train_config)
            else:
                position = restore(box, state, passes, where)
            keeper = Keeper(directory, identity)
            with _cudnn(cudnn_benchmark, cudnn.deterministic), whole_files():
                train(
                    box,
                    student,
                    models[name],
                    train_config,
                    where,
                    passes=passes,
                    position=position,
                    keep=partial(keeper.save, box, passes=passes, where=where),
                    save_steps=save_steps,
                    options={"seed": seed, "start_epoch": start_epoch},
                    write=write,
                    board=board,
                )
            del box
        load_weights(student, dst_ckpt, f"models.{name}.dst_ckpt")
        with _cudnn(False, True):
            test = _test({"teacher": None if student_only else teacher, "student": student}, loaded, where)
        result = {"test": test, "seconds": time.perf_counter() - start}
        write(result)
    return {**result, "epochs": records}


def planned_directory(config: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any]) -> Path:
    """The directory of a run, read from its configuration before anything of that is built."""
    plain = plain_config(config, overrides)
    models = section(plain, "models", "student_model, and teacher_model for distillation")
    name = student_name(models)
    with inside("models"):
        block = section(models, name, "key, kwargs and dst_ckpt")
    with inside(f"models.{name}"):
        check_destination(block)
    return run_directory(block["dst_ckpt"])


def tell_found_modules(train_config: Mapping[str, Any]) -> None:
    """Warn of auxiliary modules of an earlier run, which torchdistill begins with where their files exist."""
    for path, stage in stages(train_config):
        for side in ("teacher", "student", "model"):
            wrapper = (stage.get(side) or {}).get("auxiliary_model_wrapper") or {}
            for name, file in (wrapper.get("kwargs") or {}).items():
                if name.endswith("ckpt") and isinstance(file, str) and Path(file).exists():
                    where = f"{path}.{side}.auxiliary_model_wrapper.kwargs.{name}"
                    logger.warning("%s: '%s' is there already, and its module begins with it", where, file)


def _load(config: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[Any, str]:
    """The configuration with its overrides and its dependencies imported, and its text."""
    loaded = prepare_config(config, overrides)
    if isinstance(config, Mapping):
        return loaded, as_yaml(loaded)
    return loaded, Path(config).expanduser().read_text(encoding="utf-8")


def _as_it_ran(config: str | os.PathLike[str], text: str, overrides: Mapping[str, Any], dst_ckpt: str) -> str:
    """The text of a YAML with its overrides, if they can be set in it and nothing else changes; else as it is."""
    shown = text
    try:
        for path, value in overrides.items():
            shown = set_value(shown, path, value if isinstance(value, TaggedYAML) else flow(value))
        ran = plain_config(config, overrides)
        _move_checkpoints(ran["train"], dst_ckpt, overrides)
        return shown if config_of(shown) == ran else text
    except (ConfigError, yaml.YAMLError):
        return text


def _move_checkpoints(train_config: Mapping[str, Any], dst_ckpt: str, overrides: Mapping[str, Any]) -> None:
    """Let the checkpoints of robust validation follow a ``dst_ckpt`` that is another than the YAML's."""
    if not {"models.student_model.dst_ckpt", "models.model.dst_ckpt"} & overrides.keys():
        return
    for path, stage in stages(train_config):
        if stage.get(BLOCK) and not {f"{path}.{BLOCK}", f"{path}.{BLOCK}.ckpt"} & overrides.keys():
            stage[BLOCK]["ckpt"] = dst_ckpt


def _test(
    networks: Mapping[str, nn.Module | None], config: Mapping[str, Any], where: Place
) -> dict[str, dict[str, float]]:
    """The accuracy of each network on the test set."""
    block = config["test"]["test_data_loader"]
    loader = build_data_loader(config["datasets"][block["dataset_id"]], block, where.distributed)
    results = {}
    for who, network in networks.items():
        if network is not None:
            results[who] = accuracy(network, loader, where.device, f"{who}_model")
            logger.info("%s: test accuracy: %s", who, describe(results[who]))
    return results


@contextlib.contextmanager
def _cudnn(benchmark: bool, deterministic: bool) -> Iterator[None]:
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
