"""Studies and the settings they share, read from YAML.

A *setting* (``settings/NAME.yaml``) is what all its students have in common: images, teachers, networks and schedule at
each size, and how students are measured. A *study* (``studies/NAME.yaml``) is a question, the *variants* that answer
it, and which of them are compared. Variants of one setting share their results across studies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from torchdistill_adv.errors import ConfigError, inside, nearest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """One way to train a student, or to search particles around a teacher's images.

    Args:
        name: in tables.
        config: of ``configs/``, without the extension; empty for a search.
        teacher: of the setting; empty for none.
        options: of loss terms, ``{term.option: value}``.
        overrides: of any other entry of the configuration, by dotted path.
        search: adversary of particles, in the place of ``config``.
        duration: how many times the epochs of the setting, and so their milestones.
        seeds: how many, from 0.
        note: what a reader has to know, for the table.
    """

    name: str
    config: str = ""
    teacher: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] | None = None
    duration: float = 1.0
    seeds: int = 3
    note: str = ""

    @property
    def slug(self) -> str:
        """Its name in files."""
        return re.sub(r"\W+", "_", self.name.lower().replace("+", "plus")).strip("_")


@dataclass(frozen=True)
class Size:
    """How large a setting is run.

    Args:
        description: of networks, images and schedule, one sentence each.
        images: arguments of :class:`experiments.data.Images` for students.
        teacher_images: the same for teachers, where they differ.
        teacher: network of the teachers, ``{key, kwargs}``; by default that of the configuration.
        student: network of the students, likewise.
        overrides: of every configuration that has the block, by dotted path.
        teacher_overrides: of the teachers' configurations, beside these.
        student_overrides: of the students', likewise.
        options: of every loss term that a configuration has, ``{term.option: value}``.
        measures: that are other than the setting's, by name.
    """

    description: str
    images: Mapping[str, Any] = field(default_factory=dict)
    teacher_images: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] | None = None
    student: Mapping[str, Any] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    teacher_overrides: Mapping[str, Any] = field(default_factory=dict)
    student_overrides: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What variants have in common.

    Args:
        name: of its file.
        data: name of the images, as :class:`experiments.data.Images` knows it.
        is_normalized: whether networks take normalized images; else they take pixels.
        measures: ``robustness`` and ``autoattack`` (arguments of :func:`torchdistill_adv.evaluation.evaluate`),
            ``similarity`` (``num_images``), ``diversity`` (``num_images``, ``threat`` and ``search``); ``of`` lists the
            checkpoints, ``last`` and ``best``, that one is for.
        teachers: by name.
        sizes: by name.
    """

    name: str
    data: str
    is_normalized: bool
    measures: Mapping[str, Any]
    teachers: Mapping[str, Variant]
    sizes: Mapping[str, Size]


@dataclass(frozen=True)
class Comparison:
    """A claim that is tested: one variant against another, seed by seed.

    Args:
        says: the question.
        variant: name of the one.
        reference: name of the other.
        measure: that counts; a path such as ``last.pgd20``.
    """

    says: str
    variant: str
    reference: str
    measure: str


@dataclass(frozen=True)
class Study:
    """A question and what answers it.

    Args:
        name: of its file.
        title: of its page.
        question: what it asks.
        setting: that its variants share.
        variants: in the order of the table.
        columns: measures in the table, heading by path.
        timed: variant in whose time the measure ``time`` is, that of ``python -m experiments time``.
        reference: every other variant is compared with it: ``{variant, measure}``.
        comparisons: what else is compared.
        notes: what a reader has to know.
        chart: of the picture, as :mod:`experiments.charts` has it.
        readme: ``columns`` and ``variants`` of its table in the README; empty for none.
        budget: minutes that one ``run`` takes at most, by size, unless the command says otherwise.
    """

    name: str
    title: str
    question: str
    setting: Setting
    variants: tuple[Variant, ...]
    columns: Mapping[str, str]
    timed: str = ""
    reference: Mapping[str, str] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    notes: Sequence[str] = ()
    chart: Mapping[str, Any] = field(default_factory=dict)
    readme: Mapping[str, Sequence[str]] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)

    def variant(self, name: str) -> Variant:
        """The one of that name."""
        return next(variant for variant in self.variants if variant.name == name)


def study_names(folder: Path = HERE) -> list[str]:
    return sorted(path.stem for path in (folder / "studies").glob("*.yaml"))


def load_study(name: str, folder: Path = HERE) -> Study:
    """Read a study and its setting.

    Args:
        name: of the file in ``studies/``.
        folder: that has ``studies/`` and ``settings/``.

    Raises:
        ConfigError: no such study, or an entry that it cannot have; with the path of the entry.
    """
    block = _read(folder / "studies", name)
    with inside(f"studies/{name}.yaml"):
        setting = load_setting(block.pop("setting", ""), folder)
        variants = tuple(_variants(block.pop("variants", {}), folder, setting))
        with inside("comparisons"):
            found = [build(Comparison, item, str(i)) for i, item in enumerate(block.pop("comparisons", ()))]
            for i, comparison in enumerate(found):
                for who in (comparison.variant, comparison.reference):
                    _known(who, [variant.name for variant in variants], str(i))
        if block.get("timed"):
            _known(block["timed"], [variant.name for variant in variants], "timed")
        return build(Study, block, "", name=name, setting=setting, variants=variants, comparisons=tuple(found))


def load_setting(name: str, folder: Path = HERE) -> Setting:
    """Read a setting.

    Raises:
        ConfigError: no such setting, or an entry that it cannot have.
    """
    block = _read(folder / "settings", name)
    with inside(f"settings/{name}.yaml"):
        teachers = {
            who: build(Variant, item, f"teachers.{who}", name=who, seeds=1)
            for who, item in block.pop("teachers").items()
        }
        sizes = {who: build(Size, item, f"sizes.{who}") for who, item in block.pop("sizes").items()}
        return build(Setting, block, "", name=name, teachers=teachers, sizes=sizes)


def build(kind: type[T], block: Any, path: str, **given: Any) -> T:
    """A dataclass of a YAML block.

    Raises:
        ConfigError: a key that it does not have, or one that is missing.
    """
    with inside(path):
        if not isinstance(block, Mapping):
            raise ConfigError(f"found {block!r}; write a mapping")
        names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
        for key in block:
            if key not in names or key in given:
                raise ConfigError(f"found '{key}'; {nearest(key, set(names) - set(given))}")
        try:
            return kind(**block, **given)
        except TypeError as error:
            raise ConfigError(f"found too few entries: {error}") from error


def _variants(block: Mapping[str, Any], folder: Path, setting: Setting) -> list[Variant]:
    """The variants of a study; the text in the place of one names the study that has it."""
    found = []
    for name, item in block.items():
        with inside(f"variants.{name}"):
            if isinstance(item, str):
                others = {v.name: v for v in _variants(_read(folder / "studies", item)["variants"], folder, setting)}
                found.append(others[_known(name, others, "")])
                continue
            variant = build(Variant, item, "", name=name)
            if bool(variant.config) == (variant.search is not None):
                raise ConfigError("write either config or search")
            if variant.teacher:
                _known(variant.teacher, setting.teachers, "teacher")
            found.append(variant)
    return found


def _known(name: str, known: Any, path: str) -> str:
    if name not in known:
        raise ConfigError(f"found '{name}'; {nearest(name, known)}", path)
    return name


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(
            f"found {name!r}; {nearest(name, [path.stem for path in folder.glob('*.yaml')])}", folder.name
        )
    block: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return block
