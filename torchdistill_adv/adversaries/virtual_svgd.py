"""The search of TALD's published code, which differs from the paper's Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdistill_adv.adversaries.common import Examples, RowObjective, input_gradient
from torchdistill_adv.adversaries.svgd import svgd_direction
from torchdistill_adv.checks import flag, integer, number, optional_integer, put
from torchdistill_adv.noise import Noise
from torchdistill_adv.registry import register_adversary
from torchdistill_adv.threat import ThreatModel, unit_l2


@register_adversary
@dataclass(frozen=True)
class VirtualSVGD:
    r"""SVGD over unit directions, probed far from the image and applied close to it, as TALD's published code does.

    .. math::
        d_i \leftarrow \frac{u_i}{\|u_i\|_2},\ u_i \sim U(-0.5, 0.5)^D; \qquad
        d_i \leftarrow \frac{\phi(d_i)}{\|\phi(d_i)\|_2} \quad (L \text{ times}); \qquad
        x_i = \Pi_{C_\epsilon}(x + \epsilon\, d_i)

    where :math:`\phi` of :func:`~torchdistill_adv.adversaries.svgd.svgd_direction` takes its gradients at
    :math:`x + \xi d_i`, with the kernel over **all** particles of all images at once. (The 1e-8 that the code adds to
    :math:`2 \sigma^2` changes nothing between unit directions, and is left out.)

    Steps follow l2 directions whatever the norm of the ball: use it with an l2 threat model.

    The paper has none of these; they are the published code's (a virtual-adversarial-training routine with
    :math:`\xi = 10` and :math:`\epsilon = 0.0005`). At its bandwidth of 1e-3 for K = 4 the kernel is the identity, so
    that images do not mix. The code derives the bandwidth from K as 10^(1-K): give the number.

    Paper: `Adversarial local distribution regularization for knowledge distillation
    <https://openaccess.thecvf.com/content/WACV2023/html/Nguyen-Duc_Adversarial_Local_Distribution_Regularization_for_Knowledge_Distillation_WACV_2023_paper.html>`_
    (Nguyen-Duc et al., WACV 2023).

    Args:
        num_particles: K.
        num_steps: L.
        probe_radius: xi, the distance at which the objective is probed, in the units of the threat model's space.
        bandwidth: sigma, on unit directions.
        targeted: descend the objective, which then has a target class.
        chunk_size: rows through the networks at once; None is all K x N.

    Raises:
        ConfigError: a value out of range.

    Example:
        .. code-block:: yaml

            adversary: {key: 'VirtualSVGD', kwargs: {num_particles: 4, probe_radius: 10.0, bandwidth: 1.0e-3}}
    """

    num_particles: int = 4
    num_steps: int = 1
    probe_radius: float = 10.0
    bandwidth: float = 1e-3
    targeted: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        put(
            self,
            num_particles=integer(self.num_particles, "num_particles", minimum=1),
            num_steps=integer(self.num_steps, "num_steps", minimum=1),
            probe_radius=number(self.probe_radius, "probe_radius", above=0),
            bandwidth=number(self.bandwidth, "bandwidth", above=0),
            targeted=flag(self.targeted, "targeted"),
            chunk_size=optional_integer(self.chunk_size, "chunk_size", minimum=1),
        )

    @property
    def num_rows(self) -> int:
        return self.num_particles

    @property
    def num_gradients(self) -> int:
        return self.num_steps

    def __call__(self, objective: RowObjective, x: Tensor, threat: ThreatModel, noise: Noise) -> Examples:
        index = torch.arange(len(x), device=x.device).repeat(self.num_particles)
        clean = x.detach()[index]
        directions = unit_l2(noise.uniform(clean.shape))
        for _ in range(self.num_steps):
            probes = threat.step(clean, directions, self.probe_radius, "l2")
            scores = threat.gradient(input_gradient(objective, probes, index, self.chunk_size))
            # one group of all rows: the published code's kernel spans the whole batch
            all_rows = svgd_direction(
                directions.reshape(1, len(clean), -1),
                (-scores if self.targeted else scores).reshape(1, len(clean), -1),
                self.bandwidth,
            )
            directions = unit_l2(all_rows.view_as(directions))
        return Examples(threat.project(threat.step(clean, directions, threat.finite_eps, "l2"), clean), index)
