"""Any torchdistill loss, evaluated on adversarial examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import (
    LOSS_DICT,
    LOSS_WRAPPER_DICT,
    LOW_LEVEL_LOSS_DICT,
    get_loss_wrapper,
    register_loss_wrapper,
)

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import choice
from torchdistill_adv.errors import ConfigError, inside, nearest
from torchdistill_adv.half import in_full_precision
from torchdistill_adv.losses.base import AdversarialTerm, Cost, Search
from torchdistill_adv.registry import split_spec
from torchdistill_adv.sources import AllViews

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_loss_wrapper
class OnAdversarialExamples(AdversarialTerm):
    r"""A loss wrapper: any low- or mid-level loss of torchdistill on adversarial examples, its hooks included.

    .. math:: \frac{1}{K} \sum_{k=1}^{K} L\big(h_S(x^k), h_T(x^k), y\big)

    where :math:`h_S, h_T` are whatever outputs and hooked features the wrapped loss reads, gathered exactly as
    torchdistill's box gathers them on clean images (forward process, hooks, auxiliary modules). Each of the K examples
    of an image comes in a batch of its own, in the order of the clean batch, as some losses compare the images of a
    batch. Ours: no paper has it.

    A low-level loss (``CrossEntropyLoss``, ``MSELoss``) needs torchdistill's ``SimpleLossWrapper``, which then stands
    inside this one: ``kwargs: {..., criterion_wrapper: {key: 'SimpleLossWrapper', kwargs: {...}}}``.

    The options of every loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`; adversary, threat and
    objective have no default.

    Args:
        mid_level_loss: the wrapped loss, given by torchdistill.
        student_on: ``adversarial`` or ``clean`` images for the student's side.
        teacher_on: ``adversarial`` or ``clean`` images for the teacher's side. Both clean is refused.
        criterion_wrapper: another loss wrapper, around the loss and inside this one.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'KDLoss'
              kwargs: {student_module_path: '.', student_module_io: 'output', teacher_module_path: '.',
                       teacher_module_io: 'output', temperature: 4.0, alpha: 0.0, reduction: 'batchmean'}
            criterion_wrapper:
              key: 'OnAdversarialExamples'
              kwargs:
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255}}
                objective: 'kl_teacher_student'
                threat: {norm: 'linf', eps: 8/255, mean: [0.507, 0.487, 0.441], std: [0.268, 0.257, 0.276]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {"student_bn": "batch"}

    def __init__(self, mid_level_loss: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.wrapped = mid_level_loss

    def configure(
        self, student_on: str = "adversarial", teacher_on: str = "adversarial", criterion_wrapper: Any = None
    ) -> None:
        sides = ("clean", "adversarial")
        self.student_on = choice(student_on, "student_on", sides)
        self.teacher_on = choice(teacher_on, "teacher_on", sides)
        if self.student_on == self.teacher_on == "clean":
            raise ConfigError(
                "found 'clean' on both sides; write 'adversarial' for one, or drop the wrapper", "student_on"
            )
        if isinstance(self.wrapped, AdversarialTerm):
            raise ConfigError(f"stands around {type(self.wrapped).__name__}, which finds its own examples; drop it")
        self.criterion = self.wrapped if criterion_wrapper is None else self._wrap(criterion_wrapper)
        low_level = {**LOSS_DICT, **LOW_LEVEL_LOSS_DICT}.values()
        if self.criterion is self.wrapped and type(self.wrapped) in low_level:
            raise ConfigError(
                f"is missing; {type(self.wrapped).__name__} is a low-level loss and needs a 'SimpleLossWrapper' here",
                "criterion_wrapper",
            )

    def _wrap(self, spec: Any) -> nn.Module:
        with inside("criterion_wrapper"):
            key, kwargs = split_spec(spec, "loss wrapper")
            if key not in LOSS_WRAPPER_DICT:
                raise ConfigError(f"found {key!r}; {nearest(key, LOSS_WRAPPER_DICT)}", "key")
            try:
                return get_loss_wrapper(self.wrapped, {"key": key, "kwargs": kwargs})
            except (KeyError, TypeError) as error:
                raise ConfigError(f"{key} cannot be built with these: {error!r}", "kwargs") from error

    def plan(self) -> tuple[Search, ...]:
        return (self.make_search(AllViews()),)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        groups = step.examples(self.search).rows.split(len(step.all_images))
        values = []
        for rows in groups:
            if self.student_on == "adversarial":
                student_io_dict = step.collect_student(rows, self.student_bn)
            if self.teacher_on == "adversarial" and step.binding.teacher is not None:
                teacher_io_dict = step.collect_teacher(rows)
            io_dicts = student_io_dict, teacher_io_dict
            values.append(in_full_precision(rows.device.type, self.criterion, *io_dicts, targets))
        return torch.stack(values).mean()

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        rows = self.search.num_rows(images, num_views)
        student = rows if self.student_on == "adversarial" else 0
        return {self.path: Cost(rows if self.teacher_on == "adversarial" else 0, 0, student, student)}
