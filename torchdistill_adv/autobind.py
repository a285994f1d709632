"""Binding without a ``pre_epoch_process`` line: importing this module is enough.

.. code-block:: yaml

    dependencies:
      - name: 'torchdistill_adv.autobind'

It wraps ``DistillationBox.setup`` and ``TrainingBox.setup``, which torchdistill calls for every stage.
"""

from __future__ import annotations

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
        # torchdistill has just set it, on the class
        process: Callable[..., None] = cls.pre_epoch_process

        def pre_epoch_process(self: Box, epoch: int | None = None, *args: Any, **kwargs: Any) -> None:
            process(self, epoch, *args, **kwargs)
            bind(self, epoch)

        cls.pre_epoch_process = pre_epoch_process
        bind(self)

    cls.setup = setup_and_bind


for _box_class in (DistillationBox, TrainingBox):
    _wrap(_box_class)
