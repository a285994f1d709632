"""Binding without a ``pre_epoch_process`` line: importing this module is enough.

.. code-block:: yaml

    dependencies:
      - name: 'torchdistill_adv.autobind'

It wraps ``DistillationBox.setup`` and ``TrainingBox.setup``, which torchdistill calls for every stage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torchdistill.core.distillation import DistillationBox
from torchdistill.core.training import TrainingBox

import torchdistill_adv  # noqa: F401  (registers everything)
from torchdistill_adv.binding import bind
from torchdistill_adv.boxes import Box


def _wrap(cls: type[Box]) -> None:
    setup: Callable[..., None] = cls.setup

    def setup_and_bind(self: Box, *args: Any, **kwargs: Any) -> None:
        setup(self, *args, **kwargs)
        if bind(self) is None:
            self.__dict__.pop("pre_epoch_process", None)
            return
        reference = weakref.ref(self)

        def pre_epoch_process(*args: Any, epoch: int | None = None, **kwargs: Any) -> None:
            box = reference()
            assert box is not None
            # looked up on the class, where torchdistill sets the stage's own
            type(box).pre_epoch_process(box, *args, epoch=epoch, **kwargs)
            bind(box, epoch)

        self.__dict__["pre_epoch_process"] = pre_epoch_process

    cls.setup = setup_and_bind


for _box_class in (DistillationBox, TrainingBox):
    _wrap(_box_class)
