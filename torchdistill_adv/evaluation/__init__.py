"""What papers' tables and figures measure, on any classifier: attacks, and how alike teacher and student are."""

from torchdistill_adv.evaluation.attacks import Attack, Attacked, GradientAttack, parse_attacks
from torchdistill_adv.evaluation.engine import evaluate
from torchdistill_adv.evaluation.pixels import PixelModel, find_normalization, pixel_threat
from torchdistill_adv.evaluation.results import AttackResult, Evaluation, Flag

__all__ = [
    "Attack",
    "AttackResult",
    "Attacked",
    "Evaluation",
    "Flag",
    "GradientAttack",
    "PixelModel",
    "evaluate",
    "find_normalization",
    "parse_attacks",
    "pixel_threat",
]
