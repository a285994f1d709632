"""Adversarial losses, one file a method; importing this registers them with torchdistill."""

from torchdistill_adv.losses.base import AdversarialTerm, Cost, Search
from torchdistill_adv.losses.on_adversarial_examples import OnAdversarialExamples
from torchdistill_adv.losses.tald import TALDLoss

__all__ = ["AdversarialTerm", "Cost", "OnAdversarialExamples", "Search", "TALDLoss"]
