"""FGSM and PGD."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchdistill_adv.adversaries.common import (
    Examples,
    PredictingObjective,
    RowObjective,
    input_gradient,
    value_and_gradient,
)
from torchdistill_adv.checks import choice, flag, integer, number, optional_integer, put
from torchdistill_adv.errors import ConfigError
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

    Two options make a search cheaper than the papers' (our reading throughout):

    ``early_stop`` lets an image leave the search, so that the networks are passed the images that still search, and
    no others. What tells that an image is to leave comes with the forward pass of its gradient; there are no further
    passes. The last step is never judged.

    * ``stalled``: its objective did not rise in the last step, or fall if ``targeted``. Its example is the iterate
      before that step, the best one.
    * ``changed``: an attacked network predicts another class than at the first iterate. Its example is this iterate.
      What is compared is the network with itself, so no label is needed; an image that was wrong from the start is
      searched on. In `Friendly Adversarial Training <https://arxiv.org/abs/2002.11242>`_ (Zhang et al., ICML 2020) an
      image leaves once it is misclassified, or some steps later, so that a wrong one may make none at all.

    Images do not see each other in eval mode, so an image's example does not depend on which others have left, but for
    the rounding of batches of other sizes; in train mode early stopping is refused. Each step but the first waits for
    the device once, to count who is left, and batches have any size: a network that is compiled for fixed shapes gains
    nothing.

    ``first_num_steps`` begins the training stage with fewer, longer steps: in its e-th of E epochs there are

    .. math:: L_e = L_1 - 1 + \lceil (L - L_1 + 1)\, e / E \rceil, \qquad \eta_e = \eta L / L_e

    so every number of steps from :math:`L_1` to :math:`L` has an equal share of the epochs, and the last epoch has L.
    Where there are no epochs (validation, evaluation), and in the cost line, it is L.

    Args:
        num_steps: gradient steps, L; with ``early_stop``, at most.
        step_size: length of a step, eta, in the units of the threat model's space.
        start: ``uniform`` (``noise_factor * U(-eps, eps)`` a coordinate), ``gaussian`` (``noise_std * N(0, 1)``) or
            ``none``; projected.
        noise_factor: multiplier of the uniform start.
        noise_std: deviation of the Gaussian start, in the units of the threat model's space.
        targeted: descend the objective, which then has a target class, instead of ascending it.
        return_path: also return every iterate.
        chunk_size: rows through the networks at once; None is all.
        early_stop: when an image leaves the search: ``never``, ``stalled`` or ``changed``.
        first_num_steps: steps in the first epochs, L_1; None is L in all of them.

    Raises:
        ConfigError: a value out of range; ``return_path`` together with what makes paths shorter; in a search with
            ``changed``, an objective that does not tell predictions.

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
    early_stop: str = "never"
    first_num_steps: int | None = None

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
            early_stop=choice(self.early_stop, "early_stop", ("never", "stalled", "changed")),
            first_num_steps=optional_integer(self.first_num_steps, "first_num_steps", minimum=1),
        )
        if self.first_num_steps is not None and self.first_num_steps > self.num_steps:
            raise ConfigError(
                f"found {self.first_num_steps}, more than the {self.num_steps} of the last epoch; write at most that",
                "first_num_steps",
            )
        if self.return_path and self.early_stop != "never":
            raise ConfigError(f"found {self.early_stop!r} where all of the path is needed; write 'never'", "early_stop")
        if self.return_path and self.first_num_steps is not None:
            raise ConfigError("found a schedule where a path of fixed length is needed; drop it", "first_num_steps")

    @property
    def needs_radius(self) -> bool:
        return self.start == "uniform"

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def num_gradients(self) -> int:
        """At most."""
        return self.num_steps

    def at(self, progress: float) -> PGD:
        """The search of the epoch at whose end the share ``progress`` of the stage's epochs, in (0, 1], is over."""
        if self.first_num_steps is None:
            return self
        # a share such as 7/25 must not round up to the next step
        stage = math.ceil(progress * (self.num_steps - self.first_num_steps + 1) - 1e-9)
        steps = self.first_num_steps - 1 + stage
        size = self.step_size * (self.num_steps / steps)
        return replace(self, num_steps=steps, step_size=size, first_num_steps=None)

    def __call__(self, objective: RowObjective, x: Tensor, threat: ThreatModel, noise: Noise) -> Examples:
        x = x.detach()
        index = torch.arange(len(x), device=x.device)
        rows = x
        if self.start == "uniform":
            rows = threat.random_start(x, noise.uniform(x.shape), self.noise_factor)
        elif self.start == "gaussian":
            rows = threat.project(threat.shift(x, noise.normal(x.shape) * self.noise_std), x)
        if self.early_stop != "never":
            return Examples(self._until_stopped(objective, rows, x, threat), index)
        path = []
        for _ in range(self.num_steps):
            rows = self._step(rows, input_gradient(objective, rows, index, self.chunk_size), x, threat)
            if self.return_path:
                path.append(rows)
        return Examples(rows, index, torch.stack(path) if path else None)

    def _step(self, rows: Tensor, gradient: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        size = -self.step_size if self.targeted else self.step_size
        return threat.project(threat.step(rows, threat.gradient(gradient), size), x)

    def _until_stopped(self, objective: RowObjective, rows: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        """The example of each image, (N, ...), from a search of those that have not left."""
        stalls = self.early_stop == "stalled"
        predicted: list[Tensor] = []

        def watched(some: Tensor, which: Tensor) -> Tensor:
            if not isinstance(objective, PredictingObjective):
                raise ConfigError("found 'changed', with an objective that tells no predictions", "early_stop")
            values = objective(some, which)
            predicted.append(objective.predictions())
            return values

        found, index, before, last = rows.clone(), torch.arange(len(x), device=x.device), rows, torch.empty(0)
        for step in range(self.num_steps):
            predicted.clear()
            values, gradient = value_and_gradient(objective if stalls else watched, rows, index, self.chunk_size)
            now = (-values if self.targeted else values) if stalls else torch.cat(predicted)
            if step:
                # one that is NaN stays, and is noticed where the search ends
                stays = ~(now <= last) if stalls else (now == last).all(1)
                found[index] = before if stalls else rows
                kept = stays.nonzero()[:, 0]
                if not len(kept):
                    return found
                rows, x, gradient, index, now = (each[kept] for each in (rows, x, gradient, index, now))
            last, before = now, rows
            rows = self._step(rows, gradient, x, threat)
        found[index] = rows
        return found


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
