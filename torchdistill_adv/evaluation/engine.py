"""Attacks on a network, image by image, with everything that a reviewer asks for."""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from torchdistill_adv.checks import optional_integer
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.attacks import Attack, describe, parse_attacks
from torchdistill_adv.evaluation.blocks import Block, as_dataset, blocks, fingerprint, subset, versions
from torchdistill_adv.evaluation.flags import network_flags, result_flags
from torchdistill_adv.evaluation.journal import Journal, Record
from torchdistill_adv.evaluation.passes import Batches, Counted, twin_for_attacks
from torchdistill_adv.evaluation.pixels import ROUNDING, PixelModel, pixel_threat
from torchdistill_adv.evaluation.results import AttackResult, Evaluation, Flag
from torchdistill_adv.guards import eval_mode, own_random_stream
from torchdistill_adv.noise import ImageNoise, derive_seed
from torchdistill_adv.threat import ThreatModel

logger = logging.getLogger(__name__)

Job: TypeAlias = tuple[Attack | None, ThreatModel | None]

DEFAULT_EPS = {"linf": "8/255", "l2": 0.5}
TRAIN_MODE = Flag("model in train mode", "it came in train mode; it was evaluated in eval mode")


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    attacks: str | Sequence[str | Attack] = "clean,fgsm,pgd20,cw30",
    norm: str = "linf",
    eps: Any = None,
    step_size: Any = None,
    restarts: Any = 1,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    num_images: Any = None,
    seed: int = 0,
    batch_size: Any = None,
    num_workers: int = 0,
    journal: str | os.PathLike[str] | None = None,
) -> Evaluation:
    r"""Accuracy of any classifier on clean images and under attack.

    .. math::
        \frac{1}{n} \sum_i \mathbb{1}\big[\arg\max f(x_i) = y_i \wedge \arg\max f(x_i') = y_i\big], \quad
        x_i' \in \{x' : \|x' - x_i\|_p \le \epsilon\} \cap [0, 1]

    Only images that are classified rightly are attacked. Attacks work on pixels of [0, 1]; ``mean`` and ``std`` are put
    in front of the network. Whatever an attack returns counts only if it lies in the ball (up to rounding) and is
    classified wrongly when the network is asked again. The network is in eval mode, and comes out as it went in. The
    gradients of attacks are those of a faster copy of it, in float32, where there is a faithful one
    (:func:`~torchdistill_adv.evaluation.passes.twin_for_attacks`).

    Every image has random numbers of its own, so that the outcomes of FGSM, PGD and CW do not depend on the batch size
    (up to the rounding of other batch sizes); those of AutoAttack do. A batch that does not fit in memory is halved.

    Args:
        model: images (N, C, ...) to logits (N, num_classes), on its device.
        data: a data set of (image, label, ...), or a pair of tensors (images, labels), in the space that ``model``
            takes.
        attacks: names, such as ``"clean,fgsm,pgd20,cw30,cwl2,autoattack"``, or attacks of
            :mod:`torchdistill_adv.evaluation.attacks`.
        norm: ``linf`` or ``l2``.
        eps: radius in pixels of [0, 1], or several; by default 8/255 in l-infinity and 0.5 in l2.
        step_size: of PGD and CW-infinity, in pixels; by default a quarter of each radius.
        restarts: of PGD and CW-infinity.
        mean: per-channel mean that ``data`` are normalised with; 0 for data in [0, 1].
        std: per-channel standard deviation, likewise.
        num_images: how many images, drawn with ``seed``; by default all.
        seed: of the subset and of the attacks.
        batch_size: images at once; by default 100 on the CPU and 500 elsewhere.
        num_workers: processes that load the data.
        journal: file that keeps what is done. A killed evaluation that is started again with the same arguments goes on
            from there and ends with the same outcomes; attacks or radii that are added later find the others done.

    Raises:
        ConfigError: an unknown attack or one without the norm, a radius in 0..255, an empty data set, or a model that
            returns no logits.

    Example:
        .. code-block:: python

            from torchdistill_adv.evaluation import evaluate

            found = evaluate(model, test_set, attacks="clean,pgd20,autoattack", eps="8/255", mean=mean, std=std)
            print(found.table())
    """
    todo = parse_attacks(attacks, step_size=step_size, restarts=restarts)
    radii = eps if isinstance(eps, (list, tuple)) else [DEFAULT_EPS.get(norm, 0.5) if eps is None else eps]
    threats = list(dict.fromkeys(pixel_threat(radius, norm) for radius in radii)) if todo else []
    for chosen in todo:
        if norm not in chosen.norms:
            wanted = " or ".join(chosen.norms)
            raise ConfigError(f"found {chosen.name} with norm '{norm}'; it measures in {wanted}", "attacks")
    dataset = as_dataset(data)
    indices = subset(len(dataset), num_images, seed)
    on_pixels = model if isinstance(model, PixelModel) else PixelModel(model, mean, std)
    device = on_pixels.mean.device
    batches = Batches(optional_integer(batch_size, "batch_size", minimum=1) or (100 if device.type == "cpu" else 500))
    # a loader with a generator of its own leaves the global stream alone
    own = torch.Generator()
    loader = DataLoader(Subset(dataset, indices), batch_size=batches.size, num_workers=num_workers, generator=own)
    counted, kept = Counted(on_pixels), Journal(None if journal is None else Path(journal))
    jobs: list[Job] = [(None, None), *((attack, threat) for threat in threats for attack in todo)]
    records: list[list[Record]] = [[] for _ in jobs]
    flags = [TRAIN_MODE] if any(module.training for module in model.modules()) else []
    num_classes, twin = 0, None
    with eval_mode(on_pixels), _progress(len(indices) * len(jobs)) as bar:
        identity = fingerprint(on_pixels, seed, batches.size)
        for block in blocks(loader, indices, on_pixels, device):
            with torch.no_grad():
                num_classes = num_classes or counted(block.pixels[:1]).shape[1]
            block.check_labels(num_classes)
            if not records[0]:
                with own_random_stream(derive_seed(seed), device):
                    flags += batches.run(partial(_network_flags, counted, block), len(block.ids))[0]
                    twin = twin_for_attacks(on_pixels, block.pixels) if todo else None
            digest = block.digest()
            for (attack, threat), done in zip(jobs, records, strict=True):
                key = f"{_settings(attack, threat)} {identity} {digest}"
                record = kept.get(key)
                if record is None:
                    clean = records[0][-1]["outcomes"] if done is not records[0] else ""
                    # the nearest example is on the boundary, where rounding decides: the network itself looks for it
                    counted.twin = None if attack is None or attack.minimal_norm else twin
                    # a network may draw numbers of its own: the same when an evaluation goes on
                    with own_random_stream(derive_seed(seed, key), device):
                        record = kept.add(key, _measure(counted, block, attack, threat, seed, batches, clean))
                batches.size = min(batches.size, record["batch_size"])
                done.append(record)
                bar.update(len(block.ids))
                _show(bar, jobs, records)
    results = [_result(attack, threat, done) for (attack, threat), done in zip(jobs, records, strict=True)]
    facts = {
        "data": {"num_images": len(indices), "of": len(dataset), "subset_seed": seed, "indices": indices},
        "seed": seed,
        "batch_size": batches.size,
        "device": str(device),
        "versions": versions(),
    }
    return Evaluation(results, [*flags, *result_flags(results, num_classes)], norm, facts)


def _settings(attack: Attack | None, threat: ThreatModel | None) -> str:
    if attack is None or threat is None:
        return "clean"
    return f"{json.dumps(describe(attack), sort_keys=True, default=repr)} {threat.norm} {threat.eps!r}"


def _network_flags(model: nn.Module, block: Block, part: slice) -> list[Flag]:
    return network_flags(model, block.pixels[part], block.labels[part])


def _measure(
    model: Counted,
    block: Block,
    attack: Attack | None,
    threat: ThreatModel | None,
    seed: int,
    batches: Batches,
    clean: str,
) -> Record:
    """The record of one attack on one block; ``clean`` are the outcomes without an attack."""
    model.take()
    start = time.perf_counter()
    record: Record
    if attack is None or threat is None:
        parts = batches.run(lambda part: _is_right(model, block.pixels[part], block.labels[part]), len(block.ids))
        record = {"outcomes": _text(torch.cat(parts).tolist())}
    else:
        places = [place for place, outcome in enumerate(clean) if outcome == "1"]
        found = batches.run(lambda part: _attack(model, block, places[part], attack, threat, seed), len(places))
        outcomes = dict(zip(places, (outcome for part in found for outcome in part["right"]), strict=True))
        record = {"outcomes": _text(outcomes.get(place, False) for place in range(len(clean)))}
        for name in ("found_by", "distances"):
            if any(name in part for part in found):
                record[name] = [value for part in found for value in part[name]]
    return {**record, **model.take(), "seconds": time.perf_counter() - start, "batch_size": batches.size}


def _attack(
    model: Counted, block: Block, places: list[int], attack: Attack, threat: ThreatModel, seed: int
) -> dict[str, list[Any]]:
    """Attack some images of a block: which are still right and, of the others, what found them and how far they are."""
    images, labels = block.pixels[places], block.labels[places]
    noise = ImageNoise(derive_seed(seed), [block.ids[place] for place in places], images)
    attacked = attack(model, images, labels, threat, noise)
    rows = attacked.rows.detach()
    if model.twin is not None and not model.twin.agrees_on(rows):
        # a branch of the network that the twin was not made on
        logger.warning("attacks differentiate the network as it is: its copy returns other logits on their examples")
        model.twin = None
        attacked = attack(model, images, labels, threat, noise)
        rows = attacked.rows.detach()
    fooled = ~_is_right(model, rows, labels)
    distance = threat.distance(rows, images)
    # a ball has rounding at its surface; pixels that were outside [0, 1] are the flags' to tell
    low, high = (torch.as_tensor(limit).to(images) for limit in threat.limits(images) or (-torch.inf, torch.inf))
    inside = (
        (rows >= torch.minimum(low, images) - ROUNDING) & (rows <= torch.maximum(high, images) + ROUNDING)
    ).flatten(1)
    counts = fooled & inside.all(1) & (distance <= threat.eps * (1 + 1e-4) + ROUNDING)
    found: dict[str, list[Any]] = {"right": (~counts).tolist()}
    if attacked.found_by is not None:
        found["found_by"] = [part for part, each in zip(attacked.found_by, counts.tolist(), strict=True) if each]
    if attack.minimal_norm:
        found["distances"] = distance[fooled].tolist()
    return found


def _is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(images)
        # argmax takes NaN for the largest, which would be right for the class of its place
        return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def _text(outcomes: Iterable[bool]) -> str:
    return "".join("01"[outcome] for outcome in outcomes)


def _result(attack: Attack | None, threat: ThreatModel | None, records: list[Record]) -> AttackResult:
    parts = Counter(part for record in records for part in record.get("found_by", []))
    distances = [distance for record in records for distance in record.get("distances", [])]
    return AttackResult(
        attack="clean" if attack is None else attack.name,
        settings={} if attack is None else describe(attack),
        eps=0.0 if threat is None else threat.eps,
        outcomes=[outcome == "1" for record in records for outcome in record["outcomes"]],
        seconds=sum(record["seconds"] for record in records),
        gradient_evaluations=sum(record["gradient_evaluations"] for record in records),
        forward_evaluations=sum(record["forward_evaluations"] for record in records),
        found_by=dict(parts) if any("found_by" in record for record in records) else None,
        median_distance=statistics.median(distances) if distances else None,
    )


@contextmanager
def _progress(total: int) -> Iterator[tqdm[Any]]:
    """A bar over all images and attacks; none where the standard error is no terminal."""
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, desc="evaluate", unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar,
    ):
        yield bar


def _show(bar: tqdm[Any], jobs: Sequence[Job], records: Sequence[Sequence[Record]]) -> None:
    """The accuracies so far, on the bar or, where there is none, in a line of the log after every block."""
    so_far = {}
    for (attack, threat), done in zip(jobs, records, strict=True):
        outcomes = "".join(record["outcomes"] for record in done)
        if outcomes:
            name = "clean" if attack is None or threat is None else f"{attack.name}@{threat.eps:.3g}"
            so_far[name] = f"{100 * outcomes.count('1') / len(outcomes):.1f}"
    if not bar.disable:
        bar.set_postfix(so_far, refresh=False)
    elif len({len(done) for done in records}) == 1:
        images = sum(len(record["outcomes"]) for record in records[0])
        logger.info("%d images: %s", images, ", ".join(f"{name} {value} %" for name, value in so_far.items()))
