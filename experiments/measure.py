"""What is measured of a trained network on the test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchdistill.models.registry import get_model

from experiments.data import NORMALIZATION, Images
from experiments.runs import Run
from torchdistill_adv.evaluation import evaluate
from torchdistill_adv.evaluation.blocks import subset, weights_digest
from torchdistill_adv.evaluation.similarity import boundary_similarity, describe_similarity
from torchdistill_adv.runner.records import run_directory
from torchdistill_adv.threat import ThreatModel


def measure_all(run: Run, checkpoints: Mapping[str, Path], device: str | None = None) -> dict[str, Any]:
    """What is measured of each checkpoint of a run, and digests of their weights; equal ones are measured once.

    The best one of a teacher, or else the last, is put where its students find it.
    """
    measured: dict[str, Any] = {}
    weights: dict[str, str] = {}
    for which, checkpoint in checkpoints.items():
        network = load_network(run, checkpoint)
        weights[which] = weights_digest(network)
        same = next((other for other in measured if weights[other] == weights[which]), None)
        measured[which] = measured[same] if same else measure(run, which, network, device)
    if run.is_teacher:
        taught = "best" if "best" in checkpoints else "last"
        weights["taught"] = weights[taught]
        run.weights_file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": load_network(run, checkpoints[taught]).state_dict()}, run.weights_file)
    return {"weights": weights, "measured": measured}


def measure(run: Run, which: str, network: nn.Module, device: str | None) -> dict[str, Any]:
    """The measures of a setting on the test images, but for those that name other checkpoints than this one.

    ``clean``, on all of them, and every attack are accuracies in percent; ``outcomes`` says of each image whether it is
    classified rightly, packed by :func:`pack`; ``flags`` are the evaluation's reasons to doubt the numbers.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = network.to(where)
    images = Images(split="test", **run.images())
    normalization = NORMALIZATION if run.setting.is_normalized else {"mean": (0.0,), "std": (1.0,)}
    results = [evaluate(network, images, attacks="clean", batch_size=500, **normalization).result("clean")]
    found: dict[str, Any] = {"flags": [], "found_by": {}}
    measures = {name: dict(block) for name, block in run.measures.items() if which in block.get("of", (which,))}
    for name in ("robustness", "autoattack"):
        if name in measures:
            journal = run_directory(str(run.checkpoint)) / "evaluation.jsonl"
            measures[name].pop("of", None)
            evaluation = evaluate(network, images, journal=journal, **measures[name], **normalization)
            known = [result.attack for result in results]
            results += [result for result in evaluation.results if result.attack not in known]
            found["flags"] += [{"name": flag.name, "message": flag.message} for flag in evaluation.flags]
            found["found_by"] |= {each.attack: dict(each.found_by) for each in evaluation.results if each.found_by}
    found |= {result.attack: result.accuracy for result in results}
    found["outcomes"] = {result.attack: pack(result.outcomes) for result in results}
    teacher = run.teacher
    if "similarity" in measures and teacher is not None:
        chosen = subset(len(images), measures["similarity"]["num_images"], 0)
        pixels, labels = zip(*(images[i] for i in chosen), strict=True)
        threat = ThreatModel(float("inf"), norm="l2", space="input", **normalization)
        networks = (load_network(teacher, teacher.weights_file).to(where), network)
        for each in networks:
            each.eval().requires_grad_(False)
        compared = boundary_similarity(*networks, torch.stack(pixels).to(where), torch.tensor(labels).to(where), threat)
        described = describe_similarity(compared)
        found |= {name: described[name] for name in ("magsim", "angsim", "num_compared")}
    return found


def pack(outcomes: Sequence[bool]) -> str:
    """Outcomes as hexadecimal digits, four a digit, after their number."""
    bits = "".join("01"[outcome] for outcome in outcomes)
    return f"{len(bits)}:{int(bits, 2):0{-(-len(bits) // 4)}x}"


def unpack(text: str) -> list[bool]:
    """What :func:`pack` was given."""
    count, _, digits = text.partition(":")
    return [bit == "1" for bit in f"{int(digits, 16):0{int(count)}b}"]


def load_network(run: Run, checkpoint: Path) -> nn.Module:
    """The student, or teacher, that a run has trained, in eval mode."""
    block = run.network()
    network: nn.Module = get_model(block["key"], **block["kwargs"])
    network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=False)["model"])
    return network.eval()
