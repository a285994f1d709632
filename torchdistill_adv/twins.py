"""Twins of networks: the same functions of the images, laid out for the passes of a search.

A search differentiates networks with respect to the images alone, and between two training steps their weights stand
still. So it need not pass the networks themselves: a *twin* is a copy without gradients for weights, in which batch
normalisation is folded into the layer before it and whose weights have the precision and the layout that the device is
fast in. It takes the network's weights anew before every search.

A network of which no faithful twin can be made is passed as it is, and the log says why.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_weights

from torchdistill_adv.checks import choice, put
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.guards import on_cloned_buffers, original, uncompiled
from torchdistill_adv.registry import check_options

logger = logging.getLogger(__name__)

PRECISIONS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# their outputs scale with their weights, so a factor for each channel can go into these; subclasses may not
FOLDABLE = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}
NORMALISATIONS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
# what every module has of itself
OWN = frozenset(vars(nn.Module()))
# how many rows a twin is compared with its network on
PROBE_ROWS = 4


@dataclass(frozen=True)
class SearchPasses:
    """How the passes of a search are computed: the ``search`` block of a term.

    Only the search is meant. Its examples, steps, norms and divergences stay in float32, so that examples stay in their
    ball; the passes that train the student are the host's business (``--amp``, ``--channels_last`` and ``--compile`` of
    our runner). ``auto`` is decided on the device at the first search, and logged:

    * ``precision``: ``float32`` for objectives that compare a network with itself near an image (those of TALD and
      TRADES), whose differences half precision rounds away; else what an autocast around the step has; else
      ``bfloat16`` on CPUs with bfloat16 units (AVX512-BF16, AMX) and on GPUs of compute capability 8.0 and newer; else
      ``float32``.
    * ``channels_last``: true, but for float32 on GPUs.
    * ``fold``: true.
    * ``compile``: whether the network itself is compiled.

    A network in train mode (``search_bn`` other than ``eval``, ``teacher_mode: keep``), one with weights that are not
    plain float32 parameters (FSDP, quantised), and one that a copy does not reproduce are passed as they are; with
    ``auto`` the search is then in the precision of the step.

    Args:
        precision: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        channels_last: whether convolutions are laid out with the channels last.
        fold: whether batch normalisation is folded into the convolution or linear layer before it.
        compile: whether the twin is compiled, one graph for each batch size, on GPUs as CUDA graphs.

    Raises:
        ConfigError: another value.

    Example:
        .. code-block:: yaml

            search: {precision: 'bfloat16', channels_last: true, fold: true, compile: false}
    """

    precision: str = "auto"
    channels_last: bool | str = "auto"
    fold: bool | str = "auto"
    compile: bool | str = "auto"

    def __post_init__(self) -> None:
        put(self, precision=choice(self.precision, "precision", ("auto", *PRECISIONS)))
        for name in ("channels_last", "fold", "compile"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise ConfigError(f"found {value!r}; write true, false or 'auto'", name)

    @classmethod
    def build(cls, spec: Any) -> SearchPasses:
        """Those of a YAML block; a :class:`SearchPasses` is taken as it is.

        Raises:
            ConfigError: an unknown option, or another value.
        """
        if isinstance(spec, cls):
            return spec
        if not isinstance(spec, Mapping):
            raise ConfigError(f"found {spec!r}; write {{precision: ..., channels_last: ..., fold: ..., compile: ...}}")
        check_options(cls, spec, "a search block")
        return cls(**spec)

    def pick(self, device: torch.device, compares_itself: bool = False) -> Picked:
        """What ``auto`` is on ``device``, within the autocast that is on, for an objective that is so or not."""
        if self.precision != "auto":
            dtype = PRECISIONS[self.precision]
        elif compares_itself:
            dtype = torch.float32
        else:
            around = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
            dtype = around or fast_dtype(device)
        channels_last = self.channels_last
        if channels_last == "auto":
            channels_last = device.type != "cuda" or dtype != torch.float32
        return Picked(dtype, bool(channels_last), self.fold is not False, self.compile)


@dataclass(frozen=True)
class Picked:
    """:class:`SearchPasses` on a device. ``compile`` may still be ``auto``, which depends on the network."""

    dtype: torch.dtype
    channels_last: bool
    fold: bool
    compile: bool | str

    def compiles(self, network: nn.Module) -> bool:
        """Whether a twin of ``network`` is compiled."""
        if self.compile == "auto":
            return original(network) is not network or network._compiled_call_impl is not None
        return bool(self.compile)

    def changes(self, network: nn.Module) -> bool:
        """Whether a twin would differ from ``network``."""
        return self.dtype != torch.float32 or self.channels_last or self.fold or self.compiles(network)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of the passes, whatever is around them."""
        # nothing to cache: a twin has its weights in this precision already
        in_half = self.dtype != torch.float32
        dtype = self.dtype if in_half else torch.get_autocast_dtype(device.type)
        return torch.autocast(device.type, dtype, enabled=in_half, cache_enabled=False)


def fast_dtype(device: torch.device) -> torch.dtype:
    """The narrowest type of at least float32's range that ``device`` has units for."""
    if device.type == "cuda":
        has_units = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # PyTorch has no public question for them
        questions = (getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("avx512_bf16", "amx_tile"))
        has_units = device.type == "cpu" and any(has is not None and has() for has in questions)
    return torch.bfloat16 if has_units else torch.float32


class NoTwinError(Exception):
    """There is no faithful twin of a network; the message says why."""


class Twin:
    """A copy of a network for passes whose gradient goes to the images.

    Batch normalisation in eval mode is folded where the only thing that it is given is the output of one convolution or
    linear layer, both called once a pass: with weight :math:`W`, bias :math:`b`, scale :math:`\\gamma`, shift
    :math:`\\beta` and running statistics :math:`\\mu, \\sigma^2`

    .. math:: W' = \\frac{\\gamma}{\\sqrt{\\sigma^2 + \\epsilon}} W, \\qquad
        b' = \\frac{\\gamma}{\\sqrt{\\sigma^2 + \\epsilon}} (b - \\mu) + \\beta

    Which layers these are is read off the graph of a pass of a few rows, and checked on the logits of a copy with
    random statistics, since those of a new network change nothing. The finished twin is held against the network on
    these rows, logits and gradients. What depends on other things may differ unseen: another branch for other rows,
    tensors in lists, arrays that are written in place.

    Args:
        network: in eval mode, rows (R, ...) to logits (R, num_classes) in float32.
        how: precision, layout, folding.
        rows: some that it may see, (R, ...).
        kept: paths of modules whose outputs somebody wants to read, which are not folded.

    Raises:
        NoTwinError: the copy would not be faithful.
    """

    def __init__(self, network: nn.Module, how: Picked, rows: Tensor, kept: Collection[str] = ()) -> None:
        self.network, self.how = original(network), how
        try:
            self._make(rows, kept)
        except NoTwinError:
            raise
        except Exception as error:  # whatever a network raises that is copied, laid out in another way, or passed
            raise NoTwinError(f"a copy of it cannot be passed: {type(error).__name__}: {error}") from error
        if how.compiles(network):
            on_gpu = rows.device.type == "cuda"
            self.module.compile(dynamic=False, mode="reduce-overhead" if on_gpu else None)

    def _make(self, rows: Tensor, kept: Collection[str]) -> None:
        _check_copyable(self.network)
        self.signature = _signature(self.network)
        rows = rows[:PROBE_ROWS].detach().float()
        # the streams too: a network that draws in eval mode must not notice
        devices = [rows.device] if rows.device.type == "cuda" else []
        guards: list[Any] = [torch.random.fork_rng(devices), uncompiled(self.network), on_cloned_buffers(self.network)]
        # what is compared is to differ by rounding alone
        guards += [torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)]
        with ExitStack() as stack:
            for guard in [*guards, torch.autocast(rows.device.type, enabled=False)]:
                stack.enter_context(guard)
            self.module = _copy(self.network)
            self.folded = _fold(self.module, rows, kept) if self.how.fold else {}
            self._lay_out(on_cpu=rows.device.type == "cpu")
            self._collect()
            self.update()
            self._check(rows)

    def _check(self, rows: Tensor) -> None:
        """Refuse to be another function, or to have other gradients, than the network."""
        wanted = _logits_and_gradients(self.network, rows)
        with self.how.autocast(rows.device):
            found = _logits_and_gradients(self.module, rows)
        # rounding turns gradients of half precision by some degrees
        cosine = 0.999 if self.how.dtype == torch.float32 else 0.5
        for what, own, its in zip(("logits", "gradients"), found, wanted, strict=True):
            if not _points_alike(own, its, cosine):
                raise NoTwinError(f"a copy of it returns other {what}")

    @torch.no_grad()
    def agrees_on(self, rows: Tensor) -> bool:
        """Whether the network returns the same logits for ``rows``, up to rounding in float32."""
        with torch.autocast(rows.device.type, enabled=False):
            return _close(self(rows), self.network(rows))

    @property
    def __wrapped__(self) -> nn.Module:
        """What ``inspect.unwrap`` finds: the module, for objectives that look inside."""
        return self.module

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits (R, num_classes) of ``rows``; the caller has the autocast of :meth:`Picked.autocast` on."""
        logits: Tensor = self.module(rows)
        # a CUDA graph writes into the same memory again
        return logits.clone() if self.module._compiled_call_impl is not None else logits

    @property
    def is_current(self) -> bool:
        """Whether nothing but the weights has changed in the network."""
        return self.signature == _signature(self.network)

    def describe(self) -> str:
        """One line for logs."""
        parts = [str(self.how.dtype).removeprefix("torch.")]
        parts += ["channels last"] if self.how.channels_last else []
        parts += [f"{len(self.folded)} normalisations folded"] if self.folded else []
        parts += ["compiled"] if self.module._compiled_call_impl is not None else []
        return ", ".join(parts)

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's weights and buffers as they are now."""
        sources = [getattr(module, name) for module, name in self._plain_sources]
        if sources:
            torch._foreach_copy_(self._plain_targets, sources)
        for layer, source, norm in self._folds:
            _copy_folded(layer, source, norm)

    def _lay_out(self, on_cpu: bool) -> None:
        """Weights without gradients, in their precision and layout."""
        self.module.requires_grad_(False)
        for module in self.module.modules() if self.how.dtype != torch.float32 else ():
            is_depthwise = isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels
            if on_cpu and is_depthwise:
                # there half precision is slower for these, up to twice
                module.forward = partial(_in_float32, module)
            elif isinstance(module, (nn.Linear, _ConvNd)):
                # autocast would cast the weights of these, and of nothing else that matters, in every pass
                module.to(self.how.dtype)
        for parameter in self.module.parameters() if self.how.channels_last else ():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def _collect(self) -> None:
        """Which tensors are copied from where."""
        sources = dict(self.network.named_modules())
        self._folds = [
            (self.module.get_submodule(layer), sources[layer], sources[norm]) for norm, layer in self.folded.items()
        ]
        taken = {layer for layer, *_ in self._folds}
        self._plain_targets: list[Tensor] = []
        self._plain_sources: list[tuple[nn.Module, str]] = []
        for path, module in self.module.named_modules():
            if module in taken:
                continue
            for name, tensor in _tensors(module).items():
                if tensor is not None:
                    self._plain_targets.append(tensor)
                    self._plain_sources.append((sources[path], name))


class Twins:
    """The twins of a stage, each made when it is first asked for."""

    def __init__(self) -> None:
        self._twins: dict[tuple[nn.Module, Picked, Collection[str]], Twin | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Twins:
        """None yet: a copied box has other networks."""
        return Twins()

    def of(
        self, network: nn.Module, who: str, how: Picked, rows: Tensor, kept: Collection[str] = frozenset()
    ) -> Twin | None:
        """The twin of ``network``, with its present weights; None where there is none, which is logged once.

        Args:
            network: in the mode of the search.
            who: what the log calls it.
            how: as in :class:`Twin`.
            rows: as in :class:`Twin`.
            kept: as in :class:`Twin`.
        """
        key = (network, how, kept)
        is_new, twin = key not in self._twins, self._twins.get(key)
        if twin is not None and twin.is_current:
            twin.update()
        elif is_new or twin is not None:
            try:
                twin = Twin(network, how, rows, kept)
                if is_new:
                    logger.info("search: the %s is passed in %s", who, twin.describe())
            except NoTwinError as reason:
                twin = None
                logger.info("search: the %s is passed as it is: %s", who, reason)
            self._twins[key] = twin
        return twin


def _in_float32(layer: nn.Module, rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        result: Tensor = type(layer).forward(layer, rows.float())
    return result


def _check_copyable(network: nn.Module) -> None:
    for path, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NoTwinError(f"'{path}' is a TorchScript module")
        if isinstance(module, (FullyShardedDataParallel, DistributedDataParallel)):
            raise NoTwinError(f"its processes share '{path}', a {type(module).__name__}")
        if module.training:
            raise NoTwinError(f"'{path}' is in train mode" if path else "it is in train mode")
        if "forward" in vars(module):
            raise NoTwinError(f"'{path}' has a forward of its own")
        for name, parameter in module._parameters.items():
            if parameter is not None and (type(parameter) is not nn.Parameter or parameter.dtype != torch.float32):
                raise NoTwinError(f"'{path}.{name}' is a {type(parameter).__name__} of {parameter.dtype}")
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        for hook in (hook for kind in hooks for hook in kind.values()):
            if not _is_torchdistills(hook):
                raise NoTwinError(f"'{path}' has a hook, which may change what it returns")


def _is_torchdistills(hook: Any) -> bool:
    """Whether a hook only records, as torchdistill's do."""
    function = hook.func if isinstance(hook, partial) else hook
    return str(getattr(function, "__module__", "")).startswith("torchdistill.")


def _copy(network: nn.Module) -> nn.Module:
    """A copy without hooks, which would drag along what they record into."""
    hooks = [getattr(m, name) for m in network.modules() for name in vars(m) if name.endswith("_hooks")]
    memo: dict[int, Any] = {id(hook): type(hook)() for hook in hooks if isinstance(hook, dict)}
    try:
        found = copy.deepcopy(network, memo)
    except Exception as error:  # whatever a module's own way of copying raises
        raise NoTwinError(f"it cannot be copied: {error}") from error
    if {id(module) for module in network.modules()} & {id(module) for module in found.modules()}:
        raise NoTwinError("a copy of it has modules of its own")
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """Parameters, buffers and plain attributes of ``module`` that are tensors, or None in the place of one."""
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return {**module._parameters, **module._buffers, **attributes}


def _signature(network: nn.Module) -> list[Any]:
    """What a pass may depend on but for the values of tensors: modules, modes, attributes, hooks, shapes."""
    found: list[Any] = []
    for module in network.modules():
        values = vars(module)
        shapes = {name: None if tensor is None else tensor.shape for name, tensor in _tensors(module).items()}
        hooks = [tuple(value) for name, value in values.items() if name in OWN and name.endswith("_hooks")]
        attributes = {name: _comparable(value) for name, value in values.items() if name not in OWN}
        found.append((id(module), type(module), module.training, shapes, hooks, attributes))
    return found


def _comparable(value: Any) -> Any:
    """Something that is equal as long as ``value`` is, and does not change with it."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((_comparable(key), _comparable(item)) for key, item in value.items())
    # a tensor's value is copied, so it may be another one
    return "tensor" if isinstance(value, Tensor) else id(value)


def _logits_and_gradients(network: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (R, C), and the gradient of half their squared norm with respect to each row, (R, ...)."""
    with torch.enable_grad():
        leaf = rows.clone().requires_grad_()
        logits: Tensor = network(leaf)
        # the gradient is zero where the network cuts the graph
        (gradients,) = torch.autograd.grad(logits.float().square().sum() / 2 + 0 * leaf.sum(), leaf)
    return logits.detach().float(), gradients


def _points_alike(found: Tensor, wanted: Tensor, cosine: float) -> bool:
    """Whether the rows of both have the same direction, and about the same length."""
    if found.shape != wanted.shape:
        return False
    found, wanted = found.flatten(1), wanted.flatten(1)
    lengths = found.norm(dim=1), wanted.norm(dim=1)
    alike = (found * wanted).sum(1) >= cosine * lengths[0] * lengths[1]
    return bool((alike & (lengths[0] >= cosine * lengths[1]) & (lengths[1] >= cosine * lengths[0])).all())


def _close(found: Any, wanted: Any) -> bool:
    """Equal up to rounding on the scale of the largest value."""
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())


@torch.no_grad()
def _fold(module: nn.Module, rows: Tensor, kept: Collection[str]) -> dict[str, str]:
    """Fold what can be.

    Returns:
        By path of the normalisation, that of the layer that it went into.
    """
    pairs = _pairs(module, rows, kept)
    trial = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for norm in filter(_normalises, trial.modules()):
        # statistics that matter: those of a new network are 0 and 1
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = getattr(norm, name)
            if values is not None:
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    wanted = trial(rows)
    _replace(trial, pairs)
    if not _close(trial(rows), wanted):
        return {}
    _replace(module, pairs)
    return pairs


def _normalises(module: nn.Module) -> bool:
    """Whether it scales and shifts every channel by numbers that it has."""
    return isinstance(module, _BatchNorm) and type(module) in NORMALISATIONS and module.running_mean is not None


def _pairs(module: nn.Module, rows: Tensor, kept: Collection[str]) -> dict[str, str]:
    """Normalisations in eval mode, by path, that are the only reader of what a layer returns; each is called once.

    Read off the graph: that somebody else reads it too may not show in the logits yet, as in networks whose branches
    begin at zero.
    """
    nodes: dict[str, list[Any]] = {}

    def see(path: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nodes.setdefault(path, []).append(output.grad_fn)

    with ExitStack() as hooks:
        for path, part in module.named_modules():
            if _normalises(part) or (type(part) in FOLDABLE and path not in kept):
                hooks.enter_context(part.register_forward_hook(partial(see, path)))
        with torch.enable_grad():
            # a clone, since a network may work in place, which a leaf does not allow
            logits = module(rows.clone().requires_grad_().clone())
    readers = _readers(logits.grad_fn)
    once = {path: called[0] for path, called in nodes.items() if len(called) == 1 and called[0] is not None}
    norms = {node: path for path, node in once.items() if _normalises(module.get_submodule(path))}
    layers = {path: node for path, node in once.items() if node not in norms}
    alone = {path: readers[node][0] for path, node in layers.items() if len(readers.get(node, [])) == 1}
    found = {norms[reader]: path for path, reader in alone.items() if reader in norms}
    # a normalisation may be along another dimension than the layer's outputs
    return {n: path for n, path in found.items() if _width(module, n) == _width(module, path)}


def _readers(last: Any) -> dict[Any, list[Any]]:
    """For every node of the graph that ends in ``last``, the nodes that read its result."""
    readers: dict[Any, list[Any]] = {}
    left = [last]
    while left:
        node = left.pop()
        for below, _ in node.next_functions:
            if below is not None:
                if below not in readers:
                    left.append(below)
                readers.setdefault(below, []).append(node)
    return readers


def _width(module: nn.Module, path: str) -> int:
    part: Any = module.get_submodule(path)
    return int(part.num_features if _normalises(part) else part.weight.shape[0])


def _replace(module: nn.Module, pairs: Mapping[str, str]) -> None:
    """Put every normalisation into its layer, and nothing in its place."""
    for norm_path, layer_path in pairs.items():
        layer, norm = module.get_submodule(layer_path), module.get_submodule(norm_path)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
        _copy_folded(layer, layer, norm)
        parent, _, name = norm_path.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Identity())


def _copy_folded(target: Any, layer: Any, norm: Any) -> None:
    """Into ``target`` the weight and bias of ``layer`` followed by ``norm``."""
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics)
    target.weight.copy_(weight)
    target.bias.copy_(bias)
