"""Any model of RobustBench's zoo from the YAML."""

from __future__ import annotations

from importlib import import_module

from torch import nn
from torchdistill.models.registry import register_model

from torchdistill_adv.errors import ConfigError


@register_model
def robustbench(
    model_name: str, dataset: str = "cifar10", threat_model: str = "Linf", model_dir: str = "./models"
) -> nn.Module:
    """``robustbench.utils.load_model``: a robust teacher of https://robustbench.github.io, downloaded on first use.

    (N, 3, H, W) to (N, num_classes). The images are pixels of [0, 1]; a model that expects normalised ones normalises
    inside. The model comes as RobustBench gives it, in eval mode.

    Paper: `RobustBench: a standardized adversarial robustness benchmark <https://arxiv.org/abs/2010.09670>`_ (Croce et
    al., NeurIPS 2021). The teachers of AdaAD are ``Chen2021LTD_WRN34_20`` on ``cifar10`` and ``Chen2021LTD_WRN34_10``
    on ``cifar100``; TRADES's WRN-34-10, that of RSLAD on CIFAR-10, is ``Zhang2019Theoretically``.

    Needs its package: ``pip install git+https://github.com/RobustBench/robustbench.git``.

    Args:
        model_name: RobustBench's name.
        dataset: ``cifar10``, ``cifar100`` or ``imagenet``.
        threat_model: ``Linf``, ``L2`` or ``corruptions``.
        model_dir: folder of the downloads.

    Raises:
        ConfigError: the package cannot be imported, or has no such model.

    Example:
        .. code-block:: yaml

            teacher_model:
              key: 'robustbench'
              kwargs: {model_name: 'Chen2021LTD_WRN34_20', dataset: 'cifar10', threat_model: 'Linf'}
    """
    try:
        # no dependency of ours: it recommends GitHub over PyPI, and needs a package that PyPI lacks
        load_model = import_module("robustbench.utils").load_model
    except ImportError as error:
        raise ConfigError(
            f"needs the package robustbench ({error}); run: pip install "
            "git+https://github.com/RobustBench/robustbench.git"
        ) from error
    try:
        model: nn.Module = load_model(model_name, model_dir=model_dir, dataset=dataset, threat_model=threat_model)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"found {model_name!r} for {dataset!r} and {threat_model!r}, which RobustBench does not have "
            f"({type(error).__name__}: {error}); write what https://robustbench.github.io lists",
            "model_name",
        ) from error
    return model
