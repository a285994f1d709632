"""Networks with trainable modules beside them, for the distillation methods that compare maps through such modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.common.module_util import get_module
from torchdistill.models.registry import (
    ADAPTATION_MODULE_DICT,
    MODULE_DICT,
    get_adaptation_module,
    register_adaptation_module,
    register_auxiliary_model_wrapper,
)
from torchdistill.models.util import wrap_if_distributed
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from torchdistill_adv.boxes import IODict
from torchdistill_adv.errors import ConfigError, inside, nearest


class NetworkWithModules(AuxiliaryModelWrapper):
    """A teacher or a student as ``model``; a subclass adds the modules that read its maps.

    A teacher's network runs without a graph, and stays in eval mode, in which torchdistill does not put it.
    """

    def __init__(
        self,
        device: torch.device,
        device_ids: list[int] | None,
        distributed: bool,
        teacher_model: nn.Module | None = None,
        student_model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.where = device, device_ids, distributed
        self.is_teacher = teacher_model is not None
        self.model: nn.Module = self.shared(student_model) if teacher_model is None else teacher_model.eval()
        # where this side's options stand in the YAML
        self.path = f"{'teacher' if self.is_teacher else 'student'}.auxiliary_model_wrapper.kwargs"

    def shared(self, module: nn.Module | None) -> Any:
        """``module`` on the device; with several processes, with gradients that are theirs in common."""
        return wrap_if_distributed(module, *self.where)

    def train(self, mode: bool = True) -> NetworkWithModules:
        super().train(mode)
        if self.is_teacher:
            self.model.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_teacher):
            return self.model(x)

    def read(self, io_dict: IODict, path: str, io: str = "output") -> Tensor:
        """What torchdistill's hooks have of a module of the network.

        Raises:
            ConfigError: there is no such hook.
        """
        try:
            value: Tensor = io_dict[path][io]
        except KeyError:
            hooks = f"{self.path.partition('.')[0]}.forward_hook.{io}"
            raise ConfigError(f"does not have '{path}', which {type(self).__name__} reads; add it", hooks) from None
        return value


@register_auxiliary_model_wrapper
class Adapters(NetworkWithModules):
    """A network with adapters: modules that make what one of its modules gives comparable to the other network's.

    For methods of one stage with a regressor, such as FitNet, where torchdistill's ``adaptations`` cut the network off
    behind the map, and for AB, which reads maps *before* their activation. The network is ``model``, and what adapter
    ``name`` gives is the output of ``adapters.name``. Every ``path`` must be among the ``forward_hook`` of its side.
    Where an adapter reads the ``input`` of an in-place activation, that activation is made to work out of place, as
    what it was given would be overwritten otherwise. A teacher's network stays in eval mode.

    Paper: `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_ (Romero et al., ICLR 2015) and
    `Knowledge Transfer via Distillation of Activation Boundaries <https://arxiv.org/abs/1811.03233>`_ (Heo et al., AAAI
    2019). The form is ours.

    Args:
        adapters: by name, ``path`` and ``io`` of what each one reads, and ``key`` and ``kwargs`` of the module: one
            that is registered with torchdistill as an adaptation module, or a class of ``torch.nn``.

    Raises:
        ConfigError: there is no such module or path, or it cannot be built.

    Example:
        .. code-block:: yaml

            student:
              forward_proc: 'forward_batch_only'
              auxiliary_model_wrapper:
                key: 'Adapters'
                kwargs:
                  adapters:
                    regressor:
                      path: 'model.layer2'
                      io: 'output'
                      key: 'ConvRegressor'
                      kwargs: {in_channels: 32, out_channels: 32, in_size: 16, out_size: 16}
              forward_hook: {input: [], output: ['model.layer2', 'adapters.regressor']}
    """

    def __init__(self, adapters: Mapping[str, Mapping[str, Any]], **common: Any) -> None:
        super().__init__(**common)
        self.sources = {name: (block["path"], block["io"]) for name, block in adapters.items()}
        self.adapters = nn.ModuleDict()
        for name, block in adapters.items():
            with inside(f"{self.path}.adapters.{name}"):
                self.adapters[name] = self.shared(_build(block["key"], block.get("kwargs") or {}))
                module = get_module(self, block["path"])
                if module is None:
                    raise ConfigError(f"found '{block['path']}', which this network does not have", "path")
                if block["io"] == "input" and getattr(module, "inplace", False):
                    module.inplace = False

    def secondary_forward(self, io_dict: IODict) -> None:
        for name, (path, io) in self.sources.items():
            self.adapters[name](self.read(io_dict, path, io))


def _build(key: str, kwargs: Mapping[str, Any]) -> nn.Module:
    known = {**MODULE_DICT, **ADAPTATION_MODULE_DICT}
    if key not in known:
        raise ConfigError(f"found '{key}'. {nearest(key, [*ADAPTATION_MODULE_DICT])} Or a class of torch.nn.", "key")
    try:
        with inside("kwargs"):
            module: nn.Module = get_adaptation_module(key, **kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"'{key}' cannot be built: {error}", "kwargs") from error
    return module


@register_adaptation_module
class ConvRegressor(nn.Sequential):
    """FitNet's regressor in the form of RepDistiller: a convolution to the other map's shape, BN and ReLU.

    (N, in_channels, in_size, in_size) to (N, out_channels, out_size, out_size): 3 x 3 with stride 2 to half the size,
    transposed 4 x 4 with stride 2 to twice the size, and no padding otherwise, which is 1 x 1 between equal sizes.

    Paper: `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_ (Romero et al., ICLR 2015).
    **RepDistiller's** (`repository <https://github.com/HobbitLong/RepDistiller>`_): all of it; torchdistill's
    ``ConvReg`` has no transposed convolution.

    Args:
        in_channels: of the student's map.
        out_channels: of the teacher's map.
        in_size: height and width of the student's map.
        out_size: height and width of the teacher's map.
        uses_relu: whether there is a ReLU.

    Raises:
        ConfigError: the teacher's map is larger than the student's, and not of twice its size.

    Example:
        .. code-block:: yaml

            regressor:
              path: 'model.layer2'
              io: 'output'
              key: 'ConvRegressor'
              kwargs: {in_channels: 32, out_channels: 32, in_size: 16, out_size: 16}
    """

    def __init__(
        self, in_channels: int, out_channels: int, in_size: int, out_size: int, uses_relu: bool = True
    ) -> None:
        convolution: nn.Module
        if in_size == 2 * out_size:
            convolution = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        elif 2 * in_size == out_size:
            convolution = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
        elif in_size >= out_size:
            convolution = nn.Conv2d(in_channels, out_channels, 1 + in_size - out_size)
        else:
            raise ConfigError(f"found {out_size} for a map of {in_size}; write at most its double", "out_size")
        layers = [convolution, nn.BatchNorm2d(out_channels), *([nn.ReLU()] if uses_relu else [])]
        super().__init__(*layers)


@register_adaptation_module(key="ABConnector")
def ab_connector(in_channels: int, out_channels: int, in_size: int, out_size: int) -> nn.Module:
    """AB's connector in the form of RepDistiller: nothing between maps of one shape, else a convolution and BN.

    (N, in_channels, in_size, in_size) to (N, out_channels, out_size, out_size); the convolution is that of
    :class:`ConvRegressor`.

    Paper: `Knowledge Transfer via Distillation of Activation Boundaries <https://arxiv.org/abs/1811.03233>`_ (Heo et
    al., AAAI 2019). **RepDistiller's** (`repository <https://github.com/HobbitLong/RepDistiller>`_): all of it.

    Args:
        in_channels: of the student's map.
        out_channels: of the teacher's map.
        in_size: height and width of the student's map.
        out_size: height and width of the teacher's map.

    Raises:
        ConfigError: the teacher's map is larger than the student's, and not of twice its size.

    Example:
        .. code-block:: yaml

            connector1:
              path: 'model.layer1.2.relu'
              io: 'input'
              key: 'ABConnector'
              kwargs: {in_channels: 16, out_channels: 16, in_size: 32, out_size: 32}
    """
    if (in_channels, in_size) == (out_channels, out_size):
        return nn.Identity()
    return ConvRegressor(in_channels, out_channels, in_size, out_size, uses_relu=False)
