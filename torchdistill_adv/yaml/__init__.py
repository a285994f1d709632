"""YAML files of torchdistill, edited as text: what is added is new, and every other byte stays."""

from torchdistill_adv.yaml.add import Addition, add_term, add_to_file

__all__ = ["Addition", "add_term", "add_to_file"]
