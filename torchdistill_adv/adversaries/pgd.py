"""FGSM and PGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdistill_adv.adversaries.common import Examples, RowObjective, input_gradient
from torchdistill_adv.checks import choice, flag, integer, number, optional_integer, put
from torchdistill_adv.noise import Noise
from torchdistill_adv.registry import register_adversary
from torchdistill_adv.threat import ThreatModel


@register_adversary
@dataclass(frozen=True)
class PGD:
    r"""Projected gradient ascent, one example an image.

    .. math:: x^{(l+1)} = \Pi_{C_\epsilon(x)}\big(x^{(l)} + \eta\, u(\nabla \ell(x^{(l)}))\big)

    with :math:`u` the sign in l-infinity and the unit vector in l2.

    Paper: `Towards Deep Learning Models Resistant to Adversarial Attacks <https://arxiv.org/abs/1706.06083>`_
    (Madry et al., ICLR 2018). The Gaussian start of deviation 0.001 is that of the code of TRADES, RSLAD and AdaAD.

    Args:
        num_steps: gradient steps.
        step_size: length of a step, in the units of the threat model's space.
        start: ``uniform`` (``noise_factor * U(-eps, eps)`` a coordinate), ``gaussian`` (``noise_std * N(0, 1)``) or
            ``none``; projected.
        noise_factor: multiplier of the uniform start.
        noise_std: deviation of the Gaussian start, in the units of the threat model's space.
        targeted: descend the objective, which then has a target class, instead of ascending it.
        return_path: also return every iterate.
        chunk_size: rows through the networks at once; None is all.

    Raises:
        ConfigError: a value out of range.

    Example:
        .. code-block:: yaml

            adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: 2/255, start: 'uniform'}}
    """

    num_steps: int = 10
    step_size: float = 2 / 255
    start: str = "uniform"
    noise_factor: float = 1.0
    noise_std: float = 0.001
    targeted: bool = False
    return_path: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        put(
            self,
            num_steps=integer(self.num_steps, "num_steps", minimum=1),
            step_size=number(self.step_size, "step_size", minimum=0),
            start=choice(self.start, "start", ("uniform", "gaussian", "none")),
            noise_factor=number(self.noise_factor, "noise_factor", minimum=0),
            noise_std=number(self.noise_std, "noise_std", minimum=0),
            targeted=flag(self.targeted, "targeted"),
            return_path=flag(self.return_path, "return_path"),
            chunk_size=optional_integer(self.chunk_size, "chunk_size", minimum=1),
        )

    @property
    def needs_radius(self) -> bool:
        return self.start == "uniform"

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def num_gradients(self) -> int:
        return self.num_steps

    def __call__(self, objective: RowObjective, x: Tensor, threat: ThreatModel, noise: Noise) -> Examples:
        x = x.detach()
        index = torch.arange(len(x), device=x.device)
        rows = x
        if self.start == "uniform":
            rows = threat.random_start(x, noise.uniform(x.shape), self.noise_factor)
        elif self.start == "gaussian":
            rows = threat.project(threat.shift(x, noise.normal(x.shape) * self.noise_std), x)
        size = -self.step_size if self.targeted else self.step_size
        path = []
        for _ in range(self.num_steps):
            gradient = threat.gradient(input_gradient(objective, rows, index, self.chunk_size))
            rows = threat.project(threat.step(rows, gradient, size), x)
            if self.return_path:
                path.append(rows)
        return Examples(rows, index, torch.stack(path) if path else None)


@register_adversary
@dataclass(frozen=True)
class FGSM:
    r"""The fast gradient sign method: one step of length eps from the clean image.

    .. math:: x' = \Pi_{C_\epsilon(x)}\big(x + \epsilon\, u(\nabla \ell(x))\big)

    Paper: `Explaining and Harnessing Adversarial Examples <https://arxiv.org/abs/1412.6572>`_ (Goodfellow et al., ICLR
    2015). In l2 the step follows the unit gradient: our reading.

    Objectives that compare a network with itself on the clean image have no gradient there, so the result is the
    clean image; use PGD with a random start for them.

    Args:
        targeted: descend the objective, which then has a target class, instead of ascending it.
        chunk_size: rows through the networks at once; None is all.

    Example:
        .. code-block:: yaml

            adversary: 'FGSM'
    """

    targeted: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        put(
            self,
            targeted=flag(self.targeted, "targeted"),
            chunk_size=optional_integer(self.chunk_size, "chunk_size", minimum=1),
        )

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def num_gradients(self) -> int:
        return 1

    def __call__(self, objective: RowObjective, x: Tensor, threat: ThreatModel, noise: Noise) -> Examples:
        step = PGD(1, threat.finite_eps, start="none", targeted=self.targeted, chunk_size=self.chunk_size)
        return step(objective, x, threat, noise)
