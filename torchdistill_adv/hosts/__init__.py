"""What torchdistill lacks of the methods that adversarial terms are added to; importing this registers it."""

from torchdistill_adv.hosts.at import PooledATLoss
from torchdistill_adv.hosts.auxiliary import Adapters, ConvRegressor, ab_connector
from torchdistill_adv.hosts.cc import CCLoss
from torchdistill_adv.hosts.ft import FactorMapLoss
from torchdistill_adv.hosts.hsakd import HSAKDHeadsLoss, HSAKDLoss
from torchdistill_adv.hosts.hsakd_heads import HSAKDHeads, HSAKDWrapper
from torchdistill_adv.hosts.nst import NSTLoss
from torchdistill_adv.hosts.sp import SPLoss
from torchdistill_adv.hosts.vid import PooledVIDLoss

__all__ = [
    "Adapters",
    "CCLoss",
    "ConvRegressor",
    "FactorMapLoss",
    "HSAKDHeads",
    "HSAKDHeadsLoss",
    "HSAKDLoss",
    "HSAKDWrapper",
    "NSTLoss",
    "PooledATLoss",
    "PooledVIDLoss",
    "SPLoss",
    "ab_connector",
]
