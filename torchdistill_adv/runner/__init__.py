"""Training and testing from a torchdistill YAML file; ``torchdistill-adv`` on the command line calls :func:`run`."""

from torchdistill_adv.runner.experiment import run

__all__ = ["run"]
