"""One run, from a configuration to its test results."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.backends import cudnn
from torchdistill.common.main_util import is_main_process, set_seed
from torchdistill.datasets.util import build_data_loader

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.robust_validation import BLOCK
from torchdistill_adv.runner.check import check_config, stages, student_name
from torchdistill_adv.runner.evaluation import accuracy, describe
from torchdistill_adv.runner.records import append_record, as_yaml, run_directory, start_records
from torchdistill_adv.runner.setup import (
    Place,
    build_box,
    build_model,
    load_weights,
    place,
    prepare_config,
)
from torchdistill_adv.runner.training import Record, train

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
) -> dict[str, Any]:
    """Train and test as torchdistill's example runner does, with checks before the first step.

    The best student goes to its ``dst_ckpt``; ``config.yaml``, ``run.json`` and ``metrics.jsonl`` go next to it, into
    the directory of that name without its extension.

    Args:
        config: YAML file, or a configuration as torchdistill loads one.
        test_only: train nothing; test the student of ``dst_ckpt``.
        student_only: do not test the teacher.
        start_epoch: epoch to go on from, with the student's ``src_ckpt``; counted over all stages.
        seed: of Python's, NumPy's and PyTorch's random numbers.
        device: such as ``cpu`` or ``cuda:1``; by default a GPU where there is one.
        adjust_lr: multiply the learning rate by the number of processes.
        cudnn_benchmark: let cuDNN choose its algorithms by trying them, in training.
        log_config: log the configuration.
        world_size: number of processes, where ``WORLD_SIZE`` is not in the environment.
        dist_url: how processes find each other.
        overrides: other values for entries, by dotted YAML path: ``{"train.num_epochs": 2}``.

    Returns:
        ``test``: accuracies of ``student`` and ``teacher``; ``epochs``: the records of ``metrics.jsonl``; ``seconds``.

    Raises:
        ConfigError: the configuration cannot be run; with the YAML path.
        NonFiniteError: the loss became NaN or infinite.
    """
    start = time.perf_counter()
    with place(device, world_size, dist_url) as where:
        set_seed(seed)
        loaded, text = _load(config, overrides or {})
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
        if overrides and f"models.{name}.dst_ckpt" in overrides and not test_only:
            _move_checkpoints(loaded["train"], dst_ckpt, overrides)
        directory = run_directory(dst_ckpt)
        if is_main_process():
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                found = f"found '{dst_ckpt}', where nothing can be written: {error.strerror}"
                raise ConfigError(found, f"models.{name}.dst_ckpt") from error

        def write(record: Record) -> None:
            if is_main_process():
                append_record(directory, record)

        has_teacher = models.get("teacher_model") is not None and not (test_only and student_only)
        teacher = build_model(models["teacher_model"], "teacher_model", where) if has_teacher else None
        student = build_model(models[name], name, where)
        epochs: list[Record] = []
        if not test_only:
            box = build_box(teacher, student, loaded, where, where.world_size if adjust_lr else 1)
            if is_main_process():
                facts = {"seed": seed, "device": str(where.device), "overrides": dict(overrides or {})}
                start_records(directory, text, keep=start_epoch > 0, **facts)
            options = {"seed": seed, "start_epoch": start_epoch}
            with _cudnn(cudnn_benchmark, cudnn.deterministic):
                epochs = train(
                    box,
                    student,
                    models[name],
                    loaded["train"],
                    where,
                    start_epoch=start_epoch,
                    options=options,
                    write=write,
                )
            del box
        load_weights(student, dst_ckpt, f"models.{name}.dst_ckpt")
        with _cudnn(False, True):
            test = _test({"teacher": None if student_only else teacher, "student": student}, loaded, where)
        result = {"test": test, "seconds": time.perf_counter() - start}
        write(result)
    return {**result, "epochs": epochs}


def _load(config: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[Any, str]:
    """The configuration with its overrides and its dependencies imported, and its text."""
    loaded = prepare_config(config, overrides)
    if isinstance(config, Mapping):
        return loaded, as_yaml(loaded)
    return loaded, Path(config).expanduser().read_text(encoding="utf-8")


def _move_checkpoints(train_config: Mapping[str, Any], dst_ckpt: str, overrides: Mapping[str, Any]) -> None:
    """Let the checkpoints of robust validation follow a ``dst_ckpt`` that is another than the YAML's."""
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


@contextmanager
def _cudnn(benchmark: bool, deterministic: bool) -> Iterator[None]:
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
