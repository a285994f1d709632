"""Any timm model from the YAML."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchdistill.models.registry import register_model


@register_model(key="timm")
def timm(model_name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model``: https://github.com/huggingface/pytorch-image-models.

    Args:
        model_name: timm's name, such as ``deit_small_patch16_224``.
        kwargs: its options: ``pretrained``, ``num_classes``, ``in_chans``, ``img_size`` ...

    Example:
        .. code-block:: yaml

            student_model:
              key: 'timm'
              kwargs: {model_name: 'resnet18', num_classes: 100, pretrained: False}
    """
    # timm takes about a second to import
    from timm import create_model

    model: nn.Module = create_model(model_name, **kwargs)
    return model
