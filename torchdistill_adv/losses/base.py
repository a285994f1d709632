"""What every adversarial loss has in common: options resolved at binding, a search, and a cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from torchdistill_adv.adversaries.common import Adversary
from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import choice, flag, integer
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.objectives import Objective
from torchdistill_adv.registry import build_adversary, check_options
from torchdistill_adv.threat import ThreatModel

if TYPE_CHECKING:
    from torchdistill_adv.binding import Binding
    from torchdistill_adv.step import Step

STUDENT_BN = ("train", "batch", "eval")

UNBOUND = (
    "is not bound to a box, so it cannot see the images and the networks. Write pre_epoch_process: "
    "'bind_adversarial_losses' into this training stage, or the dependency {name: 'torchdistill_adv.autobind'}. "
    "(Building a second box in one process resets the first one's pre_epoch_process: train the first one before. A "
    "high-level loss of your own must keep its terms in term_dict, or as submodules.)"
)


class Cost(NamedTuple):
    """Passes of each network in one step, in images."""

    teacher_forward: float = 0
    teacher_backward: float = 0
    student_forward: float = 0
    student_backward: float = 0

    def plus(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def describe(self, images: float) -> str:
        """In units of ``images``, so passes of a whole batch read as 1."""
        t, tb, s, sb = (f"{value / images:.3g}" for value in self)
        return f"teacher {t} forward + {tb} backward, student {s} forward + {sb} backward"


@dataclasses.dataclass(frozen=True)
class Search:
    """Which examples a term wants; terms that want equal ones share them.

    Args:
        adversary: how to search.
        threat: within which bounds.
        objective: for what.
        num_images: only the first so many images of the batch; None is all.
        all_views: search on every view of a multi-view batch (SSKD's rotations), not on the labelled one alone.
        owner: path of the term that keeps its search to itself, or empty.
    """

    adversary: Adversary
    threat: ThreatModel
    objective: Objective
    num_images: int | None = None
    all_views: bool = False
    owner: str = ""

    @property
    def chunk_size(self) -> int | None:
        """Rows through a network at once, where chunks change nothing."""
        return getattr(self.adversary, "chunk_size", None)

    @property
    def identity(self) -> str:
        """What the random numbers depend on: the settings, but for how many rows are computed at once."""
        adversary: Any = self.adversary
        if not dataclasses.is_dataclass(adversary):
            adversary = type(adversary).__qualname__
        elif self.chunk_size is not None:
            adversary = dataclasses.replace(adversary, chunk_size=None)  # type: ignore[type-var]
        return repr((adversary, self.threat, self.objective, self.num_images, self.all_views, self.owner))

    def cost(self, images: int) -> Cost:
        """Cost for a batch of ``images``; the teacher's clean logits come from the host's own pass."""
        images = images if self.num_images is None else min(self.num_images, images)
        rows = images * self.adversary.num_rows * self.adversary.num_gradients
        teacher, student = (rows if who in self.objective.entry.attacks else 0 for who in ("teacher", "student"))
        return Cost(teacher, teacher, student + (images if "student" in self.objective.clean else 0), student)


class AdversarialTerm(nn.Module):
    """Base of the losses that see adversarial examples.

    A subclass writes ``configure``, whose parameters are the YAML options and which sets :attr:`search`; :meth:`loss`;
    and :meth:`outer_cost`.
    Options are only stored when torchdistill builds the loss, and checked at binding, which knows the YAML path.
    """

    configure: Callable[..., None]
    search: Search
    teacher_mode = "eval"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.path = type(self).__name__
        self.binding: Binding | None = None
        self.evaluated = True

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits are used."""
        return "teacher" in self.search.objective.needs

    @property
    def needs_labels(self) -> bool:
        """Whether class labels are used."""
        return self.search.objective.needs_labels

    @property
    def compares_predictions(self) -> bool:
        """Whether teacher and student must have the same classes."""
        return len(self.search.objective.needs) == 2

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        """The term's value, a scalar with a graph to the student."""
        raise NotImplementedError

    def outer_cost(self, images: int) -> Cost:
        """Passes beyond the search, for a batch of ``images``."""
        raise NotImplementedError

    def resolve(self, path: str) -> None:
        """Check and apply the options.

        Raises:
            ConfigError: with the YAML path of what is wrong.
        """
        self.path = path
        with inside(path):
            check_options(self.configure, self.options, type(self).__name__)
            self.configure(**self.options)

    def check_teacher(self, has_teacher: bool) -> None:
        """Refuse training without a teacher where one is needed.

        Raises:
            ConfigError: below the term's own path.
        """
        if has_teacher:
            return
        if "teacher" in self.search.objective.needs:
            raise ConfigError(
                f"found '{self.search.objective.key}', which needs a teacher, in training without one; add "
                "models.teacher_model, or choose an objective of the student alone, such as 'ce_student'",
                "objective",
            )
        if self.needs_teacher:
            raise ConfigError("needs a teacher, in training without one; add models.teacher_model")

    def make_search(
        self,
        adversary: Any,
        threat: Any,
        objective: Any,
        num_images: int | None = None,
        all_views: bool = False,
        share: bool = True,
    ) -> Search:
        """The search of this term from its YAML blocks."""
        with inside("adversary"):
            built = build_adversary(adversary)
        with inside("threat"):
            threat = ThreatModel.build(threat)
        with inside("objective"):
            objective = Objective.build(objective)
        if objective.is_targeted and not built.targeted:
            raise ConfigError(
                "found an adversary that ascends, with an objective that has a target_class; write targeted: true",
                "adversary.kwargs.targeted",
            )
        if built.targeted and not objective.is_targeted:
            raise ConfigError(
                f"found a targeted adversary, with objective {objective.key} without a target class; write objective: "
                "{key: 'ce_student', kwargs: {target_class: 'runner_up'}} or another one with a target_class",
                "objective",
            )
        if self.teacher_mode == "keep" and getattr(built, "chunk_size", None) is not None:
            raise ConfigError(
                "splits batches that a teacher in train mode normalises as a whole; write teacher_mode: 'eval', or "
                "leave it out",
                "adversary.kwargs.chunk_size",
            )
        owner = "" if flag(share, "share") else self.path
        if num_images is not None:
            num_images = integer(num_images, "num_attacked", minimum=1)
        return Search(built, threat, objective, num_images, all_views, owner)

    def set_modes(self, student_bn: str, teacher_mode: str) -> None:
        """Check and keep the two mode options that all terms have."""
        self.student_bn = choice(student_bn, "student_bn", STUDENT_BN)
        self.teacher_mode = choice(teacher_mode, "teacher_mode", ("eval", "keep"))

    def forward(
        self, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.binding is None:
            raise ConfigError(UNBOUND, self.path)
        return self.binding.evaluate(self, student_io_dict, teacher_io_dict, targets)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the loss alone is unbound."""
        return {**self.__dict__, "binding": None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
