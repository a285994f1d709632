"""From a YAML file to models and a box: loading, devices and processes, building."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchdistill.common.main_util import import_dependencies, load_ckpt
from torchdistill.common.module_util import check_if_wrapped, get_updatable_param_names
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import TrainingBox, get_training_box
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

import torchdistill_adv  # noqa: F401  (its data sets, models and losses are known before the YAML is loaded)
from torchdistill_adv.binding import BINDING, bind
from torchdistill_adv.boxes import Box, sides, stage_path
from torchdistill_adv.errors import ConfigError, inside


@dataclass(frozen=True)
class Place:
    """Where a run computes.

    Args:
        device: of this process.
        device_ids: for ``DistributedDataParallel``; None on the CPU.
        distributed: whether there is a process group.
        world_size: number of processes.
    """

    device: torch.device
    device_ids: list[int] | None = None
    distributed: bool = False
    world_size: int = 1


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of a YAML file, with the objects that its tags name.

    Raises:
        ConfigError: no such file, a YAML error, or an object of the YAML that cannot be made.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"found '{path}', which is no file; write the path of a YAML file", "--config")
    try:
        config: dict[str, Any] = load_yaml_file(str(file))
    except yaml.YAMLError as error:
        raise ConfigError(f"is no YAML: {error}", str(path)) from error
    # the YAML calls whatever it names, so anything can be raised
    except Exception as error:
        raise ConfigError(f"something in it cannot be made: {type(error).__name__}: {error}", str(path)) from error
    return config


def import_config_dependencies(config: Any) -> None:
    """Import what the YAML names under ``dependencies``.

    Raises:
        ConfigError: a module that is not there.
    """
    try:
        import_dependencies(config.get("dependencies") if isinstance(config, Mapping) else None)
    except (ImportError, TypeError) as error:
        raise ConfigError(f"{error}; write a list of {{name: '<importable module>'}}", "dependencies") from error


def copy_containers(value: Any) -> Any:
    """Dictionaries and lists copied, what they hold not: torchdistill writes into its configuration."""
    if type(value) is dict:
        return {key: copy_containers(item) for key, item in value.items()}
    return [copy_containers(item) for item in value] if type(value) is list else value


def override(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the entry at a dotted YAML path.

    Raises:
        ConfigError: the block that should hold the entry is not there.
    """
    *parents, key = path.split(".")
    block: Any = config
    for parent in parents:
        block = block.get(parent) if isinstance(block, dict) else None
    if not isinstance(block, dict):
        raise ConfigError("cannot be set; there is no such block in the YAML", path)
    block[key] = value


def prepare_config(
    config: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Any:
    """A configuration with its dependencies imported and its overrides set; what is given stays as it is.

    Args:
        config: YAML file, or a configuration as torchdistill loads one.
        overrides: other values for entries, by dotted YAML path.

    Raises:
        ConfigError: it cannot be loaded, or a block that should hold an override is not there.
    """
    loaded = copy_containers(dict(config) if isinstance(config, Mapping) else load_config(config))
    import_config_dependencies(loaded)
    for path, value in (overrides or {}).items():
        override(loaded, path, value)
    return loaded


# devices and processes


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: it is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"found '{name}', which is not there ({reason}); leave --device out to have one picked, or write 'cpu'",
            "--device",
        ) from error
    return device


def default_device() -> torch.device:
    """A GPU where there is one."""
    has_mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")


@contextmanager
def place(device_name: str | None, world_size: int = 1, dist_url: str = "env://") -> Iterator[Place]:
    """The device, by default a GPU where there is one; under torchrun also the process group.

    torchdistill's own set-up of processes takes NCCL only; here processes on CPUs use Gloo.

    Raises:
        ConfigError: there is no such device.
    """
    name = device_name or str(default_device())
    if "RANK" not in os.environ:
        yield Place(check_device(name))
        return
    device = check_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", world_size))
    rank = int(os.environ["RANK"])
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=dist_url, world_size=world_size, rank=rank)
    try:
        yield Place(device, [device.index] if on_gpu else None, True, world_size)
    finally:
        # a box is in reference cycles, and its DistributedDataParallel must not outlive the processes' group
        gc.collect()
        dist.destroy_process_group()


def to_device(data: Any, device: torch.device) -> Any:
    """``data`` with its tensors on ``device``; dictionaries, lists and tuples are gone into."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return {key: to_device(item, device) for key, item in data.items()}
    if isinstance(data, (list, tuple)):
        items = [to_device(item, device) for item in data]
        return items if isinstance(data, list) else tuple(items)
    return data


# models and boxes


def build_model(block: Mapping[str, Any], name: str, where: Place) -> nn.Module:
    """The model of a block of ``models``, with the weights of its ``src_ckpt``.

    Raises:
        ConfigError: it cannot be built, or the weights do not fit.
    """
    kwargs = block.get("kwargs") or {}
    try:
        with inside(f"models.{name}.kwargs"):
            model = get_image_classification_model({**block, "kwargs": kwargs}, where.distributed)
            if model is None:
                model = get_model(block["key"], block.get("repo_or_dir"), **kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"'{block['key']}' cannot be built: {error}", f"models.{name}.kwargs") from error
    load_weights(model, block.get("src_ckpt"), f"models.{name}.src_ckpt")
    return model.to(where.device)


def load_weights(model: nn.Module, checkpoint: str | None, path: str) -> None:
    """Load a checkpoint's weights; nothing for None.

    Raises:
        ConfigError: they do not fit.
    """
    try:
        load_ckpt(checkpoint, model=model, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"found '{checkpoint}', whose weights do not fit the model: {error}", path) from error


def build_box(
    teacher: nn.Module | None, student: nn.Module, config: Mapping[str, Any], where: Place, lr_factor: int
) -> Box:
    """The box that trains ``student``, ready for the first epoch.

    Raises:
        ConfigError: torchdistill cannot build it.
    """
    common = (config["datasets"], config["train"], where.device, where.device_ids, where.distributed, lr_factor)
    make_box = get_training_box if teacher is None else partial(get_distillation_box, teacher)
    try:
        box: Box = make_box(student, *common)
    except ConfigError:
        raise
    # what the checks do not know of, such as the options of auxiliary wrappers
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        where_raised = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({where_raised.filename}:{where_raised.lineno})"
        raise ConfigError(f"torchdistill cannot build this training: {reason}", "train") from error
    wrap_student(box, config["train"], where)
    return box


def wrap_student(box: Box, train: Mapping[str, Any], where: Place) -> None:
    """Let processes on CPUs share the student's gradients, where torchdistill wraps on GPUs only.

    Call it whenever a stage begins.

    Raises:
        ConfigError: there are several processes, and each would train a student of its own.
    """
    if not where.distributed:
        return
    attribute, key = ("model", "model") if isinstance(box, TrainingBox) else ("student_model", "student")
    path = stage_path(box)
    block = (train if path == "train" else train[path.removeprefix("train.")])[key]
    wrapper = block.get("wrapper")
    if isinstance(wrapper, Mapping):
        wrapper = wrapper.get("key")
    student = sides(box)[0].outermost
    if any(check_if_wrapped(module) for module in student.modules()) or not get_updatable_param_names(student):
        return
    if wrapper != "DistributedDataParallel":
        raise ConfigError(
            f"found {wrapper!r} with {where.world_size} processes, which would train a student each; write "
            "'DistributedDataParallel'",
            f"{path}.{key}.wrapper",
        )
    any_frozen = box.model_any_frozen if isinstance(box, TrainingBox) else box.student_any_frozen
    setattr(box, attribute, DistributedDataParallel(student, find_unused_parameters=any_frozen))
    if BINDING in box.__dict__:
        bind(box)
