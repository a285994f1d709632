"""AutoAttack, by an installed library of its authors' code."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.attacks import Attacked, GradientAttack
from torchdistill_adv.guards import own_random_stream
from torchdistill_adv.noise import ImageNoise
from torchdistill_adv.threat import ThreatModel

logger = logging.getLogger(__name__)

LIBRARIES = ("pyautoattack", "autoattack")
MARGIN = GradientAttack("cw", 100)


@dataclass(frozen=True)
class AutoAttack:
    r"""AutoAttack in its standard version: four attacks, each on the images that the former ones left right.

    ``apgd-ce``
        APGD on the cross-entropy, 100 steps.
    ``apgd-t``
        APGD on the targeted DLR loss, 100 steps toward each of the :math:`\min(9, C - 1)` likeliest other classes
        :math:`t`, with the logits sorted as :math:`z_{\pi_1} \ge z_{\pi_2} \ge \dots`:

        .. math:: -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}
    ``fab-t``
        FAB, 100 steps toward each of the same classes.
    ``square``
        Square Attack, 5,000 queries, no gradients.

    Paper: `Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks
    <https://arxiv.org/abs/2003.01690>`_ (Croce and Hein, ICML 2020). The parts are the library's, of ``pyautoattack``
    or, where that is not installed, of the authors' ``autoattack``, with the standard version's settings; the order is
    the standard one and every part starts from the same seed, so the outcomes of a batch are those of the library's own
    ``run_standard_evaluation``. Its checks of the network are not run: the evaluation has flags of its own.

    With fewer than four classes :math:`z_{\pi_4}` does not exist, and the library's ``apgd-t`` fails. Its place is then
    taken by PGD on the margin :math:`\max_{j \ne y} z_j - z_y`, the numerator of DLR toward the likeliest other class,
    with 100 steps of a quarter of the radius from a uniform start; ``found_by`` calls it ``cw100``, and the log says
    it once. This is our reading: the paper and its code have no such case.

    The parts work in float32. A batch is attacked with one random stream, so the outcome of an image depends on the
    others in its batch. ``rows`` are in pixels, inside the ball and [0, 1].

    Args:
        library: package and version, for the record; the one that is installed.

    Raises:
        ConfigError: neither library is installed; the images are no (N, C, H, W), or for l2 are smaller than 5 pixels,
            which Square Attack cannot tile.
    """

    library: str = field(default_factory=lambda: _installed())

    kind = "autoattack"
    name = "autoattack"
    norms = ("linf", "l2")
    minimal_norm = False

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, noise: ImageNoise
    ) -> Attacked:
        smallest = 5 if threat.norm == "l2" else 1
        if images.dim() != 4 or min(images.shape[2:]) < smallest:
            raise ConfigError(
                f"found images {tuple(images.shape[1:])}; autoattack in {threat.norm} needs (C, H, W) of at least "
                f"{smallest} x {smallest} pixels; write other attacks, such as pgd20,cw30",
                "attacks",
            )
        rows, found_by = images.clone(), [""] * len(images)
        left = torch.arange(len(images), device=images.device)
        with torch.no_grad(), _silence(), _constant(model), own_random_stream(noise.seed, images.device):
            for name, perturb in _parts(self.library.split()[0], model, images, threat, noise.seed).items():
                x, y = images[left].contiguous(), labels[left]
                found = threat.project(perturb(x.float(), y).to(x.dtype), x)
                fooled = model(found).argmax(1) != y
                rows[left[fooled]] = found[fooled]
                for place in left[fooled].tolist():
                    found_by[place] = name
                left = left[~fooled]
                if not len(left):
                    break
        return Attacked(rows, found_by)


def _parts(
    package: str, model: nn.Module, images: Tensor, threat: ThreatModel, seed: int
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The parts by name, each from images (N, C, H, W) and labels (N,) to examples of the same shape."""

    def logits(pixels: Tensor) -> Tensor:
        # the library knows float32 only
        return model(pixels.to(images.dtype)).float()

    num_classes = logits(images[:1]).shape[1]
    # what is used of it is the same in both
    library = importlib.import_module(package).AutoAttack(
        logits,
        norm={"linf": "Linf", "l2": "L2"}[threat.norm],
        eps=threat.finite_eps,
        seed=seed,
        version="standard",
        device=images.device,
    )
    library.fab.targeted = True
    library.fab.n_target_classes = library.apgd_targeted.n_target_classes = min(9, num_classes - 1)
    targeted = {"apgd-t": library.apgd_targeted.perturb}
    if num_classes < 4:
        _tell(num_classes)
        targeted = {MARGIN.name: lambda x, y: MARGIN(model, x, y, threat, ImageNoise(seed, range(len(x)), x)).rows}
    last = {"fab-t": library.fab.perturb, "square": library.square.perturb}
    return {"apgd-ce": library.apgd.perturb} | targeted | last


def _installed() -> str:
    """Package and version of the first library that is there."""
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    raise ConfigError(
        "autoattack needs the package pyautoattack, which is not installed; run pip install 'torchdistill-adv[eval]'",
        "attacks",
    )


@functools.cache
def _tell(num_classes: int) -> None:
    """Say it once."""
    logger.warning(
        "autoattack: with %d classes the targeted DLR loss is undefined; its part apgd-t is replaced by %s",
        num_classes,
        MARGIN.name,
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing from the library: its warnings are flags of the evaluation. One logs, the other prints."""
    theirs = logging.getLogger("auto-attack")
    before, theirs.disabled = theirs.disabled, True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        theirs.disabled = before


@contextlib.contextmanager
def _constant(model: nn.Module) -> Iterator[None]:
    """Parameters ask for no gradient: FAB goes backward through the whole graph, down to their ``.grad``."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
