"""Methods written plainly: the other side of ``steps.py``.

Each function is a training step up to its loss as one would write it from the papers' formulas, with the settings of
this project's configurations: float32, images laid out channels first, ``torch.autograd.grad`` in a loop, one particle
at a time, nothing shared, folded, compiled or chunked. Teachers are in eval mode without gradients for their weights;
the student comes and goes in train mode. Images are (N, C, H, W), labels (N,), losses scalars.

The host's clean pass comes first, so that a search in eval mode reads the running statistics that it has moved; the
values are then those of the package, which ``tests/test_benchmarks.py`` checks. One thing differs: particles that pass
the student one at a time are normalised particle by particle, and move its running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchdistill_adv.noise import Noise

Plain = Callable[[nn.Module, nn.Module, Tensor, Tensor, Noise], Tensor]

# pixels of [0, 1]
EPS, STEP_SIZE, NUM_STEPS = 8 / 255, 2 / 255, 10
# of CIFAR-100
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of two predictions, averaged over the images."""
    p, log_q = F.softmax(target / temperature, 1), F.log_softmax(logits / temperature, 1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def pgd(value: Callable[[Tensor], Tensor], x: Tensor, start: Tensor) -> Tensor:
    """Ascend ``value``, a mean over images, in the l-infinity ball around ``x``."""

    def clip(rows: Tensor) -> Tensor:
        return torch.min(torch.max(rows, x - EPS), x + EPS).clamp(0, 1)

    rows = clip(x + start)
    for _ in range(NUM_STEPS):
        rows.requires_grad_()
        (gradient,) = torch.autograd.grad(value(rows), rows)
        rows = clip(rows.detach() + STEP_SIZE * gradient.sign())
    return rows


def pgd_at(teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """Madry et al., ICLR 2018."""
    with torch.no_grad():
        student(x)
    student.eval()
    rows = pgd(lambda rows: F.cross_entropy(student(rows), y), x, 0.001 * noise.normal(x.shape))
    student.train()
    return F.cross_entropy(student(rows), y)


def trades(teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """Zhang et al., ICML 2019."""
    clean = student(x)
    student.eval()
    with torch.no_grad():
        reference = student(x)
    rows = pgd(lambda rows: kl(reference, student(rows)), x, 0.001 * noise.normal(x.shape))
    student.train()
    return F.cross_entropy(clean, y) + 6 * kl(clean, student(rows))


def rslad(teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """Zi et al., ICCV 2021."""
    with torch.no_grad():
        soft = teacher(x)
    clean = student(x)
    student.eval()
    rows = pgd(lambda rows: kl(soft, student(rows)), x, 0.001 * noise.normal(x.shape))
    student.train()
    return 5 / 6 * kl(soft, student(rows)) + 1 / 6 * kl(soft, clean)


def adaad(teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """Huang et al., CVPR 2023; the clean pass moves the running statistics and trains nothing."""
    with torch.no_grad():
        student(x)
    student.eval()
    rows = pgd(lambda rows: kl(teacher(rows), student(rows)), x, 0.001 * noise.normal(x.shape))
    student.train()
    with torch.no_grad():
        soft = teacher(rows)
    return kl(soft, student(rows))


def kd_tald(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: Noise,
    num_particles: int = 4,
    num_steps: int = 1,
    bandwidth: float = 1e-3,
) -> Tensor:
    """KD and Nguyen-Duc et al., WACV 2023: an l2 ball of 0.3 around images normalised as CIFAR-100's."""
    mean, std = x.new_tensor(MEAN).view(1, 3, 1, 1), x.new_tensor(STD).view(1, 3, 1, 1)

    def norms(v: Tensor) -> Tensor:
        return v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def clip(rows: Tensor) -> Tensor:
        rows = x + (rows - x) * (0.3 / norms(rows - x)).clamp(max=1)
        return torch.max(torch.min(rows, (1 - mean) / std), (0 - mean) / std)

    with torch.no_grad():
        soft = teacher(x)
    logits = student(x)
    particles = [clip(x + 10 * 0.3 * uniform) for uniform in noise.uniform((num_particles, *x.shape))]
    for _ in range(num_steps):
        gradients = []
        for rows in particles:
            leaf = rows.detach().requires_grad_()
            # of the sum over images, so that each image's gradient is its own
            gradients.append(torch.autograd.grad(len(x) * kl(teacher(leaf), soft), leaf)[0])
        moved = []
        for rows in particles:
            direction = torch.zeros_like(x)
            for other, gradient in zip(particles, gradients, strict=True):
                kernel = torch.exp(-(norms(other - rows) ** 2) / (2 * bandwidth**2))
                direction += kernel * (gradient + (rows - other) / bandwidth**2) / num_particles
            moved.append(clip(rows + 0.1 * direction / norms(direction)))
        particles = moved
    tald = x.new_zeros(())
    for rows in particles:
        with torch.no_grad():
            wanted = F.cross_entropy(teacher(rows), y, reduction="none")
        gap = wanted - F.cross_entropy(student(rows), y, reduction="none")
        tald = tald + gap.square().mean() / num_particles
    return 0.1 * F.cross_entropy(logits, y) + 0.9 * kl(soft, logits, 4) + 0.01 * tald


# by the name of the configuration that has the same settings
PLAIN: Mapping[str, Plain] = {
    "pgd_at": pgd_at,
    "trades": trades,
    "rslad": rslad,
    "adaad": adaad,
    "kd_tald_paper": kd_tald,
}
