"""How adversarial terms get to see the images and the networks of a torchdistill box.

:func:`bind_adversarial_losses` is a ``pre_epoch_process``. It finds the adversarial terms of the box's criterion and
sets an instance attribute ``box.forward_process``, which records the batch, calls the class's own method, and forgets
everything of the step when that ends.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torchdistill.core.interfaces.pre_epoch_proc import (
    default_pre_epoch_process_with_teacher,
    default_pre_epoch_process_without_teacher,
)
from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func
from torchdistill.core.training import TrainingBox

from torchdistill_adv.boxes import Box, IODict, sides, stage_path
from torchdistill_adv.errors import ConfigError, NonFiniteError, inside
from torchdistill_adv.guards import own_random_stream, restored_hooks
from torchdistill_adv.losses.base import AdversarialTerm, Cost, Search
from torchdistill_adv.noise import Noise, derive_seed
from torchdistill_adv.step import Step

logger = logging.getLogger(__name__)

BINDING = "adversarial_binding"


def find_terms(box: Box) -> list[tuple[str, AdversarialTerm, float]]:
    """YAML path of the options, term and weight of every adversarial term of the box's criterion."""
    root = f"{stage_path(box)}.criterion.kwargs.sub_terms"
    found = []
    for name, (criterion, weight) in getattr(box.criterion, "term_dict", {}).items():
        for term in criterion.modules():
            if isinstance(term, AdversarialTerm):
                block = "criterion_wrapper" if hasattr(term, "wrapped") else "criterion"
                found.append((f"{root}.{name}.{block}.kwargs", term, weight))
    return found


def _rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


class Binding:
    """The adversarial terms of one stage of one box."""

    def __init__(self, box: Box) -> None:
        self._box = weakref.ref(box)
        self.criterion = box.criterion
        self.student, self.teacher = sides(box)
        self.device = box.device
        self.epoch = 0
        self.step_number = 0
        self.seed = torch.initial_seed()
        self.step: Step | None = None
        self.num_classes = 0
        self.reuses_teacher_logits: bool | None = None
        self._teacher_was_training: list[nn.Module] = []
        self.terms: list[AdversarialTerm] = []
        for path, term, weight in find_terms(box):
            term.resolve(path)
            term.evaluated = weight != 0
            term.binding = self
            self.terms.append(term)
        self._check_needs()
        self.log(box)

    @property
    def evaluated(self) -> list[AdversarialTerm]:
        """The terms whose weight is not 0."""
        return [term for term in self.terms if term.evaluated]

    @property
    def teacher_mode(self) -> str:
        return self.terms[0].teacher_mode

    def _check_needs(self) -> None:
        for term in self.terms:
            with inside(term.path):
                term.check_teacher(self.teacher is not None)
                if term.teacher_mode != self.teacher_mode:
                    raise ConfigError(
                        f"found '{term.teacher_mode}', but {self.terms[0].path} has '{self.teacher_mode}'; the terms "
                        "of one stage share the teacher, so write the same for all",
                        "teacher_mode",
                    )

    def log(self, box: Box) -> None:
        """Say what was bound, what a step costs, and the radius in pixels."""
        images = getattr(box.train_data_loader, "batch_size", None) or 1
        total, searches = Cost(), set()
        for term in self.terms:
            if not term.evaluated:
                logger.info("%s: %s has weight 0 and is not evaluated", term.path, type(term).__name__)
                continue
            search = term.search
            logger.info(
                "%s: bound %s, student_bn=%s; search: %s on %s; %s",
                *(term.path, type(term).__name__, term.student_bn, search.adversary, search.objective.key),
                search.threat.describe(),
            )
            total = total.plus(term.outer_cost(images))
            if search not in searches:
                total = total.plus(search.cost(images))
            searches.add(search)
        if searches:
            logger.info("adversarial cost of a step, in passes of a batch of %d: %s", images, total.describe(images))

    def set_teacher_mode(self) -> None:
        """Put the teacher's network in eval mode, which torchdistill never does, unless it is to be kept."""
        if self.teacher is None or self.teacher_mode == "keep":
            return
        training = [m for m in self.teacher.network.modules() if m.training]
        if training:
            logger.info("teacher: its network is put in eval mode (teacher_mode: keep leaves it in train mode)")
            self._teacher_was_training = training
            self.teacher.network.eval()

    def is_current(self, box: Box) -> bool:
        """Whether the box still has the criterion and the models that were bound."""
        if self.criterion is not box.criterion:
            return False
        student, teacher = sides(box)
        return student == self.student and teacher == self.teacher

    def release(self) -> None:
        """Let the box go: its own method again, the teacher's modes as they were found."""
        box = self._box()
        if box is not None and box.__dict__.get(BINDING) is self:
            for name in (BINDING, "forward_process"):
                box.__dict__.pop(name, None)
        for module in self._teacher_was_training:
            module.training = True
        for term in self.terms:
            term.binding = None

    def forward_process(self, sample_batch: Any, targets: Any = None, supp_dict: Any = None, **kwargs: Any) -> Tensor:
        """The box's ``forward_process``, with the step known to the terms while it runs."""
        box = self._box()
        assert box is not None
        if not self.is_current(box):
            # the stage changed without binding: its own terms, if any, say that they are unbound
            self.release()
            return box.forward_process(sample_batch, targets, supp_dict, **kwargs)
        if self.evaluated:
            self.step = Step(self, sample_batch, targets, supp_dict)
        try:
            return type(box).forward_process(box, sample_batch, targets, supp_dict, **kwargs)
        finally:
            self.step = None
            self.step_number += 1

    def evaluate(self, term: AdversarialTerm, student: IODict, teacher: IODict, targets: Any) -> Tensor:
        """The value of ``term`` in the current step."""
        if not term.evaluated:
            return torch.zeros((), device=self.device)
        if self.step is None:
            raise RuntimeError(f"{term.path}: an adversarial term can be evaluated only inside box.forward_process")
        step = self.step
        step.student_io_dict, step.teacher_io_dict = student, teacher
        step.search_all()
        with self.no_trace(term.path):
            value = term.loss(step, student, teacher, targets)
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{term.path}: the loss is {value.tolist()} at {self.when()}; {step.statistics(term)}")
        return value

    def when(self) -> str:
        return f"epoch {self.epoch}, step {self.step_number}"

    def no_trace(self, purpose: object) -> ExitStack:
        """Hook dictionaries and random streams come out as they went in; the streams start from ``purpose``."""
        stack = ExitStack()
        sides = [side.io_dict for side in (self.student, self.teacher) if side is not None]
        stack.enter_context(restored_hooks(*sides))
        stack.enter_context(own_random_stream(self.seed_for(purpose), self.device))
        return stack

    def seed_for(self, purpose: object) -> int:
        return derive_seed(self.seed, _rank(), self.epoch, self.step_number, purpose)

    def noise_for(self, search: Search, like: Tensor) -> Noise:
        """The random numbers of a search: equal settings have equal noise, whatever other terms there are."""
        return Noise(self.seed_for(search.identity), like.device, like.dtype)


def bind(box: Box, epoch: int | None = None) -> Binding | None:
    """Bind the adversarial terms of the box's present stage; None, and the box let go, where there are none.

    Raises:
        ConfigError: a wrong option, with its YAML path.
    """
    binding: Binding | None = box.__dict__.get(BINDING)
    if binding is not None and not binding.is_current(box):
        binding.release()
        binding = None
    if binding is None:
        if not find_terms(box):
            return None
        binding = Binding(box)
        box.__dict__[BINDING] = binding
        box.__dict__["forward_process"] = binding.forward_process
    elif epoch is None:
        epoch = binding.epoch + 1
    binding.epoch = epoch or 0
    binding.step_number = 0
    binding.set_teacher_mode()
    return binding


@register_pre_epoch_proc_func
def bind_adversarial_losses(self: Box, epoch: int | None = None, **kwargs: Any) -> None:
    """torchdistill's default pre-epoch process, then the binding of the adversarial terms.

    Example:
        .. code-block:: yaml

            train:
              pre_epoch_process: 'bind_adversarial_losses'
    """
    default = (
        default_pre_epoch_process_without_teacher
        if isinstance(self, TrainingBox)
        else default_pre_epoch_process_with_teacher
    )
    default(self, epoch=epoch, **kwargs)
    bind(self, epoch)
