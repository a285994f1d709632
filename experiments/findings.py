"""What the results of a study say: values by variant and seed, differences, what is missing or out of date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.fingerprint import is_code
from experiments.intervals import Estimate, estimate, estimate_with_images
from experiments.measure import unpack
from experiments.runs import Place, Run, runs_of
from experiments.study import Study, Variant
from experiments.timing import outdated_times, read_times, relative_times

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Findings:
    """The results of a study.

    Args:
        study: the study.
        place: where the results are.
        results: by variant and seed.
        missing: runs that were not done, or with a result of another configuration.
        outdated: runs with a result of other code, and the files that have changed since; it is among the results.
        times: what :func:`experiments.timing.time_study` has written.
        outdated_times: what has changed since, by variant; those with another configuration have no time.
    """

    study: Study
    place: Place
    results: Mapping[str, Mapping[int, Result]]
    missing: tuple[Run, ...]
    outdated: tuple[tuple[Run, tuple[str, ...]], ...]
    times: Mapping[str, Any]
    outdated_times: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, study: Study, place: Place) -> Findings:
        """Read the results of a study."""
        results: dict[str, dict[int, Result]] = {}
        missing, outdated = [], []
        for run in runs_of(study, place):
            result, differs = run.result(), run.differs()
            if result is None or differs is None or not is_code(differs):
                missing.append(run)
                continue
            results.setdefault(run.variant.name, {})[run.seed] = result
            if differs:
                outdated.append((run, tuple(differs)))
        times = read_times(study, place)
        return cls(study, place, results, tuple(missing), tuple(outdated), times, outdated_times(times, study, place))

    @property
    def variants(self) -> list[Variant]:
        """Those with a result."""
        return [variant for variant in self.study.variants if variant.name in self.results]

    @property
    def marked(self) -> set[str]:
        """Names of the variants with a result of other code."""
        return {run.variant.name for run, _ in self.outdated}

    def values(self, name: str, measure: str) -> dict[int, float]:
        """A measure of a variant by seed, or ``time`` by round; empty where it has none."""
        if measure == "time":
            holds = all(is_code(self.outdated_times.get(each, ())) for each in (name, self.study.timed))
            return relative_times(self.times, name, self.study.timed) if holds else {}
        found = {seed: value_of(result, measure) for seed, result in self.results.get(name, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, name: str, measure: str) -> Estimate | None:
        """The mean of a measure over the seeds of a variant."""
        values = self.values(name, measure)
        return estimate(list(values.values())) if values else None

    def difference(self, name: str, reference: str, measure: str) -> Estimate | None:
        """By how much a variant exceeds another one, over the seeds that both have.

        Where the outcome of every image is known, the images count as a sample too.
        """
        seeds = sorted(self.values(name, measure).keys() & self.values(reference, measure).keys())
        if not seeds or name == reference:
            return None
        pairs = [(self.results[name][seed], self.results[reference][seed]) for seed in seeds]
        outcomes = [tuple(outcomes_of(result, measure) for result in pair) for pair in pairs]
        if all(first is not None and second is not None for first, second in outcomes):
            return estimate_with_images(np.array([100.0 * (first - second) for first, second in outcomes]))
        return estimate([value_of(own, measure) - value_of(other, measure) for own, other in pairs])


def seconds_of(result: Result) -> float:
    """How long a run took: training, which may have been done before its last process, and measuring."""
    return max(result["wall_seconds"], result.get("seconds", 0.0))


def value_of(result: Result, measure: str) -> Any:
    """A measure of a result, such as ``seconds`` or ``last.pgd20``; None if it has none.

    ``validation.clean`` and ``validation.robust`` are of the validation images, at the last epoch.
    """
    value: Any = result if measure in result else result["measured"]
    if measure.startswith("validation."):
        value = {"validation": result["epochs"][-1].get("robust_validation")}
    for part in measure.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def outcomes_of(result: Result, measure: str) -> Any:
    """What an accuracy is the mean of: the outcome of every image, as numbers; None for other measures."""
    which, _, attack = measure.partition(".")
    packed = (value_of(result, which) or {}).get("outcomes", {}).get(attack) if attack else None
    return None if packed is None else np.array(unpack(packed), dtype=np.float64)
