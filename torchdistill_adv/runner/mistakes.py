"""Likely mistakes in a configuration that can be run: pure functions of what was found, one for each mistake.

They warn and do not refuse: each can be meant. The limits are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torchdistill_adv.evaluation.pixels import Normalization
from torchdistill_adv.robust_validation import num_common_images
from torchdistill_adv.threat import ThreatModel

NO_NORMALIZE: Normalization = ((0.0,), (1.0,))
# mean and std may be rounded to two digits
ROUNDED = 0.01
# in pixels of [0, 1]
LARGEST_EPS = 0.5
SMALLEST_EPS = 0.1 / 255
# standard deviations of a guesser's accuracy
CHANCE = 3.0
MAX_SHARE = 1000.0
MIN_SHARE = 1e-6


class Mistake(NamedTuple):
    """A likely mistake.

    Args:
        path: where, as a dotted YAML path.
        message: what was found, and what to write instead.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"WARNING {self.path}: {self.message}"


def wrong_normalization(threat: ThreatModel, normalization: Normalization, path: str) -> Mistake | None:
    """The mean and std of a threat model are not those of the data's Normalize, so its radius and range are others.

    Args:
        threat: of a search.
        normalization: mean and std that the training images have.
        path: of the threat model.
    """
    if threat.mean is None or threat.std is None:
        return None
    for name, own, of_data in zip(("mean", "std"), (threat.mean, threat.std), normalization, strict=True):
        channels = range(max(len(own), len(of_data)))
        if any(abs(own[i % len(own)] - of_data[i % len(of_data)]) > ROUNDED for i in channels):
            has = "no Normalize" if normalization == NO_NORMALIZE else f"a Normalize with {name} {_list(of_data)}"
            message = f"found {_list(own)}, and the training images have {has}; write {name}: {_list(of_data)}"
            return Mistake(f"{path}.{name}", message)
    return None


def odd_radius(threat: ThreatModel, num_values: int, path: str) -> Mistake | None:
    r"""A radius that would leave nothing of an image, or next to nothing of an attack.

    In l2 the upper limit is that of a change of every one of the ``num_values`` values of an image:
    :math:`0.5 \sqrt{d}`.

    Args:
        threat: of a search.
        num_values: values of an image, d.
        path: of the threat model.
    """
    if math.isinf(threat.eps) or (threat.space == "input" and threat.std is None):
        return None
    pixels = threat.eps * (max(threat.std) if threat.space == "input" and threat.std else 1)
    largest = LARGEST_EPS * (math.sqrt(num_values) if threat.norm == "l2" else 1)
    if SMALLEST_EPS <= pixels <= largest:
        return None
    size = "more than half the range of an image" if pixels > largest else "less than any image shows"
    usual = "8/255" if threat.norm == "linf" else "0.5"
    found = f"found {threat.eps:g} in {threat.space} space, {pixels:.3g} in pixels of [0, 1]: {size}"
    return Mistake(f"{path}.eps", f"{found}; write a radius such as {usual} with space: 'pixel'")


def selects_on_test(datasets: Mapping[str, Any], val_id: str, test_id: str, path: str) -> Mistake | None:
    """The best epoch is chosen by images of the test set, so the test accuracy of that epoch is too high.

    Args:
        datasets: the section ``datasets``.
        val_id: of the validation set.
        test_id: of the test set.
        path: of the validation loader.
    """
    common = num_common_images(datasets[val_id], datasets[test_id])
    if not common:
        return None
    return Mistake(
        f"{path}.dataset_id",
        f"found '{val_id}', which has {common:,} images of the test set: the epoch that is kept is chosen by them; "
        "write a data set of held-out training images, such as a torch.utils.data.Subset",
    )


def single_last_batch(num_images: int, batch_size: int, path: str) -> Mistake | None:
    """The last batch of an epoch is one image, which batch normalisation cannot normalise, or normalises by itself.

    Args:
        num_images: of an epoch.
        batch_size: of a loader that keeps its last batch.
        path: of the loader.
    """
    if batch_size == 1 or num_images % batch_size != 1:
        return None
    return Mistake(
        f"{path}.kwargs.drop_last",
        f"found False, and the last of {num_images:,} images by {batch_size} is a batch by itself, which batch "
        "normalisation has no statistics for; write drop_last: True",
    )


def weak_teacher(right: int, images: int, num_classes: int, source: Any) -> Mistake | None:
    """The teacher is right on no more images than a guesser would be: it is untrained, or gets other images.

    Args:
        right: images of the batch whose class it predicts.
        images: of the batch.
        num_classes: of the teacher.
        source: its ``src_ckpt``.
    """
    chance = 1 / num_classes
    limit = chance + CHANCE * math.sqrt(chance * (1 - chance) / images)
    # of a few images a good teacher can miss as many
    if right / images > limit or limit > 0.8:
        return None
    found = f"'{source}'" if source else "no checkpoint"
    return Mistake(
        "models.teacher_model.src_ckpt",
        f"found {found}, and the teacher is right on {right} of the {images} images of a batch, which guessing gives "
        f"too ({num_classes} classes); write the checkpoint of a trained teacher, and the Normalize and the order of "
        "classes that it was trained with",
    )


def different_classes(student: int, teacher: int) -> Mistake | None:
    """Teacher and student give logits of different numbers of classes, so no loss can compare their predictions."""
    if student == teacher:
        return None
    return Mistake(
        "models.student_model.kwargs",
        f"the student has {student} classes, the teacher {teacher}; write the same num_classes for both",
    )


def teacher_in_train_mode(mode: str, in_train_mode: bool, path: str) -> Mistake | None:
    """The teacher is kept in train mode: batch normalisation by the batch at hand, dropout on.

    Args:
        mode: ``teacher_mode`` of the stage's adversarial terms.
        in_train_mode: whether the teacher is.
        path: of the first of them.
    """
    if mode != "keep" or not in_train_mode:
        return None
    return Mistake(
        f"{path}.teacher_mode",
        "found 'keep', and the teacher is in train mode: its predictions depend on the other images of the batch or on "
        "chance; write 'eval', or leave it out",
    )


def useless_gradient(gradient: float, path: str) -> Mistake | None:
    """What is trained gets no gradient from a term, or one that is not finite.

    Args:
        gradient: its l2 norm.
        path: of the term.
    """
    if gradient and math.isfinite(gradient):
        return None
    if gradient == 0:
        text = "has no gradient with respect to what is trained, so it trains nothing in this step; write the paths of "
        return Mistake(path, f"{text}modules of the student, or leave the term out")
    return Mistake(path, f"has a gradient of norm {gradient}; write a smaller weight, or another learning target")


def odd_weight(name: str, gradients: Mapping[str, float], path: str) -> Mistake | None:
    """A term whose gradient is so much larger or smaller than that of all others that only one side trains.

    Args:
        name: of the term.
        gradients: l2 norm of the gradient of every weighted term.
        path: of the term.
    """
    own = gradients[name]
    others = sum(gradient for other, gradient in gradients.items() if other != name)
    if not (math.isfinite(own) and math.isfinite(others) and own and others):
        return None
    if MIN_SHARE <= own / others <= MAX_SHARE:
        return None
    who, change = ("it hardly trains", "larger") if own < others else ("they hardly train", "smaller")
    found = f"the gradient of this term is {own / others:.2g} times that of all others together, so {who} anything"
    return Mistake(f"{path}.weight", f"{found}; write a {change} weight")


def idle_search(statistics: Mapping[str, float], adversary: str, path: str) -> Mistake | None:
    """A search that did not change what it is to raise or lower.

    Args:
        statistics: of :func:`~torchdistill_adv.statistics.search_statistics`.
        adversary: its name.
        path: of the term.
    """
    before, after = statistics["objective_clean"], statistics["objective_adversarial"]
    if before != after:
        return None
    found = (
        f"{adversary} left its objective at {before:.4g}, its examples {statistics['distance_max']:.4g} away at most"
    )
    return Mistake(f"{path}.adversary", f"{found}; write a random start (start: 'uniform'), or another objective")


def _list(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
