"""The threat model: which changes of an image an adversary may make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchdistill_adv.checks import choice, number, put
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.registry import check_options

Norm = Literal["linf", "l2"]


def unit_l2(v: Tensor) -> Tensor:
    """Each row of ``v`` (R, ...) divided by its l2 norm; a zero row stays zero."""
    flat = v.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    # after that scaling a row that is not denormal has a norm of at least 1, so nothing under- or overflows
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1)).view_as(v)


def _rows(v: Tensor, factor: Tensor) -> Tensor:
    return v * factor.view(-1, *[1] * (v.dim() - 1))


@dataclass(frozen=True)
class ThreatModel:
    r"""The ball around each clean image, and the valid range, that adversarial examples stay in.

    .. math:: C_\epsilon(x) = \{x' : \|x' - x\|_p \le \epsilon\} \cap [\mathrm{lower}, \mathrm{upper}]

    Every tensor is a batch in *model-input* space: what the network is given, normalised or not.

    Args:
        eps: radius, in the units of ``space``; ``.inf`` leaves the valid range as the only bound.
        norm: ``linf`` or ``l2``.
        space: ``pixel`` measures radius, step sizes and bounds in pixels of [0, 1], whatever normalisation the data
            have; ``input`` measures them on the tensor that the network is given.
        mean: per-channel mean of the data's Normalize; ``[0]`` with ``std: [1]`` for data that are not normalised.
        std: per-channel standard deviation of the data's Normalize.
        bounds: ``image`` is the range of real images, [0, 1] in pixels; ``none``; or ``[lower, upper]`` in the units
            of ``space``.

    Raises:
        ConfigError: a value out of range, or ``mean`` and ``std`` missing where they are needed.

    Example:
        .. code-block:: yaml

            threat: {norm: 'linf', eps: 8/255, space: 'pixel', mean: [0.507, 0.487, 0.441], std: [0.268, 0.257, 0.276]}
    """

    eps: float
    norm: Norm = "linf"
    space: Literal["pixel", "input"] = "pixel"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bounds: str | tuple[float, float] = "image"

    def __post_init__(self) -> None:
        put(
            self,
            eps=number(self.eps, "eps", minimum=0, finite=False),
            norm=choice(self.norm, "norm", ("linf", "l2")),
            space=choice(self.space, "space", ("pixel", "input")),
        )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None:
                values = values.tolist() if hasattr(values, "tolist") else values
                values = values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
                above = 0 if name == "std" else None
                put(self, **{name: tuple(number(v, name, above=above) for v in values)})
        if (self.mean is None) != (self.std is None):
            raise ConfigError("is missing; mean and std come together", "mean" if self.mean is None else "std")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ConfigError(f"found {len(self.std)} values; mean has {len(self.mean)}", "std")
        if not isinstance(self.bounds, str):
            given: Any = self.bounds
            put(self, bounds=given.tolist() if hasattr(given, "tolist") else given)
            if not isinstance(self.bounds, Sequence) or len(self.bounds) != 2:
                raise ConfigError(f"found {self.bounds!r}; write 'image', 'none' or [lower, upper]", "bounds")
            low, high = (number(v, "bounds") for v in self.bounds)
            if low >= high:
                raise ConfigError(f"found {list(self.bounds)!r}; the lower bound must be below the upper one", "bounds")
            put(self, bounds=(low, high))
        else:
            choice(self.bounds, "bounds", ("image", "none"))
        if self.mean is None and (self.space == "pixel" or self.bounds == "image"):
            why = "eps in pixels" if self.space == "pixel" else "bounds: 'image'"
            other = "" if self.space == "pixel" else ", or write bounds: 'none'"
            raise ConfigError(
                f"is missing, and {why} cannot be converted without mean and std; add the mean and std of the data's "
                f"Normalize (<<: *normalize_kwargs), or mean: [0], std: [1] for data in [0, 1]{other}",
                "mean",
            )

    @classmethod
    def build(cls, spec: Any) -> ThreatModel:
        """The threat model of a YAML block; a :class:`ThreatModel` is taken as it is."""
        if isinstance(spec, cls):
            return spec
        if not isinstance(spec, Mapping):
            raise ConfigError(f"found {spec!r}; write {{norm: ..., eps: ..., space: ..., mean: ..., std: ...}}")
        # torchvision's Normalize has it too, so <<: *normalize_kwargs may bring it along
        spec = {name: value for name, value in spec.items() if name != "inplace"}
        check_options(cls, spec, "a threat model")
        return cls(**spec)

    def _channels(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        if len(values) not in (1, like.shape[1]):
            raise ConfigError(f"found {len(values)} values, but the images have {like.shape[1]} channels", "mean")
        return like.new_tensor(values).view(1, -1, *[1] * (like.dim() - 2))

    def _scale(self, like: Tensor) -> Tensor | float:
        """Units of ``space`` per unit of model input."""
        return 1.0 if self.space == "input" or self.std is None else self._channels(self.std, like)

    def limits(self, like: Tensor) -> tuple[Tensor | float, Tensor | float] | None:
        """Lower and upper bound in model-input space, or None without bounds."""
        if self.bounds == "none":
            return None
        if not isinstance(self.bounds, str) and self.space == "input":
            return self.bounds
        assert self.mean is not None and self.std is not None
        low, high = (0.0, 1.0) if isinstance(self.bounds, str) else self.bounds
        mean, std = self._channels(self.mean, like), self._channels(self.std, like)
        return (low - mean) / std, (high - mean) / std

    @property
    def finite_eps(self) -> float:
        """The radius, for searches that need one.

        Raises:
            ConfigError: it is infinite.
        """
        if math.isinf(self.eps):
            raise ConfigError("found an infinite radius, which this search cannot use; write a finite one", "eps")
        return self.eps

    def displacement(self, rows: Tensor, x: Tensor) -> Tensor:
        """``rows - x`` in the units of ``space``; both (R, ...)."""
        return (rows - x) * self._scale(x)

    def distance(self, rows: Tensor, x: Tensor) -> Tensor:
        """Norm of the displacement of each row, (R,), in the units of ``space``."""
        flat = self.displacement(rows, x).flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else flat.norm(dim=1)

    def project(self, rows: Tensor, x: Tensor) -> Tensor:
        """``rows`` (R, ...) into the ball around ``x`` (R, ...) and into the valid range.

        The range is widened to hold ``x`` where that lies outside. In l2 the ball comes first; clipping to a range that
        holds ``x`` moves every coordinate toward ``x``, so the result is in both, though not always the nearest such
        point.
        """
        if self.norm == "linf":
            radius = self.eps / self._scale(x)
            rows = torch.maximum(torch.minimum(rows, x + radius), x - radius)
        else:
            norm = self.distance(rows, x)
            inside = x + _rows(rows - x, self.eps / norm.clamp_min(torch.finfo(x.dtype).tiny))
            rows = torch.where(_rows(torch.ones_like(rows), norm) > self.eps, inside, rows)
        limits = self.limits(x)
        if limits is None:
            return rows
        low, high = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in limits)
        return torch.maximum(torch.minimum(rows, torch.maximum(high, x)), torch.minimum(low, x))

    def gradient(self, gradient: Tensor) -> Tensor:
        """A gradient with respect to the model's input, (R, ...), as one with respect to the units of ``space``."""
        return gradient / self._scale(gradient)

    def step(self, rows: Tensor, direction: Tensor, size: float, norm: Norm | None = None) -> Tensor:
        """Move ``rows`` by ``size`` along ``direction`` (R, ...; in the units of ``space``), steepest in ``norm``.

        ``linf`` follows the sign, ``l2`` the unit vector; the default is the norm of the ball.
        """
        unit = direction.sign() if (norm or self.norm) == "linf" else unit_l2(direction)
        return self.shift(rows, unit * size)

    def shift(self, rows: Tensor, displacement: Tensor) -> Tensor:
        """``rows`` moved by ``displacement`` (R, ...), given in the units of ``space``."""
        return rows + displacement / self._scale(rows)

    def random_start(self, x: Tensor, uniform: Tensor, factor: float = 1.0) -> Tensor:
        r"""``project(x + factor * U(-eps, eps))``, with ``uniform`` in [-1, 1) of the shape of ``x``."""
        return self.project(self.shift(x, uniform * (factor * self.finite_eps)), x)

    def check_inputs(self, x: Tensor) -> None:
        """Refuse images outside the valid range: their perturbation would be clipped to nonsense.

        Raises:
            ConfigError: with the range found, in the units of ``space``.
        """
        limits = self.limits(x)
        if limits is None or bool(((x >= limits[0] - 1e-3) & (x <= limits[1] + 1e-3)).all()):
            return
        low, high = (0, 1) if isinstance(self.bounds, str) else self.bounds
        values, unit = x, "values"
        in_pixels = isinstance(self.bounds, str) or self.space == "pixel"
        if in_pixels and self.mean is not None and self.std is not None:
            values, unit = x * self._channels(self.std, x) + self._channels(self.mean, x), "pixels"
        own = "the mean and std of the data's own Normalize ([0] and [1] if there is none)"
        raise ConfigError(
            f"the images have {unit} from {float(values.min()):.3g} to {float(values.max()):.3g} under this threat "
            f"model, outside [{low:g}, {high:g}]; write {own if in_pixels else 'wider ones'}",
            "mean" if in_pixels else "bounds",
        )

    def describe(self) -> str:
        """One line for logs, with the radius in pixel units."""
        if math.isinf(self.eps):
            return f"{self.norm} without a radius"
        own = f"{self.norm} eps={self.eps:.4g} in {self.space} space"
        if self.std is None:
            return f"{own} (pixel units unknown without mean and std)"
        radii = [self.eps * s for s in self.std] if self.space == "input" else [self.eps]
        if self.norm == "linf":
            texts = dict.fromkeys(f"{255 * r:.3g}/255" for r in (min(radii), max(radii)))
        else:
            texts = dict.fromkeys(f"{r:.3g}" for r in (min(radii), max(radii)))
        return f"{own} = {' to '.join(texts)} in pixels of [0, 1]"
