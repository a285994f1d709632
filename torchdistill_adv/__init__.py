"""Adversarial distillation for torchdistill: importing this registers every loss, adversary, model and dataset."""

__version__ = "0.1.0"

from torchdistill_adv import adversaries, binding, datasets, hosts, losses, models, robust_validation, teacher_mode
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.objectives import register_objective
from torchdistill_adv.registry import register_adversary
from torchdistill_adv.threat import ThreatModel

__all__ = [
    "ConfigError",
    "NonFiniteError",
    "ThreatModel",
    "adversaries",
    "binding",
    "datasets",
    "hosts",
    "losses",
    "models",
    "register_adversary",
    "register_objective",
    "robust_validation",
    "teacher_mode",
]
