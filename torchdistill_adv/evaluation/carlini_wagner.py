"""The l2 attack of Carlini and Wagner."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchdistill_adv.checks import integer, number, put
from torchdistill_adv.divergences import margin
from torchdistill_adv.evaluation.attacks import Attacked
from torchdistill_adv.noise import ImageNoise
from torchdistill_adv.threat import ThreatModel


@dataclass(frozen=True)
class CarliniWagnerL2:
    r"""The smallest change in l2 that fools the network, image by image.

    .. math::
        \min_w \|x'(w) - x\|_2^2 + c \max\big(\kappa - (\max_{j \ne y} z_j(x'(w)) - z_y(x'(w))), 0\big), \quad
        x'(w) = \tfrac{1}{2} (\tanh w + 1)

    by Adam from :math:`x'(w) = x`, in pixels: the change of variables keeps every iterate inside [0, 1]. The weight
    :math:`c` of each image is searched: ten times larger until an example is found, then halfway between the largest
    that failed and the smallest that did not.

    Paper: `Towards Evaluating the Robustness of Neural Networks <https://arxiv.org/abs/1608.04644>`_ (Carlini and
    Wagner, S&P 2017). The defaults are those of the authors' code and of foolbox but for ``num_steps``, 10,000 there:
    on small networks a tenth gave the same distances. Up to 9,000 gradients an image. Ours: an image stops when its own
    objective has not fallen by 0.01 % over each of two tenths of the steps, where the code stops the batch when the sum
    has not over one, so that an image's outcome does not depend on its batch; and with ten searches or more the last
    weight is not tried a second time.

    ``rows`` are the nearest examples found, at whatever distance; an image for which none was found comes back as it
    is. The radius plays no part: the evaluation counts the examples inside it. No random numbers.

    Args:
        num_steps: steps of Adam for each weight.
        search_steps: weights tried.
        step_size: learning rate of Adam, in the units of :math:`w`.
        confidence: :math:`\kappa`, the margin in logits that an example must exceed.
        initial_const: the first weight.

    Raises:
        ConfigError: a value out of range.
    """

    num_steps: int = 1000
    search_steps: int = 9
    step_size: float = 0.01
    confidence: float = 0.0
    initial_const: float = 0.001

    kind = "cwl2"
    name = "cwl2"
    norms = ("l2",)
    minimal_norm = True

    def __post_init__(self) -> None:
        put(
            self,
            num_steps=integer(self.num_steps, "num_steps", minimum=1),
            search_steps=integer(self.search_steps, "search_steps", minimum=1),
            step_size=number(self.step_size, "step_size", above=0),
            confidence=number(self.confidence, "confidence", minimum=0),
            initial_const=number(self.initial_const, "initial_const", above=0),
        )

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, noise: ImageNoise
    ) -> Attacked:
        nearest, shortest = images.clone(), images.new_full((len(images),), torch.inf)
        const = torch.full_like(shortest, self.initial_const)
        failed, succeeded = torch.zeros_like(const), torch.full_like(const, torch.inf)
        for _ in range(self.search_steps):
            rows, lengths = self._minimise(model, images, labels, const)
            closer = lengths < shortest
            nearest[closer], shortest[closer] = rows[closer], lengths[closer]
            found = lengths.isfinite()
            failed, succeeded = torch.where(found, failed, const), torch.where(found, const, succeeded)
            const = torch.where(succeeded.isinf(), const * 10, (failed + succeeded) / 2)
        return Attacked(nearest)

    def _minimise(self, model: nn.Module, images: Tensor, labels: Tensor, const: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest examples with these weights, (N, C, ...), and their distances (N,), infinite where none is."""
        # a little inside, where w is finite; distances in the objective are to this point, as in the authors' code
        origin = ((2 * images.clamp(0, 1) - 1) * 0.999999).atanh()
        start = _pixels(origin)
        change, mean, square = (torch.zeros_like(images) for _ in range(3))
        rows, lengths = images.clone(), torch.full_like(const, torch.inf)
        previous, stalls = torch.full_like(const, torch.inf), torch.zeros_like(const)
        left = torch.arange(len(images), device=images.device)
        for step in range(self.num_steps):
            with torch.enable_grad():
                leaf = change[left].requires_grad_()
                tried = _pixels(origin[left] + leaf)
                margins = margin(model(tried), labels[left])
                losses = (tried - start[left]).square().flatten(1).sum(1)
                losses = losses + const[left] * (self.confidence - margins).clamp_min(0)
                gradient = torch.autograd.grad(losses.sum(), leaf)[0]
            tried, margins, losses = tried.detach(), margins.detach(), losses.detach()
            distance = (tried - images[left]).flatten(1).norm(dim=1)
            closer = (margins > self.confidence) & (distance < lengths[left])
            rows[left[closer]], lengths[left[closer]] = tried[closer], distance[closer]
            mean[left] = 0.9 * mean[left] + 0.1 * gradient
            square[left] = 0.999 * square[left] + 0.001 * gradient.square()
            unbiased, deviation = (
                mean[left] / (1 - 0.9 ** (step + 1)),
                (square[left] / (1 - 0.999 ** (step + 1))).sqrt(),
            )
            change[left] -= self.step_size * unbiased / (deviation + 1e-8)
            # ten times in a search: an image whose objective has twice running not fallen is done
            if step % math.ceil(self.num_steps / 10) == 0:
                stalls[left] = torch.where(losses <= 0.9999 * previous[left], 0, stalls[left] + 1)
                previous[left] = losses
                left = left[stalls[left] < 2]
                if not len(left):
                    break
        return rows, lengths


def _pixels(w: Tensor) -> Tensor:
    return (w.tanh() + 1) / 2
