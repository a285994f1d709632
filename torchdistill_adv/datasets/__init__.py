"""Data sets for torchdistill's YAML that torchvision does not have, and wrappers of data sets."""

from torchdistill_adv.datasets.digits import Digits
from torchdistill_adv.datasets.generated import MixedWithGenerated
from torchdistill_adv.datasets.pairing import PairWithOtherClass
from torchdistill_adv.datasets.rotations import FourRotations, SSKDRotations

__all__ = ["Digits", "FourRotations", "MixedWithGenerated", "PairWithOtherClass", "SSKDRotations"]
