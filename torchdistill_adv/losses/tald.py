"""Teacher adversarial local distribution regularisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import choice, flag, optional_integer
from torchdistill_adv.divergences import cross_entropy
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.base import AdversarialTerm, Cost, Search
from torchdistill_adv.objectives import Objective
from torchdistill_adv.objectives import target_class as check_target_class
from torchdistill_adv.sources import Images

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@register_mid_level_loss
class TALDLoss(AdversarialTerm):
    r"""TALD: the student's loss matches the teacher's on samples of the teacher's adversarial local distribution.

    .. math::
        \ell_\mathrm{TALD} = \frac{1}{N K} \sum_{i=1}^{N} \sum_{k=1}^{K}
        \big( \mathrm{CE}(T(x_i^k), y_i) - \mathrm{CE}(S(x_i^k), y_i) \big)^2

    The particles :math:`x_i^k` (N K, C, H, W) are found by :class:`~torchdistill_adv.adversaries.SVGD` on the teacher
    alone, maximising :math:`KL(T(x') \| T(x))` in a ball around each image. Only the student gets a gradient. Meant to
    raise *clean* accuracy with an ordinary teacher; the weight lambda is 0.01 in the paper (0.001 on ImageNet in the
    paper's text, 0.01 in its supplement).

    Paper: `Adversarial local distribution regularization for knowledge distillation
    <https://openaccess.thecvf.com/content/WACV2023/html/Nguyen-Duc_Adversarial_Local_Distribution_Regularization_for_Knowledge_Distillation_WACV_2023_paper.html>`_
    (Nguyen-Duc et al., WACV 2023), Eq. 1 to 4 and Algorithm 1.

    **The paper's**: equation, objective, K, L, eta, eps, tau, bandwidth 1e-3, all images attacked, adversarial rows
    only. At that bandwidth the kernel is the identity and the repulsion is zero (see
    :class:`~torchdistill_adv.adversaries.SVGD`).

    **The published code's** six differences, each an option here: objective ``mse_teacher_clean_teacher``; directions
    probed far away and applied close by, and one kernel for the whole batch (adversary ``VirtualSVGD``);
    ``num_attacked: 10``; ``include_clean: true``; ``forward: 'joint'`` with ``student_bn: 'train'``. The preset is
    ``configs/cifar100/kd_tald_code_exact-*.yaml``. There the host's terms come from the joint pass too; torchdistill
    computes them on its own clean pass.

    **Our reading**: the ball is l2 in model-input space (the paper does not name its norm; ``paper_linf`` is the other
    reading); examples stay in the range of real images; ``student_bn: 'batch'``.

    The options of every loss are those of :class:`~torchdistill_adv.losses.base.AdversarialTerm`.

    Args:
        target_class: particles that descend CE(T(x'), c) toward a class c instead (the paper's future work):
            ``runner_up`` (the teacher's second), ``random`` (any that the teacher does not predict) or a class number.
        num_attacked: only the first so many images of each batch; None is all.
        include_clean: whether the clean images of the batch are rows of the mean too.
        forward: ``separate`` passes the particles alone through the student; ``joint`` particles and clean images in
            one pass, so that batch normalisation mixes them.

    Raises:
        ConfigError: at binding, with the YAML path.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'TALDLoss'
              kwargs:
                adversary: {key: 'SVGD', kwargs: {num_particles: 4, num_steps: 1, step_size: 0.1, bandwidth: 1.0e-3}}
                threat: {norm: 'l2', eps: 0.3, space: 'input', mean: [0.507, 0.487, 0.441], std: [0.268, 0.257, 0.276]}
            weight: 0.01
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "adversary": "SVGD",
        "threat": {"norm": "l2", "eps": 0.3, "space": "input"},
        "objective": "kl_teacher_clean_teacher",
        "student_bn": "batch",
    }
    teacher_sees_examples = True
    distils = True
    needs_labels = True

    def configure(
        self,
        target_class: Any = None,
        num_attacked: int | None = None,
        include_clean: bool = False,
        forward: str = "separate",
    ) -> None:
        self.num_attacked = optional_integer(num_attacked, "num_attacked", minimum=1)
        self.include_clean = flag(include_clean, "include_clean")
        self.joint = choice(forward, "forward", ("separate", "joint")) == "joint"
        if target_class is not None:
            if "objective" in self.options:
                raise ConfigError("found an objective beside target_class, which sets its own; drop one", "objective")
            chosen = check_target_class(target_class)
            self.objective = Objective.build({"key": "ce_teacher", "kwargs": {"target_class": chosen}})
            self.adversary = dataclasses.replace(self.adversary, targeted=True)
        if "student" in self.objective.needs:
            raise ConfigError("found one that attacks the student; TALD explores the teacher alone", "objective")

    def plan(self) -> tuple[Search, ...]:
        return (self.make_search(Images(self.num_attacked)),)

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        examples = step.examples(self.search)
        labels = step.labels[examples.index]
        teacher_ce = cross_entropy(step.teacher_on(self.search), labels)
        if self.joint:
            logits = step.student(torch.cat([examples.rows, step.images]), self.student_bn)
            student_logits, clean_logits = logits[: len(labels)], logits[len(labels) :]
        else:
            student_logits = step.student_on(self.search, self.student_bn)
        student_ce = cross_entropy(student_logits, labels)
        step.record(self, teacher_ce=teacher_ce, student_ce=student_ce)
        if self.include_clean:
            if not self.joint:
                clean_logits = step.student_clean()
            teacher_ce = torch.cat([teacher_ce, cross_entropy(step.teacher_clean(), step.labels)])
            student_ce = torch.cat([student_ce, cross_entropy(clean_logits, step.labels)])
        return (teacher_ce - student_ce).square().mean()

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        if not self.joint:
            return super().outer_cost(images, num_views)
        rows = self.search.num_rows(images)
        return {self.path: Cost(0, 0, rows + images, rows + images), ("teacher", self.search): Cost(rows)}
