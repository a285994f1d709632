"""Checks of a loaded configuration, before anything is built: pure functions, one for each part of the YAML."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchdistill.core.interfaces import registry as processes
from torchdistill.datasets.registry import BATCH_SAMPLER_DICT, COLLATE_FUNC_DICT, DATASET_WRAPPER_DICT
from torchdistill.losses.registry import (
    FUNC2EXTRACT_MODEL_OUTPUT_DICT,
    HIGH_LEVEL_LOSS_DICT,
    LOSS_DICT,
    LOSS_WRAPPER_DICT,
    LOW_LEVEL_LOSS_DICT,
    MIDDLE_LEVEL_LOSS_DICT,
)
from torchdistill.models.registry import AUXILIARY_MODEL_WRAPPER_DICT, MODEL_DICT
from torchdistill.optim.registry import OPTIM_DICT, SCHEDULER_DICT

from torchdistill_adv.errors import ConfigError, inside, nearest
from torchdistill_adv.losses.base import AdversarialTerm
from torchdistill_adv.registry import check_options
from torchdistill_adv.robust_validation import BLOCK, PROCESS, RobustValidation, check_held_out, num_common_images

logger = logging.getLogger(__name__)

Block = Mapping[str, Any]

STAGE_PROCESSES = {
    "pre_epoch_process": processes.PRE_EPOCH_PROC_FUNC_DICT,
    "pre_forward_process": processes.PRE_FORWARD_PROC_FUNC_DICT,
    "post_forward_process": processes.POST_FORWARD_PROC_FUNC_DICT,
    "post_epoch_process": processes.POST_EPOCH_PROC_FUNC_DICT,
}
# a user's own process may bind; these do not
UNBOUND_PROCESSES = (
    None,
    "eval_teacher",
    "default_pre_epoch_process_with_teacher",
    "default_pre_epoch_process_without_teacher",
)


def check_config(
    config: Any,
    *,
    test_only: bool = False,
    student_only: bool = False,
    start_epoch: int = 0,
    binds_by_itself: bool = False,
) -> None:
    """Refuse a configuration that cannot be run.

    Args:
        config: the loaded YAML.
        test_only: models are only tested, so ``train`` is not read.
        student_only: the teacher is not tested.
        start_epoch: the epoch at which training starts.
        binds_by_itself: whether :mod:`torchdistill_adv.autobind` is imported.

    Raises:
        ConfigError: with the YAML path of the entry.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"found {config!r}; write the sections datasets, models, train and test")
    datasets = section(config, "datasets", "the data sets, each under the id that dataset_id names")
    models = section(config, "models", "student_model, and teacher_model for distillation")
    has_teacher = models.get("teacher_model") is not None
    with inside("models"):
        student = section(models, student_name(models), "key, kwargs and dst_ckpt")
        with inside(student_name(models)):
            check_model(student)
            check_destination(student)
        if has_teacher:
            teacher = section(models, "teacher_model", "key, kwargs and src_ckpt")
            with inside("teacher_model"):
                check_model(teacher)
                if not (test_only and student_only):
                    check_source(teacher)
    test = section(config, "test", "test_data_loader")
    with inside("test"):
        check_loader(test, "test_data_loader", datasets)
    if test_only:
        with inside(f"models.{student_name(models)}"):
            check_tested(student)
    else:
        train = section(config, "train", "num_epochs, train_data_loader, optimizer, criterion ...")
        check_training(train, datasets, has_teacher, binds_by_itself)
        check_robust_validation(train, test["test_data_loader"]["dataset_id"], datasets, has_teacher)
        with inside(f"models.{student_name(models)}"):
            check_source(student, written=[student["dst_ckpt"]])
        check_start(start_epoch, student, train)


def student_name(models: Block) -> str:
    """The key of the student's block: ``student_model``, or ``model`` in a YAML without a teacher."""
    return "model" if "student_model" not in models and "model" in models else "student_model"


def stages(train: Block) -> list[tuple[str, Block]]:
    """YAML path and block of every training stage."""
    count = sum(str(key).startswith("stage") for key in train)
    if not count:
        return [("train", train)]
    with inside("train"):
        return [(f"train.stage{i + 1}", section(train, f"stage{i + 1}", "a training stage")) for i in range(count)]


# single entries


def section(block: Block, key: str, content: str) -> Block:
    """The mapping at ``key``."""
    value = block.get(key)
    if value is None:
        raise ConfigError(f"is missing; it holds {content}", key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"found {value!r}; write a mapping of {content}", key)
    return value


def known(block: Block, key: str, registry: Mapping[str, Any], kind: str) -> Any:
    """What ``registry`` has under the name at ``key``."""
    name = block.get(key)
    if name is None:
        raise ConfigError(f"is missing; write the name of a {kind}. {nearest(name, registry)}", key)
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"found {name!r}, which is no registered {kind}; {nearest(name, registry)}", key)
    return registry[name]


def known_if_given(block: Block, key: str, registry: Mapping[str, Any], kind: str) -> None:
    if block.get(key):
        with inside(key):
            known(section(block, key, "key and kwargs"), "key", registry, kind)


def positive_integer(block: Block, key: str) -> int:
    value = block.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{'is missing' if value is None else f'found {value!r}'}; write an integer >= 1", key)
    return value


def check_kwargs(function: Callable[..., Any], options: Any, owner: str, given: int = 0) -> None:
    """Refuse options that ``function`` does not take, lacks, or would get as text instead of a number.

    The first ``given`` parameters of ``function`` are not options.
    """
    with inside("kwargs"):
        if not isinstance(options, Mapping):
            raise ConfigError(f"found {options!r}; write a mapping of options, {{}} for none")
        check_options(function, options, owner, skip=given)
        for name, value in options.items():
            check_no_text(value, str(name))


def check_no_text(value: Any, key: str) -> None:
    """Refuse a number that YAML 1.1 reads as text, such as ``1e-3``."""
    if not isinstance(value, str) or not any(character.isdigit() for character in value):
        return
    try:
        number = float(value)
    except ValueError:
        return
    raise ConfigError(f"found '{value}', which YAML reads as text; write {number!r}", key)


# models and their checkpoints


def check_model(block: Block) -> None:
    """A model that torchdistill, torchvision or this package builds."""
    key, kwargs = block.get("key"), block.get("kwargs")
    official = vars(torchvision.models.quantization if block.get("quantized") else torchvision.models)
    if kwargs is not None:
        section(block, "kwargs", "options of the model")
    if key is None:
        raise ConfigError(f"is missing; write the name of a model. {nearest(key, MODEL_DICT)}", "key")
    if block.get("repo_or_dir") is not None or callable(official.get(key)):
        return
    if key not in MODEL_DICT:
        close = difflib.get_close_matches(str(key), (name for name in official if callable(official[name])), n=5)
        raise ConfigError(
            f"found {key!r}, which is neither registered nor one of torchvision.models; "
            f"{nearest(key, {*MODEL_DICT, *close})}",
            "key",
        )
    check_kwargs(MODEL_DICT[key], kwargs or {}, str(key))


def check_destination(student: Block) -> None:
    """Where the best student goes; the run's records go into a directory of that name without its extension."""
    path = student.get("dst_ckpt")
    if not isinstance(path, str) or not Path(path).suffix:
        found = "is missing" if path is None else f"found {path!r}"
        raise ConfigError(f"{found}; write a file with an extension, such as './ckpt/student.pt'", "dst_ckpt")


def check_source(block: Block, written: list[str] | None = None) -> None:
    """A checkpoint to start from exists, unless this very training writes it."""
    source = block.get("src_ckpt")
    if source is None or source in (written or []) or str(source).startswith(("https://", "http://")):
        return
    if not Path(source).exists():
        raise ConfigError(
            f"found '{source}', which does not exist; train that model first, or leave the entry empty to start from "
            "untrained weights",
            "src_ckpt",
        )


def check_tested(student: Block) -> None:
    """There are weights to test: with no file, torchdistill measures an untrained network."""
    if Path(student["dst_ckpt"]).exists():
        return
    check_source(student)
    kwargs = student.get("kwargs") or {}
    if not (student.get("src_ckpt") or kwargs.get("weights") or kwargs.get("pretrained")):
        raise ConfigError(f"found '{student['dst_ckpt']}', which does not exist; train first", "dst_ckpt")


def check_start(start_epoch: int, student: Block, train: Block) -> None:
    """The epoch that training starts at exists, and has a checkpoint to go on from."""
    total = sum(stage["num_epochs"] for _, stage in stages(train))
    if not 0 <= start_epoch < total:
        raise ConfigError(f"found {start_epoch}; training has the epochs 0 to {total - 1}", "--start_epoch")
    source = student.get("src_ckpt")
    if start_epoch and not (source and Path(source).exists()):
        raise ConfigError(
            f"found {start_epoch}, with src_ckpt {source!r} of the student; give it the checkpoint to go on from, such "
            f"as '{student['dst_ckpt']}'",
            "--start_epoch",
        )


# training


def check_training(train: Block, datasets: Block, has_teacher: bool, binds_by_itself: bool) -> None:
    """Every stage; what a later stage leaves out, torchdistill keeps from the one before."""
    if "log_freq" in train:
        with inside("train"):
            positive_integer(train, "log_freq")
    # torchdistill writes these between stages
    written = [train[name].get("dst_ckpt") for name in ("teacher", "student", "model") if train.get(name)]
    for number, (path, stage) in enumerate(stages(train)):
        with inside(path):
            check_stage(stage, datasets, has_teacher, is_first=number == 0, written=written if number else [])
            check_bound(stage, binds_by_itself)


def check_robust_validation(train: Block, test_id: str, datasets: Block, has_teacher: bool) -> None:
    """The options of robust validation in every stage, and that it selects on no image of the test set.

    That it selects on images that are trained on is logged.
    """
    val_path, val_id, train_id = "", None, ""
    for path, stage in stages(train):
        if stage.get("train_data_loader"):
            train_id = stage["train_data_loader"]["dataset_id"]
        if stage.get("val_data_loader"):
            val_path, val_id = f"{path}.val_data_loader.dataset_id", stage["val_data_loader"]["dataset_id"]
        process = stage.get("post_epoch_process")
        if process is None and stage.get(BLOCK):
            raise ConfigError(f"is missing beside {BLOCK}; write '{PROCESS}'", f"{path}.post_epoch_process")
        if process != PROCESS:
            continue
        with inside(path):
            if RobustValidation.build(stage.get(BLOCK), has_teacher) is None:
                continue
            if val_id is None:
                raise ConfigError(
                    f"is missing; '{PROCESS}' measures held-out training images: write dataset_id, sampler and kwargs, "
                    f"or {BLOCK}: {{}} to turn it off",
                    "val_data_loader",
                )
        with inside(val_path):
            if val_id == test_id:
                raise ConfigError(f"found '{val_id}', the test set; nothing may be selected on it")
            check_held_out(datasets[val_id], datasets[test_id])
        common = num_common_images(datasets[val_id], datasets[train_id])
        if common:
            text = "%s: %d images are trained on, and robust accuracy on those is not that on others; hold some out"
            logger.warning(text, val_path, common)


def check_stage(stage: Block, datasets: Block, has_teacher: bool, is_first: bool, written: list[str]) -> None:
    """One stage: epochs, data loaders, processes, models, loss, optimizer and scheduler."""
    positive_integer(stage, "num_epochs")
    for name in ("train_data_loader", "val_data_loader"):
        if stage.get(name) or (is_first and name == "train_data_loader"):
            check_loader(stage, name, datasets)
    for name, registry in STAGE_PROCESSES.items():
        if name in stage:
            known(stage, name, registry, name)
    for name in ("teacher", "student") if has_teacher else ("model",):
        side = section(stage, name, "forward_proc, requires_grad ...")
        with inside(name):
            known(side, "forward_proc", processes.FORWARD_PROC_FUNC_DICT, "forward process")
            known_if_given(side, "auxiliary_model_wrapper", AUXILIARY_MODEL_WRAPPER_DICT, "auxiliary model wrapper")
            check_source(side, written)
    check_criterion(
        section(stage, "criterion", "key and kwargs of a high-level loss"), has_teacher, stage["num_epochs"]
    )
    if stage.get("optimizer") or is_first:
        check_stepper(stage, "optimizer", OPTIM_DICT, Optimizer)
    if stage.get("scheduler"):
        check_stepper(stage, "scheduler", SCHEDULER_DICT, LRScheduler)


def check_loader(block: Block, name: str, datasets: Block) -> None:
    """A data loader: its data set, sampler, and what else is registered by name."""
    loader = section(block, name, "dataset_id, sampler and kwargs")
    with inside(name):
        known(loader, "dataset_id", datasets, "data set")
        section(loader, "kwargs", "batch_size, num_workers ...")
        make_sampler = section(loader, "sampler", "class_or_func").get("class_or_func")
        if not callable(make_sampler):
            raise ConfigError(
                f"found {make_sampler!r}; write a class, such as !import_get {{key: 'torch.utils.data.RandomSampler'}}",
                "sampler.class_or_func",
            )
        if loader.get("collate_fn") is not None:
            known(loader, "collate_fn", COLLATE_FUNC_DICT, "collate function")
        known_if_given(loader, "dataset_wrapper", DATASET_WRAPPER_DICT, "dataset wrapper")
        known_if_given(loader, "batch_sampler", BATCH_SAMPLER_DICT, "batch sampler")


def check_stepper(stage: Block, name: str, registry: Mapping[str, Any], kind: type) -> None:
    """An optimizer or a scheduler."""
    block = section(stage, name, "key and kwargs")
    # torchdistill collects every class of PyTorch's modules
    usable = {key: entry for key, entry in registry.items() if not isinstance(entry, type) or issubclass(entry, kind)}
    with inside(name):
        check_kwargs(known(block, "key", usable, name), block.get("kwargs"), block["key"], given=1)


def check_criterion(criterion: Block, has_teacher: bool, num_epochs: int) -> None:
    """The high-level loss and its terms, for a stage of so many epochs."""
    with inside("criterion"):
        known(criterion, "key", HIGH_LEVEL_LOSS_DICT, "high-level loss")
        if criterion.get("func2extract_model_loss") is not None:
            known(criterion, "func2extract_model_loss", FUNC2EXTRACT_MODEL_OUTPUT_DICT, "function")
        with inside("kwargs"):
            kwargs = section(criterion, "kwargs", "sub_terms") if criterion.get("kwargs") else {}
            if criterion["key"] == "WeightedSumLoss" and not kwargs.get("model_term"):
                section(kwargs, "sub_terms", "the terms of the loss by name")
        for name, term in sub_terms(criterion).items():
            with inside(f"kwargs.sub_terms.{name}"):
                check_term(term, has_teacher, num_epochs)


def sub_terms(criterion: Block) -> Block:
    """The terms of a high-level loss, by name."""
    return (criterion.get("kwargs") or {}).get("sub_terms") or {}


def check_term(term: Any, has_teacher: bool, num_epochs: int) -> None:
    """A loss of torchdistill or PyTorch, its wrapper and its weight."""
    if not isinstance(term, Mapping):
        raise ConfigError(f"found {term!r}; write criterion, weight and, around a low-level loss, criterion_wrapper")
    if term.get("weight") is None:
        raise ConfigError("is missing; write a number", "weight")
    check_no_text(term["weight"], "weight")
    if isinstance(term.get("criterion"), nn.Module):
        return
    criterion = section(term, "criterion", "key and kwargs of a loss")
    with inside("criterion"):
        loss = known(criterion, "key", _losses(), "loss")
        check_loss(loss, criterion, has_teacher, num_epochs)
    is_wrapped = False
    for path, wrapper in _wrappers(term):
        with inside(path):
            wraps = known(wrapper, "key", LOSS_WRAPPER_DICT, "loss wrapper")
            check_loss(wraps, wrapper, has_teacher, num_epochs, nn.Identity())
            is_wrapped |= not _is_adversarial(wraps)
    if criterion["key"] not in MIDDLE_LEVEL_LOSS_DICT and not is_wrapped:
        path = ".kwargs.".join(["criterion_wrapper"] * (1 + len(_wrappers(term))))
        raise ConfigError(f"is missing; {criterion['key']} is a low-level loss and needs a 'SimpleLossWrapper'", path)


def check_loss(make: Callable[..., Any], block: Block, has_teacher: bool, num_epochs: int, *given: nn.Module) -> None:
    """The options of a loss or a wrapper; those of an adversarial one are checked as binding checks them.

    ``given`` stands for the loss that a wrapper is around.
    """
    options = block.get("kwargs") if block.get("kwargs") is not None or not given else {}
    if _is_adversarial(make) and isinstance(options, Mapping):
        term: AdversarialTerm = make(*given, **options)
        term.resolve("kwargs")
        with inside("kwargs"):
            term.check_teacher(has_teacher)
            term.check_epochs(num_epochs)
    else:
        check_kwargs(make, options, block["key"], len(given))


def check_bound(stage: Block, binds_by_itself: bool) -> None:
    """Adversarial terms need the line that binds them."""
    terms = sub_terms(stage["criterion"])
    names = [name for name, term in terms.items() if any(map(_is_adversarial, _makers(term)))]
    if names and not binds_by_itself and stage.get("pre_epoch_process") in UNBOUND_PROCESSES:
        raise ConfigError(
            f"found {stage.get('pre_epoch_process')!r} in a stage with adversarial terms ({', '.join(names)}); write "
            "pre_epoch_process: 'bind_adversarial_losses', or the dependency {name: 'torchdistill_adv.autobind'}",
            "pre_epoch_process",
        )


def _losses() -> dict[str, Any]:
    # torchdistill collects every class of PyTorch's module of losses
    low_level = {name: loss for name, loss in LOSS_DICT.items() if name.endswith("Loss") and not name.startswith("_")}
    return {**low_level, **LOW_LEVEL_LOSS_DICT, **MIDDLE_LEVEL_LOSS_DICT}


def _wrappers(term: Block) -> list[tuple[str, Block]]:
    """Path and block of the wrappers around a loss, from the outermost to the innermost."""
    found, path = [], "criterion_wrapper"
    wrapper = term.get("criterion_wrapper")
    while isinstance(wrapper, Mapping) and wrapper:
        found.append((path, wrapper))
        wrapper, path = (wrapper.get("kwargs") or {}).get("criterion_wrapper"), f"{path}.kwargs.criterion_wrapper"
    return found


def _makers(term: Block) -> Iterator[Any]:
    """The loss of a checked term and its wrappers, as registered; a loss that is built already, as it is."""
    criterion = term["criterion"]
    yield criterion if isinstance(criterion, nn.Module) else _losses()[criterion["key"]]
    yield from (LOSS_WRAPPER_DICT[wrapper["key"]] for _, wrapper in _wrappers(term))


def _is_adversarial(loss: Any) -> bool:
    return isinstance(loss, AdversarialTerm) or (isinstance(loss, type) and issubclass(loss, AdversarialTerm))
