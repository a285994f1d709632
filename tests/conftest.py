"""Fixtures that several test files use."""

from __future__ import annotations

import pytest

from torchdistill_adv.step import Step


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
