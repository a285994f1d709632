"""What is measured of a trained network on the test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchdistill.models.registry import get_model

from experiments.data import NORMALIZATION, Images
from experiments.runs import Run
from torchdistill_adv.evaluation import evaluate
from torchdistill_adv.evaluation.similarity import boundary_similarity, describe_similarity
from torchdistill_adv.runner.check import student_name
from torchdistill_adv.runner.config import plain_config
from torchdistill_adv.threat import ThreatModel


def measure(run: Run, network: nn.Module, device: str | None) -> dict[str, Any]:
    """All measures of a setting on the test images."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = network.to(where)
    images = Images(split="test", **run.images())
    normalization = NORMALIZATION if run.setting.is_normalized else {"mean": (0.0,), "std": (1.0,)}
    clean = evaluate(network, images, attacks="clean", batch_size=500, **normalization).result("clean")
    found: dict[str, Any] = {"clean": clean.accuracy}
    measures = run.measures
    if "robustness" in measures:
        evaluation = evaluate(network, images, **measures["robustness"], **normalization)
        found |= {result.attack: result.accuracy for result in evaluation.results if result.attack != "clean"}
        found["outcomes"] = {r.attack: "".join("01"[o] for o in r.outcomes) for r in evaluation.results}
        found["flags"] = [{"name": flag.name, "message": flag.message} for flag in evaluation.flags]
        found["found_by"] = {r.attack: dict(r.found_by) for r in evaluation.results if r.found_by}
    teacher = run.teacher
    if "similarity" in measures and teacher is not None:
        count = min(len(images), measures["similarity"]["num_images"])
        pixels, labels = zip(*(images[i] for i in range(count)), strict=True)
        threat = ThreatModel(float("inf"), norm="l2", space="input", **normalization)
        # the BSS search of both networks is theirs; no gradient of a weight is needed
        networks = (load_network(teacher, teacher.best_checkpoint).to(where), network)
        for each in networks:
            each.eval().requires_grad_(False)
        compared = boundary_similarity(*networks, torch.stack(pixels).to(where), torch.tensor(labels).to(where), threat)
        described = describe_similarity(compared)
        found |= {name: described[name] for name in ("magsim", "angsim", "num_compared")}
    return found


def load_network(run: Run, checkpoint: Path) -> nn.Module:
    """The student, or teacher, that a run has trained."""
    models = plain_config(run.config_file, run.overrides())["models"]
    block = models[student_name(models)]
    network: nn.Module = get_model(block["key"], **block["kwargs"])
    network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=False)["model"])
    return network.eval()
