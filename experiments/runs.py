"""One run of a study: where its files are, the configuration it trains, and whether its result still holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.fingerprint import code_digests, differing, digest, modules_of
from experiments.study import HERE, ROOT, Setting, Size, Study, Variant
from torchdistill_adv.checks import number
from torchdistill_adv.errors import ConfigError, nearest
from torchdistill_adv.runner.check import student_name
from torchdistill_adv.runner.config import TaggedYAML, plain_config

SUB_TERMS = "train.criterion.kwargs.sub_terms"
TRAINING = (
    "experiments.train",
    "torchdistill_adv.binding",
    "torchdistill_adv.runner.training",
    "torchdistill_adv.robust_validation",
)
MEASURING = "experiments.measure"
SEARCHING = "experiments.particles"


@dataclass(frozen=True)
class Place:
    """Where a study is run, and where its results are.

    Args:
        size: of the setting.
        source: of the images.
        results: folder of the JSON files.
        state: folder of checkpoints.
        studies: folder that has ``studies`` and ``settings``.
    """

    size: str = "small"
    source: str = "packs"
    results: Path = ROOT / "results"
    state: Path = ROOT / "resource" / "experiments"
    studies: Path = HERE

    @property
    def is_default(self) -> bool:
        """Whether its results are those of the overview and the README."""
        return (self.size, self.source) == ("small", "packs")

    @property
    def is_ours(self) -> bool:
        """Whether studies and results are those of the repository."""
        return (self.results, self.studies) == (Place.results, Place.studies)


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    setting: Setting
    variant: Variant
    seed: int
    place: Place

    @property
    def name(self) -> str:
        return f"{self.variant.slug}-{self.seed}"

    @property
    def folder(self) -> str:
        """Of its files, in the results and in the state."""
        return f"{self.setting.name}/{self.place.size}-{self.place.source}"

    @property
    def result_file(self) -> Path:
        return self.place.results / self.folder / f"{self.name}.json"

    @property
    def checkpoint(self) -> Path:
        return self.place.state / self.folder / f"{self.name}.pt"

    @property
    def is_teacher(self) -> bool:
        return self.variant.name in self.setting.teachers

    @property
    def is_robust(self) -> bool:
        return "robustness" in self.measures

    @property
    def size(self) -> Size:
        try:
            return self.setting.sizes[self.place.size]
        except KeyError:
            raise ConfigError(
                f"found '{self.place.size}'; {nearest(self.place.size, self.setting.sizes)}", "--size"
            ) from None

    @property
    def measures(self) -> dict[str, Any]:
        return {**self.setting.measures, **self.size.measures}

    @property
    def teacher(self) -> Run | None:
        """The run that makes its teacher."""
        if not self.variant.teacher:
            return None
        return Run(self.setting, self.setting.teachers[self.variant.teacher], 0, self.place)

    def beside(self, what: str) -> Path:
        """A checkpoint of robust validation."""
        return self.checkpoint.with_name(f"{self.checkpoint.stem}-{what}.pt")

    @property
    def weights_file(self) -> Path:
        """Of a teacher, beside its result: the weights that students start from on every machine."""
        return self.result_file.with_suffix(".pt")

    def network(self) -> dict[str, Any]:
        """Key and kwargs of the network that it trains."""
        models = plain_config(self.config_file, self.overrides())["models"]
        return {key: models[student_name(models)][key] for key in ("key", "kwargs")}

    @property
    def config_file(self) -> Path:
        return ROOT / "configs" / f"{self.variant.config}.yaml"

    def images(self) -> dict[str, Any]:
        """Arguments of :class:`experiments.data.Images`, but for the split."""
        own = {**self.size.images, **(self.size.teacher_images if self.is_teacher else {})}
        return {
            "name": self.setting.data,
            "source": self.place.source,
            "is_normalized": self.setting.is_normalized,
            **own,
        }

    def overrides(self) -> dict[str, Any]:
        """Of the configuration: size, images, networks, checkpoints, and what the variant has of its own."""
        plain = plain_config(self.config_file)
        teacher = self.teacher
        found = {path: value for path, value in self._of_size().items() if _has(plain, path)}
        if self.variant.duration != 1:
            found |= longer(plain["train"], found, self.variant.duration)
        for split in ("train", "val", "test"):
            kwargs = json.dumps({**self.images(), "split": split})
            call = f"!import_call {{key: 'experiments.data.Images', init: {{kwargs: {kwargs}}}}}"
            found[f"datasets.{self.setting.data}/{split}"] = TaggedYAML(call)
        found["dependencies"] = [{"name": "torchdistill_adv"}, {"name": "experiments.networks"}]
        student = f"models.{student_name(plain['models'])}"
        network = self.size.teacher if self.is_teacher else self.size.student
        for key, value in (network or {}).items():
            found[f"{student}.{key}"] = value
        found[f"{student}.dst_ckpt"] = str(self.checkpoint)
        if teacher is not None:
            found |= {f"models.teacher_model.{key}": value for key, value in teacher.network().items()}
            found["models.teacher_model.src_ckpt"] = str(teacher.weights_file)
        if self.is_robust:
            found["train.val_data_loader.dataset_id"] = f"{self.setting.data}/val"
            found["train.post_epoch_process"] = "validate_robustly"
            found["train.robust_validation"] = {
                "num_images": self.images().get("num_val", 1000),
                "threat": {"norm": "linf", "eps": self.measures["robustness"]["eps"], "space": "pixel", **PIXELS},
                "ckpt": str(self.checkpoint),
            }
            found |= with_radius(plain, self.measures["robustness"]["eps"])
        else:
            # without validation the runner saves every epoch's student, so the last one is left
            found["train.val_data_loader"] = {}
        found |= {option_path(o): value for o, value in self.size.options.items() if _has(plain, option_path(o))}
        found |= {option_path(option): value for option, value in self.variant.options.items()}
        return {**found, **self.variant.overrides}

    def _of_size(self) -> Mapping[str, Any]:
        size = self.size
        return {**size.overrides, **(size.teacher_overrides if self.is_teacher else size.student_overrides)}

    def fingerprint(self) -> dict[str, Any]:
        """What the result depends on: of training, and of what is measured after it."""
        module = MEASURING if self.variant.search is None else SEARCHING
        measures = {"settings": digest([self.measures, self.variant.search]), "code": code_digests([module])}
        return {"training": self._training_fingerprint(), "measures": measures}

    def _training_fingerprint(self) -> dict[str, Any]:
        teacher = self.teacher
        found: dict[str, Any] = {} if teacher is None else {"teacher": teacher._training_fingerprint()}
        if self.variant.search is not None:
            return found
        config = _without_checkpoints(plain_config(self.config_file, self.overrides()))
        return {"config": digest(config), "code": code_digests([*TRAINING, *modules_of(config)]), **found}

    def result(self) -> dict[str, Any] | None:
        """What was found, whether it still holds or not; None if it was not run."""
        if not self.result_file.exists():
            return None
        found: dict[str, Any] = json.loads(self.result_file.read_text(encoding="utf-8"))
        return found

    def differs(self) -> list[str] | None:
        """What has changed since its result: nothing is an empty list; None if there is no result."""
        result = self.result()
        if result is None:
            return None
        found = differing(result["fingerprint"], self.fingerprint())
        taught_by = self.teacher and self.teacher.result()
        if taught_by and (result["teacher"] or {}).get("weights") != taught_by["weights"]["taught"]:
            found.append("teacher")
        return found

    @property
    def is_done(self) -> bool:
        """Whether its result holds, and the weights are there that its students need."""
        return self.differs() == [] and (not self.is_teacher or self.weights_file.exists())


PIXELS = {"mean": [0], "std": [1]}


def runs_of(study: Study, place: Place, only: Sequence[str] = ()) -> list[Run]:
    """All runs of a study's variants, the first seed of every variant first.

    Args:
        study: the study.
        place: where.
        only: names of the variants that are wanted; by default all.
    """
    variants = [variant for variant in study.variants if not only or variant.name in only]
    last = max((variant.seeds for variant in variants), default=0)
    return [
        Run(study.setting, variant, seed, place) for seed in range(last) for variant in variants if seed < variant.seeds
    ]


def with_radius(plain: Mapping[str, Any], eps: Any) -> dict[str, Any]:
    """Overrides that give every adversarial term of a configuration a radius, and steps of the same part of it."""
    found: dict[str, Any] = {}
    for name, term in plain["train"]["criterion"]["kwargs"]["sub_terms"].items():
        kwargs = term["criterion"]["kwargs"]
        if "threat" in kwargs:
            found[option_path(f"{name}.threat.eps")] = eps
            ratio = number(eps, "eps") / number(kwargs["threat"]["eps"], "eps")
            step_size = number(kwargs["adversary"]["kwargs"]["step_size"], "step_size")
            found[option_path(f"{name}.adversary.kwargs.step_size")] = ratio * step_size
    return found


def longer(plain: Mapping[str, Any], overrides: Mapping[str, Any], times: float) -> dict[str, Any]:
    """Overrides that make a schedule so many times as long as the configuration, or other overrides, have it."""
    epochs, milestones = "train.num_epochs", "train.scheduler.kwargs.milestones"
    own = plain["scheduler"]["kwargs"]["milestones"]
    return {
        epochs: round(times * overrides.get(epochs, plain["num_epochs"])),
        milestones: [round(times * epoch) for epoch in overrides.get(milestones, own)],
    }


def option_path(option: str) -> str:
    """The YAML path of ``term.option``."""
    term, _, rest = option.partition(".")
    return f"{SUB_TERMS}.{term}.{rest}" if rest == "weight" else f"{SUB_TERMS}.{term}.criterion.kwargs.{rest}"


def _has(plain: Mapping[str, Any], path: str) -> bool:
    """Whether a configuration has the block that holds an entry."""
    block: Any = plain
    for part in path.split(".")[:-1]:
        if not isinstance(block, Mapping) or part not in block:
            return False
        block = block[part]
    return True


def _without_checkpoints(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_checkpoints(item) for key, item in value.items() if "ckpt" not in str(key)}
    return [_without_checkpoints(item) for item in value] if isinstance(value, list) else value
