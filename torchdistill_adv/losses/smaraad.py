"""Slack matching and attribution region alignment."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.attribution import (
    Layout,
    class_activation_maps,
    exact_maps,
    feature_maps,
    layout_of,
    map_distance,
    squared_maps,
)
from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import choice, flag, number, optional_integer
from torchdistill_adv.divergences import kl_divergence
from torchdistill_adv.guards import on_cloned_buffers
from torchdistill_adv.losses.base import UNIFORM_START, AdversarialTerm, Cost, Search
from torchdistill_adv.losses.iad import trust
from torchdistill_adv.objectives import Objective, Who
from torchdistill_adv.ranking import soft_spearman
from torchdistill_adv.sources import Images

if TYPE_CHECKING:
    from torchdistill_adv.step import Step

OBJECTIVES = {
    "attribution": "kl_cam_teacher_student",
    "feature": "kl_features_teacher_student",
    "none": "kl_teacher_student",
}


@register_mid_level_loss
class SmaraADLoss(AdversarialTerm):
    r"""SmaraAD: the student ranks the classes as the teacher does, and looks where the teacher looks.

    .. math::
        \ell = \frac{1}{N} \sum_i m(T(x'_i), S(x'_i)) + m(T(x_i), S(x_i)) + \alpha \big[d(x'_i) + d(x_i)\big]

    .. math::
        m(T, S) = c - \rho(S, T), \qquad
        d(x) = \frac{1}{h w} \|\mathrm{CAM}_S(x, y) - \mathrm{CAM}_T(x, y)\|^2

    .. math:: x'_i = \arg\max_{x' \in C_\epsilon(x_i)} KL(T(x') \| S(x')) + d(x')

    with the rank correlation :math:`\rho` of :func:`~torchdistill_adv.ranking.soft_spearman` and the
    class-activation maps (h, w) of unit norm of :mod:`torchdistill_adv.attribution`, for images (N, C, H, W) and logits
    (N, num_classes). The gradient of the search goes through both networks. SmaraAD++, with ``plus_plus``, trusts the
    teacher in part, with :math:`w_i = p_T(y_i | x'_i)^\beta`: the first term becomes
    :math:`w_i\, m(T(x'_i), S(x'_i)) + (1 - w_i)\, m(S(x_i), S(x'_i))`. The options of every loss are those of
    :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Logits and maps on the clean images are those of the host's own pass, in the mode that it has the student in, as in
    TRADES and RSLAD; ``student_bn`` is about the examples. Where that pass does not give them (Grad-CAM, a compiled
    network, a teacher in train mode, a forward process of the user's own), the clean images pass the network once more
    in that mode, which moves no running statistics and is not in the announced cost.

    Paper:
    `Adversarial Distillation Based on Slack Matching and Attribution Region Alignment <https://openaccess.thecvf.com/content/CVPR2024/html/Yin_Adversarial_Distillation_Based_on_Slack_Matching_and_Attribution_Region_Alignment_CVPR_2024_paper.html>`_
    (Yin et al., CVPR 2024).

    **The paper's**, from its supplement: the search with a uniform start, soft ranks, their correlation, alignment by
    mean squared error, a constant c and a weight alpha; feature alignment as the alternative (its Table 2). **The
    official code's** helper returns the correlation with the other sign, without a gradient, and ranks images instead
    of classes; nothing of it is followed. **Our reading**, as the equations of the two losses are not at hand: how the
    terms are put together, c = 1, alpha = 1, ranks of logits of unit deviation at a sharpness of 2, class, layer and
    norm of the maps, the weights of SmaraAD++ (those of IAD, whose self-target has a gradient too), 10 steps of 2/255.

    Args:
        matching: m: ``slack``, or ``kl`` for the divergence in its place.
        alignment: d: ``attribution``, ``feature`` (maps that know no class, in the search too) or ``none``.
        offset: c, which has no gradient and makes the values positive.
        alignment_weight: alpha.
        sharpness: slope of the soft ranks.
        top_k: rank only the classes that the teacher puts first, and y; for 1,000 classes.
        plus_plus: SmaraAD++.
        beta: exponent of the trust in the teacher.
        student_module: the student's module whose output is the feature map; found where it is not given.
        teacher_module: the same of the teacher.
        label_free: the teacher's prediction stands for the label y.

    Raises:
        ConfigError: at binding, with the YAML path; at the first step for a network without a feature map.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'SmaraADLoss'
              kwargs:
                alignment: 'attribution'
                alignment_weight: 1.0
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'uniform'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**UNIFORM_START, "objective": "kl_cam_teacher_student"}
    teacher_sees_examples = True
    distils = True

    def configure(
        self,
        matching: str = "slack",
        alignment: str = "attribution",
        offset: float = 1.0,
        alignment_weight: float = 1.0,
        sharpness: float = 2.0,
        top_k: int | None = None,
        plus_plus: bool = False,
        beta: float = 0.1,
        student_module: str | None = None,
        teacher_module: str | None = None,
        label_free: bool = False,
    ) -> None:
        self.is_slack = choice(matching, "matching", ("slack", "kl")) == "slack"
        self.alignment = choice(alignment, "alignment", OBJECTIVES)
        self.offset = number(offset, "offset")
        self.alignment_weight = number(alignment_weight, "alignment_weight", minimum=0)
        self.sharpness = number(sharpness, "sharpness", above=0)
        self.top_k = optional_integer(top_k, "top_k", minimum=2)
        self.plus_plus = flag(plus_plus, "plus_plus")
        self.beta = number(beta, "beta", minimum=0)
        self.map_modules: dict[Who, str | None] = {"student": student_module, "teacher": teacher_module}
        self.label_free = flag(label_free, "label_free")
        if "objective" not in self.options:
            named = {f"{who}_module": path for who, path in self.map_modules.items() if path is not None}
            given = {} if self.alignment == "none" else named
            self.objective = Objective.build({"key": OBJECTIVES[self.alignment], "kwargs": given})

    @property
    def needs_labels(self) -> bool:
        ranks_some = self.is_slack and self.top_k is not None
        uses_classes = self.alignment == "attribution" or self.plus_plus or ranks_some
        return not self.label_free and (uses_classes or super().needs_labels)

    def plan(self) -> tuple[Search, ...]:
        return (self.make_search(Images(label_free=self.label_free)),)

    def before_host(self, step: Step) -> None:
        for who in self.map_modules if self.alignment != "none" else ():
            with step.binding.no_trace(self.path):
                layout = self._layout(step, who)
            if self._takes_recorded(layout):
                step.record_features(who, layout)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        examples = step.examples(self.search)
        classes = step.classes(self.label_free) if self.needs_labels or self.label_free else None
        example_classes = None if classes is None else classes[examples.index]
        if self.alignment == "none":
            clean, teacher_clean = step.student_clean(), step.teacher_clean()
            adversarial, teacher = step.student_on(self.search, self.student_bn), step.teacher_on(self.search)
            distance = clean.new_zeros(())
        else:
            adversarial, maps = self._pass("student", step, examples.rows, example_classes, self.student_bn)
            teacher, teacher_maps = self._pass("teacher", step, examples.rows, example_classes)
            clean, clean_maps = self._on_clean("student", step, classes)
            teacher_clean, teacher_clean_maps = self._on_clean("teacher", step, classes)
            distance = map_distance(maps, teacher_maps).mean() + map_distance(clean_maps, teacher_clean_maps).mean()
        values = self._match(teacher, adversarial, example_classes)
        if self.plus_plus:
            assert example_classes is not None
            weight = trust(teacher, example_classes, self.beta)
            itself = self._match(clean[examples.index], adversarial, example_classes)
            values = weight * values + (1 - weight) * itself
        step.record(self, matching=values, alignment=distance)
        value = values.mean() + self._match(teacher_clean, clean, classes).mean()
        return value + self.alignment_weight * distance

    def _match(self, target: Tensor, student: Tensor, classes: Tensor | None) -> Tensor:
        if not self.is_slack:
            return kl_divergence(target, student)
        return self.offset - soft_spearman(student, target, self.sharpness, self.top_k, classes)

    def _layout(self, step: Step, who: Who) -> Layout:
        return layout_of(step.side(who).network, step.images, self.map_modules[who], f"{who}_module")

    def _takes_recorded(self, layout: Layout) -> bool:
        """Whether maps can be had from the feature map of a pass that somebody else made."""
        return self.alignment == "feature" or layout.linear is not None

    def _pass(
        self, who: Who, step: Step, rows: Tensor, classes: Tensor | None, student_bn: str = "batch"
    ) -> tuple[Tensor, Tensor]:
        """Logits of ``rows`` (R, num_classes) and their maps (R, h, w), from a pass of our own."""
        network, layout = step.side(who).network, self._layout(step, who)
        with ExitStack() as mode:
            if who == "student":
                mode.enter_context(step.student_mode(student_bn))
            else:
                mode.enter_context(torch.no_grad())
                mode.enter_context(on_cloned_buffers(network, read_only_in_eval=True))
            if self.alignment == "feature":
                return feature_maps(network, layout, rows)
            assert classes is not None
            return class_activation_maps(network, layout, rows, classes)

    def _on_clean(self, who: Who, step: Step, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same of the clean images, from the host's own pass where it has them."""
        network, layout = step.side(who).network, self._layout(step, who)
        features = step.host_features(who, layout) if self._takes_recorded(layout) else None
        if features is None:
            return self._pass(who, step, step.images, classes)
        if self.alignment == "feature":
            maps = squared_maps(layout, features)
        else:
            assert classes is not None
            maps = exact_maps(network, layout, features, classes)
        return (step.student_clean(), maps) if who == "student" else (step.teacher_clean(), maps.detach())

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        if self.alignment == "none":
            return super().outer_cost(images, num_views)
        rows = self.search.num_rows(images, num_views)
        return {self.path: Cost(rows, 0, rows, rows)}
