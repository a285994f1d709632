r"""Class-activation maps: where in an image a network finds the evidence for a class.

Found through forward hooks on any classifier, which stays as it is. The caller finds the :class:`Layout` of a network
once, keeps it with the network, and asks for maps as often as it likes.

Papers: `Learning Deep Features for Discriminative Localization <https://arxiv.org/abs/1512.04150>`_ (Zhou et al., CVPR
2016) for the exact maps, `Grad-CAM <https://arxiv.org/abs/1610.02391>`_ (Selvaraju et al., ICCV 2017) for the others,
`Adversarial Distillation Based on Slack Matching and Attribution Region Alignment
<https://openaccess.thecvf.com/content/CVPR2024/html/Yin_Adversarial_Distillation_Based_on_Slack_Matching_and_Attribution_Region_Alignment_CVPR_2024_paper.html>`_
(Yin et al., CVPR 2024) for the mean squared error between those of student and teacher. Its authors name a Grad-CAM
library; layer, class, normalisation and sizes are our reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdistill_adv.checks import check_logits
from torchdistill_adv.divergences import wide
from torchdistill_adv.errors import ConfigError, nearest
from torchdistill_adv.guards import eval_mode, on_cloned_buffers, original, uncompiled


@dataclass(frozen=True)
class Layout:
    """Where the maps of a network come from.

    Attributes:
        feature: path of the module whose output is the feature map (N, C, h, w).
        relu: whether a ReLU, applied as a function, comes between that output and the pooling.
        linear: path of the linear layer that turns the spatial mean of the map into the logits; None where the network
            has another head, and maps are Grad-CAM.
    """

    feature: str
    relu: bool = False
    linear: str | None = None


def find_layout(network: nn.Module, images: Tensor, module_path: str | None = None) -> Layout:
    """Where to take the maps of ``network``, from one pass in eval mode that leaves no trace in it.

    The last feature map whose spatial mean, or that of its ReLU, is the input of a linear layer that returns the
    logits gives exact maps; both equalities are checked on the numbers. In any other network the last feature map
    gives Grad-CAM. A map that is the same in every cell does not count: a grid of one cell, or one blown up from it.

    A network that passes on tokens (N, T, D), such as a vision transformer, gets no Grad-CAM unasked: its last map is
    mostly the patch embedding, which has seen nothing but its own patch.

    The pass fills the hook dictionaries of torchdistill like any other; restoring them is the caller's.

    Args:
        network: a classifier, images to logits (N, num_classes).
        images: (N, ...), some that it may see; one is enough.
        module_path: the module whose output is the feature map, (N, C, h, w) with channels second; None is automatic.

    Raises:
        ConfigError: there is no such module, its output is no feature map, or none can be chosen; with those that
            would do.
    """
    network = original(network)
    # half precision would make the comparisons too coarse
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        logits, outputs, inputs = _probe(network, images)
        maps = {path: output for path, output in outputs.items() if _is_map(output)}
        allowed = {path: output for path, output in maps.items() if module_path in (None, path)}
        exact = _find_exact(network, logits, allowed, inputs)
    if exact is not None:
        return exact
    if module_path is None:
        _check_automatic(network, images, outputs, maps)
    elif not allowed:
        _refuse(network, module_path, outputs, maps)
    return Layout(next(reversed(allowed)))


_LAYOUTS: WeakKeyDictionary[nn.Module, dict[str | None, Layout]] = WeakKeyDictionary()


def layout_of(network: nn.Module, images: Tensor, module_path: str | None, option: str) -> Layout:
    """The layout that :func:`find_layout` found for ``network`` when it was first asked.

    Raises:
        ConfigError: there is none; ``option`` names the YAML option that ``module_path`` is from.
    """
    known = _LAYOUTS.setdefault(network, {})
    if module_path not in known:
        try:
            known[module_path] = find_layout(network, images[:1], module_path)
        except ConfigError as error:
            raise ConfigError(error.message, option) from error
    return known[module_path]


def class_activation_maps(network: nn.Module, layout: Layout, rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    r"""Logits and the map of one class for each row, from a single forward pass.

    .. math::
        M = \frac{m}{\|m\|_2}, \quad
        m = \max\Big(0, \sum_c \alpha_c A_c\Big), \quad
        \alpha_c = \begin{cases} W_{kc} & \text{exact} \\
        \frac{1}{h w} \sum_{u,v} \partial z_k / \partial A_{c,u,v} & \text{Grad-CAM} \end{cases}

    For the class k of the row, with :math:`A` (C, h, w) the feature map, after its ReLU if the layout has one,
    :math:`W` the last linear layer and :math:`z` the logits. On what enters the pooling both are equal, and the exact
    one needs no second derivative. Maps are in float32 or wider under any autocast.

    Logits and maps carry gradients to rows and parameters wherever the network's own output would. A row without
    evidence for its class has a map of zeros, and no gradient. Batch normalisation in train mode after the map of
    Grad-CAM lets rows see each other.

    Args:
        network: that of ``layout``, in any mode.
        layout: of :func:`find_layout`.
        rows: (R, ...).
        classes: class numbers (R,).

    Returns:
        Logits (R, num_classes) and maps (R, h, w) of unit l2 norm.
    """
    network = original(network)
    if layout.linear is not None:
        logits, features = _features(network, layout, rows)
        return logits, exact_maps(network, layout, features, classes)

    differentiable = torch.is_grad_enabled() and (
        rows.requires_grad or any(p.requires_grad for p in network.parameters())
    )
    # the faster attention kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits, features = _features(network, layout, rows, as_input=True)
        evidence = logits.gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(evidence, features, create_graph=differentiable)
        maps = _unit(_weighted_sum(gradient.mean((2, 3)), features))
    return (logits, maps) if differentiable else (logits.detach(), maps.detach())


def feature_maps(network: nn.Module, layout: Layout, rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""Logits and a map that knows no class: the mean of the squared channels, :math:`m = \frac{1}{C} \sum_c A_c^2`.

    In the place of :func:`class_activation_maps`, to compare alignment of features with alignment of evidence, as the
    supplement of Yin et al. does in Table 2. It does not say how its features are aligned; ours are the attention maps
    of `Zagoruyko and Komodakis <https://arxiv.org/abs/1612.03928>`_ (ICLR 2017), which need no equal widths.

    Returns:
        Logits (R, num_classes) and maps (R, h, w) of unit l2 norm.
    """
    logits, features = _features(original(network), layout, rows)
    return logits, squared_maps(layout, features)


@contextmanager
def recorded_features(network: nn.Module, layout: Layout) -> Iterator[list[Tensor]]:
    """What the feature module of ``layout`` returns in the passes inside, (R, C, h, w) a call, with its graph.

    For passes that somebody else makes: :func:`exact_maps` and :func:`squared_maps` turn one into maps. A network that
    is compiled need not notice the hook.
    """
    seen: list[Tensor] = []
    module = original(network).get_submodule(layout.feature)
    with module.register_forward_hook(lambda module, args, output: seen.append(output)):
        yield seen


def exact_maps(network: nn.Module, layout: Layout, features: Tensor, classes: Tensor) -> Tensor:
    """The maps (R, h, w) of :func:`class_activation_maps` from a recorded feature map, where they are exact."""
    assert layout.linear is not None, "Grad-CAM needs a pass of its own"
    weights = _linear(original(network), layout.linear).weight[classes]
    return _unit(_weighted_sum(weights, _entering(layout, features)))


def squared_maps(layout: Layout, features: Tensor) -> Tensor:
    """The maps (R, h, w) of :func:`feature_maps` from a recorded feature map."""
    return _unit(wide(_entering(layout, features)).square().mean(1))


def map_distance(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Mean squared error between the maps of each row, (R, h, w) and (R, h', w') to (R,).

    Both are brought to the coarser grid by adaptive average pooling and then to unit norm again, which pooling takes
    away: maps of one pattern on two grids have distance 0. Our reading, as the paper does not speak of sizes.
    """
    (_, h, w), (_, height, width) = student_maps.shape, teacher_maps.shape
    size = min(h, height), min(w, width)
    student, teacher = (_unit(F.adaptive_avg_pool2d(wide(maps), size)) for maps in (student_maps, teacher_maps))
    return (student - teacher).square().mean((1, 2))


def _probe(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, outputs of all modules by path in the order of their last calls, and inputs of the linear ones."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.pop(path, None)
            outputs[path] = output
            if isinstance(module, nn.Linear) and args:
                inputs[path] = args[0]

    with eval_mode(network), on_cloned_buffers(network), uncompiled(network), ExitStack() as hooks:
        for path, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(keep, path)))
        logits = network(images)
    return logits, outputs, inputs


def _is_map(output: Tensor) -> bool:
    return output.dim() == 4 and bool((output != output[:, :, :1, :1]).any())


def _check_automatic(network: nn.Module, images: Tensor, outputs: dict[str, Tensor], maps: dict[str, Tensor]) -> None:
    if not maps:
        raise ConfigError(
            "found no module with an output (N, C, h, w) of several cells, so that none would do "
            f"at images {tuple(images.shape[1:])}; use a convolutional network, larger images, or a loss without maps",
            "module_path",
        )
    if any(output.dim() == 3 and output.shape[1] > 1 for output in outputs.values()):
        raise ConfigError(
            "found a network that passes on tokens (N, T, D), whose last map need not be near its logits; name the "
            f"module to take it from. {_would_do(network, maps)}",
            "module_path",
        )


def _refuse(network: nn.Module, path: str, outputs: dict[str, Tensor], maps: dict[str, Tensor]) -> NoReturn:
    if path not in dict(network.named_modules()):
        raise ConfigError(f"found no module {path!r}; {nearest(path, maps)}", "module_path")
    found = f"an output {tuple(outputs[path].shape)}" if path in outputs else "no output that is a tensor"
    raise ConfigError(
        f"found {path!r}, which has {found}; wanted (N, C, h, w) with cells that differ. {_would_do(network, maps)}",
        "module_path",
    )


def _would_do(network: nn.Module, maps: dict[str, Tensor]) -> str:
    """The last map of every grid, for an error."""
    last = {
        output.shape[2:]: f"{path} {tuple(output.shape[1:])}"
        for path, output in maps.items()
        # attention passes (N, heads, T, T) and the like through them
        if not isinstance(network.get_submodule(path), (nn.Identity, nn.Dropout))
    }
    return f"Known, of which those with channels first would do: {', '.join(last.values()) or 'none'}."


def _find_exact(
    network: nn.Module, logits: Tensor, maps: dict[str, Tensor], inputs: dict[str, Tensor]
) -> Layout | None:
    for linear, pooled in reversed(inputs.items()):
        layer = _linear(network, linear)
        if pooled.dim() == 2 and _close(F.linear(pooled, layer.weight, layer.bias), logits):
            for path, features in reversed(maps.items()):
                for relu in (False, True):
                    if _close((features.relu() if relu else features).mean((2, 3)), pooled):
                        return Layout(path, relu, linear)
    return None


def _linear(network: nn.Module, path: str) -> nn.Linear:
    layer = network.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, on the scale of the largest value."""
    tolerance = torch.finfo(b.dtype).eps ** 0.5
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def _features(network: nn.Module, layout: Layout, rows: Tensor, as_input: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and what the feature module returned; ``as_input`` gives that a gradient even where it has none."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if as_input and not output.requires_grad:
            # a clone, since what follows may work in place, which a leaf does not allow
            output = output.detach().requires_grad_().clone()
        seen[:] = [output]  # the last call, of a module that is called more often
        return output

    with network.get_submodule(layout.feature).register_forward_hook(keep), uncompiled(network):
        logits = check_logits(network(rows), type(network).__name__, "maps need")
    (features,) = seen
    return logits, features


def _entering(layout: Layout, features: Tensor) -> Tensor:
    """What enters the pooling, from what the feature module returned."""
    return features.relu() if layout.relu else features


def _weighted_sum(weights: Tensor, features: Tensor) -> Tensor:
    """Channels (R, C, h, w) weighted by (R, C) and summed: (R, h, w)."""
    return (wide(weights)[:, :, None, None] * wide(features)).sum(1)


def _unit(maps: Tensor) -> Tensor:
    """The positive part of each map, of unit l2 norm; one below rounding beside the rest of its map stays small."""
    flat = maps.flatten(1)
    # maps of 1e-14 are common in deep untrained networks; a constant factor is no matter for what follows
    largest = flat.detach().abs().amax(1, keepdim=True)
    return F.normalize((flat / largest.where(largest > 0, 1)).relu(), dim=1, eps=1e-6).view_as(maps)
