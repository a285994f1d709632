"""Robust accuracy on held-out images while training, and the checkpoint that is best by it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchdistill.common.main_util import is_main_process, save_ckpt
from torchdistill.core.distillation import DistillationBox
from torchdistill.core.interfaces.post_epoch_proc import (
    default_post_epoch_process_with_teacher,
    default_post_epoch_process_without_teacher,
)
from torchdistill.core.interfaces.registry import register_post_epoch_proc_func
from torchdistill.core.training import TrainingBox

from torchdistill_adv.adversaries import PGD
from torchdistill_adv.boxes import Box, Side, sides, stage_epochs, stage_path
from torchdistill_adv.checkpoints import read_checkpoint
from torchdistill_adv.checks import check_logits, integer, put
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.guards import eval_mode, on_cloned_buffers, own_random_stream, restored_hooks, share_buffers
from torchdistill_adv.noise import ImageNoise, derive_seed
from torchdistill_adv.objectives import Network, Objective, View, Who
from torchdistill_adv.registry import build_adversary, check_options
from torchdistill_adv.threat import ThreatModel

logger = logging.getLogger(__name__)

PROCESS = "validate_robustly"
BLOCK = "robust_validation"


@dataclass(frozen=True)
class RobustValidation:
    r"""What is measured of the student after an epoch, and where the best student goes.

    .. math::
        \frac{100}{n} \sum_{i=1}^{n} \mathbb{1}\big[\arg\max S(x_i) = y_i \wedge \arg\max S(x'_i) = y_i\big]

    over n images of the stage's validation set, with :math:`x'_i` from the search. The images, and the random start of
    each, are the same in every epoch, whatever the batch size and the number of processes.

    Selecting by PGD-10 on about a thousand of 5,000 training images held out is our reading of what the papers should
    do: their code keeps the best epoch of the test set, or the last one.

    Args:
        threat: block of the threat model, :class:`~torchdistill_adv.threat.ThreatModel`; mean and std are those of the
            data's Normalize, ``[0]`` and ``[1]`` without one.
        ckpt: the student's ``dst_ckpt``, such as ``student.pt``. The best student goes to ``student-best_robust.pt``,
            that of the last epoch to ``student-last.pt``.
        every: epochs from one measurement to the next; the last epoch of a stage is measured too.
        num_images: how many validation images are drawn; all, where there are not so many.
        adversary: block of the search; PGD with 10 steps of a quarter of the radius from one uniform start.
        objective: what the search maximises.
        seed: of the images and the random starts.

    Raises:
        ConfigError: a wrong option, or a search that does not attack the student from its labels' class.

    Example:
        .. code-block:: yaml

            post_epoch_process: 'validate_robustly'
            robust_validation:
              every: 1
              num_images: 1000
              adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'uniform'}}
              objective: 'ce_student'
              threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
              ckpt: './resource/ckpt/student.pt'
              seed: 0
    """

    threat: ThreatModel
    ckpt: str
    every: int = 1
    num_images: int = 1000
    adversary: Any = None
    objective: Any = "ce_student"
    seed: int = 0

    def __post_init__(self) -> None:
        with inside("threat"):
            put(self, threat=ThreatModel.build(self.threat))
            quarter = self.threat.finite_eps / 4
        if not isinstance(self.ckpt, str) or not Path(self.ckpt).suffix:
            raise ConfigError(f"found {self.ckpt!r}; write the student's dst_ckpt, a file with an extension", "ckpt")
        with inside("adversary"):
            put(self, adversary=PGD(10, quarter) if self.adversary is None else build_adversary(self.adversary))
            if self.adversary.targeted or self.adversary.num_rows != 1:
                raise ConfigError(f"found {self.adversary}; write an untargeted search of one example an image")
        with inside("objective"):
            put(self, objective=Objective.build(self.objective))
            if self.objective.is_targeted or "student" not in self.objective.entry.attacks:
                raise ConfigError(f"found '{self.objective.key}'; write an untargeted one that attacks the student")
        put(
            self,
            every=integer(self.every, "every", minimum=1),
            num_images=integer(self.num_images, "num_images", minimum=1),
            seed=integer(self.seed, "seed", minimum=0),
        )

    @classmethod
    def build(cls, block: Any, has_teacher: bool) -> RobustValidation | None:
        """The settings of a YAML block; None for an empty one (``{}``), which turns the validation off.

        Raises:
            ConfigError: a wrong option, or an objective with a teacher where there is none.
        """
        if not isinstance(block, Mapping):
            found = "is missing" if block is None else f"found {block!r}"
            raise ConfigError(f"{found}; '{PROCESS}' needs {{threat: {{...}}, ckpt: ...}}, or {{}} for none", BLOCK)
        if not block:
            return None
        with inside(BLOCK):
            check_options(cls, block, BLOCK)
            settings = cls(**block)
            if "teacher" in settings.objective.needs and not has_teacher:
                raise ConfigError(
                    f"found '{settings.objective.key}', which needs a teacher, in training without one; write "
                    "'ce_student'",
                    "objective",
                )
        return settings

    def draw(self, count: int) -> list[int]:
        """Which of ``count`` validation images are measured, in their order."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return sorted(order[: self.num_images].tolist())

    def beside(self, name: str) -> str:
        """The file ``<ckpt>-<name>``, with the extension of ``ckpt``."""
        path = Path(self.ckpt)
        return str(path.with_name(f"{path.stem}-{name}{path.suffix}"))

    def describe(self) -> dict[str, Any]:
        """The attack, for the record of an epoch; ``eps`` is in the units of the threat model's space."""
        attack = f"{type(self.adversary).__name__}-{self.adversary.num_gradients} on {self.objective.key}"
        threat = self.threat
        return {"attack": attack, "norm": threat.norm, "eps": threat.eps, "threat": threat.describe()}


def count_right(
    settings: RobustValidation,
    student: Side,
    teacher: Side | None,
    loader: DataLoader[Any],
    ids: list[int],
    device: torch.device,
) -> Tensor:
    """How many images are classified rightly, how many still are after the search, and how many there are, (3,).

    Args:
        settings: the search.
        student: whose network is attacked, in eval mode.
        teacher: for objectives with one.
        loader: gives images in model-input space and labels.
        ids: the number of each of its images, which its random start depends on.
        device: where the networks are.

    Raises:
        ConfigError: images out of the threat model's range, or a network that returns no logits.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    networks: tuple[Network, Network | None] | None = None
    for images, labels, *_ in loader:
        images, labels = images.to(device), labels.to(device)
        with inside("threat"):
            settings.threat.check_inputs(images)
        right = _predicted(student, images) == labels
        noise = ImageNoise(derive_seed(settings.seed, "start"), ids[: len(images)], images)
        ids = ids[len(images) :]
        networks = networks or _networks(settings, student, teacher, images)
        view = View(images, labels, *networks, noise)
        # all of them, also those that are lost already: cuDNN tunes itself for every new size of a batch
        rows = settings.adversary(settings.objective.bind(view), images, settings.threat, noise).rows
        survived = right & (_predicted(student, rows) == labels)
        counts += torch.stack([right.sum(), survived.sum(), counts.new_tensor(len(images))])
    return counts


def _networks(
    settings: RobustValidation, student: Side, teacher: Side | None, images: Tensor
) -> tuple[Network, Network | None]:
    """Student and teacher as the search passes them: faster copies of those that it attacks."""
    from torchdistill_adv.evaluation.passes import twin_for_attacks

    def passed(who: Who, side: Side) -> Network:
        twin = twin_for_attacks(side.network, images) if who in settings.objective.entry.attacks else None
        return side.network if twin is None else twin

    return passed("student", student), None if teacher is None else passed("teacher", teacher)


@torch.no_grad()
def _predicted(student: Side, rows: Tensor) -> Tensor:
    return check_logits(student.network(rows), "student", "robust validation needs").argmax(1)


class Validator:
    """The robust validation of one stage of a box.

    Args:
        settings: what is measured.
        box: in its stage, with its data loaders.
        before: that of an earlier stage, whose best student this one goes on from.

    Attributes:
        latest: the record of the present epoch, None where it was not measured.

    Raises:
        ConfigError: no validation set, or one that is test data or no images.
    """

    def __init__(self, settings: RobustValidation, box: Box, before: Validator | None) -> None:
        self.settings = settings
        self.stage = stage_path(box)
        self.epoch = -1
        self.latest: dict[str, Any] | None = None
        self.best_clean: float | None = None if before is None else before.best_clean
        self.best_robust: float | None = None if before is None else before.best_robust
        # a box that goes on from a checkpoint has trained no epoch when it comes to its stage
        self.goes_on = getattr(box, "current_epoch", 0) == 0
        with inside(f"{self.stage}.val_data_loader"):
            if box.val_data_loader is None:
                raise ConfigError(
                    f"is missing; '{PROCESS}' measures held-out training images: write dataset_id, sampler and kwargs"
                )
            data = box.val_data_loader.dataset
            check_no_test_data(data)
            self.indices = settings.draw(len(data))
            if not self.indices:
                raise ConfigError("has no images")
            with own_random_stream(settings.seed, torch.device("cpu")):
                images, labels, *_ = box.val_data_loader.collate_fn([data[self.indices[0]]])
            if not isinstance(images, Tensor) or not images.is_floating_point():
                raise ConfigError(f"gives a {type(images).__name__}; robust validation perturbs a float tensor")
            if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (1,):
                raise ConfigError(f"gives labels {labels!r}; robust validation needs one class number an image")
        with inside(f"{self.stage}.{BLOCK}.threat"):
            settings.threat.check_inputs(images)

    def end_epoch(self, box: Box, metrics: Any) -> None:
        """Measure the student if it is time to, and save it as the last one and, where it is, as the best one."""
        settings = self.settings
        if self.goes_on and self.epoch > 0:
            self._recall()
        self.goes_on = False
        is_last = self.epoch == stage_epochs(box).stop - 1
        self.latest = self._measure(box) if (self.epoch + 1) % settings.every == 0 or is_last else None
        clean = metrics if isinstance(metrics, (int, float)) else (self.latest or {}).get("clean")
        if clean is not None:
            self.best_clean = clean if self.best_clean is None else max(clean, self.best_clean)
        robust = None if self.latest is None else self.latest["robust"]
        is_best = robust is not None and (self.best_robust is None or robust > self.best_robust)
        if is_best and self._save(box, "best_robust"):
            self.best_robust = robust
        self._save(box, "last")

    def _measure(self, box: Box) -> dict[str, Any]:
        settings, (student, teacher) = self.settings, sides(box)
        present = [side for side in (student, teacher) if side is not None]
        networks = [side.network for side in present]
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share, data = self.indices[rank::world_size], box.val_data_loader
        loader: DataLoader[Any] = DataLoader(
            Subset(data.dataset, share),
            batch_size=data.batch_size or 100,  # a loader with a batch sampler has none
            collate_fn=data.collate_fn,
            num_workers=data.num_workers,
            pin_memory=data.pin_memory,
        )
        with (
            restored_hooks(*(side.io_dict for side in present)),
            own_random_stream(settings.seed, box.device),
            eval_mode(*networks),
            on_cloned_buffers(*networks),
            inside(f"{self.stage}.{BLOCK}"),
        ):
            share_buffers(*networks)
            counts = count_right(settings, student, teacher, loader, share, box.device)
        if world_size > 1:
            dist.all_reduce(counts)
        right, survived, total = counts.tolist()
        record = {"clean": 100 * right / total, "robust": 100 * survived / total, "num_images": total}
        logger.info(
            "epoch %d: %d validation images: clean %.2f %%, robust %.2f %% (%s); best robust before: %s",
            *(self.epoch, total, record["clean"], record["robust"], settings.threat.describe()),
            "none" if self.best_robust is None else f"{self.best_robust:.2f} %",
        )
        return {**record, **settings.describe()}

    def _save(self, box: Box, name: str) -> bool:
        args = {"epoch": self.epoch, "stage": getattr(box, "stage_number", 1), BLOCK: self.latest}
        # torchdistill's runner and ours compare the clean accuracy with it when training goes on from this file
        best_value = self.best_clean or 0.0
        return save_student(box, sides(box)[0].network, best_value, args, self.settings.beside(name))

    def _recall(self) -> None:
        """The best values of the run that this one goes on from."""
        for name in ("best_robust", "last"):
            path = self.settings.beside(name)
            if not os.path.exists(path):
                continue
            saved = read_checkpoint(path)
            self.best_clean = saved["best_value"]
            measured = saved["args"][BLOCK] or {}
            if name == "best_robust" and self.settings.describe().items() <= measured.items():
                self.best_robust = measured["robust"]
                logger.info("best robust validation accuracy so far: %.2f %% (%s)", self.best_robust, path)


def save_student(box: Box, student: nn.Module, best_value: float, args: Mapping[str, Any], path: str) -> bool:
    """Save a student as torchdistill does, all of it or nothing.

    Returns:
        False where nothing could be written: that is logged, and training is not lost for it.
    """
    try:
        save_ckpt(student, box.optimizer, box.lr_scheduler, best_value, args, f"{path}.part")
        if is_main_process():
            os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer has the second
        logger.error("'%s' was not saved, and training goes on: %s", path, error)
        return False
    return True


def validator_of(box: Box) -> Validator | None:
    """The robust validation of the stage that ``box`` is in; None where there is none."""
    validator: Validator | None = box.__dict__.get(BLOCK)
    return validator if validator is not None and validator.stage == stage_path(box) else None


@register_post_epoch_proc_func
def validate_robustly(self: Box, metrics: Any = None, **kwargs: Any) -> None:
    """Measure robust accuracy on held-out images, keep the best and the last student; then torchdistill's default.

    The block ``robust_validation`` beside it has the options, which are those of :class:`RobustValidation`. Training is
    bit for bit the training without it. In the checkpoints, ``best_value`` is the best clean accuracy so far, so that
    either runner can go on from them, and ``args`` has epoch, stage and what was measured.

    Example:
        .. code-block:: yaml

            train:
              post_epoch_process: 'validate_robustly'
              robust_validation:
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
                ckpt: './resource/ckpt/student.pt'
    """
    validator = validator_of(self)
    if validator is not None:
        validator.end_epoch(self, metrics)
    is_training = isinstance(self, TrainingBox)
    default = default_post_epoch_process_without_teacher if is_training else default_post_epoch_process_with_teacher
    default(self, metrics=metrics, **kwargs)


def _pre_epoch_process(box: Box, epoch: int | None = None, **kwargs: Any) -> None:
    """Stands before the class's ``pre_epoch_process``: the only one that is told the epoch."""
    validator = validator_of(box)
    if validator is not None:
        validator.epoch, validator.latest = validator.epoch + 1 if epoch is None else epoch, None
        cls = TrainingBox if isinstance(box, TrainingBox) else DistillationBox
        if cls.post_epoch_process is not validate_robustly:
            raise ConfigError(
                f"is no longer '{PROCESS}': building a second box in one process resets that of the first one; train "
                "the first one before",
                f"{validator.stage}.post_epoch_process",
            )
    type(box).pre_epoch_process(box, epoch=epoch, **kwargs)


def _prepare(box: Box, train_config: Mapping[str, Any]) -> None:
    """Check the robust validation of a stage that a box enters, before its first step."""
    if train_config.get("post_epoch_process") != PROCESS:
        return
    path = stage_path(box)
    with inside(path):
        settings = RobustValidation.build(train_config.get(BLOCK), not isinstance(box, TrainingBox))
    if settings is None:
        logger.info("%s.%s is empty, so robust accuracy is not measured", path, BLOCK)
        return
    box.__dict__[BLOCK] = Validator(settings, box, box.__dict__.get(BLOCK))
    box.__dict__["pre_epoch_process"] = MethodType(_pre_epoch_process, box)


def _tell_of_stages(cls: type[Box]) -> None:
    # a box keeps no options of its stage, and this is the last that it calls when it enters one
    setup: Callable[..., None] = cls.setup_pre_post_processes

    @functools.wraps(setup)
    def setup_and_prepare(self: Box, train_config: Mapping[str, Any]) -> None:
        setup(self, train_config)
        _prepare(self, train_config)

    cls.setup_pre_post_processes = setup_and_prepare


for _box_class in (DistillationBox, TrainingBox):
    _tell_of_stages(_box_class)


# test data


def check_no_test_data(dataset: Any) -> None:
    """Refuse a data set that says itself that it is for testing: ``train`` is False, or ``split`` is ``test``.

    Raises:
        ConfigError: it is.
    """
    base, _ = _images_of(dataset)
    if getattr(base, "train", None) is False or getattr(base, "split", None) == "test":
        raise ConfigError(
            f"found test data ({type(base).__name__}), which nothing may be selected on; write held-out training "
            "images, such as a torch.utils.data.Subset of the training set"
        )


def check_held_out(validation: Any, test: Any) -> None:
    """Refuse validation images that are among those of the test set.

    Raises:
        ConfigError: they are.
    """
    check_no_test_data(validation)
    common = num_common_images(validation, test)
    if common:
        raise ConfigError(
            f"has {common} images of the test set, which nothing may be selected on; write held-out training images"
        )


def num_common_images(first: Any, second: Any) -> int:
    """How many images two data sets have in common, as far as they tell where theirs are from."""
    (base, some), (other_base, others) = _images_of(first), _images_of(second)
    return len(set(some) & set(others)) if _same_data(base, other_base) else 0


def _images_of(dataset: Any) -> tuple[Any, range | list[int]]:
    """The data set below every ``Subset`` and wrapper of one, and which of its images are meant."""
    if isinstance(dataset, Subset):
        base, indices = _images_of(dataset.dataset)
        return base, [indices[i] for i in dataset.indices]
    inner = getattr(dataset, "org_dataset", None)  # torchdistill's wrappers
    return (dataset, range(len(dataset))) if inner is None else _images_of(inner)


def _same_data(a: Any, b: Any) -> bool:
    """Whether both are one data set, or say that they have the same files."""
    if a is b:
        return True
    told = [{name: getattr(d, name, None) for name in ("root", "split", "train")} for d in (a, b)]
    return type(a) is type(b) and told[0] == told[1] and any(value is not None for value in told[0].values())
