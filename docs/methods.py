"""Write docs/methods.md: every loss side by side, from the classes and from a step that each of them takes.

    python docs/methods.py           # write it
    python docs/methods.py --check   # fail if the file is another

The table says what was seen to happen: each loss trains a small student for a step, and the passes of both networks are
watched. Equations, sources and examples are those of the docstrings.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import SequentialSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.registry import LOSS_WRAPPER_DICT, MIDDLE_LEVEL_LOSS_DICT

from torchdistill_adv.losses import AdversarialTerm, Cost
from torchdistill_adv.models import SmallCNN
from torchdistill_adv.step import Step

PAGE = Path(__file__).with_name("methods.md")
INTRO = """# Methods

Every adversarial loss that importing `torchdistill_adv` registers. Written by `python docs/methods.py` from the
classes, and from a step that each of them takes with its defaults: S is the student, T the teacher, x a clean image and
x' an adversarial example. Losses take other adversaries, objectives and threat models too; those below are the
defaults.

*Gradient of the search* names the networks that it flows through. *Cost* counts passes of a whole batch beyond those of
the host, which always passes both networks on x once; B after a number is a backward pass. A loss that is one of
several terms shares equal searches, and the passes on their examples, with the others.
"""


class Watched(nn.Module):
    """A network that notes whether it sees clean images, and whether a gradient will come back."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.network, self.images = network, images
        self.seen: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add("x" if torch.equal(x, self.images) else "x'")
        logits: Tensor = self.network(x)
        return logits


def losses() -> list[type[AdversarialTerm]]:
    found = {**MIDDLE_LEVEL_LOSS_DICT, **LOSS_WRAPPER_DICT}.values()
    ours = [v for v in found if isinstance(v, type) and issubclass(v, AdversarialTerm)]
    return sorted((v for v in ours if v.__module__.startswith("torchdistill_adv.")), key=lambda v: v.__name__)


def example(loss: type[AdversarialTerm]) -> str:
    """The YAML block of a docstring."""
    return textwrap.dedent(documentation(loss).split(".. code-block:: yaml", 1)[1]).strip("\n")


def documentation(loss: type[AdversarialTerm]) -> str:
    found = inspect.getdoc(loss)
    assert found is not None
    return found


def take_a_step(loss: type[AdversarialTerm]) -> tuple[AdversarialTerm, dict[str, set[str]], dict[str, Cost]]:
    """The bound term, what each network saw for the loss, and the cost of its parts; of the docstring's example."""
    torch.manual_seed(0)
    images, network = torch.rand(8, 3, 8, 8), SmallCNN(4, 3, 4)
    # running statistics like those of the batch, so that both networks, in either mode, classify half of it correctly
    for _ in range(100):
        logits = network(images)
    labels = torch.where(torch.arange(8) % 2 == 0, logits.argmax(1), torch.arange(8) % 4)
    student, teacher = (Watched(copy.deepcopy(network), images) for _ in range(2))
    block = yaml.safe_load(example(loss))
    block.get("criterion_wrapper", block["criterion"])["kwargs"]["threat"] |= {"mean": [0.0], "std": [1.0]}
    side = {"forward_proc": "forward_batch_only"}
    config = {
        "num_epochs": 8,
        "pre_epoch_process": "bind_adversarial_losses",
        "train_data_loader": {
            "dataset_id": "images",
            "sampler": {"class_or_func": SequentialSampler},
            "kwargs": {"batch_size": 8},
        },
        "teacher": {**side, "requires_grad": False},
        "student": {**side, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"term": block}}},
    }
    data = {"images": TensorDataset(images, labels)}
    box = get_distillation_box(teacher, student, data, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    term = box.criterion.term_dict["term"][0]
    box.forward_process(images, labels)  # the first step has checks of its own
    used: dict[str, set[str]] = {"student": set(), "teacher": set()}
    # the host's own passes count where the loss reads their logits
    methods = {"student_clean": "student", "teacher_clean": "teacher"}
    originals = {name: getattr(Step, name) for name in methods}
    inner_loss = term.loss

    def watch(step: Step, *args: Any) -> Tensor:
        student.seen.clear(), teacher.seen.clear()
        for name, who in methods.items():

            def read(self: Step, name: str = name, who: str = who) -> Tensor:
                used[who].add("x")
                return originals[name](self)

            setattr(Step, name, read)
        try:
            return inner_loss(step, *args)
        finally:
            for name, method in originals.items():
                setattr(Step, name, method)
            used["student"] |= student.seen
            used["teacher"] |= teacher.seen

    term.loss = watch
    box.forward_process(images, labels)
    search = Cost()
    for one in term.searches:
        search = search.plus(one.cost(1))
    outer = Cost()
    for cost in term.outer_cost(1).values():
        outer = outer.plus(cost)
    return term, used, {"search": search, "loss": outer}


def passes(cost: Cost) -> str:
    """``T 10 + 10 B, S 10 + 10 B``."""
    parts = []
    for who, forward, backward in (("T", *cost[:2]), ("S", *cost[2:])):
        if forward or backward:
            parts.append(f"{who} {forward:g}" + (f" + {backward:g} B" if backward else ""))
    return ", ".join(parts) or "none"


def row(loss: type[AdversarialTerm]) -> str:
    term, used, cost = take_a_step(loss)
    names = {"teacher": "T", "student": "S"}
    searches, through = [], []
    for search in term.searches:
        direction = "descends" if search.adversary.targeted else "ascends"
        searches.append(f"{type(search.adversary).__name__} {direction} `{search.objective.key}`")
        through.append(" and ".join(names[who] for who in search.objective.entry.attacks))
    cells = [
        f"[`{loss.__name__}`](#{loss.__name__.lower()})",
        "; ".join(searches),
        "; ".join(through),
        ", ".join(sorted(used["student"])),
        ", ".join(sorted(used["teacher"])) or "no teacher",
        "yes" if term.needs_labels else "no",
        passes(cost["search"]),
        passes(cost["loss"]),
    ]
    return f"| {' | '.join(cells)} |"


def as_markdown(text: str) -> str:
    """The part of a docstring before its arguments, from reStructuredText."""
    body = text.split("\nArgs:", 1)[0].replace("``", "`")
    body = re.sub(r"\n\.\. math:: (.+(?:\n .+)*)", lambda m: f"\n```math\n{m[1].strip()}\n```", body)
    body = re.sub(
        r"\n\.\. math::\n((?:    .*\n?)+)", lambda m: f"\n```math\n{textwrap.dedent(m[1]).strip()}\n```\n", body
    )
    body = re.sub(r":math:`([^`]+)`", lambda m: "$`" + m[1].replace("\n", " ") + "`$", body)
    body = re.sub(r":\w+:`~?([\w.]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", body)
    body = re.sub(r"`([^`<]+?)\s*<([^>]+)>`_", lambda m: f"[{' '.join(m[1].split())}]({m[2]})", body)
    return body.strip()


def options(text: str) -> list[str]:
    """The arguments of a docstring as a list."""
    if "\nArgs:\n" not in text:
        return []
    block = textwrap.dedent(re.split(r"\n\n", text.split("\nArgs:\n", 1)[1])[0])
    items = re.split(r"\n(?=\S)", block)
    return ["* " + re.sub(r"^(\w+):", r"`\1`:", " ".join(as_markdown(item).split())) for item in items]


def page() -> str:
    header = ["loss", "search", "gradient of the search", "S trains on", "T sees", "labels", "cost of the search"]
    header.append("cost of the loss")
    lines = [INTRO, f"| {' | '.join(header)} |", "|" + "---|" * len(header), *map(row, losses()), ""]
    lines += ["## Options of every loss", "", *options(inspect.getdoc(AdversarialTerm) or ""), ""]
    for loss in losses():
        lines += [f"## {loss.__name__}", "", as_markdown(documentation(loss)), "", *options(documentation(loss)), ""]
        lines += ["```yaml", example(loss), "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if docs/methods.md is not what would be written")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/methods.md is not what the classes say; run: python docs/methods.py")


if __name__ == "__main__":
    main()
