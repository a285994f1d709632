"""Reasons to doubt a robust accuracy: what is seen of the network, and of its results beside each other.

The list follows what `AutoAttack <https://github.com/fra31/auto-attack/blob/master/flags_doc.md>`_ warns of and
`Athalye et al. (ICML 2018) <https://arxiv.org/abs/1802.00420>`_ and `Carlini et al. (2019)
<https://arxiv.org/abs/1902.06705>`_ ask to be checked. The limits are ours. A flag is no proof, and no flag is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from torchdistill_adv.adversaries.common import input_gradient
from torchdistill_adv.divergences import cross_entropy, wide
from torchdistill_adv.evaluation.results import AttackResult, Flag
from torchdistill_adv.evaluation.statistics import sign_test

# far below what any network in use has, far above the smallest float32
VANISHED = 1e-20
MAX_VANISHED = 0.05
# published robust networks have up to about 5 points between PGD and AutoAttack
MAX_GAP = 10.0
MAX_BLACK_BOX = 0.01
SIGNIFICANT = 0.01


def network_flags(model: nn.Module, images: Tensor, labels: Tensor) -> list[Flag]:
    """What a network in eval mode shows on some images (N, C, ...) in pixels, with their labels (N,)."""
    return list(_network_flags(model, images, labels))


def _network_flags(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Flag]:
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        yield Flag(
            "inputs out of range",
            f"pixels from {low:.3g} to {high:.3g}, outside [0, 1]: mean and std are not those of the data's Normalize",
        )
    with torch.no_grad():
        first, second = (wide(model(images)) for _ in range(2))
    difference = float((first - second).abs().max())
    if difference > 1e-3 * float(first.abs().max()):
        yield Flag(
            "randomised model",
            f"two passes on the same images differ by up to {difference:.3g} in the logits: an attack must average "
            "over passes (expectation over transformation), which none here does, so robustness is overestimated",
        )
    sums = first.sum(1)
    if float(first.min()) >= 0 and bool(((sums - 1).abs() < 1e-3).all()):
        yield Flag(
            "probabilities",
            "the outputs are probabilities: losses that expect logits have small gradients then; give the network "
            "without its softmax",
        )
    right = first.argmax(1) == labels
    if bool(right.any()):
        gradient = input_gradient(
            lambda rows, index: cross_entropy(model(rows), labels[right][index]),
            images[right],
            torch.arange(int(right.sum()), device=images.device),
        )
        # NaN too, which leads no attack anywhere
        vanished = float((~(gradient.flatten(1).abs().amax(1) >= VANISHED)).float().mean())
        if vanished > MAX_VANISHED:
            yield Flag(
                "gradient masking",
                f"the gradient of the cross-entropy is zero or vanishing on {100 * vanished:.0f} % of the images that "
                "are classified rightly: attacks that follow it find nothing there",
            )


def result_flags(results: Sequence[AttackResult], num_classes: int) -> list[Flag]:
    """What the results of one network show beside each other; ``clean`` is the first of them."""
    return list(_result_flags(results, num_classes))


def _result_flags(results: Sequence[AttackResult], num_classes: int) -> Iterator[Flag]:
    clean = results[0]
    if clean.interval[0] <= 100 / num_classes:
        yield Flag(
            "clean accuracy near chance",
            f"{clean.accuracy:.1f} % without an attack, where guessing has {100 / num_classes:.1f} %: wrong mean and "
            "std, wrong labels, or weights that were not loaded",
        )
    for stronger in results:
        for weaker in results:
            if _is_stronger(stronger, weaker) and stronger.correct > weaker.correct:
                p = sign_test(stronger.outcomes, weaker.outcomes)
                if p < SIGNIFICANT:
                    yield Flag(
                        "gradient masking",
                        f"{_name(stronger)} leaves {stronger.accuracy:.1f} %, the weaker {_name(weaker)} only "
                        f"{weaker.accuracy:.1f} % (p = {p:.1g})",
                    )
    for other in results:
        for pgd in results:
            gap = pgd.accuracy - other.accuracy
            if _kind(pgd) == "pgd" and _kind(other) in ("cw", "autoattack") and pgd.eps == other.eps and gap > MAX_GAP:
                yield Flag(
                    "PGD overestimates",
                    f"{_name(pgd)} leaves {pgd.accuracy:.1f} %, {_name(other)} {other.accuracy:.1f} %: quote the "
                    "lower; where more steps and restarts of PGD leave the gap, the cross-entropy's gradient is masked",
                )
    for result in results:
        black_box = (result.found_by or {}).get("square", 0)
        if black_box > MAX_BLACK_BOX * len(result.outcomes):
            yield Flag(
                "gradient masking",
                f"the black-box part of {_name(result)} fooled {black_box} images that its gradients did not",
            )


def _is_stronger(a: AttackResult, b: AttackResult) -> bool:
    """Whether ``a`` should fool at least the images that ``b`` fools."""
    if a.attack == b.attack:
        return a.eps > b.eps > 0
    if a.eps != b.eps:
        return False
    if _kind(a) == _kind(b) in ("pgd", "cw"):
        return _steps(a) > _steps(b)
    # FGSM has PGD's objective, not that of CW
    return (_kind(a), _kind(b)) == ("pgd", "fgsm") or (_kind(a) == "autoattack" and _kind(b) in ("fgsm", "pgd", "cw"))


def _kind(result: AttackResult) -> str:
    return result.attack.rstrip("0123456789")


def _steps(result: AttackResult) -> int:
    return int(result.settings.get("num_steps", 0))


def _name(result: AttackResult) -> str:
    return f"{result.attack} at {result.eps:.3g}"
