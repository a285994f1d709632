"""Which images a search starts from, and the classes that its objective is told.

A source is a frozen dataclass, so equal settings are equal objects. The labelled images of the batch are
``step.images``; a source that takes some of them says which, so that what is known of them is not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchdistill_adv.step import Step


class Chosen(NamedTuple):
    """The images of a search.

    Args:
        images: (n, ...), in model-input space.
        which: the labelled images of the batch that they are, (n,); None where they are others.
    """

    images: Tensor
    which: Tensor | None


class Source(Protocol):
    """The form of a source."""

    @property
    def label_free(self) -> bool:
        """Whether it takes the teacher's predictions for classes, and no label is read."""

    def choose(self, step: Step) -> Chosen:
        """The images; called once a step."""

    def classes(self, step: Step) -> Tensor:
        """The class of each chosen image, (n,)."""

    def size(self, images: int, num_views: int) -> int:
        """At most how many of a batch of ``images`` labelled ones it takes, for the cost line."""


@dataclass(frozen=True)
class Images:
    """The labelled images of the batch, or the first ``count`` of them."""

    count: int | None = None
    label_free: bool = False

    def choose(self, step: Step) -> Chosen:
        images = step.images[: self.count]
        return Chosen(images, torch.arange(len(images), device=images.device))

    def classes(self, step: Step) -> Tensor:
        return step.classes(self.label_free)[: self.count]

    def size(self, images: int, num_views: int) -> int:
        return images if self.count is None else min(self.count, images)


@dataclass(frozen=True)
class AllViews:
    """Every view of a multi-view batch (SSKD's rotations), each of the class of its image."""

    @property
    def label_free(self) -> bool:
        return False

    def choose(self, step: Step) -> Chosen:
        which = torch.arange(len(step.images), device=step.images.device)
        return Chosen(step.all_images, which if step.num_views == 1 else None)

    def classes(self, step: Step) -> Tensor:
        return step.labels.repeat_interleave(step.num_views)

    def size(self, images: int, num_views: int) -> int:
        return images * num_views
