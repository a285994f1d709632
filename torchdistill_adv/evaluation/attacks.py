"""The attacks of an evaluation, by the names that papers use: ``clean``, ``fgsm``, ``pgd20``, ``cw30``, ``autoattack``.

An attack is a frozen dataclass, so equal settings are equal objects, with

* ``name``, and ``kind``, its family;
* ``__call__(model, images, labels, threat, noise) -> Attacked``: ``model`` takes pixels of [0, 1] and gives logits,
  ``images`` (N, C, ...) are those that it classifies rightly, ``threat`` is the ball around them;
* ``norms``: the norms that it can attack in;
* ``minimal_norm``: whether it looks for the nearest example, however far, rather than for one in the ball.

Passes of ``model`` on images that require a gradient may be made by a copy of the network that is equal up to rounding;
what has to be decided by the network itself is asked without a gradient. With ``minimal_norm`` all are its own.

The outcome of an image should not depend on the others that are attacked with it; where it does, its docstring says so.
It may return any rows: the evaluation checks itself which are in the ball and are classified wrongly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchdistill_adv.adversaries import FGSM, PGD
from torchdistill_adv.checks import integer, number, put
from torchdistill_adv.errors import ConfigError, nearest
from torchdistill_adv.noise import ImageNoise
from torchdistill_adv.objectives import Objective, View
from torchdistill_adv.threat import ThreatModel


@dataclass(frozen=True)
class Attacked:
    """What an attack found.

    Args:
        rows: for every image the example that fooled the model, or any other point of the ball, (N, C, ...), in pixels.
        found_by: of an attack of several parts, the part that found each example; empty text where none did.
    """

    rows: Tensor
    found_by: list[str] | None = None


class Attack(Protocol):
    """The form of an attack; see :mod:`torchdistill_adv.evaluation.attacks`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def norms(self) -> tuple[str, ...]: ...
    @property
    def minimal_norm(self) -> bool: ...
    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, noise: ImageNoise
    ) -> Attacked: ...


@dataclass(frozen=True)
class GradientAttack:
    r"""FGSM, PGD-k and CW-infinity-k: gradient ascent inside the ball.

    ``fgsm`` is one step of length eps on the cross-entropy from the image itself; ``pgd<k>`` k steps on it from a
    uniform start (`Madry et al., ICLR 2018 <https://arxiv.org/abs/1706.06083>`_); ``cw<k>`` the same on the margin
    :math:`\max_{j \ne y} z_j - z_y`, the loss of `Carlini and Wagner <https://arxiv.org/abs/1608.04644>`_ (S&P 2017) as
    the robust-distillation papers use it. The last iterate counts, as in their code, not the best.

    Args:
        kind: ``fgsm``, ``pgd`` or ``cw``.
        num_steps: k.
        step_size: length of a step in pixels; None is a quarter of the radius, which at 8/255 is the usual 2/255.
        restarts: random starts; those after the first attack only what is still classified rightly.

    Raises:
        ConfigError: a value out of range.
    """

    kind: str
    num_steps: int = 1
    step_size: float | None = None
    restarts: int = 1

    norms = ("linf", "l2")
    minimal_norm = False

    def __post_init__(self) -> None:
        put(
            self,
            num_steps=integer(self.num_steps, "num_steps", minimum=1),
            step_size=None if self.step_size is None else number(self.step_size, "step_size", above=0),
            restarts=integer(self.restarts, "restarts", minimum=1),
        )

    @property
    def name(self) -> str:
        return self.kind if self.kind == "fgsm" else f"{self.kind}{self.num_steps}"

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, noise: ImageNoise
    ) -> Attacked:
        size = threat.finite_eps / 4 if self.step_size is None else self.step_size
        adversary = FGSM() if self.kind == "fgsm" else PGD(self.num_steps, size, start="uniform")
        objective = Objective.build("margin_student" if self.kind == "cw" else "ce_student")
        rows = images.clone()
        left = torch.arange(len(images), device=images.device)
        for restart in range(1 if self.kind == "fgsm" else self.restarts):
            if restart:
                with torch.no_grad():
                    left = left[model(rows[left]).argmax(1) == labels[left]]
                if not len(left):
                    break
            own_noise = noise.some(left, restart)
            view = View(images[left], labels[left], model, None, own_noise)
            rows[left] = adversary(objective.bind(view), images[left], threat, own_noise).rows
        return Attacked(rows)


KNOWN = ("clean", "fgsm", "pgd20", "cw30", "cwl2", "autoattack")


def parse_attacks(names: str | Sequence[str | Attack], *, step_size: Any = None, restarts: Any = 1) -> list[Attack]:
    """The attacks of a list of names, such as ``"clean,fgsm,pgd20,cw30,autoattack"``; objects are taken as they are.

    ``clean`` is always measured, and needs no attack.

    Args:
        names: the names, in a list or between commas.
        step_size: of PGD and CW-infinity, in pixels.
        restarts: of PGD and CW-infinity.

    Raises:
        ConfigError: a name that is not known, with the nearest one that is.
    """
    items = [item.strip() for item in names.split(",")] if isinstance(names, str) else list(names)
    found: list[Attack] = []
    for item in items:
        attack = _parse(item, step_size, restarts) if isinstance(item, str) else item
        if attack is not None and attack not in found:
            found.append(attack)
    repeated = {attack.name for attack in found if sum(attack.name == other.name for other in found) > 1}
    if repeated:
        raise ConfigError(
            f"found {', '.join(sorted(repeated))} with several settings; give them names apart", "attacks"
        )
    return found


def _parse(name: str, step_size: Any, restarts: Any) -> Attack | None:
    # as tables write them: PGD-20, Auto-Attack
    name = name.lower().replace("-", "")
    if name == "clean":
        return None
    if name == "fgsm":
        return GradientAttack("fgsm")
    if name == "autoattack":
        from torchdistill_adv.evaluation.autoattack import AutoAttack

        return AutoAttack()
    if name == "cwl2":
        from torchdistill_adv.evaluation.carlini_wagner import CarliniWagnerL2

        return CarliniWagnerL2()
    if match := re.fullmatch(r"(pgd|cw)([1-9]\d*)", name):
        return GradientAttack(match[1], int(match[2]), step_size, restarts)
    raise ConfigError(
        f"found attack {name!r}; {nearest(name, KNOWN)} Any number of steps will do in pgd20 and cw30", "attacks"
    )


def describe(attack: Attack) -> dict[str, Any]:
    """The settings of an attack, for the record."""
    settings = dataclasses.asdict(attack) if dataclasses.is_dataclass(attack) else {"repr": repr(attack)}
    return {"name": attack.name, **settings}
