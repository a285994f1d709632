"""How sure a mean, and a difference of two methods, is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its 95 % interval.

    Args:
        mean: of all seeds.
        half_width: None where one seed alone tells nothing of another.
        num_seeds: of the mean.
    """

    mean: float
    half_width: float | None
    num_seeds: int

    @property
    def verdict(self) -> str:
        """What may be said of a difference."""
        if self.half_width is None:
            return "one seed: unknown"
        if abs(self.mean) <= self.half_width:
            return "no difference"
        return "higher" if self.mean > 0 else "lower"

    def text(self, digits: int, sign: bool = False) -> str:
        """Such as ``1.2 ± 0.3``."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    r"""The mean over seeds, :math:`\pm\, t_{n-1,\,0.975}\, s / \sqrt n`."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    return Estimate(mean, student_t(count - 1) * statistics.stdev(values) / math.sqrt(count), count)


def estimate_with_images(values: npt.NDArray[np.float64]) -> Estimate:
    r"""The mean of values (seeds, images) for other seeds and other images of the same kind.

    .. math::
        \frac{s^2_\mathrm{seeds}}{n} + \frac{s^2_\mathrm{images}}{m}, \qquad
        \nu = \frac{(v_1 + v_2)^2}{v_1^2 / (n - 1) + v_2^2 / (m - 1)}

    is the variance of the mean, with :math:`s^2` of the means of each seed, and of each image, :math:`v_1, v_2` its two
    parts and :math:`\nu` Satterthwaite's degrees of freedom. What neither seed nor image explains is in both parts, so
    the interval is rather too wide than too narrow.
    """
    seeds, images = values.shape
    mean = float(values.mean())
    if seeds < 2:
        return Estimate(mean, None, seeds)
    parts = float(values.mean(1).var(ddof=1)) / seeds, float(values.mean(0).var(ddof=1)) / images
    total = sum(parts)
    if total == 0:
        return Estimate(mean, 0.0, seeds)
    freedom = total**2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (images - 1))
    return Estimate(mean, student_t(freedom) * math.sqrt(total), seeds)


def student_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's distribution."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))
