"""Data sets for torchdistill's YAML that torchvision does not have, and a wrapper of data sets."""

from torchdistill_adv.datasets.digits import Digits
from torchdistill_adv.datasets.generated import MixedWithGenerated
from torchdistill_adv.datasets.pairing import PairWithOtherClass

__all__ = ["Digits", "MixedWithGenerated", "PairWithOtherClass"]
