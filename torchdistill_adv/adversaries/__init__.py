"""Adversaries: pure searches for examples that maximise an objective inside a threat model.

An adversary is a frozen dataclass, so equal settings are equal objects, with

* ``__call__(objective, x, threat, noise) -> Examples``: ``objective(rows, index) -> (R,)``, ``x`` (N, ...) the clean
  images in model-input space, ``noise`` the random numbers;
* ``num_rows``: examples an image, and ``num_gradients``: gradients of the objective that it takes, for the cost line;
* ``needs_boundary``, optional: whether only objectives will do that are negative before a boundary, and flat beyond;
* ``needs_radius``, optional: whether the radius of the ball must be finite, which is so where it is left out;
* ``at(progress)``, optional: the search of an epoch, for schedules; ``progress`` is the share of epochs that are over;
* ``targeted``: whether it descends the objective, toward a chosen class, instead of ascending it.

It knows no model, no label and no torchdistill.
"""

from torchdistill_adv.adversaries.bss import BSS
from torchdistill_adv.adversaries.common import Examples, input_gradient
from torchdistill_adv.adversaries.pgd import FGSM, PGD
from torchdistill_adv.adversaries.svgd import SVGD
from torchdistill_adv.adversaries.virtual_svgd import VirtualSVGD

__all__ = ["BSS", "FGSM", "PGD", "SVGD", "Examples", "VirtualSVGD", "input_gradient"]
