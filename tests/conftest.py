"""Fixtures that several test files use."""

from __future__ import annotations

import pytest
import torch

from torchdistill_adv import twins
from torchdistill_adv.losses import base
from torchdistill_adv.step import Step


@pytest.fixture(autouse=True)
def plain_passes(monkeypatch):
    """Searches pass the networks as they are unless a test says otherwise: what is compared with is written plainly.

    Runs in processes of their own, and tests/test_twins.py, have the defaults of the package.
    """
    monkeypatch.setitem(base.COMMON, "search", twins.SearchPasses("auto", False, False, False))
    monkeypatch.setattr(twins, "fast_dtype", lambda device: torch.float32)


@pytest.fixture
def searches(monkeypatch):
    """Every search that is run from now on, with the examples that it gave to the losses."""
    seen = []
    run = Step._run

    def spy(self, search, term):
        examples = run(self, search, term)
        seen.append((search, examples))
        return examples

    monkeypatch.setattr(Step, "_run", spy)
    return seen
