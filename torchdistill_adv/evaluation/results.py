"""The result of an evaluation: every image's outcome, and what is said of all of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.statistics import wilson_interval


@dataclass(frozen=True)
class Flag:
    """A reason to doubt the numbers: its name, and one line of what was seen and what it can mean."""

    name: str
    message: str


@dataclass(frozen=True)
class AttackResult:
    """One attack at one radius.

    Args:
        attack: its name; ``clean`` for none.
        settings: its parameters.
        eps: radius in pixels of [0, 1]; 0 for ``clean``.
        outcomes: whether each image is still classified rightly; one that is wrong without an attack never is.
        seconds: spent on it.
        gradient_evaluations: passes backward to the input, in images.
        forward_evaluations: passes forward, in images.
        found_by: how many examples each part of a composed attack found.
        median_distance: of an attack that looks for the nearest example: its median distance, in the norm of the
            evaluation; over the images that it fooled at any distance.
    """

    attack: str
    settings: Mapping[str, Any]
    eps: float
    outcomes: Sequence[bool]
    seconds: float
    gradient_evaluations: int
    forward_evaluations: int
    found_by: Mapping[str, int] | None = None
    median_distance: float | None = None

    @property
    def correct(self) -> int:
        return sum(self.outcomes)

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / len(self.outcomes)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in percent."""
        return wilson_interval(self.correct, len(self.outcomes))

    def as_json(self) -> dict[str, Any]:
        optional = {"found_by": self.found_by, "median_distance": self.median_distance}
        return {
            "attack": self.attack,
            "settings": self.settings,
            "eps": self.eps,
            "correct": self.correct,
            "num_images": len(self.outcomes),
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "seconds": self.seconds,
            "gradient_evaluations": self.gradient_evaluations,
            "forward_evaluations": self.forward_evaluations,
            **{name: value for name, value in optional.items() if value is not None},
            "outcomes": "".join("01"[outcome] for outcome in self.outcomes),
        }


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one network.

    Args:
        results: ``clean`` first, then every attack at every radius.
        flags: reasons to doubt them.
        norm: of the ball.
        facts: what else the record needs: model, data, seed, device, versions.
    """

    results: Sequence[AttackResult]
    flags: Sequence[Flag]
    norm: str
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        return self.table()

    def result(self, attack: str, eps: float | None = None) -> AttackResult:
        """That of an attack, at the first radius unless one is given."""
        return next(r for r in self.results if r.attack == attack and eps in (None, r.eps))

    def worst_case(self) -> list[AttackResult]:
        """For every radius, the images that no attack at it fooled."""
        found = []
        attacked = [r for r in self.results if r.attack != "clean"]
        for eps in dict.fromkeys(r.eps for r in attacked):
            some = [r for r in attacked if r.eps == eps]
            outcomes = [all(each) for each in zip(*(r.outcomes for r in some), strict=True)]
            sums = (sum(r.seconds for r in some), *(sum(getattr(r, n) for r in some) for n in COUNTS))
            found.append(AttackResult("worst case", {}, eps, outcomes, *sums))
        return found

    def with_facts(self, **facts: Any) -> Evaluation:
        """The same with more for the record."""
        return dataclasses.replace(self, facts={**self.facts, **facts})

    def as_json(self) -> dict[str, Any]:
        names = ("eps", "correct", "accuracy", "interval")
        return {
            **self.facts,
            "norm": self.norm,
            "results": [result.as_json() for result in self.results],
            "worst_case": [{name: each.as_json()[name] for name in names} for each in self.worst_case()],
            "flags": [{"name": flag.name, "message": flag.message} for flag in self.flags],
        }

    def write(self, path: Path) -> None:
        """Write the JSON, all of it or nothing."""
        write_json(self.as_json(), path)

    def table(self) -> str:
        """Markdown, with the flags below."""
        lines = [
            "| attack | eps | accuracy, % | 95 % interval | seconds | gradients an image |",
            "|---|---|---|---|---|---|",
        ]
        rows = [*self.results]
        for worst in self.worst_case():
            same = [r for r in self.results if r.eps == worst.eps and r.attack != "clean"]
            if len(same) > 1:
                rows.insert(rows.index(same[-1]) + 1, worst)
        for r in rows:
            low, high = r.interval
            radius = "" if r.attack == "clean" else describe_eps(r.eps, self.norm)
            per_image = r.gradient_evaluations / len(r.outcomes)
            lines.append(
                f"| {r.attack} | {radius} | {r.accuracy:.2f} | {low:.1f} to {high:.1f} | {r.seconds:.1f} "
                f"| {per_image:.1f} |"
            )
        flags = [f"FLAG {flag.name}: {flag.message}" for flag in self.flags]
        return "\n".join([*lines, "", *(flags or ["no flags"])])


def write_json(found: Any, path: Path) -> None:
    """Write a JSON file, all of it or nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    # lists on one line: only between the lines of the file can a newline follow a bracket
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), json.dumps(found, indent=1))
    with usable(path, "out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)


@contextmanager
def usable(path: Path, option: str) -> Iterator[None]:
    """Say in one line what the system says of a file that is read or written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"found {path}, which cannot be used: {reason}; write another path, or make it usable", option
        ) from error


COUNTS = ("gradient_evaluations", "forward_evaluations")


def describe_eps(eps: float, norm: str) -> str:
    """A radius as papers write it: in 255ths where it is a whole number of them."""
    steps = round(255 * eps)
    return f"{steps}/255" if norm == "linf" and steps and abs(255 * eps - steps) < 1e-6 else f"{eps:.4g}"
