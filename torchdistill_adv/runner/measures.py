"""Teacher and student of an experiment compared: decision boundaries, particles, predictions."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from torchdistill_adv.adversaries import SVGD
from torchdistill_adv.checks import check_logits, integer, optional_integer
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation import agreement, diversity
from torchdistill_adv.evaluation.attacks import GradientAttack, describe
from torchdistill_adv.evaluation.blocks import Block, blocks, subset, versions, weights_digest
from torchdistill_adv.evaluation.passes import Batches
from torchdistill_adv.evaluation.pixels import PixelModel, pixel_threat
from torchdistill_adv.evaluation.results import describe_eps
from torchdistill_adv.evaluation.similarity import BoundarySimilarity, boundary_similarity, describe_similarity
from torchdistill_adv.guards import eval_mode, own_random_stream
from torchdistill_adv.noise import ImageNoise, derive_seed
from torchdistill_adv.runner.loading import Experiment, tald_terms
from torchdistill_adv.runner.progress import progress_bar
from torchdistill_adv.threat import ThreatModel

ATTACK = GradientAttack("pgd", 10)
INPUTS = {"clean": "clean", "student": "attacks on the student", "teacher": "attacks on the teacher"}

# of each image, by section and name
Values = dict[tuple[str, ...], Tensor]


def measure(
    experiment: Experiment,
    *,
    num_images: Any = None,
    seed: int = 0,
    particles: Sequence[Any] = (2, 4, 8),
    eps: Any = "8/255",
    batch_size: Any = None,
) -> dict[str, Any]:
    """How alike teacher and student are, and how diverse particles on the teacher are.

    * ``similarity``: MagSim and AngSim, :func:`~torchdistill_adv.evaluation.similarity.boundary_similarity`.
    * ``diversity``: SSE of SVGD at two bandwidths, BSS and PGD, :func:`~torchdistill_adv.evaluation.diversity.sse`,
      with the adversary and the threat model of the first TALD term of the configuration that has SVGD; without one
      those that are TALD's defaults.
    * ``agreement``: same class, KL(T || S) and rank correlations,
      :func:`~torchdistill_adv.evaluation.agreement.compare_logits`, on clean images and on those that PGD-10 (uniform
      start, steps of a quarter of the radius) makes against the student and against the teacher.

    Each section has its ``definition`` in words. Shares are in percent; what has no image, or is not defined, is None.
    Every image has random numbers of its own, so the results do not depend on the batch size (up to rounding). A batch
    that does not fit in memory is halved. The networks and the global random streams come out as they went in.

    Args:
        experiment: with a student and a teacher.
        num_images: how many test images, drawn with ``seed``; by default all.
        seed: of the subset and of the searches.
        particles: K, a list; SSE is None for K = 1.
        eps: l-infinity radius of PGD-10, in pixels of [0, 1].
        batch_size: images at once; by default 100 on the CPU and 500 elsewhere.

    Returns:
        What ``similarity.json`` holds.

    Raises:
        ConfigError: no teacher, an empty data set, labels or outputs that do not fit, or a value out of range.
    """
    counts = list(dict.fromkeys(integer(count, "particles", minimum=1) for count in particles))
    default_size = 100 if experiment.device.type == "cpu" else 500
    batches = Batches(optional_integer(batch_size, "batch_size", minimum=1) or default_size)
    ball, (settings, threat, source) = pixel_threat(eps), _tald_search(experiment)
    indices = subset(len(experiment.data), num_images, seed)
    loader = DataLoader(Subset(experiment.data, indices), batches.size, num_workers=experiment.num_workers)
    runs = [dataclasses.replace(settings, num_particles=count) for count in counts]
    found: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    with (
        eval_mode(*experiment.networks.values()),
        own_random_stream(seed, experiment.device),
        progress_bar(loader, "metrics") as bar,
    ):
        models = {who: experiment.on_pixels(who) for who in ("teacher", "student")}
        for block in blocks(loader, indices, models["teacher"], experiment.device):
            work = partial(_measure_block, block, models, ball, threat, runs, seed)
            for part in batches.run(work, len(block.ids)):
                for name, values in part.items():
                    found[name].append(values)
            bar.update()
    collected = {name: torch.cat(parts).cpu() for name, parts in found.items()}
    return {
        "models": {
            who: {"checkpoint": experiment.checkpoints[who], "sha256": weights_digest(experiment.networks[who])}
            for who in models
        },
        "data": {
            "dataset": experiment.dataset_id,
            "num_images": len(indices),
            "of": len(experiment.data),
            "subset_seed": seed,
            "indices": indices,
        },
        "seed": seed,
        "device": str(experiment.device),
        "versions": versions(),
        "similarity": describe_similarity(
            BoundarySimilarity(*(collected["similarity", field] for field in BoundarySimilarity._fields))
        ),
        "diversity": {
            "definition": diversity.DEFINITION,
            "settings": {
                "source": source,
                "threat": threat.describe(),
                **{name: getattr(settings, name) for name in ("num_steps", "step_size", "noise_factor", "norm")},
            },
            "num_images": int(collected["teacher", "right"].sum()),
            "results": [_diversity(collected, name, count) for name in diversity.SEARCHES for count in counts],
        },
        "agreement": {
            "definition": agreement.DEFINITION,
            "settings": {**describe(ATTACK), "norm": ball.norm, "eps": ball.eps},
            **{inputs: _agreement(collected, inputs) for inputs in INPUTS},
        },
    }


def _tald_search(experiment: Experiment) -> tuple[SVGD, ThreatModel, str]:
    """Adversary and threat model of the first TALD term with SVGD and where it stands, or TALD's defaults."""
    terms = tald_terms(experiment.config, experiment.normalization)
    path, term = next((path, term) for path, term in terms if isinstance(term.adversary, SVGD))
    settings = dataclasses.replace(term.adversary, targeted=False, return_path=False)
    return settings, term.threat, path.removesuffix(".criterion")


def _measure_block(
    block: Block,
    models: Mapping[str, PixelModel],
    ball: ThreatModel,
    threat: ThreatModel,
    runs: Sequence[SVGD],
    seed: int,
    part: slice,
) -> Values:
    """Every measure of some images of a block."""
    block = Block(block.ids[part], block.pixels[part], block.labels[part])
    teacher, student = models["teacher"], models["student"]
    logits = {who: _logits(model, block.pixels, who) for who, model in models.items()}
    if logits["teacher"].shape != logits["student"].shape:
        classes = f"{logits['student'].shape[1]} classes; the teacher has {logits['teacher'].shape[1]}"
        raise ConfigError(f"has {classes}, and only equal ones can be compared", "models.student_model")
    block.check_labels(logits["teacher"].shape[1])
    images = teacher.normalized(block.pixels)

    bounds = ThreatModel(math.inf, "l2", "input", *(tuple(v.tolist()) for v in (teacher.mean, teacher.std)))
    bounds.check_inputs(images)
    compared = boundary_similarity(teacher.network, student.network, images, block.labels, bounds)
    found: Values = {("similarity", name): values for name, values in compared._asdict().items()}

    right = logits["teacher"].argmax(1) == block.labels
    found["teacher", "right"] = right
    if bool(right.any()):
        places = right.nonzero()[:, 0].tolist()
        some = Block([block.ids[place] for place in places], block.pixels[right], block.labels[right])
        found |= _measure_particles(some, images[right], logits["teacher"][right], teacher.network, threat, runs, seed)

    for inputs in INPUTS:
        pixels, compare = block.pixels, logits
        if inputs != "clean":
            noise = ImageNoise(derive_seed(seed, ATTACK.name), block.ids, pixels)
            pixels = ATTACK(models[inputs], pixels, block.labels, ball, noise).rows
            compare = {who: _logits(model, pixels, who) for who, model in models.items()}
        measures = agreement.compare_logits(compare["teacher"], compare["student"])
        found |= {(inputs, name): values for name, values in measures.items()}
    return found


def _measure_particles(
    block: Block,
    images: Tensor,
    logits: Tensor,
    teacher: nn.Module,
    threat: ThreatModel,
    runs: Sequence[SVGD],
    seed: int,
) -> Values:
    """Diversity and success of every search for every number of particles."""
    found: Values = {}
    for settings in runs:
        count = settings.num_particles
        # of each particle of each image, so that more particles begin with the same ones
        streams = [derive_seed(image, particle) for particle in range(count) for image in block.ids]
        for name in diversity.SEARCHES:
            noise = ImageNoise(derive_seed(seed, "particles"), streams, images)
            rows = diversity.find_particles(name, teacher, images, logits, threat, settings, noise)
            with torch.no_grad():
                predicted = torch.cat([teacher(part).argmax(1) for part in rows.flatten(0, 1).split(len(images))])
            fooled = predicted.view(count, -1) != block.labels
            found["fooled", name, str(count)] = fooled.double().mean(0)
            if count > 1:
                displaced = threat.displacement(rows.flatten(0, 1), images.repeat(count, *[1] * (images.dim() - 1)))
                by_image = displaced.reshape(count, len(images), -1).transpose(0, 1)
                found["sse", name, str(count)] = diversity.sse(by_image)
    return found


def _logits(model: nn.Module, pixels: Tensor, who: str) -> Tensor:
    path = f"models.{who}_model"
    with torch.no_grad():
        logits = check_logits(model(pixels), path, "metrics need")
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError("returns logits that are NaN or infinite; metrics need finite ones", path)
    return logits


def _mean(values: Tensor) -> float | None:
    """The mean of what is defined."""
    defined = values[~values.isnan()]
    return float(defined.mean()) if len(defined) else None


def _diversity(values: Values, name: str, count: int) -> dict[str, Any]:
    none = torch.empty(0)
    distances, fooled = (values.get((key, name, str(count)), none) for key in ("sse", "fooled"))
    share = _mean(fooled)
    return {
        "search": name.split(",")[0],
        "bandwidth": diversity.SEARCHES[name],
        "num_particles": count,
        "sse": _mean(distances),
        "sse_std": float(distances.std(correction=0)) if len(distances) else None,
        "fooled": None if share is None else 100 * share,
    }


def _agreement(values: Values, inputs: str) -> dict[str, Any]:
    soft = {f"{beta:g}": _mean(values[inputs, f"soft {beta:g}"]) for beta in agreement.SHARPNESS}
    return {
        "same": 100 * float(values[inputs, "same"].mean()),
        "kl": float(values[inputs, "kl"].mean()),
        "spearman": {"hard": _mean(values[inputs, "hard"]), "soft": soft},
    }


def as_table(found: Mapping[str, Any]) -> str:
    """What :func:`measure` found, as Markdown, with the definitions."""
    data, alike, spread, same = (found[key] for key in ("data", "similarity", "diversity", "agreement"))
    moved = [alike["num_right"], *_percents(alike["flipped"].values()), alike["num_compared"]]
    particles = [
        [diversity.search_name(row), row["num_particles"], row["sse"], row["sse_std"], *_percents([row["fooled"]])]
        for row in spread["results"]
    ]
    attack, settings = same["settings"], spread["settings"]
    suffix = f" ({attack['name']} at {describe_eps(attack['eps'], attack['norm'])})"
    predictions = []
    for inputs, words in INPUTS.items():
        each, rank = same[inputs], same[inputs]["spearman"]
        images = words if inputs == "clean" else words + suffix
        predictions.append([images, *_percents([each["same"]]), each["kl"], rank["hard"], *rank["soft"].values()])
    parts = [
        f"{data['num_images']} of {data['of']} images of {data['dataset']}, seed {found['seed']}.",
        "**Similarity of the decision boundaries of teacher and student**",
        _table(
            ["both right", "left the label: teacher, %", "student, %", "both, %", "compared", "MagSim", "AngSim"],
            [[*moved, alike["magsim"], alike["angsim"]]],
        ),
        alike["note"] and f"Note: {alike['note']}.",
        alike["definition"],
        "**Diversity of particles on the teacher**",
        _table(["search", "K", "SSE", "deviation", "fool the teacher, %"], particles),
        f"{spread['num_images']} images; {settings['threat']}; L = {settings['num_steps']}, "
        f"eta = {settings['step_size']:g}, tau = {settings['noise_factor']:g} ({settings['source']}). "
        + spread["definition"],
        "**Agreement of teacher and student**",
        _table(
            [
                "images",
                "same class, %",
                "KL(T, S)",
                "Spearman, hard",
                *(f"soft {b}" for b in same["clean"]["spearman"]["soft"]),
            ],
            predictions,
        ),
        same["definition"],
    ]
    return "\n\n".join(part for part in parts if part)


def _percents(shares: Iterable[float | None]) -> list[str | None]:
    return [None if share is None else f"{share:.1f}" for share in shares]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[f"{v:.4g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(header), ["---"] * len(header), *cells])
