"""Everything that is registered, one row each: what the contract tests build and train with.

A row is the block of a term. Its options make it cheap; the rest are its defaults.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from tiny import KD, NORMALIZE, NUM_CLASSES, images, on_adversarial
from torch import nn
from torchdistill.losses.registry import LOSS_WRAPPER_DICT, MIDDLE_LEVEL_LOSS_DICT

from torchdistill_adv.losses import AdversarialTerm
from torchdistill_adv.objectives import OBJECTIVES
from torchdistill_adv.registry import ADVERSARIES

LINF = {**NORMALIZE, "norm": "linf", "eps": "8/255"}
L2 = {**NORMALIZE, "norm": "l2", "eps": 0.3, "space": "input"}
PGD_2 = {"key": "PGD", "kwargs": {"num_steps": 2, "start": "gaussian"}}


def row(key: str, **options: Any) -> dict[str, Any]:
    kwargs = {"adversary": PGD_2, "threat": LINF, **options}
    return {"criterion": {"key": key, "kwargs": kwargs}, "weight": 1.0}


LOSSES = {
    "PGDATLoss": row("PGDATLoss"),
    "TRADESLoss": row("TRADESLoss"),
    "ARDLoss": row("ARDLoss", alpha=0.5),
    "IADLoss": row("IADLoss", begin_epoch=0),
    "IADLoss-II": row("IADLoss", begin_epoch=0, variant="II"),
    "RSLADLoss": row("RSLADLoss"),
    "AKDLoss": row("AKDLoss"),
    "AKD2Loss": row("AKD2Loss"),
    "AdaADLoss": row("AdaADLoss", alpha=0.5),
    "AdaIADLoss": row("AdaIADLoss", begin_epoch=0),
    "DARWINLoss": row("DARWINLoss", pairing="dataset"),
    "DARWINLoss-batch": row("DARWINLoss"),
    "DARWINLoss-LF": row("DARWINLoss", label_free=True),
    "SmaraADLoss": row("SmaraADLoss"),
    "SmaraADLoss-feature": row("SmaraADLoss", alignment="feature", matching="kl"),
    "SmaraADLoss-plus_plus": row("SmaraADLoss", plus_plus=True),
    "BSSLoss": row("BSSLoss", adversary="BSS", threat={**L2, "eps": math.inf}),
    "GACDLoss": row("GACDLoss"),
    "CRDNDLoss": row("CRDNDLoss"),
    "IGDMLoss": row("IGDMLoss"),
    "DGADLoss": row("DGADLoss"),
    "TALDLoss": row("TALDLoss", adversary="SVGD", threat=L2),
    "OnAdversarialExamples": on_adversarial(KD),
}

# a loss that any search can stand in
ADVERSARY_ROWS = {
    "PGD": row("AdaADLoss"),
    "FGSM": row("AdaADLoss", adversary="FGSM"),
    "SVGD": row("AdaADLoss", adversary="SVGD", threat=L2),
    "VirtualSVGD": row("AdaADLoss", adversary="VirtualSVGD", threat=L2),
    "BSS": row("AdaADLoss", adversary="BSS", threat=L2, objective="gap_teacher"),
}
OBJECTIVE_ROWS = {key: row("AdaADLoss", objective=key) for key in OBJECTIVES}

ROWS = {
    **LOSSES,
    **{f"adversary {key}": block for key, block in ADVERSARY_ROWS.items()},
    **{f"objective {key}": block for key, block in OBJECTIVE_ROWS.items()},
}

# they say so, and why, where a batch has nothing to pair
NEEDS_TWO_CLASSES = {"DARWINLoss-batch", "DARWINLoss-LF"}
WITHOUT_TEACHER = {"PGDATLoss", "TRADESLoss"}


def registered_losses() -> set[str]:
    found = {**MIDDLE_LEVEL_LOSS_DICT, **LOSS_WRAPPER_DICT}
    ours = {k for k, v in found.items() if isinstance(v, type) and issubclass(v, AdversarialTerm)}
    return {key for key in ours if found[key].__module__.startswith("torchdistill_adv.")}


def unregistered() -> set[str]:
    """What is registered and has no row, or has one and is not."""
    rows = {key.split("-")[0] for key in LOSSES}
    return (rows ^ registered_losses()) | (set(ADVERSARY_ROWS) ^ set(ADVERSARIES))


class TwoTeachers(nn.Module):
    """A teacher with a second one, ``standard``."""

    def __init__(self, robust: nn.Module, standard: nn.Module) -> None:
        super().__init__()
        self.robust, self.standard = robust, standard

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.robust(x)


def batch_for(name: str, teacher: nn.Module, student: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels; for BSS, which starts from images that both networks get right, what both of them say."""
    x, y = images()
    if name != "BSSLoss":
        return x, y
    with torch.no_grad(), torch.random.fork_rng():
        says = copy.deepcopy(teacher).float().eval()(x).argmax(1)
        right = says == copy.deepcopy(student).float().train()(x).argmax(1)
    assert right.sum() >= 2
    return x, torch.where(right, says, y)


def pairs(y: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the data-set wrapper gives: an image of another class for each."""
    other, _ = images(len(y), seed=5)
    return {"paired_image": other.to(dtype), "paired_label": (y + 1) % NUM_CLASSES}
