"""What every adversarial loss has in common: options resolved at binding, searches, and a cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from torchdistill_adv.adversaries.common import Adversary
from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import choice, flag, integer
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.objectives import Objective
from torchdistill_adv.registry import build_adversary, check_options
from torchdistill_adv.sources import Images, Source
from torchdistill_adv.threat import ThreatModel
from torchdistill_adv.twins import SearchPasses

if TYPE_CHECKING:
    from torchdistill_adv.binding import Binding
    from torchdistill_adv.step import Step

STUDENT_BN = ("train", "batch", "eval")

# what the robust-distillation papers share; some of them start from uniform noise
PGD_10: Mapping[str, Any] = {"key": "PGD", "kwargs": {"num_steps": 10, "step_size": "2/255", "start": "gaussian"}}
LINF_8 = {"norm": "linf", "eps": "8/255", "space": "pixel"}
GAUSSIAN_START: Mapping[str, Any] = {"adversary": PGD_10, "threat": LINF_8}
UNIFORM_START: Mapping[str, Any] = {
    "adversary": {**PGD_10, "kwargs": {**PGD_10["kwargs"], "start": "uniform"}},
    "threat": LINF_8,
}

# the options of every term; one without a default here or in the term's class must be in the YAML
COMMON: Mapping[str, Any] = {
    "adversary": None,
    "threat": None,
    "objective": None,
    "student_bn": "train",
    "search_bn": "eval",
    "teacher_mode": "eval",
    "share": True,
    "search": SearchPasses(),
    "every": 1,
}

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

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * value for value in self))

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
        source: from which images.
        student_bn: the student's normalisation during the search, as ``search_bn`` of a term.
        owner: path of the term that keeps its search to itself, or empty.
        passes: in what arithmetic and layout.
    """

    adversary: Adversary
    threat: ThreatModel
    objective: Objective
    source: Source = dataclasses.field(default_factory=Images)
    student_bn: str = "eval"
    owner: str = ""
    passes: SearchPasses = dataclasses.field(default_factory=SearchPasses)

    @property
    def needs_labels(self) -> bool:
        return self.objective.needs_labels and not self.source.label_free

    @property
    def needs(self) -> frozenset[str]:
        """Every network that it calls."""
        return self.objective.needs | (frozenset({"teacher"}) if self.source.label_free else frozenset())

    @property
    def chunk_size(self) -> int | None:
        """Rows through a network at once, where chunks change nothing."""
        return getattr(self.adversary, "chunk_size", None)

    @property
    def identity(self) -> str:
        """What the random numbers depend on: the settings, but for what computes the same, or less of it."""
        adversary: Any = self.adversary
        if not dataclasses.is_dataclass(adversary):
            adversary = type(adversary).__qualname__
        else:
            spared = {"chunk_size": None, "return_path": False, "early_stop": "never", "first_num_steps": None}
            fields = {field.name for field in dataclasses.fields(adversary)}
            adversary = dataclasses.replace(
                adversary,  # type: ignore[type-var]
                **{name: value for name, value in spared.items() if name in fields},
            )
        return repr((adversary, self.threat, self.objective, self.source, self.student_bn, self.owner))

    @property
    def without_path(self) -> Search:
        """The same search, which keeps its result only."""
        adversary: Any = self.adversary
        if not getattr(adversary, "return_path", False):
            return self
        return dataclasses.replace(self, adversary=dataclasses.replace(adversary, return_path=False))

    def adversary_at(self, progress: float) -> Adversary:
        """The adversary when this share of the stage's epochs is over: its schedule, if it has one."""
        at: Callable[[float], Adversary] | None = getattr(self.adversary, "at", None)
        return self.adversary if at is None else at(progress)

    def num_rows(self, images: int, num_views: int = 1) -> int:
        """Examples for a batch of ``images``."""
        return self.source.size(images, num_views) * self.adversary.num_rows

    def cost(self, images: int, num_views: int = 1) -> Cost:
        """Cost for a batch of ``images``; the teacher's clean logits come from the host's own pass."""
        rows = self.num_rows(images, num_views) * self.adversary.num_gradients
        teacher, student = (rows if who in self.objective.entry.attacks else 0 for who in ("teacher", "student"))
        clean = self.source.size(images, num_views) if "student" in self.objective.clean else 0
        return Cost(teacher, teacher, student + clean, student)


class AdversarialTerm(nn.Module):
    """Base of the losses that see adversarial examples.

    A subclass writes ``configure``, whose parameters are its own YAML options, and :meth:`loss`; it overrides
    :meth:`plan` where one search of the batch's images is not what it wants, and :meth:`outer_cost` where its passes
    are not one of the student on the examples, and one of the teacher if ``teacher_sees_examples``.
    Options are only stored when torchdistill builds the loss, and checked at binding, which knows the YAML path.

    Every term has these options too, with ``defaults`` of its class.

    Args:
        adversary: block of the search.
        threat: block of the threat model, :class:`~torchdistill_adv.threat.ThreatModel`; mean and std are those of the
            data's Normalize, ``[0]`` and ``[1]`` without one.
        objective: what the search maximises.
        student_bn: the student's normalisation when it is trained on the examples. ``train`` normalises them by their
            own statistics and moves the running ones; ``batch`` leaves the running ones alone; ``eval`` puts the
            student in eval mode, which uses the running ones and turns dropout off.
        search_bn: the same during the search: ``eval``, or ``batch`` or ``train`` for a student in train mode.
        teacher_mode: ``eval`` puts the teacher's network in eval mode; ``keep`` leaves it as torchdistill has it.
        share: whether an equal search of another term is shared.
        search: how the passes of the search are computed, :class:`~torchdistill_adv.twins.SearchPasses`.
        every: m: the term is evaluated in every m-th step only, with m times its value, so that its mean over the steps
            stays.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    # whether the loss itself compares the student with a teacher, whatever the search does
    distils: ClassVar[bool] = False
    teacher_sees_examples: ClassVar[bool] = False
    configure: Callable[..., None]

    adversary: Any
    threat: ThreatModel
    objective: Objective
    student_bn: str
    search_bn: str
    teacher_mode: str = "eval"
    share: bool
    search_passes: SearchPasses
    every: int
    searches: tuple[Search, ...]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.path = type(self).__name__
        self.binding: Binding | None = None
        self.evaluated = True

    @property
    def search(self) -> Search:
        """The only search, or the first one."""
        return self.searches[0]

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits are used."""
        return self.distils or any("teacher" in search.needs for search in self.searches)

    @property
    def needs_labels(self) -> bool:
        """Whether class labels are used."""
        return any(search.needs_labels for search in self.searches)

    @property
    def compares_predictions(self) -> bool:
        """Whether teacher and student must have the same classes."""
        searches = self.searches
        return self.distils or (self.needs_teacher and any("student" in search.needs for search in searches))

    @property
    def teacher_parts(self) -> Mapping[str, str]:
        """Submodules of the teacher that are called as teachers of their own, by the option that names each."""
        return {}

    def plan(self) -> tuple[Search, ...]:
        """The searches of this term."""
        return (self.make_search(),)

    def before_host(self, step: Step) -> None:
        """Called before the host's own passes of a step, which the term may hook through ``step``."""

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        """The term's value, a scalar with a graph to the student."""
        raise NotImplementedError

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        """Passes beyond the searches, for a batch of ``images``; what has the same key in two terms is one pass."""
        rows = self.search.num_rows(images, num_views)
        passes: dict[object, Cost] = {("student", self.search, self.student_bn): Cost(0, 0, rows, rows)}
        if self.teacher_sees_examples:
            passes["teacher", self.search] = Cost(rows)
        return passes

    def resolve(self, path: str) -> None:
        """Check and apply the options.

        Raises:
            ConfigError: with the YAML path of what is wrong.
        """
        self.path = path
        own = {name: value for name, value in self.options.items() if name not in COMMON}
        defaults = {name: self.defaults.get(name, default) for name, default in COMMON.items()}
        # an empty block of these two means what none means
        left_out = {name for name in ("search", "every") if self.options.get(name) is None}
        common = defaults | {
            name: self.options[name] for name in COMMON if name in self.options and name not in left_out
        }
        with inside(path):
            check_options(self.configure, own, type(self).__name__, also=list(COMMON))
            for name, value in common.items():
                if value is None:
                    raise ConfigError(f"is missing; {type(self).__name__} has no default for it", name)
            with inside("adversary"):
                self.adversary = build_adversary(common["adversary"])
            with inside("threat"):
                self.threat = ThreatModel.build(common["threat"])
            with inside("objective"):
                self.objective = Objective.build(common["objective"])
            self.student_bn = choice(common["student_bn"], "student_bn", STUDENT_BN)
            self.search_bn = choice(common["search_bn"], "search_bn", STUDENT_BN)
            self.teacher_mode = choice(common["teacher_mode"], "teacher_mode", ("eval", "keep"))
            self.share = flag(common["share"], "share")
            self.every = integer(common["every"], "every", minimum=1)
            with inside("search"):
                self.search_passes = SearchPasses.build(common["search"])
            self.configure(**own)
            self.searches = self.plan()

    def check_teacher(self, has_teacher: bool) -> None:
        """Refuse training without a teacher where one is needed.

        Raises:
            ConfigError: below the term's own path.
        """
        if has_teacher:
            return
        if self.distils:
            raise ConfigError("needs a teacher, in training without one; add models.teacher_model")
        for search in self.searches:
            if "teacher" in search.objective.needs:
                raise ConfigError(
                    f"found '{search.objective.key}', which needs a teacher, in training without one; add "
                    "models.teacher_model, or choose an objective of the student alone, such as 'ce_student'",
                    "objective",
                )

    def check_radius(self, adversary: Adversary) -> None:
        """Refuse an infinite radius where the search needs one.

        Raises:
            ConfigError: below the term's own path.
        """
        if math.isinf(self.threat.eps) and getattr(adversary, "needs_radius", True):
            raise ConfigError(
                f"found an infinite radius, which {adversary} cannot use; write a finite one", "threat.eps"
            )

    def check_epochs(self, num_epochs: int) -> None:
        """Refuse a schedule that does not fit into ``num_epochs``, those of the stage.

        Raises:
            ConfigError: below the term's own path.
        """

    def make_search(
        self, source: Source | None = None, adversary: Adversary | None = None, objective: Objective | None = None
    ) -> Search:
        """A search with the options of this term, but for what is given."""
        objective, adversary = objective or self.objective, adversary or self.adversary
        if objective.is_targeted and not adversary.targeted:
            raise ConfigError(
                "found an adversary that ascends, with an objective that has a target_class; write targeted: true, or "
                "another adversary",
                "adversary.kwargs.targeted",
            )
        if adversary.targeted and not objective.is_targeted:
            raise ConfigError(
                f"found a targeted adversary, with objective {objective.key} without a target class; write objective: "
                "{key: 'ce_student', kwargs: {target_class: 'runner_up'}} or another one with a target_class",
                "objective",
            )
        if getattr(adversary, "needs_boundary", False) and not objective.entry.has_boundary:
            raise ConfigError(
                f"found '{objective.key}', which has no boundary for {adversary} to cross; write 'gap_teacher', or "
                "another adversary",
                "objective",
            )
        self.check_radius(adversary)
        owner = "" if self.share else self.path
        search = Search(
            adversary, self.threat, objective, source or Images(), self.search_bn, owner, self.search_passes
        )
        if self.search_passes.compile is True and getattr(adversary, "early_stop", "never") != "never":
            raise ConfigError(
                "found true, with an early_stop: a graph would be compiled for every number of images that are left; "
                "drop one",
                "search.compile",
            )
        # what splits a batch, and what lets images leave it
        for option, default in (("chunk_size", None), ("early_stop", "never")):
            splits = getattr(adversary, option, default) != default
            as_a_whole = {"teacher": self.teacher_mode == "keep", "student": self.search_bn != "eval"}
            for who, setting in (("teacher", "teacher_mode"), ("student", "search_bn")):
                if splits and as_a_whole[who]:
                    raise ConfigError(
                        f"splits batches that a {who} in train mode normalises as a whole; write {setting}: 'eval', or "
                        "leave it out",
                        f"adversary.kwargs.{option}",
                    )
        return search

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
