"""Intervals and tests for counts of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

# the 97.5 % quantile of the normal distribution
Z_95 = 1.959963984540054


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    r"""The 95 % interval of a share, in percent, from ``correct`` out of ``total`` independent images.

    .. math::
        \frac{1}{1 + z^2/n} \Big(\hat p + \frac{z^2}{2n}
        \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4n^2}}\Big)

    E. B. Wilson, `Probable Inference, the Law of Succession, and Statistical Inference
    <https://doi.org/10.1080/01621459.1927.10502953>`_ (1927). It says how far the images at hand tell the accuracy on
    all images; not how much another training seed would change.
    """
    share, z2 = correct / total, Z_95**2 / total
    centre = share + z2 / 2
    width = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    # the ends are 0 and 1 exactly for none and for all, which rounding would miss
    low = 0.0 if correct == 0 else (centre - width) / (1 + z2)
    high = 1.0 if correct == total else (centre + width) / (1 + z2)
    return 100 * low, 100 * high


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    r"""One-sided p-value of "``first`` is true no more often than ``second``" over paired images.

    With a images on which only ``first`` is true and b on which only ``second`` is:
    :math:`P(X \ge a)` for :math:`X \sim \mathrm{Binomial}(a + b, 1/2)` (McNemar's exact test).
    """
    only_first = sum(x and not y for x, y in zip(first, second, strict=True))
    differing = sum(x != y for x, y in zip(first, second, strict=True))
    return sum(math.comb(differing, k) for k in range(only_first, differing + 1)) / 2**differing
