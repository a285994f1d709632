"""How far apart the particles of a search are (TALD, Fig. 1), and how many of them fool the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.data import NORMALIZATION, Images
from experiments.measure import load_network
from experiments.runs import Run
from torchdistill_adv.adversaries import SVGD
from torchdistill_adv.evaluation.diversity import find_particles, sse
from torchdistill_adv.noise import ImageNoise
from torchdistill_adv.objectives import View, kl_teacher_clean_teacher
from torchdistill_adv.threat import ThreatModel

CHUNK_SIZE = 100  # rows through the teacher at once


def search_and_measure(run: Run, device: str | None = None) -> dict[str, Any]:
    """Means over test images that the teacher classifies rightly, with the seed's images and random starts.

    ``sse`` is :func:`~torchdistill_adv.evaluation.diversity.sse`; ``fooled`` the share of the particles, in percent,
    that the teacher does not classify rightly; ``divergence`` the mean of KL(T(x') || T(x)); ``length`` the mean l2
    distance from the image, in model-input space.
    """
    assert run.teacher is not None and run.variant.search is not None
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    block = run.measures["diversity"]
    search = {**block["search"], **run.variant.search}
    method = search.pop("method", "SVGD")
    normalization: Mapping[str, Any] = NORMALIZATION if run.setting.is_normalized else {"mean": [0.0], "std": [1.0]}
    threat = ThreatModel.build({**block["threat"], **search.pop("threat", {}), **normalization})
    settings = SVGD(**search, chunk_size=CHUNK_SIZE)
    teacher = load_network(run.teacher, run.teacher.weights_file).to(where).requires_grad_(False)
    images, labels = _some_right(run, teacher, block["num_images"], where)
    noise = ImageNoise(run.seed, range(settings.num_particles * len(images)), images)
    with torch.no_grad():
        logits = teacher(images)
    if method == "SVGD":
        objective = kl_teacher_clean_teacher(View(images, labels, teacher, teacher, noise, logits))
        found = settings(objective, images, threat, noise).rows.view(-1, *images.shape)
    else:
        found = find_particles(method, teacher, images, logits, threat, settings, noise)
    with torch.no_grad():
        outputs = torch.stack([teacher(particle) for particle in found])
    logs = outputs.log_softmax(2)
    distances = sse(found.transpose(0, 1).flatten(2))
    return {
        "measured": {
            "sse": float(distances.mean()),
            "sse_deviation": float(distances.std()),
            "fooled": 100 * float((outputs.argmax(2) != labels).float().mean()),
            "divergence": float((logs.exp() * (logs - logits.log_softmax(1))).sum(2).mean()),
            "length": float((found - images).flatten(2).norm(dim=2).mean()),
            "num_images": len(images),
        }
    }


def _some_right(run: Run, teacher: Any, wanted: int, where: torch.device) -> tuple[Tensor, Tensor]:
    """Test images of the seed that the teacher classifies rightly, and their labels."""
    images = Images(split="test", **run.images())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))
    chosen: list[int] = []
    for part in order.split(500):
        pixels, labels = zip(*(images[i] for i in part.tolist()), strict=True)
        with torch.no_grad():
            right = teacher(torch.stack(pixels).to(where)).argmax(1).cpu() == torch.tensor(labels)
        chosen += part[right].tolist()
        if len(chosen) >= wanted:
            break
    chosen = chosen[:wanted]
    pixels, labels = zip(*(images[i] for i in chosen), strict=True)
    return torch.stack(pixels).to(where), torch.tensor(labels).to(where)
