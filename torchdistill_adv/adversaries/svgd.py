"""Stein variational gradient descent over adversarial particles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdistill_adv.adversaries.common import Examples, RowObjective, input_gradient
from torchdistill_adv.checks import choice, flag, integer, number, optional_integer, put
from torchdistill_adv.noise import Noise
from torchdistill_adv.registry import register_adversary
from torchdistill_adv.threat import Norm, ThreatModel


def squared_distances(particles: Tensor) -> Tensor:
    """Squared distances between the K particles of each image, (N, K, K), from (N, K, D).

    From the Gram matrix, so memory is O(N K^2). Centred on each image's mean particle first, as the uncentred form
    loses all digits when distances are small beside norms; the diagonal is exactly zero.
    """
    centred = particles - particles.mean(1, keepdim=True)
    square = centred.square().sum(2)
    distances = square[:, :, None] + square[:, None, :] - 2 * centred @ centred.mT
    off_diagonal = 1 - torch.eye(particles.shape[1], dtype=particles.dtype, device=particles.device)
    return distances.clamp_min(0) * off_diagonal


def median_bandwidth(distances: Tensor) -> Tensor:
    r"""The median heuristic, :math:`\sigma^2 = \mathrm{med} / (2 \ln(K + 1))`, (N, 1, 1), from (N, K, K).

    ``med`` is the median of the squared distances between different particles of one image; coinciding particles get
    a small positive bandwidth, so that nothing is divided by zero.
    """
    count = distances.shape[1]
    if count == 1:
        return torch.ones_like(distances)
    first, second = torch.triu_indices(count, count, 1, device=distances.device)
    pairs = distances[:, first, second].sort(1).values
    middle = (pairs[:, (pairs.shape[1] - 1) // 2] + pairs[:, pairs.shape[1] // 2]) / 2
    return (middle / (2 * math.log(count + 1))).clamp_min(1e-12).view(-1, 1, 1)


def svgd_direction(
    particles: Tensor, scores: Tensor, bandwidth: float | str = "median", repulsion: bool = True
) -> Tensor:
    r"""The SVGD update of every particle, (N, K, D).

    .. math::
        \phi(x_i) = \frac{1}{K} \sum_{j=1}^{K} \Big[ F(x_j, x_i)\, \nabla_{x_j} \log P(x_j)
        + F(x_j, x_i) \frac{x_i - x_j}{\sigma^2} \Big],
        \qquad F(a, b) = \exp\Big(-\frac{\|a - b\|^2}{2 \sigma^2}\Big)

    Args:
        particles: K particles of N images, (N, K, D).
        scores: gradients of log P at the particles, (N, K, D).
        bandwidth: sigma, or ``median`` for the median heuristic of each image.
        repulsion: whether the second term is kept.
    """
    # under autocast the products below would lose the small distances
    with torch.autocast(particles.device.type, enabled=False):
        return _svgd_direction(particles, scores, bandwidth, repulsion)


def _svgd_direction(particles: Tensor, scores: Tensor, bandwidth: float | str, repulsion: bool) -> Tensor:
    distances = squared_distances(particles)
    variance = median_bandwidth(distances) if isinstance(bandwidth, str) else bandwidth**2
    kernel = torch.exp(-distances / (2 * variance))
    direction = kernel @ scores
    if repulsion:
        # the diagonal contributes nothing; without it an underflowed kernel repels by exactly zero
        others = kernel - torch.diag_embed(torch.diagonal(kernel, dim1=1, dim2=2))
        centred = particles - particles.mean(1, keepdim=True)
        direction = direction + (others.sum(2, keepdim=True) * centred - others @ centred) / variance
    return direction / particles.shape[1]


@register_adversary
@dataclass(frozen=True)
class SVGD:
    r"""K particles an image that follow the gradient and repel each other (TALD, Algorithm 1).

    .. math::
        x_i \leftarrow \Pi_{C_\epsilon}(x + \tau\, U(-\epsilon, \epsilon)), \qquad
        x_i \leftarrow \Pi_{C_\epsilon}\big(x_i + \eta\, \mathrm{norm}_p(\phi(x_i))\big) \quad (L \text{ times})

    with :math:`\phi` of :func:`svgd_direction`, all particles updated from the old ones, and
    :math:`\log P(x'|x) = \ell(x', x) + \mathrm{const}`.

    Paper: `Adversarial local distribution regularization for knowledge distillation
    <https://openaccess.thecvf.com/content/WACV2023/html/Nguyen-Duc_Adversarial_Local_Distribution_Regularization_for_Knowledge_Distillation_WACV_2023_paper.html>`_
    (Nguyen-Duc et al., WACV 2023). Defaults are its CIFAR-100 settings.

    **At the paper's bandwidth of 1e-3 the kernel is the identity and the repulsion is zero**: particles in a ball of
    radius 0.3 lie hundreds of bandwidths apart, so each follows its own gradient from its own random start.
    ``bandwidth: 'median'`` is a bandwidth at which the kernel acts.

    **The paper's** too: ``norm_p`` is the l2 norm, whatever the ball. **Our reading**: the paper prints one update
    fewer than L (its indices start at 1), and we make L; it does not name the norm of its ball, which the threat model
    has. In an l-infinity ball of radius 0.3 an l2 step of length 0.1 is lost beside the start noise; ``norm: 'linf'``,
    which follows the sign as in the authors' earlier code, is an option for it.

    Args:
        num_particles: K.
        num_steps: L.
        step_size: eta, in the units of the threat model's space.
        noise_factor: tau; at 0 all particles start on the clean image.
        bandwidth: sigma in the units of the threat model's space, or ``median``: the median heuristic for each image
            and step.
        norm: ``l2`` or ``linf``, for norm_p.
        repulsion: ``false`` drops the repulsive term.
        targeted: descend the objective, which then has a target class (the paper's stated future work).
        return_path: also return every iterate.
        chunk_size: rows through the networks at once, in the search and in the teacher's pass on the particles; None is
            all K x N.

    Raises:
        ConfigError: a value out of range.

    Example:
        .. code-block:: yaml

            adversary:
              key: 'SVGD'
              kwargs: {num_particles: 4, num_steps: 1, step_size: 0.1, noise_factor: 10.0, bandwidth: 'median'}
    """

    num_particles: int = 4
    num_steps: int = 1
    step_size: float = 0.1
    noise_factor: float = 10.0
    bandwidth: float | str = 1e-3
    norm: Norm = "l2"
    repulsion: bool = True
    targeted: bool = False
    return_path: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        median = isinstance(self.bandwidth, str) and self.bandwidth.isalpha()
        put(
            self,
            num_particles=integer(self.num_particles, "num_particles", minimum=1),
            num_steps=integer(self.num_steps, "num_steps", minimum=1),
            step_size=number(self.step_size, "step_size", minimum=0),
            noise_factor=number(self.noise_factor, "noise_factor", minimum=0),
            bandwidth=choice(self.bandwidth, "bandwidth", ("median",))
            if median
            else number(self.bandwidth, "bandwidth", above=0),
            norm=choice(self.norm, "norm", ("l2", "linf")),
            repulsion=flag(self.repulsion, "repulsion"),
            targeted=flag(self.targeted, "targeted"),
            return_path=flag(self.return_path, "return_path"),
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
        rows = threat.random_start(clean, noise.uniform(clean.shape), self.noise_factor)

        def per_image(values: Tensor) -> Tensor:
            return values.reshape(self.num_particles, len(x), -1).transpose(0, 1)

        path = []
        for _ in range(self.num_steps):
            scores = threat.gradient(input_gradient(objective, rows, index, self.chunk_size))
            direction = svgd_direction(
                per_image(threat.displacement(rows, clean)),
                per_image(-scores if self.targeted else scores),
                self.bandwidth,
                self.repulsion,
            )
            direction = direction.transpose(0, 1).reshape(rows.shape)
            rows = threat.project(threat.step(rows, direction, self.step_size, self.norm), clean)
            if self.return_path:
                path.append(rows)
        return Examples(rows, index, torch.stack(path) if path else None)
