"""The package as a whole: import cost, examples in docstrings, registered keys, files that must be there."""

from __future__ import annotations

import configparser
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from tiny import NORMALIZE, images, step, tiny_box
from torchdistill.losses.registry import LOSS_WRAPPER_DICT, MIDDLE_LEVEL_LOSS_DICT
from torchdistill.models.registry import get_model

from torchdistill_adv.losses import AdversarialTerm
from torchdistill_adv.objectives import OBJECTIVES
from torchdistill_adv.registry import ADVERSARIES, build_adversary
from torchdistill_adv.threat import ThreatModel

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [
    *(ADVERSARIES[key] for key in ADVERSARIES),
    *(v for d in (MIDDLE_LEVEL_LOSS_DICT, LOSS_WRAPPER_DICT) for v in d.values() if "torchdistill_adv" in v.__module__),
    ThreatModel,
]


def example(cls):
    """The YAML block of a docstring."""
    block = inspect.getdoc(cls).split(".. code-block:: yaml", 1)[1]
    return yaml.safe_load(textwrap.dedent(block))


# losses of host methods, whose examples are built in tests/test_host_pieces.py, test_nst.py and test_hsakd.py
HOSTS = [
    loss
    for loss in MIDDLE_LEVEL_LOSS_DICT.values()
    if "torchdistill_adv" in loss.__module__ and not issubclass(loss, AdversarialTerm)
]


@pytest.mark.parametrize("cls", [cls for cls in PUBLIC if cls not in HOSTS], ids=lambda cls: cls.__name__)
def test_docstring_example_builds_and_runs(cls):
    block = example(cls)
    if "threat" in block:
        assert ThreatModel.build(block["threat"]).eps > 0
    elif "adversary" in block:
        assert isinstance(build_adversary(block["adversary"]), cls)
    else:
        # the example is for three channels, the test's images have two
        kwargs = block.get("criterion_wrapper", block["criterion"])["kwargs"]
        kwargs["threat"] |= NORMALIZE
        box = tiny_box({"term": block})
        box.pre_epoch_process(epoch=0)
        assert torch.isfinite(step(box, *images()))


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_docstring_names_every_option(cls):
    function = getattr(cls, "configure", cls)
    for name in list(inspect.signature(function).parameters):
        if name != "self":
            assert f"{name}:" in inspect.getdoc(cls), name


@pytest.mark.parametrize("key", OBJECTIVES)
def test_objectives_say_what_they_are(key):
    assert "(" in inspect.getdoc(OBJECTIVES[key].function)


def test_timm_models_come_from_the_yaml():
    model = get_model("timm", model_name="resnet10t", num_classes=7, in_chans=1)
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 7)


IMPORT = """
import sys, time
import torchdistill.core.distillation
before = time.perf_counter()
import torchdistill_adv
print(time.perf_counter() - before, *({"timm", "matplotlib", "sklearn", "tqdm"} & set(sys.modules)))
"""


def test_import_is_cheap():
    """At most 0.3 s on top of torchdistill, with the heavy libraries left for when they are needed; best of three."""
    outputs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, *_ in outputs) <= 0.3
    assert not {heavy for _, *modules in outputs for heavy in modules} & {"timm", "matplotlib", "sklearn"}


def test_dependencies_have_lower_bounds_only():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split() + [
        line
        for name in config["options.extras_require"]
        for line in config["options.extras_require"].get(name, raw=True).split()
    ]
    assert not [line for line in lines if any(pin in line for pin in ("==", "<", "~=", "!="))]


def test_lowest_versions_are_the_lower_bounds():
    """`make test-lowest` tests what setup.cfg promises."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    names = ("demo", "eval", "report", "experiments", "tensorboard", "completion", "accelerate", "test")
    lines = "\n".join([config["options"]["install_requires"], *(extras[name] for name in names)]).split()
    bounds = {line.replace(">=", "==") for line in lines if not line.startswith("%")}
    constraints = (ROOT / "tests/lowest.txt").read_text().splitlines()
    assert {line for line in constraints if "==" in line} == bounds
