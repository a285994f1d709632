"""The networks and the test images of a configuration, for what is measured after training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.evaluation.pixels import Normalization, PixelModel, find_normalization
from torchdistill_adv.losses import TALDLoss
from torchdistill_adv.models.checkpoint import load_checkpoint
from torchdistill_adv.runner.building import build_model
from torchdistill_adv.runner.check import check_loader, check_model, check_source, section, stages, student_name
from torchdistill_adv.runner.config import prepare_config
from torchdistill_adv.runner.processes import Place, check_device, default_device
from torchdistill_adv.runner.records import run_directory
from torchdistill_adv.threat import ThreatModel


@dataclass(frozen=True)
class Experiment:
    """What a configuration trained, ready to be measured.

    Args:
        config: the loaded YAML.
        networks: ``student`` and, where there is one, ``teacher``, in eval mode, with their weights; they take what the
            data set gives.
        checkpoints: the file that the weights of each are from; None for weights that came with the model.
        data: the test set, ``data[i] -> (image, label, ...)`` in model-input space.
        dataset_id: its name in the YAML.
        num_workers: processes that its data loader has.
        normalization: mean and std of its Normalize.
        device: where the networks are.
    """

    config: Mapping[str, Any]
    networks: Mapping[str, nn.Module]
    checkpoints: Mapping[str, str | None]
    data: Any
    dataset_id: str
    num_workers: int
    normalization: Normalization
    device: torch.device

    def on_pixels(self, who: str) -> PixelModel:
        """A network that takes pixels of [0, 1].

        Raises:
            ConfigError: the configuration has no such network.
        """
        if who not in self.networks:
            raise ConfigError(f"is missing, so there is no {who} to measure", f"models.{who}_model")
        return PixelModel(self.networks[who], *self.normalization).eval()

    def folder(self, who: str) -> Path:
        """Where results of a network go: the folder of its checkpoint's name, or of the student's and its own."""
        checkpoint = self.checkpoints[who]
        if checkpoint is not None and not checkpoint.startswith(("http://", "https://")):
            return run_directory(checkpoint)
        return run_directory(self.config["models"][student_name(self.config["models"])]["dst_ckpt"]) / who

    def radius(self, norm: str) -> float | None:
        """The radius in pixels of the first ``robust_validation`` with this norm; None where there is none."""
        for path, stage in stages(self.config.get("train") or {}):
            block = stage.get("robust_validation")
            if block:
                with inside(f"{path}.robust_validation.threat"):
                    threat = ThreatModel.build(block.get("threat"))
                if threat.norm == norm and threat.space == "pixel":
                    return threat.eps
        return None


def load_experiment(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    ckpt: str | None = None,
    networks: tuple[str, ...] = ("student", "teacher"),
    device: str | None = None,
    normalization: Normalization | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Experiment:
    """Build the networks of a configuration and load their weights.

    Args:
        config: YAML file, or a configuration as torchdistill loads one.
        ckpt: the student's weights; by default those of its ``dst_ckpt``, or else of its ``src_ckpt``.
        networks: which to build, of those that the configuration has.
        device: such as ``cpu`` or ``cuda:1``; by default a GPU where there is one.
        normalization: mean and std, where the transforms of the data do not tell.
        overrides: other values for entries, by dotted YAML path.

    Raises:
        ConfigError: something is missing or does not fit; with the YAML path.
    """
    loaded = prepare_config(config, overrides)
    where = Place(check_device(device) if device else default_device())
    models = section(loaded, "models", "student_model, and teacher_model for distillation")
    with inside("test"):
        check_loader(section(loaded, "test", "test_data_loader"), "test_data_loader", loaded.get("datasets") or {})
    dataset_id = loaded["test"]["test_data_loader"]["dataset_id"]
    data = loaded["datasets"][dataset_id]
    found, checkpoints = {}, {}
    for who in networks:
        name = student_name(models) if who == "student" else f"{who}_model"
        if who == "student" or models.get(name) is not None:
            found[who], checkpoints[who] = _load(models, name, ckpt if who == "student" else None, where)
    if normalization is None:
        normalization = find_normalization(data)
    num_workers = loaded["test"]["test_data_loader"]["kwargs"].get("num_workers", 0)
    return Experiment(loaded, found, checkpoints, data, dataset_id, num_workers, normalization, where.device)


def _load(models: Mapping[str, Any], name: str, ckpt: str | None, where: Place) -> tuple[nn.Module, str | None]:
    """A network in eval mode with its weights, and the file they are from."""
    with inside("models"):
        block = section(models, name, "key, kwargs and the checkpoint")
    with inside(f"models.{name}"):
        check_model(block)
        trained = block.get("dst_ckpt")
        source = ckpt or (trained if trained and Path(trained).exists() else block.get("src_ckpt"))
        kwargs = block.get("kwargs") or {}
        comes_with_weights = kwargs.get("weights") or kwargs.get("pretrained") or block["key"] in LOADS_WEIGHTS
        if source is None and not comes_with_weights:
            missing = f"found '{trained}', which does not exist" if trained else "has no checkpoint"
            instead = "--ckpt" if trained else "src_ckpt"
            raise ConfigError(f"{missing}; train first, or write {instead} with the file of the weights")
        if ckpt is None:
            check_source({"src_ckpt": source})
    network = build_model({**block, "src_ckpt": None if ckpt else source}, name, where)
    if ckpt is not None:
        with inside("--ckpt"):
            load_checkpoint(network, str(block["key"]), ckpt)
    return network.eval(), source


# models that read their weights themselves
LOADS_WEIGHTS = ("from_checkpoint", "robustbench", "teacher_pair")


def tald_terms(config: Mapping[str, Any], normalization: Normalization) -> Iterator[tuple[str, TALDLoss]]:
    """Every TALD term of a configuration and its YAML path; last, without one, TALD's defaults.

    Args:
        config: as torchdistill loads it.
        normalization: mean and std of the data, for the defaults.

    Raises:
        ConfigError: an option of a term is wrong.
    """
    mean, std = normalization
    defaults = {"threat": {**TALDLoss.defaults["threat"], "mean": mean, "std": std}}
    for path, options in (*_tald_options(config.get("train"), "train"), ("TALD's defaults", defaults)):
        term = TALDLoss(**options)
        term.resolve(f"{path}.kwargs")
        yield path, term


def _tald_options(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if node.get("key") == TALDLoss.__name__:
            yield path, node.get("kwargs") or {}
        for name, value in node.items():
            yield from _tald_options(value, f"{path}.{name}")
