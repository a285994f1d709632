"""What the tests of the robust-distillation losses share: formulas in plain Python, and boxes of confident networks.

Each formula takes the adversarial rows of a batch, the epoch and how many there are, and the loss's options, whose
defaults are those of the papers and their code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from tiny import PIXEL_THREAT, images, sharp, tiny_box
from torch import Tensor, nn

from torchdistill_adv.boxes import Box

Logits = list[float]


class Row(NamedTuple):
    """One adversarial example: which image it is of, that one's label, and logits on both."""

    image: int
    label: int
    teacher_clean: Logits
    student_clean: Logits
    teacher: Logits
    student: Logits
    standard: Logits  # of the standard teacher
    teacher_mirrored: Logits  # on 2 x - x'
    student_mirrored: Logits


Rows = list[Row]


def softmax(logits: Logits, temperature: float = 1.0) -> list[float]:
    total = sum(math.exp(v / temperature) for v in logits)
    return [math.exp(v / temperature) / total for v in logits]


def kl(p: Logits, q: Logits, temperature: float = 1.0) -> float:
    pairs = zip(softmax(p, temperature), softmax(q, temperature), strict=True)
    return temperature**2 * sum(a * math.log(a / b) for a, b in pairs)


def ce(logits: Logits, label: int) -> float:
    return -math.log(softmax(logits)[label])


def soft_ce(logits: Logits, target: list[float]) -> float:
    return -sum(q * math.log(p) for q, p in zip(target, softmax(logits), strict=True))


def mixture(row: Row, share: float) -> list[float]:
    """The label and the teacher's clean prediction, with ``share`` of the latter."""
    return [share * p + (1 - share) * (c == row.label) for c, p in enumerate(softmax(row.teacher_clean))]


def trust(row: Row, beta: float) -> float:
    return softmax(row.teacher)[row.label] ** beta


def is_wrong(logits: Logits, label: int) -> bool:
    return logits.index(max(logits)) != label


def exchanged(logits: Logits, label: int) -> Logits:
    """Logits with those of the label and of the predicted class exchanged."""
    logits, predicted = list(logits), logits.index(max(logits))
    logits[label], logits[predicted] = logits[predicted], logits[label]
    return logits


def correlation(a: Logits, b: Logits) -> float:
    a, b = ([v - sum(vector) / len(vector) for v in vector] for vector in (a, b))
    ab, aa, bb = (sum(v * w for v, w in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b)))
    return ab / math.sqrt(aa * bb)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def pgd_at(rows: Rows, epoch: int, epochs: int) -> float:
    return mean(ce(r.student, r.label) for r in rows)


def trades(rows: Rows, epoch: int, epochs: int, beta: float = 6.0) -> float:
    return mean(ce(r.student_clean, r.label) + beta * kl(r.student_clean, r.student) for r in rows)


def ard(rows: Rows, epoch: int, epochs: int, alpha: float = 1.0, temperature: float = 30.0) -> float:
    distillation = mean(kl(r.teacher_clean, r.student, temperature) for r in rows)
    return alpha * distillation + (1 - alpha) * mean(ce(r.student_clean, r.label) for r in rows)


def rslad(rows: Rows, epoch: int, epochs: int, alpha: float = 5 / 6) -> float:
    clean = mean(kl(r.teacher_clean, r.student_clean) for r in rows)
    return alpha * mean(kl(r.teacher_clean, r.student) for r in rows) + (1 - alpha) * clean


def adaad(rows: Rows, epoch: int, epochs: int, alpha: float = 1.0, temperature: float = 1.0) -> float:
    clean = mean(kl(r.teacher_clean, r.student_clean, temperature) for r in rows)
    return alpha * mean(kl(r.teacher, r.student, temperature) for r in rows) + (1 - alpha) * clean


def adaiad(
    rows: Rows,
    epoch: int,
    epochs: int,
    temperature: float = 30.0,
    beta: float = 0.1,
    begin_epoch: int = 60,
    weigh_teacher: bool = False,
) -> float:
    values = []
    for r in rows:
        w = trust(r, beta) if epoch >= begin_epoch else 1.0
        guided = kl(r.teacher, r.student, temperature)
        values.append((w if weigh_teacher else 1.0) * guided + (1 - w) * kl(r.student_clean, r.student))
    return mean(values)


def iad(
    rows: Rows,
    epoch: int,
    epochs: int,
    variant: str = "I",
    temperature: float = 1.0,
    beta: float = 0.1,
    begin_epoch: int = 60,
    weigh_teacher: bool = False,
) -> float:
    values = []
    for r in rows:
        w = trust(r, beta) if epoch >= begin_epoch else 1.0
        introspection = (1 - w) * kl(r.student_clean, r.student)
        if variant == "I":
            guided = kl(r.teacher_clean, r.student, temperature)
            values.append((w if weigh_teacher else 1.0) * guided + introspection)
        else:
            robust = w * kl(r.teacher, r.student, temperature) + temperature**2 * introspection
            values.append(ce(r.student, r.label) / 4 + robust / 2 + kl(r.standard, r.student, temperature) / 4)
    return mean(values)


def akd(rows: Rows, epoch: int, epochs: int, teacher_share: float = 0.5) -> float:
    return mean(soft_ce(r.student, mixture(r, teacher_share)) for r in rows)


def akd2(
    rows: Rows,
    epoch: int,
    epochs: int,
    robust_weight: float = 0.6,
    standard_weight: float = 0.1,
    temperature: float = 2.0,
) -> float:
    robust = robust_weight * mean(kl(r.teacher, r.student, temperature) for r in rows)
    standard = standard_weight * mean(kl(r.standard, r.student, temperature) for r in rows)
    return robust + standard + (1 - robust_weight - standard_weight) * mean(ce(r.student, r.label) for r in rows)


def igdm(rows: Rows, epoch: int, epochs: int, ramp: bool = True) -> float:
    values = []
    for r in rows:
        teacher = [a - b for a, b in zip(r.teacher, r.teacher_mirrored, strict=True)]
        student = [a - b for a, b in zip(r.student, r.student_mirrored, strict=True)]
        values.append(kl(teacher, student))
    return ((epoch + 1) / epochs if ramp else 1.0) * mean(values)


def dgad(rows: Rows, epoch: int, epochs: int, beta: float = 1.0) -> float:
    values = []
    for r in rows:
        if is_wrong(r.teacher_clean, r.label):
            guided = kl(exchanged(r.teacher_clean, r.label), r.student_clean)
        else:
            guided = kl(exchanged(r.teacher, r.label), r.student)
        pairs = zip(softmax(r.student), softmax(r.student_clean), strict=True)
        values.append(guided + beta * mean((p - q) ** 2 for p, q in pairs))
    return mean(values)


def anchors(rows: Rows) -> list[Logits]:
    """The teacher's clean logits, by image."""
    return [logits for _, logits in sorted({r.image: r.teacher_clean for r in rows}.items())]


def gacd(rows: Rows, epoch: int, epochs: int, temperature: float = 0.1, ce_weight: float = 1.0) -> float:
    contrast = total = 0.0
    for r in rows:
        similarity = softmax([correlation(r.student, t) for t in anchors(rows)], temperature)
        weight = softmax(r.teacher_clean)[r.label]
        contrast -= weight * math.log(similarity[r.image])
        total += weight
    return ce_weight * mean(ce(r.student, r.label) for r in rows) + contrast / total


def crdnd(rows: Rows, epoch: int, epochs: int, relation_weight: float = 1.0, temperature: float = 0.5) -> float:
    count = len(anchors(rows))
    values = []
    for k, r in enumerate(rows):
        # one example of each other image: several of an image come particle by particle
        others = [o for o in rows[k - k % count :][:count] if o.image != r.image]
        teacher = [correlation(r.teacher_clean, o.teacher_clean) / temperature for o in others]
        student = [correlation(r.student, o.student) / temperature for o in others]
        denoised = soft_ce(r.student, mixture(r, softmax(r.teacher_clean)[r.label]))
        values.append(denoised + relation_weight * kl(teacher, student))
    return mean(values)


FORMULAS: dict[str, Callable[..., float]] = {
    "PGDATLoss": pgd_at,
    "TRADESLoss": trades,
    "ARDLoss": ard,
    "RSLADLoss": rslad,
    "AdaADLoss": adaad,
    "AdaIADLoss": adaiad,
    "IADLoss": iad,
    "AKDLoss": akd,
    "AKD2Loss": akd2,
    "IGDMLoss": igdm,
    "DGADLoss": dgad,
    "GACDLoss": gacd,
    "CRDNDLoss": crdnd,
}

# one case of each, and of both variants of IAD, in which every part of the loss counts
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {key: (key, {}) for key in FORMULAS} | {
    "ARDLoss": ("ARDLoss", {"alpha": 0.3, "temperature": 2}),
    "AdaADLoss": ("AdaADLoss", {"alpha": 0.3, "temperature": 2}),
    "AdaIADLoss": ("AdaIADLoss", {"begin_epoch": 0, "beta": 1, "temperature": 2}),
    "IADLoss": ("IADLoss", {"begin_epoch": 0, "beta": 1, "temperature": 2}),
    "IADLoss II": ("IADLoss", {"begin_epoch": 0, "beta": 1, "temperature": 2, "variant": "II"}),
}

EPOCHS = 4
TWO_STEPS = {"key": "PGD", "kwargs": {"num_steps": 2, "step_size": 0.1}}
PARTICLES = {"key": "SVGD", "kwargs": {"num_particles": 2, "step_size": 0.5, "bandwidth": "median"}}
# a wide ball, so that predictions on clean images and on examples differ
WIDE = {"adversary": TWO_STEPS, "threat": {**PIXEL_THREAT, "eps": 0.2}}


class TwoTeachers(nn.Module):
    """A robust teacher, which gives the logits, and a standard one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.robust, self.standard = sharp(1, width=8), sharp(3, width=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.robust(x)


def batch(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images in float64; the teacher is right about every second one at least."""
    x, y = images(count, seed)
    with torch.no_grad():
        y[::2] = TwoTeachers().eval()(x).argmax(1)[::2]
    return x.double(), y


def block(key: str, **options: Any) -> dict[str, Any]:
    """A term of weight 1."""
    return {"criterion": {"key": key, "kwargs": {"threat": PIXEL_THREAT, **options}}, "weight": 1.0}


def box_of(
    *blocks: dict[str, Any], epoch: int = 2, bn: bool = True, teacher: Callable[[], nn.Module] | None = TwoTeachers
) -> Box:
    """A box in float64 with ``term0`` and so on, whose epoch ``epoch`` of four has begun."""
    terms = {f"term{i}": block for i, block in enumerate(blocks)}
    box = tiny_box(terms, teacher=teacher, student=sharp(2, bn=bn), double=True, num_epochs=EPOCHS)
    box.pre_epoch_process(epoch=epoch)
    return box
