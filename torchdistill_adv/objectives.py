r"""What a search maximises.

An objective is a function of a :class:`View` (the clean images of the search and the networks) that returns
``objective(rows, index) -> (R,)``: ``rows`` (R, ...) are candidate examples in model-input space, ``index`` (R,) says
which clean image each belongs to. Values are per row, so chunks and particles do not mix.

To add one, decorate a function with :func:`register_objective`; its further parameters are its YAML options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchdistill_adv.attribution import Layout, class_activation_maps, feature_maps, layout_of, map_distance
from torchdistill_adv.checks import choice, integer, number
from torchdistill_adv.divergences import cross_entropy, kl_divergence, margin, mixed_target, softmax_mse, wide
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.noise import Noise
from torchdistill_adv.registry import Registry, check_options, split_spec
from torchdistill_adv.twins import Twin

Network = Callable[[Tensor], Tensor]
MapsOf = Callable[[nn.Module, Layout, Tensor, Tensor], tuple[Tensor, Tensor]]
BoundObjective = Callable[[Tensor, Tensor], Tensor]
Who = Literal["student", "teacher"]


@dataclass
class View:
    """What an objective may look at.

    Args:
        images: clean images, (N, ...).
        labels: their classes, (N,), or None.
        student: rows to logits, in the mode of the search.
        teacher: rows to logits, or None where there is no teacher.
        noise: random numbers of this search.
        known_teacher_logits: the teacher's logits on ``images``, (N, C), where they are at hand already.
        last_logits: where :meth:`keep` puts them.
    """

    images: Tensor
    labels: Tensor | None
    student: Network
    teacher: Network | None
    noise: Noise
    known_teacher_logits: Tensor | None = None
    last_logits: dict[Who, Tensor] = field(default_factory=dict)

    def network(self, who: Who) -> Network:
        network = self.student if who == "student" else self.teacher
        assert network is not None, "binding refuses objectives that need a teacher where there is none"
        return network

    def module(self, who: Who) -> nn.Module:
        """The network itself, for objectives that look inside, and :meth:`keep` its logits."""
        network = inspect.unwrap(self.network(who))
        assert isinstance(network, nn.Module)
        return network

    def layout(self, who: Who, path: str | None) -> Layout:
        """Where the maps of a network are, found in full precision; ``path`` names the module, if the YAML does."""
        network: Any = inspect.unwrap(self.network(who), stop=lambda found: isinstance(found, Twin))
        return layout_of(network.network if isinstance(network, Twin) else network, self.images, path, f"{who}_module")

    def keep(self, who: Who, logits: Tensor) -> Tensor:
        """``logits`` (R, C) themselves; those of the last call are kept, for a search that asks for predictions."""
        self.last_logits[who] = logits.detach()
        return logits

    def keeping(self, networks: tuple[Who, ...]) -> View:
        """The same view, but that the logits of every call of ``networks`` are kept."""

        def kept(who: Who) -> Network:
            network = self.network(who)
            # module finds what is wrapped
            return wraps(network, assigned=(), updated=())(lambda rows: self.keep(who, network(rows)))

        changes: dict[str, Any] = {who: kept(who) for who in networks}
        return replace(self, **changes)

    @cached_property
    def student_clean(self) -> Tensor:
        """The student's logits on the clean images, (N, C), without a graph."""
        with torch.no_grad():
            return self.student(self.images)

    @cached_property
    def teacher_clean(self) -> Tensor:
        """The teacher's logits on the clean images, (N, C), without a graph."""
        if self.known_teacher_logits is not None:
            return self.known_teacher_logits.detach()
        with torch.no_grad():
            return self.network("teacher")(self.images)

    def clean(self, who: Who) -> Tensor:
        return self.student_clean if who == "student" else self.teacher_clean


@dataclass(frozen=True)
class WatchedObjective:
    """An objective that also tells which classes the attacked networks predicted in its last call.

    Args:
        function: the objective.
        view: that of the objective, which keeps the logits of the attacked networks.
        attacks: which these are.
    """

    function: BoundObjective
    view: View
    attacks: tuple[Who, ...]

    def __call__(self, rows: Tensor, index: Tensor) -> Tensor:
        self.view.last_logits.clear()
        return self.function(rows, index)

    def predictions(self) -> Tensor:
        """The class that each of the A attacked networks gave each row of the last call, (R, A).

        Raises:
            ConfigError: the objective looks inside a network, and does not :meth:`~View.keep` its logits.
        """
        logits = self.view.last_logits
        for who in self.attacks:
            if who not in logits:
                raise ConfigError(
                    f"does not tell what the {who} predicts, which the search needs; write early_stop: 'stalled' or "
                    "'never'",
                    "objective",
                )
        return torch.stack([logits[who].argmax(1) for who in self.attacks], 1)


@dataclass(frozen=True)
class Entry:
    """A registered objective and what it asks of the networks."""

    function: Callable[..., BoundObjective]
    attacks: tuple[Who, ...]
    clean: tuple[Who, ...]
    labels: bool
    has_boundary: bool
    compares_itself: bool
    options: Mapping[str, Callable[[Any], Any]]


OBJECTIVES: Registry[Entry] = Registry("objective")


def register_objective(
    *,
    attacks: tuple[Who, ...],
    clean: tuple[Who, ...] = (),
    labels: bool = False,
    has_boundary: bool = False,
    compares_itself: bool = False,
    options: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
    key: str | None = None,
) -> Callable[[Callable[..., BoundObjective]], Callable[..., BoundObjective]]:
    """Register an objective.

    Args:
        attacks: networks that see the candidate rows, and that the gradient flows through.
        clean: networks whose clean logits are needed.
        labels: whether class labels are needed.
        has_boundary: whether it is negative until a decision boundary is crossed, and has no gradient beyond.
        compares_itself: whether it compares a network's predictions near an image with those on it, so that half
            precision would round away what its gradient depends on.
        options: for YAML options that need it, a check that returns the value, or raises a ConfigError.
        key: YAML key, the function's name unless given.

    Raises:
        ValueError: the key is taken.
    """

    def register(function: Callable[..., BoundObjective]) -> Callable[..., BoundObjective]:
        entry = Entry(function, attacks, clean, labels, has_boundary, compares_itself, options)
        OBJECTIVES.add(key or function.__name__, entry)
        return function

    return register


@dataclass(frozen=True)
class Objective:
    """An objective with its options, as a YAML block names it; equal blocks are equal objects."""

    key: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def build(cls, spec: Any) -> Objective:
        """The objective of a YAML block: a key, or ``{key: ..., kwargs: {...}}``.

        Raises:
            ConfigError: unknown key or option.
        """
        if isinstance(spec, cls):
            return spec
        key, kwargs = split_spec(spec, "objective")
        entry = OBJECTIVES[key]
        with inside("kwargs"):
            check_options(entry.function, kwargs, f"objective {key}", skip=1)
            kwargs = {name: entry.options.get(name, lambda v: v)(value) for name, value in kwargs.items()}
        # an option that is left out is equal to its default
        parameters = list(inspect.signature(entry.function).parameters.values())[1:]
        kwargs = {p.name: p.default for p in parameters if p.default is not p.empty} | kwargs
        options = ((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(kwargs.items()))
        return cls(key, tuple(options))

    @property
    def entry(self) -> Entry:
        return OBJECTIVES[self.key]

    @property
    def needs_labels(self) -> bool:
        return self.entry.labels and not self.is_targeted

    @property
    def needs(self) -> frozenset[str]:
        """Every network that the objective calls."""
        return frozenset(self.entry.attacks + self.entry.clean)

    @property
    def clean(self) -> frozenset[str]:
        """Networks whose clean logits it needs."""
        chosen = dict(self.options).get("target_class")
        return frozenset(self.entry.clean) | (frozenset(self.entry.attacks) if isinstance(chosen, str) else frozenset())

    @property
    def is_targeted(self) -> bool:
        """Whether it is small where a chosen class is predicted, so that the search must descend."""
        return dict(self.options).get("target_class") is not None

    def bind(self, view: View) -> WatchedObjective:
        attacks = self.entry.attacks
        view = view.keeping(attacks)
        return WatchedObjective(self.entry.function(view, **dict(self.options)), view, attacks)


def target_class(value: Any) -> str | int | None:
    """A chosen class: ``runner_up``, ``random`` or a class number; None for the labels."""
    if value is None:
        return None
    if isinstance(value, str) and not value.isdigit():
        return choice(value, "target_class", ("runner_up", "random"))
    return integer(value, "target_class", minimum=0)


def _targets(view: View, who: Who, chosen: str | int | None) -> Tensor:
    """Classes (N,) that a cross-entropy is taken against."""
    if chosen is None:
        assert view.labels is not None, "binding refuses objectives that need labels where there are none"
        return view.labels
    if isinstance(chosen, int):
        return torch.full((len(view.images),), chosen, dtype=torch.long, device=view.images.device)
    logits = view.clean(who)
    top = logits.topk(2, dim=1).indices
    if chosen == "runner_up":
        return top[:, 1]
    # uniform over the classes other than the predicted one
    num_classes = logits.shape[1]
    shift = 1 + ((view.noise.uniform((len(logits),)) + 1) / 2 * (num_classes - 1)).long().clamp_max(num_classes - 2)
    return (top[:, 0] + shift) % num_classes


def _cross_entropy(view: View, who: Who, chosen: str | int | None) -> BoundObjective:
    targets = _targets(view, who, chosen)
    network = view.network(who)

    def objective(rows: Tensor, index: Tensor) -> Tensor:
        logits = network(rows)
        if isinstance(chosen, int) and chosen >= logits.shape[1]:
            raise ConfigError(f"found {chosen}; the network has classes 0 to {logits.shape[1] - 1}", "target_class")
        return cross_entropy(logits, targets[index])

    return objective


@register_objective(attacks=("student",), labels=True, options={"target_class": target_class})
def ce_student(view: View, target_class: str | int | None = None) -> BoundObjective:
    """CE(S(x'), y): what PGD-AT and ARD attack. With ``target_class``, the class to descend toward."""
    return _cross_entropy(view, "student", target_class)


@register_objective(attacks=("student",), labels=True)
def margin_student(view: View) -> BoundObjective:
    """max over j != y of z_j(x') less z_y(x'), the student's logits: positive where the class is wrong (CW)."""
    assert view.labels is not None, "binding refuses objectives that need labels where there are none"
    labels = view.labels
    return lambda rows, index: margin(view.student(rows), labels[index])


@register_objective(attacks=("teacher",), labels=True, options={"target_class": target_class})
def ce_teacher(view: View, target_class: str | int | None = None) -> BoundObjective:
    """CE(T(x'), y). With ``target_class``, the class to descend toward."""
    return _cross_entropy(view, "teacher", target_class)


@register_objective(
    attacks=("student",),
    clean=("teacher",),
    labels=True,
    options={"teacher_share": partial(number, name="teacher_share", minimum=0, maximum=1)},
)
def ce_student_mixed(view: View, teacher_share: float = 0.5) -> BoundObjective:
    """CE(S(x'), (1 - a) onehot(y) + a p_T(x)), with ``teacher_share`` a in [0, 1] (AKD, our reading)."""
    assert view.labels is not None, "binding refuses objectives that need labels where there are none"
    target = mixed_target(view.labels, view.teacher_clean, teacher_share)
    return lambda rows, index: cross_entropy(view.student(rows), target[index])


@register_objective(attacks=("student",), clean=("teacher",))
def kl_clean_teacher_student(view: View) -> BoundObjective:
    """KL(T(x) || S(x')): the student is driven from the teacher's clean prediction (RSLAD)."""
    reference = view.teacher_clean
    return lambda rows, index: kl_divergence(reference[index], view.student(rows))


@register_objective(attacks=("student",), clean=("student",), compares_itself=True)
def kl_clean_student_student(view: View) -> BoundObjective:
    """KL(S(x) || S(x')): the student is driven from its own clean prediction (TRADES)."""
    reference = view.student_clean
    return lambda rows, index: kl_divergence(reference[index], view.student(rows))


@register_objective(attacks=("teacher", "student"))
def kl_teacher_student(view: View) -> BoundObjective:
    """KL(T(x') || S(x')), with the gradient through both networks (AdaAD)."""
    teacher = view.network("teacher")
    return lambda rows, index: kl_divergence(teacher(rows), view.student(rows))


def boundary_gap(network: Network, base: Tensor, target: Tensor) -> BoundObjective:
    """z_k(x') - z_b(x'), the logit of each image's class k less that of its class b, both (N,), of any network.

    The value is 0, without a gradient, once b is no longer predicted.
    """

    def objective(rows: Tensor, index: Tensor) -> Tensor:
        logits = wide(network(rows))
        gap = logits.gather(1, target[index, None]) - logits.gather(1, base[index, None])
        return torch.where(logits.argmax(1) == base[index], gap[:, 0], 0)

    return objective


@register_objective(
    attacks=("teacher",),
    clean=("teacher",),
    has_boundary=True,
    options={"toward": partial(choice, name="toward", known=("sampled", "runner_up"))},
)
def gap_teacher(view: View, toward: str = "sampled") -> BoundObjective:
    """z_k(x') - z_b(x'), the teacher's logit of a class k less that of the class b it predicts for x (BSS).

    The value is 0, without a gradient, once b is no longer predicted. ``toward`` chooses k among the other classes:
    ``sampled`` by the teacher's probabilities for x, or its ``runner_up``.
    """
    base = view.teacher_clean.argmax(1)
    others = wide(view.teacher_clean).scatter(1, base[:, None], -torch.inf)
    target = others.argmax(1)
    if toward == "sampled":
        cumulated = others.softmax(1).cumsum(1)
        drawn = (view.noise.uniform((len(base), 1)) + 1) / 2 * cumulated[:, -1:]
        target = (cumulated > drawn).int().argmax(1)
    return boundary_gap(view.network("teacher"), base, target)


@register_objective(attacks=("teacher",), clean=("teacher",), compares_itself=True)
def kl_teacher_clean_teacher(view: View) -> BoundObjective:
    """KL(T(x') || T(x)): the teacher's prediction changes most (TALD, Eq. 1)."""
    reference, teacher = view.teacher_clean, view.network("teacher")
    return lambda rows, index: kl_divergence(teacher(rows), reference[index])


def _aligned(view: View, maps: MapsOf, weight: float, modules: Mapping[Who, str | None]) -> BoundObjective:
    """KL(T(x') || S(x')) + weight * distance of the maps that ``maps`` gives."""
    layouts = {who: view.layout(who, path) for who, path in modules.items()}

    def objective(rows: Tensor, index: Tensor) -> Tensor:
        logits, found = zip(*(maps(view.module(who), layouts[who], rows, index) for who in layouts), strict=True)
        logits = tuple(view.keep(who, of) for who, of in zip(layouts, logits, strict=True))
        return kl_divergence(*logits) + weight * map_distance(found[1], found[0])

    return objective


ALIGNMENT_OPTIONS = {"alignment_weight": partial(number, name="alignment_weight", minimum=0)}


@register_objective(attacks=("teacher", "student"), labels=True, options=ALIGNMENT_OPTIONS)
def kl_cam_teacher_student(
    view: View, alignment_weight: float = 1.0, student_module: str | None = None, teacher_module: str | None = None
) -> BoundObjective:
    """KL(T(x') || S(x')) + a MSE(CAM of S, CAM of T) for the class y, through both networks (SmaraAD).

    ``student_module`` and ``teacher_module`` are the modules with the feature map, found where they are not given.
    """
    assert view.labels is not None, "binding refuses objectives that need labels where there are none"
    labels = view.labels
    return _aligned(
        view,
        lambda network, layout, rows, index: class_activation_maps(network, layout, rows, labels[index]),
        alignment_weight,
        {"teacher": teacher_module, "student": student_module},
    )


@register_objective(attacks=("teacher", "student"), options=ALIGNMENT_OPTIONS)
def kl_features_teacher_student(
    view: View, alignment_weight: float = 1.0, student_module: str | None = None, teacher_module: str | None = None
) -> BoundObjective:
    """KL(T(x') || S(x')) + a MSE(features of S, features of T), each averaged over squared channels.

    ``student_module`` and ``teacher_module`` are the modules with the feature map, found where they are not given.
    """
    return _aligned(
        view,
        lambda network, layout, rows, index: feature_maps(network, layout, rows),
        alignment_weight,
        {"teacher": teacher_module, "student": student_module},
    )


@register_objective(attacks=("teacher",), clean=("teacher",), compares_itself=True)
def mse_teacher_clean_teacher(view: View) -> BoundObjective:
    """MSE(softmax T(x'), softmax T(x)): what TALD's published code maximises in place of the KL."""
    reference, teacher = view.teacher_clean, view.network("teacher")
    return lambda rows, index: softmax_mse(teacher(rows), reference[index])
