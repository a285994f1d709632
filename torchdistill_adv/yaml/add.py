"""An adversarial loss put into somebody's own YAML."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torchdistill.losses.registry import LOSS_WRAPPER_DICT, MIDDLE_LEVEL_LOSS_DICT

from torchdistill_adv.checks import number
from torchdistill_adv.errors import ConfigError, inside, nearest
from torchdistill_adv.losses import AdversarialTerm
from torchdistill_adv.runner.check import section, stages, student_name
from torchdistill_adv.runner.config import copy_containers, import_config_dependencies, split_override
from torchdistill_adv.yaml.normalization import find_mean_and_std
from torchdistill_adv.yaml.text import Raw, append_item, config_of, flow, put_entry, set_value

BIND = "bind_adversarial_losses"
PACKAGE, AUTOBIND = "torchdistill_adv", "torchdistill_adv.autobind"

Plain = Mapping[str, Any]


class Addition(NamedTuple):
    """A YAML with one term more.

    Args:
        text: the new YAML.
        path: of the term in it.
        notes: what its user should know, a line each.
    """

    text: str
    path: str
    notes: Sequence[str]


class Entry(NamedTuple):
    """What is put into a block: its value, and how that is written; without a key it is an item of a list."""

    block: Sequence[str]
    key: str | None
    value: Any
    written: Any
    first: bool = False


def add_term(
    text: str,
    key: str,
    *,
    stage: str | None = None,
    name: str | None = None,
    weight: Any = None,
    overrides: Sequence[str] = (),
) -> Addition:
    """Put an adversarial loss into the text of a YAML, with the lines that it needs to train.

    Those are the dependency ``torchdistill_adv``, the stage's ``pre_epoch_process``, and a sub-term with adversary,
    threat model and objective written out: the options of the example in the loss's documentation and of its
    ``defaults``, and mean and std of the training set's Normalize. Every other byte stays. In a stage with a
    ``pre_epoch_process`` of its own, the dependency is :mod:`torchdistill_adv.autobind`.

    Args:
        text: YAML of torchdistill, in any style.
        key: registered name of the loss; of a user's own too, where the YAML's dependencies register it.
        stage: such as ``stage2``; by default the last one.
        name: of the term; by default that of the loss in small letters.
        weight: of the term; by default that of the loss's example.
        overrides: texts such as ``train.num_epochs=2``, set in the YAML's text.

    Raises:
        ConfigError: there is no such loss or stage, the loss cannot be trained there, or the YAML is written such that
            nothing can be put in without a change of something else; with what to write by hand.
    """
    config_of(text)
    for item in overrides:
        text = set_value(text, *split_override(item))
    config = config_of(text)
    loss = _find_loss(key, config)
    path, block = _choose_stage(config, stage)
    name = name or key.removesuffix("Loss").lower()
    term_path = f"{path}.criterion.kwargs.sub_terms.{name}"
    if name in _sub_terms(block, path):
        raise ConfigError("is there already; write another name with --name", term_path)
    values, alias, notes = _normalization(text, config, path)
    term = _term(key, loss, weight, values)
    _check_term(loss, term, term_path, config, block)
    written = _term(key, loss, weight, {Raw("<<"): Raw(f"*{alias}")} if alias else values)
    new = _put_in(text, config, _needed(config, path, name, term, written))
    notes = [*_stage_note(config, path, stage), *notes, *_checkpoint_note(config, name, overrides)]
    return Addition(new, term_path, notes)


def add_to_file(key: str, source: Path, out: Path, **options: Any) -> tuple[str, Sequence[str]]:
    """Write a YAML file with an adversarial loss more, by :func:`add_term`.

    Args:
        key: registered name of the loss.
        source: YAML file, in UTF-8, which stays as it is.
        out: the new file.
        options: those of :func:`add_term`.

    Returns:
        What was changed, as a unified diff, and notes, a line each.

    Raises:
        ConfigError: those of :func:`add_term`; ``source`` cannot be read, ``out`` is there or cannot be written.
    """
    try:
        text = source.expanduser().read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}; write the path of a YAML file in UTF-8", str(source)) from error
    added = add_term(text, key, **options)
    try:
        with out.expanduser().open("xb") as file:
            file.write(added.text.encode("utf-8"))
    except FileExistsError as error:
        raise ConfigError(f"found '{out}', which is there already; write the name of a new file", "-o") from error
    except OSError as error:
        raise ConfigError(f"found '{out}', which cannot be written: {error.strerror}", "-o") from error
    before, after = (which.splitlines() for which in (text, added.text))
    return "\n".join(difflib.unified_diff(before, after, str(source), str(out), lineterm="")), added.notes


# the loss


def _find_loss(key: str, config: Plain) -> type[AdversarialTerm]:
    if key not in _adversarial_losses():
        # the YAML's own modules may register it
        import_config_dependencies(config)
    losses = _adversarial_losses()
    if key in losses:
        return losses[key]
    if key in LOSS_WRAPPER_DICT:
        raise ConfigError(
            f"found {key}, which is put around a loss that is there: write criterion_wrapper: {{key: '{key}', kwargs: "
            "{adversary: ..., threat: ..., objective: ...}} beside that loss's criterion by hand",
            "LOSS",
        )
    if key in MIDDLE_LEVEL_LOSS_DICT:
        raise ConfigError(
            f"found {key}, which has no search and whose options are paths in your networks; write it under sub_terms "
            "by hand, as its documentation says",
            "LOSS",
        )
    raise ConfigError(f"found {key!r}, which is no registered adversarial loss; {nearest(key, losses)}", "LOSS")


def _adversarial_losses() -> dict[str, type[AdversarialTerm]]:
    return {
        name: loss
        for name, loss in MIDDLE_LEVEL_LOSS_DICT.items()
        if isinstance(loss, type) and issubclass(loss, AdversarialTerm) and name not in LOSS_WRAPPER_DICT
    }


def _example(loss: type[AdversarialTerm]) -> Plain:
    """The sub-term in the documentation of a loss; empty where there is none."""
    found = re.search(r"^( *)\.\. code-block:: yaml\n((?:\1 +\S.*\n?|\s*\n)+)", inspect.getdoc(loss) or "", re.M)
    return yaml.safe_load(textwrap.dedent(found[2])) if found else {}


def _term(key: str, loss: type[AdversarialTerm], weight: Any, mean_and_std: Plain) -> dict[str, Any]:
    """The sub-term of a loss, with mean and std of the data."""
    example = _example(loss)
    own = (example.get("criterion") or {}).get("kwargs", {})
    options = own | {option: value for option, value in loss.defaults.items() if option not in own}
    threat = {option: value for option, value in options.get("threat", {}).items() if option not in ("mean", "std")}
    weight = example.get("weight", 1.0) if weight is None else number(weight, "--weight")
    return {"criterion": {"key": key, "kwargs": {**options, "threat": {**mean_and_std, **threat}}}, "weight": weight}


def _check_term(loss: type[AdversarialTerm], term: Plain, path: str, config: Plain, block: Plain) -> None:
    """Refuse a loss that cannot be trained in a stage."""
    has_teacher = (config.get("models") or {}).get("teacher_model") is not None
    options = term["criterion"]["kwargs"]
    made = loss(**options)
    made.resolve(f"{path}.criterion.kwargs")
    with inside(f"{path}.criterion.kwargs"):
        made.check_teacher(has_teacher)
        if isinstance(block.get("num_epochs"), int):
            made.check_epochs(block["num_epochs"])


# the stage


def _choose_stage(config: Plain, stage: str | None) -> tuple[str, Plain]:
    """Path and block of a stage, of the last one by default, in which the student is trained."""
    blocks = dict(stages(section(config, "train", "num_epochs, train_data_loader, optimizer, criterion ...")))
    path = f"train.{stage}" if stage else list(blocks)[-1]
    if path not in blocks:
        names = [known.removeprefix("train.") for known in blocks if known != "train"]
        raise ConfigError(f"found {stage!r}, which is no stage of this YAML; {nearest(stage, names)}", "--stage")
    for side in ("student", "model"):
        if (blocks[path].get(side) or {}).get("requires_grad") is False:
            raise ConfigError(
                "is False, so no student is trained in this stage; write --stage with the one that does",
                f"{path}.{side}.requires_grad",
            )
    return path, blocks[path]


def _sub_terms(block: Plain, path: str) -> Plain:
    with inside(path):
        criterion = section(block, "criterion", "key and kwargs of a high-level loss")
    if criterion.get("key") != "WeightedSumLoss":
        raise ConfigError(
            f"found {criterion.get('key')!r}; write key: 'WeightedSumLoss', with the loss that is there as one of "
            "kwargs.sub_terms, each with a criterion and a weight",
            f"{path}.criterion.key",
        )
    return (criterion.get("kwargs") or {}).get("sub_terms") or {}


def _normalization(text: str, config: Plain, path: str) -> tuple[dict[str, Any], str | None, list[str]]:
    """Mean and std of a stage's training set, an anchor above the stage that stands for them, and notes."""
    dataset_id = None
    for name, block in stages(config["train"]):
        # a stage without one goes on with that of the stage before
        dataset_id = (block.get("train_data_loader") or {}).get("dataset_id", dataset_id)
        if name == path:
            break
    found = find_mean_and_std(text, str(dataset_id), path.split("."))
    if found is not None:
        return *found, []
    return (
        {"mean": [0], "std": [1]},
        None,
        [f"found no Normalize in data set '{dataset_id}'; mean [0] and std [1] are right for images in [0, 1] alone"],
    )


def _stage_note(config: Plain, path: str, stage: str | None) -> list[str]:
    others = [name.removeprefix("train.") for name, _ in stages(config["train"]) if name != path]
    if stage or not others:
        return []
    return [f"the term is in {path}, the last stage; --stage {' or '.join(others)} puts it elsewhere"]


def _checkpoint_note(config: Plain, name: str, overrides: Sequence[str]) -> list[str]:
    models = config.get("models") or {}
    path = f"models.{student_name(models)}.dst_ckpt"
    dst_ckpt = (models.get(student_name(models)) or {}).get("dst_ckpt")
    if not dst_ckpt or any(split_override(item)[0].startswith(path) for item in overrides):
        return []
    stem, extension = os.path.splitext(str(dst_ckpt))
    return [
        f"the new YAML saves its student where the old one does, in '{dst_ckpt}'; "
        f"--set {path}={stem}-{name}{extension} gives it a file of its own"
    ]


# the text


def _needed(config: Plain, path: str, name: str, term: Plain, written: Plain) -> list[Entry]:
    """What is put in: the term, what binds it in its stage, and the dependency."""
    stage = path.split(".")
    block, keys = [*stage, "criterion"], ["kwargs", "sub_terms", name]
    while keys[0] in (_at(config, block) or {}):
        block.append(keys.pop(0))
    # blocks that are not there are put in too
    for key in reversed(keys[1:]):
        term, written = {key: term}, {key: written}
    needed = [Entry(block, keys[0], term, written)]

    names = [item.get("name") for item in config.get("dependencies") or [] if isinstance(item, Mapping)]
    if AUTOBIND in names:
        return needed
    process = _at(config, stage).get("pre_epoch_process", ...)
    if process is ...:
        needed.append(Entry(stage, "pre_epoch_process", BIND, BIND, first=True))
    # a process of the stage's own stays
    dependency = {"name": PACKAGE if process in (..., BIND) else AUTOBIND}
    if dependency["name"] in names:
        return needed
    if "dependencies" in config:
        return [*needed, Entry(["dependencies"], None, dependency, dependency)]
    return [*needed, Entry([], "dependencies", [dependency], [dependency], first=True)]


def _put_in(text: str, config: Plain, needed: Sequence[Entry]) -> str:
    """The text with some entries more, checked to mean the same but for them.

    Raises:
        ConfigError: they cannot be put into the text; with what to write by hand.
    """
    expected: Any = copy_containers(config)
    new = text
    try:
        for entry in needed:
            if entry.key is None:
                new = append_item(new, entry.block, entry.written)
                expected["dependencies"] = [*(expected["dependencies"] or []), entry.value]
            else:
                new = put_entry(new, entry.block, entry.key, entry.written, first=entry.first)
                block = _at(expected, entry.block)
                if block is None:
                    block = _at(expected, entry.block[:-1])[entry.block[-1]] = {}
                block[entry.key] = entry.value
        if config_of(new) != expected:
            raise ConfigError("holds blocks that are used at several places, or in a style that no line fits into")
    except (ConfigError, yaml.YAMLError) as error:
        by_hand = {Raw(".".join([*entry.block, entry.key or "0"])): entry.value for entry in needed}
        path, why = (error.path, error.message) if isinstance(error, ConfigError) else ("", str(error))
        raise ConfigError(f"{why}; write by hand {flow(by_hand)}", path) from error
    return new


def _at(config: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        config = config[key]
    return config
