"""Boxes with a Hugging Face Accelerator and a frozen teacher: importing this module is enough.

.. code-block:: yaml

    dependencies:
      - name: 'torchdistill_adv.accelerate'

It is for a runner that hands an ``accelerate.Accelerator`` to torchdistill, as that of its examples with Transformers.
Where nothing of the teacher is trained, torchdistill asks ``accelerator.state.use_fp16``, which Accelerate no longer
has. Here it is there again, and False: the teacher keeps its float32, which takes the images as they are.

This package's own runner needs none of it: ``accelerate launch -m torchdistill_adv train`` starts it as torchrun does.
"""

from __future__ import annotations

from accelerate.state import AcceleratorState

import torchdistill_adv  # noqa: F401  (registers everything)

if not hasattr(AcceleratorState, "use_fp16"):
    AcceleratorState.use_fp16 = False
