"""Data sets for torchdistill's YAML that torchvision does not have."""

from torchdistill_adv.datasets.digits import Digits

__all__ = ["Digits"]
