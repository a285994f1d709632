"""Models for torchdistill's YAML that it does not have itself; importing this registers them."""

from torchdistill_adv.models.small_cnn import SmallCNN
from torchdistill_adv.models.timm import timm

__all__ = ["SmallCNN", "timm"]
