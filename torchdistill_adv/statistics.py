"""What a search did, and how long it took: for whoever watches a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchdistill_adv.adversaries import Examples
from torchdistill_adv.objectives import BoundObjective, Network, Who
from torchdistill_adv.threat import ThreatModel


@torch.no_grad()
def search_statistics(
    objective: BoundObjective,
    attacked: Mapping[Who, Network],
    images: Tensor,
    examples: Examples,
    threat: ThreatModel,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """What a search did, in means over its examples.

    Every example is compared with its own clean image, so all passes have as many rows as those of the search had.
    There are two of each network for the objective, and two of each attacked one for its predictions.

    Args:
        objective: what the search maximised; one with a target class was minimised.
        attacked: the networks that see the examples in the search, in the mode of the search.
        images: its clean images, (N, ...).
        examples: what it found, R of them.
        threat: its threat model.
        chunk_size: rows through a network at once; None is all.

    Returns:
        ``objective_clean`` and ``objective_adversarial``, the means of the objective; ``changed_student`` and
        ``changed_teacher``, the share of the examples that change the prediction of each attacked network, in [0, 1];
        ``distance_mean`` and ``distance_max``, the perturbation's norm in the units of the threat model's space, and
        ``eps``, its bound, unless that is infinite. A value that is not finite stands as it is.
    """
    rows, index = examples.rows, examples.index
    clean = images[index]

    def by_chunks(function: Callable[[Tensor, Tensor], Tensor], some: Tensor) -> Tensor:
        size = chunk_size or len(some)
        return torch.cat([function(*part) for part in zip(some.split(size), index.split(size), strict=True)])

    def changes(network: Network) -> Tensor:
        before, after = (by_chunks(lambda x, _: network(x).argmax(1), some) for some in (clean, rows))
        return before != after

    distance = threat.distance(rows, clean)
    found = {
        "objective_clean": by_chunks(objective, clean),
        "objective_adversarial": by_chunks(objective, rows),
        **{f"changed_{who}": changes(network) for who, network in attacked.items()},
        "distance_mean": distance,
        "distance_max": distance.max(),
    }
    radius = {} if math.isinf(threat.eps) else {"eps": threat.eps}
    return {name: float(values.float().mean()) for name, values in found.items()} | radius


@dataclass
class Watch:
    """A training step that is watched; what is seen does not change the step.

    Args:
        device: whose work is waited for before the time is read.
        searches: the statistics of each search of the step, by its name.
        seconds: spent on ``search``, which includes those on ``statistics``.
    """

    device: torch.device
    searches: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"search": 0.0, "statistics": 0.0})

    def now(self) -> float:
        """The time when all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the time that the context takes."""
        start = self.now()
        yield
        self.seconds[what] += self.now() - start
