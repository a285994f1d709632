"""Distillation along untargeted and targeted adversarial paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss

from torchdistill_adv.adversaries import PGD, Examples
from torchdistill_adv.boxes import IODict
from torchdistill_adv.checks import choice, flag, number
from torchdistill_adv.divergences import kl_divergence, probability_of, wide
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.guards import over_ranks_max
from torchdistill_adv.half import gradient_scale
from torchdistill_adv.losses.base import GAUSSIAN_START, AdversarialTerm, Cost, Search
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import Objective
from torchdistill_adv.registry import build_adversary
from torchdistill_adv.sources import Chosen, Images

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


@dataclass(frozen=True)
class Pairs:
    """For every image x of the batch an image x' of another class, whose search goes toward the class of x.

    Args:
        pairing: ``batch`` takes x' from the batch, any of another class alike; ``dataset`` from the data set wrapper
            ``PairWithOtherClass``.
        label_free: the teacher's predictions are the classes.
    """

    pairing: str
    label_free: bool

    def choose(self, step: Step) -> Chosen:
        if self.pairing == "dataset":
            return Chosen(_of_pairs(step, "paired_image").to(step.images.dtype), None)
        classes = step.classes(self.label_free)
        differ = classes[:, None] != classes[None, :]
        is_one = not bool(differ.any())
        # all processes stop, or the others would wait for this one
        if over_ranks_max(classes.new_tensor(is_one)):
            kind = "that the teacher gives one class" if self.label_free else "of one class"
            kind += "" if is_one else " in another process"
            other = "" if self.label_free else ", or pairing: 'dataset'"
            raise ConfigError(
                f"found a batch of {len(classes)} images {kind}, in which no image has a partner; write a larger "
                f"batch_size and drop_last: True{other}",
                "pairing",
            )
        noise = Noise(step.binding.seed_for(self), step.images.device)
        partners = noise.uniform(differ.shape).masked_fill(~differ, -torch.inf).argmax(1)
        return Chosen(step.images[partners], partners)

    def classes(self, step: Step) -> Tensor:
        return step.classes(self.label_free)

    def own_classes(self, step: Step) -> Tensor:
        """The class of every x', (N,)."""
        partners = step.choose(self).which
        return _of_pairs(step, "paired_label") if partners is None else self.classes(step)[partners]

    def size(self, images: int, num_views: int) -> int:
        return images


def _of_pairs(step: Step, name: str) -> Tensor:
    found = step.supp_dict.get(name) if isinstance(step.supp_dict, Mapping) else None
    wanted = step.images.shape if name == "paired_image" else step.images.shape[:1]
    if not isinstance(found, Tensor) or found.shape != wanted:
        has = f"one of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "none"
        raise ConfigError(
            f"found 'dataset', but the batch should have {name} of shape {tuple(wanted)}, and has {has}; write "
            "dataset_wrapper: {key: 'PairWithOtherClass'} into train_data_loader, or pairing: 'batch'",
            "pairing",
        )
    return found.to(step.images.device)


class _KnownGradient(torch.autograd.Function):
    """A value whose gradient with respect to the parameters has been taken already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if gradient is None else upstream * gradient for gradient in ctx.gradients)


def accumulated(parts: Iterable[Callable[[], Tensor]], network: nn.Module) -> Tensor:
    """The sum of ``parts``, each differentiated as soon as it is computed, so that one graph at a time is alive.

    The result has the gradient of the sum, for the parameters of ``network`` only, and can be differentiated once.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not parameters:
        return torch.stack([part() for part in parts]).sum()
    gradients: list[Tensor | None] = [None] * len(parameters)
    values = []
    scale = gradient_scale(parameters[0].device.type)
    for part in parts:
        value = part()
        found = torch.autograd.grad(value * scale, parameters, allow_unused=True)
        for k, (total, scaled) in enumerate(zip(gradients, found, strict=True)):
            if scaled is not None:
                # the division copies, so that the sum has memory of its own
                gradients[k] = scaled / scale if total is None else total.add_(scaled, alpha=1 / scale)
        values.append(value.detach())
    total = torch.stack(values).sum()
    result: Tensor = _KnownGradient.apply(total, gradients, *parameters)
    return result


def _squared(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    return (wide(p_logits).softmax(1) - wide(q_logits).softmax(1)).square().sum(1)


@register_mid_level_loss
class DARWINLoss(AdversarialTerm):
    r"""DARWIN: the whole path of the search is distilled, and a second path leads there from another class.

    .. math::
        \ell = a_1 \big[KL(T(x) \| S(x)) + \beta\, KL(T(\hat x^{(n)}) \| S(\hat x^{(n)}))\big]
        + a_2 \frac{1}{n - 1} \sum_{i=1}^{n-1} w(\hat x^{(i)} | x)\, KL(T(\hat x^{(i)}) \| S(\hat x^{(i)}))

    .. math::
        + a_3 \frac{1}{n} \sum_{i=1}^{n} \Big[ w(\hat x^{(i)} | x)\, L\big(T(x), S(\hat x^{(i)}), S(\hat x'^{(i)})\big)
        + w(\hat x'^{(i)} | x')\, L\big(T(x'), S(\hat x'^{(i)}), S(\hat x^{(i)})\big) \Big]

    .. math::
        w(\hat x^{(i)} | x) = (1 - \gamma) \frac{i}{n} + \gamma \frac{|p_T(x)_y - p_S(\hat x^{(i)})_y|}
        {\max_{j} |p_T(x_j)_{y_j} - p_S(\hat x_j^{(i)})_{y_j}|}, \qquad
        L(a, p, q) = \max(0,\, m + D(a, p) - D(a, q))

    averaged over the batch, for images (N, C, H, W) and logits (N, num_classes): ARKD, IAKD and DBKD. The untargeted
    path :math:`\hat x^{(1..n)}` ascends :math:`\mathrm{CE}(S(\cdot), y)` from x; the targeted one
    :math:`\hat x'^{(1..n)}` starts from an image x' of another class y' and descends the same, toward the class y of x.
    The weights w are constants, with the maximum over all processes. The options of every loss are those of
    :class:`~torchdistill_adv.losses.base.AdversarialTerm`; adversary and objective are those of the untargeted path.

    Gradients are taken step by step along the path, so that one step's graph is alive at a time and memory hardly
    grows with n; the networks are passed once for each i, with both paths in one batch.

    Paper:
    `Robust Distillation via Untargeted and Targeted Intermediate Adversarial Samples <https://openaccess.thecvf.com/content/CVPR2024/html/Dong_Robust_Distillation_via_Untargeted_and_Targeted_Intermediate_Adversarial_Samples_CVPR_2024_paper.html>`_
    (Dong et al., CVPR 2024).

    **The paper's**: the three parts, the weights, gamma = 0.5, the anchors on clean images; sums over i, which are
    means here (``average: false`` has the sums). There is no official code. **Our reading**: beta = 1; the weights of
    the parts, 1; of the triplet its distance D, the divergence (``squared``: of probabilities), and its margin m = 1;
    the target of the second path; 10 steps of 2/255 with the student in eval mode from a Gaussian start; and
    ``label_free``, DARWIN-LF, in which the teacher's prediction stands for the label everywhere.

    Args:
        beta: weight of the last example in ARKD.
        gamma: share of the second term of the weights w, in [0, 1].
        weighted: ``false`` makes all w 1.
        arkd_weight: a_1; 0 leaves ARKD out.
        iakd_weight: a_2; 0 leaves the intermediate examples out.
        dbkd_weight: a_3; 0 leaves the second path out.
        average: mean over i; ``false`` sums.
        margin: m.
        distance: D, ``kl`` or ``squared``.
        pairing: where x' is from: ``batch``, any image of another class alike, or ``dataset``, with the wrapper
            ``PairWithOtherClass`` around the training set.
        label_free: read no label; pairs are then found in the batch.
        target_adversary: block of the search of the second path; the default is PGD with the steps of the first one.

    Raises:
        ConfigError: at binding, with the YAML path; in every process, at a batch of one in which all images are of one
            class.

    Example:
        .. code-block:: yaml

            criterion:
              key: 'DARWINLoss'
              kwargs:
                gamma: 0.5
                pairing: 'batch'
                adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'gaussian'}}
                threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]}
            weight: 1.0
    """

    defaults: ClassVar[Mapping[str, Any]] = {**GAUSSIAN_START, "objective": "ce_student"}
    teacher_sees_examples = True
    distils = True

    def configure(
        self,
        beta: float = 1.0,
        gamma: float = 0.5,
        weighted: bool = True,
        arkd_weight: float = 1.0,
        iakd_weight: float = 1.0,
        dbkd_weight: float = 1.0,
        average: bool = True,
        margin: float = 1.0,
        distance: str = "kl",
        pairing: str = "batch",
        label_free: bool = False,
        target_adversary: Any = None,
    ) -> None:
        self.beta = number(beta, "beta", minimum=0)
        self.gamma = number(gamma, "gamma", minimum=0, maximum=1)
        self.weighted = flag(weighted, "weighted")
        self.arkd_weight = number(arkd_weight, "arkd_weight", minimum=0)
        self.iakd_weight = number(iakd_weight, "iakd_weight", minimum=0)
        self.dbkd_weight = number(dbkd_weight, "dbkd_weight", minimum=0)
        if not self.arkd_weight + self.iakd_weight + self.dbkd_weight:
            raise ConfigError("found 0 for all three parts; write a positive weight for one", "arkd_weight")
        self.average = flag(average, "average")
        self.margin = number(margin, "margin", minimum=0)
        self.distance = {"kl": kl_divergence, "squared": _squared}[choice(distance, "distance", ("kl", "squared"))]
        self.label_free = flag(label_free, "label_free")
        self.pairs = Pairs(choice(pairing, "pairing", ("batch", "dataset")), self.label_free)
        if self.label_free and self.dbkd_weight and self.pairs.pairing == "dataset":
            raise ConfigError("found 'dataset', which pairs by labels, with label_free; write 'batch'", "pairing")
        if hasattr(self.adversary, "return_path"):
            with inside("adversary.kwargs"):
                self.adversary = dataclasses.replace(self.adversary, return_path=True)
        elif self.path_length > 1:
            raise ConfigError(f"found {self.adversary}, which does not give its path; write PGD or SVGD", "adversary")
        with inside("target_adversary"):
            self.target_adversary = self._target_adversary(target_adversary)
        if not (self._steps() or self.arkd_weight):
            raise ConfigError("found a path of one step, which IAKD alone leaves out; write more", "adversary")

    def _target_adversary(self, block: Any) -> Any:
        """The search of the second path: as many steps, toward a class."""
        if block is not None:
            adversary = build_adversary(block)
            wanted = {"targeted": True, "return_path": True}
            if not all(hasattr(adversary, name) for name in wanted) or adversary.num_rows != 1:
                raise ConfigError(f"found {adversary}, which has no path of one example an image; write a PGD block")
            with inside("kwargs"):
                adversary = dataclasses.replace(adversary, **wanted)
        elif isinstance(self.adversary, PGD):
            adversary = dataclasses.replace(self.adversary, targeted=True)
        else:
            steps = self.path_length
            size = getattr(self.adversary, "step_size", self.threat.finite_eps)
            adversary = PGD(steps, size, start="gaussian", targeted=True, return_path=True)
        length = self.path_length
        if adversary.num_steps != length:
            raise ConfigError(
                f"found {adversary.num_steps} for a path beside one of {length} steps; write num_steps: {length}",
                "kwargs.num_steps",
            )
        return adversary

    @property
    def needs_labels(self) -> bool:
        weights_or_pairs = bool(self.dbkd_weight or (self.iakd_weight and self.weighted))
        return not self.label_free and (weights_or_pairs or super().needs_labels)

    def plan(self) -> tuple[Search, ...]:
        untargeted = self.make_search(Images(label_free=self.label_free))
        if not self.dbkd_weight:
            return (untargeted,)
        self.check_radius(self.target_adversary)
        # its classes are those of x, so the descent needs no target_class
        targeted = dataclasses.replace(
            untargeted, adversary=self.target_adversary, objective=Objective.build("ce_student"), source=self.pairs
        )
        return untargeted, targeted

    def loss(self, step: Step, student_io_dict: IODict, teacher_io_dict: IODict, targets: Any) -> Tensor:
        value = torch.zeros((), device=step.images.device)
        if self.arkd_weight:
            value = self.arkd_weight * kl_divergence(step.teacher_clean(), step.student_clean()).mean()
        parts = [lambda i=i: self._part(step, i) for i in self._steps()]
        return value + accumulated(parts, step.binding.student.network) if parts else value

    @property
    def path_length(self) -> int:
        """n; a search without steps has its result only."""
        return getattr(self.adversary, "num_steps", 1)

    def _steps(self) -> range:
        """Which i = 1, ..., n of the path are passed through the networks."""
        length = self.path_length
        first = 1 if self.iakd_weight or self.dbkd_weight else length
        has_last = self.dbkd_weight or self.arkd_weight * self.beta
        return range(first, length + (1 if has_last else 0))

    def _part(self, step: Step, i: int) -> Tensor:
        """What is summed over i."""
        examples = step.examples(self.search)
        length, index = self.path_length, examples.index
        rows = _on_path(examples, i)
        clean, value = step.teacher_clean()[index], torch.zeros((), device=rows.device)
        if self.dbkd_weight:
            both = torch.cat([rows, _on_path(step.examples(self.searches[1]), i)])
            student, paired = step.student(both, self.student_bn).split([len(rows), len(both) - len(rows)])
            paired = paired[index]
        else:
            student = step.student(rows, self.student_bn)
        weight = torch.ones(len(rows), device=rows.device)
        if self.weighted and (i < length or self.dbkd_weight):
            weight = self._weight(i / length, clean, student, step.classes(self.label_free)[index])
        is_last = i == length
        share = self.arkd_weight * self.beta if is_last else self._share(self.iakd_weight, length - 1)
        if share:
            teacher = step.teacher(rows, self.search.chunk_size)
            matching = kl_divergence(teacher, student)
            value = value + share * (matching if is_last else weight * matching).mean()
        if self.dbkd_weight:
            anchor, classes = self._paired_anchor(step), self.pairs.own_classes(step)
            paired_weight = torch.ones_like(weight)
            if self.weighted:
                paired_weight = self._weight(i / length, anchor[index], paired, classes[index])
            triplets = weight * self._triplet(clean, student, paired)
            triplets = triplets + paired_weight * self._triplet(anchor[index], paired, student)
            value = value + self._share(self.dbkd_weight, length) * triplets.mean()
        return value

    def _share(self, weight: float, count: int) -> float:
        return weight / count if self.average and count else weight

    def _paired_anchor(self, step: Step) -> Tensor:
        """The teacher's logits on every x', (N, C)."""
        images, partners = step.choose(self.pairs)
        if partners is not None:
            return step.teacher_clean()[partners]
        return step.once(self.pairs, lambda: step.teacher(images, self.search.chunk_size))

    def _weight(self, position: float, anchor: Tensor, student: Tensor, classes: Tensor) -> Tensor:
        gap = (probability_of(classes, anchor) - probability_of(classes, student.detach())).abs()
        return (1 - self.gamma) * position + self.gamma * gap / (over_ranks_max(gap.max()) + 1e-8)

    def _triplet(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return (self.margin + self.distance(anchor, positive) - self.distance(anchor, negative)).clamp_min(0)

    def outer_cost(self, images: int, num_views: int = 1) -> dict[object, Cost]:
        rows = self.search.num_rows(images)
        last = 1 if self.arkd_weight and self.beta else 0
        count, length = len(self._steps()), self.path_length
        student = count * (rows + (images if self.dbkd_weight else 0))
        teacher = rows * ((length - 1 if self.iakd_weight else 0) + last)
        anchors = images if self.dbkd_weight and self.pairs.pairing == "dataset" else 0
        return {self.path: Cost(teacher + anchors, 0, student, student)}


def _on_path(examples: Examples, i: int) -> Tensor:
    """The examples after step i = 1, ..., n; a search without a path has its result only."""
    return examples.rows if examples.path is None else examples.path[i - 1]
