"""Adversarial losses, one file a method; importing this registers them with torchdistill."""

from torchdistill_adv.losses.adaad import AdaADLoss
from torchdistill_adv.losses.adaiad import AdaIADLoss
from torchdistill_adv.losses.akd import AKDLoss
from torchdistill_adv.losses.akd2 import AKD2Loss
from torchdistill_adv.losses.ard import ARDLoss
from torchdistill_adv.losses.base import AdversarialTerm, Cost, Search
from torchdistill_adv.losses.bss import BSSLoss
from torchdistill_adv.losses.crdnd import CRDNDLoss
from torchdistill_adv.losses.darwin import DARWINLoss
from torchdistill_adv.losses.dgad import DGADLoss
from torchdistill_adv.losses.gacd import GACDLoss
from torchdistill_adv.losses.iad import IADLoss
from torchdistill_adv.losses.igdm import IGDMLoss
from torchdistill_adv.losses.on_adversarial_examples import OnAdversarialExamples
from torchdistill_adv.losses.pgd_at import PGDATLoss
from torchdistill_adv.losses.rslad import RSLADLoss
from torchdistill_adv.losses.smaraad import SmaraADLoss
from torchdistill_adv.losses.tald import TALDLoss
from torchdistill_adv.losses.trades import TRADESLoss

__all__ = [
    "AKD2Loss",
    "AKDLoss",
    "ARDLoss",
    "AdaADLoss",
    "AdaIADLoss",
    "AdversarialTerm",
    "BSSLoss",
    "CRDNDLoss",
    "Cost",
    "DARWINLoss",
    "DGADLoss",
    "GACDLoss",
    "IADLoss",
    "IGDMLoss",
    "OnAdversarialExamples",
    "PGDATLoss",
    "RSLADLoss",
    "Search",
    "SmaraADLoss",
    "TALDLoss",
    "TRADESLoss",
]
