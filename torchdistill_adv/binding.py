"""How adversarial terms get to see the images and the networks of a torchdistill box.

:func:`bind_adversarial_losses` is a ``pre_epoch_process``. It finds the adversarial terms of the box's criterion and
gives the box a ``forward_process`` of its own, which records the batch, calls the class's method, and forgets
everything of the step when that ends.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from types import MethodType
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
from torchdistill.losses.mid_level import SimpleLossWrapper

from torchdistill_adv.boxes import Box, IODict, sides, stage_epochs, stage_path
from torchdistill_adv.errors import ConfigError, NonFiniteError, inside
from torchdistill_adv.guards import own_random_stream, restored_hooks
from torchdistill_adv.losses.base import AdversarialTerm, Cost, Search
from torchdistill_adv.noise import Noise, derive_seed
from torchdistill_adv.statistics import Watch
from torchdistill_adv.step import Step
from torchdistill_adv.twins import Twins

logger = logging.getLogger(__name__)

BINDING = "adversarial_binding"


def find_terms(box: Box) -> list[tuple[str, AdversarialTerm, Any]]:
    """YAML path of the block, term and weight of every adversarial term of the box's criterion.

    Raises:
        ConfigError: a wrapper around a term that finds its own examples, or one object in two places.
    """
    found = list(_walk(box.criterion, f"{stage_path(box)}.criterion", 1.0))
    terms = [term for _, term, _ in found]
    for path, term, _ in found:
        if terms.count(term) > 1:
            raise ConfigError("is one object in two places; build one loss for each", path)
    return found


def _walk(criterion: nn.Module, path: str, weight: Any) -> Iterator[tuple[str, AdversarialTerm, Any]]:
    if isinstance(criterion, AdversarialTerm):
        # torchdistill's name for the block that has the term's options
        yield f"{path}_wrapper" if hasattr(criterion, "wrapped") else path, criterion, weight
        return
    inner = [m for m in criterion.modules() if isinstance(m, AdversarialTerm)]
    if isinstance(criterion, SimpleLossWrapper) and inner:
        wrapper = type(criterion).__name__
        raise ConfigError(f"found '{wrapper}' around {type(inner[0]).__name__}; drop it", f"{path}_wrapper")
    for term in inner:
        yield path, term, weight
    for holder in criterion.modules():
        for name, (sub_criterion, factor) in getattr(holder, "term_dict", {}).items():
            yield from _walk(sub_criterion, f"{path}.kwargs.sub_terms.{name}.criterion", factor)


def host_losses(criterion: nn.Module) -> Iterator[nn.Module]:
    """The losses in ``criterion`` that only read what networks returned: torchdistill's and the user's own."""
    terms = getattr(criterion, "term_dict", None)
    if terms is not None:
        for term, _ in terms.values():
            yield from host_losses(term)
    elif not any(isinstance(module, AdversarialTerm) for module in criterion.modules()):
        yield criterion


def _rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


class Binding:
    """The adversarial terms of one stage of one box."""

    def __init__(self, box: Box) -> None:
        self.criterion = box.criterion
        self.stage = stage_path(box)
        self.student, self.teacher = sides(box)
        self.device = box.device
        self.epoch = 0
        self.step_number = 0
        self.epochs = range(0)
        self.seed = torch.initial_seed()
        self.step: Step | None = None
        self.watch: Watch | None = None
        self.num_classes = 0
        self.reuses_teacher_logits: bool | None = None
        self.twins = Twins()
        self._teacher_was_training: list[nn.Module] = []
        self.terms: list[AdversarialTerm] = []
        for path, term, _ in find_terms(box):
            term.resolve(f"{path}.kwargs")
            self.terms.append(term)
        self._join_paths()
        self.read_weights(box)
        self.log(box)

    def _join_paths(self) -> None:
        """Let searches that differ only in whether they keep their path be one, which keeps it."""
        searches = [search for term in self.terms for search in term.searches]
        with_path = {search.without_path: search for search in searches if search.without_path is not search}
        for term in self.terms:
            term.searches = tuple(with_path.get(search, search) for search in term.searches)

    def read_weights(self, box: Box) -> None:
        """Which terms count at present: a schedule may change a weight between epochs."""
        for path, term, weight in find_terms(box):
            valid = isinstance(weight, (int, float, Tensor)) and math.isfinite(float(weight))
            if not valid or isinstance(weight, bool):
                parent = path.rpartition(".criterion")[0]
                raise ConfigError(f"found {weight!r}; write a finite number, such as 0.01", f"{parent}.weight")
            term.evaluated = bool(weight != 0)
            term.binding = self
        self._check_needs()

    @property
    def evaluated(self) -> list[AdversarialTerm]:
        """The terms whose weight is not 0."""
        return [term for term in self.terms if term.evaluated]

    def is_due(self, term: AdversarialTerm) -> bool:
        """Whether ``term`` is evaluated in this step: its steps begin elsewhere in each epoch, alike on all ranks."""
        return (self.step_number + derive_seed(self.epoch, term.path)) % term.every == 0

    @property
    def teacher_mode(self) -> str:
        return self.evaluated[0].teacher_mode if self.evaluated else "keep"

    def search_names(self) -> dict[Search, str]:
        """A name for each search: the sub-term's in the YAML, with ``.2`` for its second search, and so on.

        One that several terms share has the name of the first.
        """
        names: dict[Search, str] = {}
        counts: Counter[str] = Counter()
        for term in self.evaluated:
            name = ".".join(re.findall(r"sub_terms\.(.+?)\.criterion", term.path)) or type(term).__name__
            for search in term.searches:
                counts[name] += 1
                names.setdefault(search, name if counts[name] == 1 else f"{name}.{counts[name]}")
        return names

    def _check_needs(self) -> None:
        sparse = [term for term in self.evaluated if term.every > 1]
        if sparse and sparse == self.evaluated and not any(host_losses(self.criterion)):
            raise ConfigError(
                f"found {sparse[0].every}, but no other loss trains in the steps between; write 1, or add one",
                f"{sparse[0].path}.every",
            )
        for term in self.evaluated:
            with inside(term.path):
                term.check_teacher(self.teacher is not None)
                if term.teacher_mode != self.teacher_mode:
                    raise ConfigError(
                        f"found '{term.teacher_mode}', but {self.evaluated[0].path} has '{self.teacher_mode}'; the "
                        "terms of one stage share the teacher, so write the same for all",
                        "teacher_mode",
                    )

    def begin_epoch(self, box: Box, epoch: int) -> None:
        """Count from the first step of ``epoch``, which counts over all stages."""
        self.epoch, self.step_number = epoch, 0
        self.epochs = stage_epochs(box)
        if self.epochs:
            for term in self.evaluated:
                with inside(term.path):
                    term.check_epochs(len(self.epochs))
        self.set_teacher_mode()

    def log(self, box: Box) -> None:
        """Say what was bound, what a step costs, and the radius in pixels."""
        images = getattr(box.train_data_loader, "batch_size", None) or 1
        for term in self.terms:
            if not term.evaluated:
                logger.info("%s: %s has weight 0 and is not evaluated", term.path, type(term).__name__)
                continue
            for search in term.searches:
                logger.info(
                    "%s: bound %s, student_bn=%s; search: %s on %s; %s",
                    *(term.path, type(term).__name__, term.student_bn, search.adversary, search.objective.key),
                    search.threat.describe(),
                )
        if self.evaluated:
            cost = self.cost(images).describe(images)
            logger.info("adversarial cost of a step, in passes of a batch of %d: %s", images, cost)

    def cost(self, images: int) -> Cost:
        """Passes of both networks beyond the host's own, in the mean over the steps, for a batch of ``images``.

        Equal ones count once.
        """
        views = self.student.num_views
        passes: dict[object, Cost] = {}
        # what terms share is made as often as the most frequent of them needs it
        for term in sorted(self.evaluated, key=lambda term: -term.every):
            own = {search: search.cost(images, views) for search in term.searches} | term.outer_cost(images, views)
            passes |= {key: cost.times(1 / term.every) for key, cost in own.items()}
        total = functools.reduce(Cost.plus, passes.values(), Cost())
        return total._replace(teacher_forward=0, teacher_backward=0) if self.teacher is None else total

    def set_teacher_mode(self) -> None:
        """Put the teacher's network in eval mode, which torchdistill never does, unless it is to be kept."""
        if self.teacher is None or self.teacher_mode == "keep" or not self.teacher.in_train_mode:
            return
        students = set(self.student.network.modules())
        training = [m for m in self.teacher.network.modules() if m.training and m not in students]
        if training and not self._teacher_was_training:
            logger.info("teacher: its network is put in eval mode (teacher_mode: keep leaves it in train mode)")
            if any(m in students for m in self.teacher.network.modules()):
                logger.warning("teacher: what it shares with the student stays in the student's mode")
        for module in training:
            module.training = False
        self._teacher_was_training += [m for m in training if m not in self._teacher_was_training]

    def is_current(self, box: Box) -> bool:
        """Whether the box still has the criterion and the models that were bound."""
        if self.criterion is not box.criterion:
            return False
        student, teacher = sides(box)
        return student == self.student and teacher == self.teacher

    def release(self, box: Box) -> None:
        """Let the box go: its own method again, the teacher's modes as they were found."""
        for name in (BINDING, "forward_process"):
            box.__dict__.pop(name, None)
        for module in self._teacher_was_training:
            module.training = True
        for term in self.terms:
            term.binding = None

    def forward_process(self, box: Box, sample_batch: Any, targets: Any, supp_dict: Any, **kwargs: Any) -> Tensor:
        """The box's own ``forward_process``, with the step known to the terms while it runs."""
        for term in self.terms:
            term.binding = self
        self.set_teacher_mode()
        if self.evaluated:
            self.step = Step(self, sample_batch, targets, supp_dict, kwargs)
        try:
            if self.step is not None:
                self.step.listen()
            return type(box).forward_process(box, sample_batch, targets, supp_dict, **kwargs)
        finally:
            if self.step is not None:
                self.step.host_hooks.close()
            self.step = None
            self.step_number += 1

    def evaluate(self, term: AdversarialTerm, student: IODict, teacher: IODict, targets: Any) -> Tensor:
        """The value of ``term`` in the current step."""
        if not term.evaluated or not self.is_due(term):
            return torch.zeros((), device=self.device)
        if self.step is None:
            raise RuntimeError(f"{term.path}: an adversarial term can be evaluated only inside box.forward_process")
        step = self.step
        step.student_io_dict, step.teacher_io_dict = student, teacher
        step.search_all()
        with self.no_trace(term.path), inside(term.path):
            value = term.every * term.loss(step, student, teacher, targets)
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


def _forward_process(box: Box, sample_batch: Any, targets: Any = None, supp_dict: Any = None, **kwargs: Any) -> Tensor:
    """Stands before the class's ``forward_process`` in a bound box."""
    binding: Binding = box.__dict__[BINDING]
    if binding.is_current(box):
        return binding.forward_process(box, sample_batch, targets, supp_dict, **kwargs)
    # the stage changed without binding: its own terms, if any, say that they are unbound
    binding.release(box)
    return box.forward_process(sample_batch, targets, supp_dict, **kwargs)


def bind(box: Box, epoch: int | None = None) -> Binding | None:
    """Bind the adversarial terms of the box's present stage; None, and the box let go, where there are none.

    Call it once an epoch: it also reads the terms' weights again. A box that is copied takes its binding along.

    Raises:
        ConfigError: a wrong option, with its YAML path.
    """
    binding: Binding | None = box.__dict__.get(BINDING)
    if binding is not None and not binding.is_current(box):
        binding.release(box)
        binding = None
    if binding is None:
        if not find_terms(box):
            return None
        binding = Binding(box)
        box.__dict__[BINDING] = binding
        # a method of this very box: copies of the box get one of their own
        box.__dict__["forward_process"] = MethodType(_forward_process, box)
    else:
        binding.read_weights(box)
        if epoch is None:
            epoch = binding.epoch + 1
    binding.begin_epoch(box, epoch or 0)
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
