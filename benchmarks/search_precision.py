"""What half precision does to a search: how high its examples are in the objective, against a search in float32.

    OMP_NUM_THREADS=1 python benchmarks/search_precision.py

trains the teacher and the KD student of ``configs/digits``, searches the test set with their twins in float32 and in
half precision as losses of this package search, and measures the examples in float32 with the networks themselves.
*Lower* is the share of images whose example is less than 95 % as high as that of the search in float32.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from robust_digits import test_set
from torch import Tensor, nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.registry import get_model

from torchdistill_adv.losses.base import Search
from torchdistill_adv.noise import Noise
from torchdistill_adv.objectives import View
from torchdistill_adv.runner import run
from torchdistill_adv.twins import SearchPasses, Twin

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "digits"
LOSSES = ("TALDLoss", "TRADESLoss", "AdaADLoss", "RSLADLoss", "PGDATLoss", "SmaraADLoss")
NORMALIZE = {"mean": 0.305, "std": 0.376}


def trained(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Teacher and student, in eval mode."""
    networks = []
    for name, who in (("ce_teacher", "model"), ("kd", "student_model")):
        file = folder / f"{name}.pt"
        overrides = {f"models.{who}.dst_ckpt": str(file)}
        if name == "kd":
            overrides["models.teacher_model.src_ckpt"] = str(folder / "ce_teacher.pt")
        run(CONFIGS / f"{name}.yaml", seed=0, student_only=True, device="cpu", overrides=overrides)
        block = load_yaml_file(str(CONFIGS / f"{name}.yaml"))["models"][who]
        network: nn.Module = get_model(block["key"], **block["kwargs"])
        network.load_state_dict(torch.load(file, map_location="cpu")["model"])
        networks.append(network.eval())
    return networks[0], networks[1]


def search_of(key: str) -> Search:
    """The default search of a loss, in its own ball, around images that are normalised as the digits are."""
    term = MIDDLE_LEVEL_LOSS_DICT[key]()
    term.options["threat"] = {**term.defaults["threat"], **NORMALIZE}
    term.resolve(key)
    return term.search


def heights(
    search: Search, passed: tuple[nn.Module | Twin, ...], networks: tuple[nn.Module, ...], x: Tensor, y: Tensor
) -> Tensor:
    """The objective at the examples of ``passed``, (N,), less that at the clean images, both by ``networks``."""
    view = View(x, y, passed[1], passed[0], Noise(0))
    how = passed[0].how if isinstance(passed[0], Twin) else SearchPasses("float32").pick(x.device)
    with how.autocast(x.device):
        found = search.adversary(search.objective.bind(view), x, search.threat, view.noise)
    objective = search.objective.bind(View(x, y, networks[1], networks[0], Noise(0)))
    with torch.no_grad():
        index = torch.arange(len(x))
        risen = objective(found.rows, found.index) - objective(x, index)[found.index]
    return risen.view(-1, len(x)).mean(0)


def main() -> None:
    with TemporaryDirectory() as folder:
        networks = trained(Path(folder))
    config = load_yaml_file(str(CONFIGS / "ce_teacher.yaml"))
    x, y = test_set(config)
    print("| search of | objective | bfloat16 / float32, mean rise | lower | float16 / float32, mean rise | lower |")
    print("|---|---|---|---|---|---|")
    for key in LOSSES:
        search = search_of(key)
        cells = []
        exact = heights(search, networks, networks, x, y)
        for precision in ("bfloat16", "float16"):
            how = SearchPasses(precision).pick(x.device)
            twins = tuple(Twin(network, how, x) for network in networks)
            half = heights(search, twins, networks, x, y)
            cells += [
                f"{float(half.mean() / exact.mean()):.3f}",
                f"{100 * float((half < 0.95 * exact).float().mean()):.0f} %",
            ]
        print(f"| {key} | {search.objective.key} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
