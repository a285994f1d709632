"""The search for samples that support a decision boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdistill_adv.adversaries.common import Examples, RowObjective, value_and_gradient
from torchdistill_adv.checks import choice, integer, number, optional_integer, put
from torchdistill_adv.noise import Noise
from torchdistill_adv.registry import register_adversary
from torchdistill_adv.threat import ThreatModel, unit_l2


@register_adversary
@dataclass(frozen=True)
class BSS:
    r"""Steps to just beyond a decision boundary, as long as the distance in logits is.

    .. math::
        x^{(l+1)} = \Pi\Big(x^{(l)}
        + \alpha\, (\xi - \ell(x^{(l)}))\, \frac{\nabla \ell(x^{(l)})}{\|\nabla \ell(x^{(l)})\|_2^p}\Big)

    for an objective that is negative before the boundary and has no gradient beyond it, which is ``gap_teacher``; one
    that is not is refused. A row
    that has crossed stays where it is; the search ends when all have. There is no ball: the threat model's ``eps`` is
    ``.inf`` in the published settings, and its bounds keep the images valid.

    Paper: `Knowledge Distillation with Adversarial Samples Supporting Decision Boundary
    <https://arxiv.org/abs/1805.05532>`_ (Heo et al., AAAI 2019).

    **The official code's**: p = 1, alpha = 0.3, xi = 1e-4, 10 steps, no random start. ``norm_power: 2`` is the step to
    the boundary of a linear network (DeepFool's); whether the paper means it is not known to us.

    Args:
        num_steps: at most so many steps.
        step_size: alpha, in the units of the threat model's space.
        overshoot: xi, which carries a row over the boundary.
        norm_power: p, 1 or 2.
        chunk_size: rows through the networks at once; None is all.

    Raises:
        ConfigError: a value out of range.

    Example:
        .. code-block:: yaml

            adversary: {key: 'BSS', kwargs: {num_steps: 10, step_size: 0.3}}
    """

    num_steps: int = 10
    step_size: float = 0.3
    overshoot: float = 1e-4
    norm_power: int = 1
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        put(
            self,
            num_steps=integer(self.num_steps, "num_steps", minimum=1),
            step_size=number(self.step_size, "step_size", minimum=0),
            overshoot=number(self.overshoot, "overshoot", minimum=0),
            norm_power=int(choice(str(self.norm_power), "norm_power", ("1", "2"))),
            chunk_size=optional_integer(self.chunk_size, "chunk_size", minimum=1),
        )

    @property
    def targeted(self) -> bool:
        return False

    @property
    def needs_boundary(self) -> bool:
        return True

    @property
    def needs_radius(self) -> bool:
        return False

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def num_gradients(self) -> int:
        return self.num_steps

    def __call__(self, objective: RowObjective, x: Tensor, threat: ThreatModel, noise: Noise) -> Examples:
        return self.search_from(x, objective, x, threat)

    def search_from(self, start: Tensor, objective: RowObjective, x: Tensor, threat: ThreatModel) -> Examples:
        """The search from other points than the images ``x``, one for each; both (N, ...)."""
        rows, x = start.detach(), x.detach()
        index = torch.arange(len(x), device=x.device)
        for _ in range(self.num_steps):
            values, gradient = value_and_gradient(objective, rows, index, self.chunk_size)
            gradient = threat.gradient(gradient)
            norm = gradient.flatten(1).norm(dim=1)
            if not bool(norm.any()):
                break
            length = self.step_size * (self.overshoot - values.to(x.dtype))
            if self.norm_power == 2:
                length = length / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            step = length.view(-1, *[1] * (x.dim() - 1)) * unit_l2(gradient)
            rows = threat.project(threat.shift(rows, step), x)
        return Examples(rows, index)
