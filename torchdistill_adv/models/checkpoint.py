"""Published weights in any model of the YAML: what a robust teacher comes from."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.models.registry import MODEL_DICT, get_model, register_model
from torchvision import models

from torchdistill_adv.checkpoints import read_checkpoint
from torchdistill_adv.checks import choice, number
from torchdistill_adv.errors import ConfigError, inside
from torchdistill_adv.registry import split_spec

logger = logging.getLogger(__name__)

CONTAINERS = ("state_dict", "model", "net")
PREFIXES = ("module.", "model.")
# of TRADES's WRN
UNUSED = "sub_block1."


@register_model
def from_checkpoint(model: Any, checkpoint: Any, mean: Any = None, std: Any = None) -> nn.Module:
    """Any model of the YAML with the weights of a published checkpoint, and the normalisation that they expect.

    (N, C, H, W) to what ``model`` returns. With ``mean`` and ``std`` the images are pixels of [0, 1], and the first
    module, ``normalize``, computes ``(x - mean) / std``; the model's own modules are then found below ``network.``, and
    threat models have ``mean: [0], std: [1]``. Without them the model comes as it is.

    The file is read on the CPU, as tensors only. It holds a state dict, or has one under ``state_dict``, ``model`` or
    ``net``. ``module.`` and ``model.`` are removed where all names begin with them. The log says if ``sub_block1`` is
    left out, which the WRN of `TRADES <https://github.com/yaodongyu/TRADES>`_ saves and never uses. Everything else
    must fit. The WRNs of TRADES and `RobustBench <https://github.com/RobustBench/robustbench>`_ are
    ``cifar_wide_resnet``; the key ``robustbench`` downloads by itself. Ours.

    Args:
        model: block of the model: a key of torchdistill, of torchvision or of ours, and its kwargs.
        checkpoint: path of the file.
        mean: per-channel mean; for weights that were trained on normalised images.
        std: per-channel standard deviation; together with ``mean``.

    Raises:
        ConfigError: the model cannot be built, the file is missing or no checkpoint, or its weights do not fit.

    Example:
        .. code-block:: yaml

            teacher_model:
              key: 'from_checkpoint'
              kwargs:
                model: {key: 'cifar_wide_resnet', kwargs: {depth: 34, widen_factor: 10, num_classes: 10}}
                checkpoint: './resource/ckpt/model_cifar_wrn.pt'
    """
    with inside("model"):
        key, network = build_model(model)
    normalize = None if mean is None and std is None else _Normalize(mean, std)
    with inside("checkpoint"):
        load_checkpoint(network, key, checkpoint)
    return network if normalize is None else nn.Sequential(OrderedDict(normalize=normalize, network=network))


class _Normalize(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Any, std: Any) -> None:
        super().__init__()
        mean, std = _per_channel(mean, "mean"), _per_channel(std, "std", above=0)
        if len(mean) != len(std):
            raise ConfigError(f"found {len(std)} values; mean has {len(mean)}", "std")
        # settings of the YAML, so not saved
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _per_channel(values: Any, name: str, above: float | None = None) -> Tensor:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"found {values!r}; write a list of numbers, one a channel; mean and std come together", name)
    return torch.tensor([number(value, name, above=above) for value in values]).view(-1, 1, 1)


def build_model(spec: Any) -> tuple[str, nn.Module]:
    """Key and model of a block: one of the models registered with torchdistill, ours among them, or torchvision's.

    Raises:
        ConfigError: no such model, or it cannot be built.
    """
    key, kwargs = split_spec(spec, "model")
    choice(key, "key", {*MODEL_DICT, *models.list_models(module=models)})
    with inside("kwargs"):
        try:
            return key, get_model(key, **kwargs) if key in MODEL_DICT else models.get_model(key, **kwargs)
        except ConfigError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"'{key}' cannot be built: {error}") from error


def load_checkpoint(network: nn.Module, key: str, checkpoint: Any) -> None:
    """Load the weights of a file, torchdistill's or a published one, as :func:`from_checkpoint` does.

    Args:
        network: gets the weights; ``key`` is its name for errors.
        checkpoint: path of the file.

    Raises:
        ConfigError: the file is missing or no checkpoint, or its weights do not fit; with the names that differ.
    """
    expected = network.state_dict()
    state = _without_prefixes(_read(checkpoint), expected)
    unused = [name for name in state if name.startswith(UNUSED) and name not in expected]
    if unused:
        logger.info("%s: left out %d tensors of %s*, which no forward pass uses", checkpoint, len(unused), UNUSED)
        state = {name: value for name, value in state.items() if name not in unused}
    if differences := _differences(state, expected):
        raise ConfigError(
            f"found '{checkpoint}', whose weights do not fit '{key}': {differences}; write the model, with its kwargs, "
            "that the weights are of"
        )
    network.load_state_dict(state)


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from being loaded; empty if nothing does."""
    differences = {
        # checkpoints from before PyTorch 0.4.1 have no counters of batches
        "not in the file": [n for n in expected if n not in state and not n.endswith("num_batches_tracked")],
        "not in the model": [n for n in state if n not in expected],
        "of other shapes": [
            f"{n} {tuple(state[n].shape)} instead of {tuple(value.shape)}"
            for n, value in expected.items()
            if n in state and state[n].shape != value.shape
        ],
    }
    return "; ".join(f"{what}: {_few(names)}" for what, names in differences.items() if names)


def _read(checkpoint: Any) -> dict[str, Tensor]:
    """The state dict of a file."""
    if not isinstance(checkpoint, str) or not Path(checkpoint).expanduser().is_file():
        raise ConfigError(f"found {checkpoint!r}, which is no file; write the path of a checkpoint")
    wanted = f"write one that torch.save made of a state dict, or of one under {', '.join(map(repr, CONTAINERS))}"
    saved = read_checkpoint(checkpoint)
    for name in CONTAINERS:
        if isinstance(saved, Mapping) and isinstance(saved.get(name), Mapping):
            saved = saved[name]
    if not isinstance(saved, Mapping) or not saved:
        raise ConfigError(f"found '{checkpoint}', which holds a {type(saved).__name__} ({saved!r:.60}); {wanted}")
    others = [name for name, value in saved.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if others:
        raise ConfigError(f"found '{checkpoint}', whose {_few(others)} is no tensor; {wanted}")
    return dict(saved)


def _without_prefixes(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the prefixes that all names have, unless some are expected to have them."""
    while not state.keys() & expected.keys():
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _few(names: list[Any]) -> str:
    """The first three, and how many more."""
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
