"""``torchdistill-adv list`` and ``completion``, and the configurations that a wheel brings along."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import CONFIGS
from torchdistill.losses.registry import LOSS_WRAPPER_DICT, MIDDLE_LEVEL_LOSS_DICT

import torchdistill_adv
from torchdistill_adv import catalogue
from torchdistill_adv.catalogue import KINDS, first_sentence, listing
from torchdistill_adv.cli import main
from torchdistill_adv.losses import AdversarialTerm
from torchdistill_adv.objectives import OBJECTIVES
from torchdistill_adv.registry import ADVERSARIES

ROOT = CONFIGS.parent
ALL_CONFIGS = {path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*.yaml")}


def columns(text: str) -> dict[str, str]:
    """Names and descriptions; two spaces or more are between them, all at one place."""
    rows = [re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines()]
    assert len({line.index(row[1], len(row[0])) for line, row in zip(text.splitlines(), rows, strict=True)}) == 1
    return dict(rows)


# list


def test_losses_are_those_of_this_package(capsys):
    assert main(["list", "losses"]) == 0
    found = columns(capsys.readouterr().out)
    registered = {**MIDDLE_LEVEL_LOSS_DICT, **LOSS_WRAPPER_DICT}
    # other tests register losses of their own
    registered = {name: loss for name, loss in registered.items() if loss.__module__.startswith("torchdistill_adv.")}
    adversarial = {name for name, loss in registered.items() if issubclass(loss, AdversarialTerm)}
    assert adversarial <= found.keys() <= registered.keys()
    assert "KDLoss" in MIDDLE_LEVEL_LOSS_DICT and "KDLoss" not in found
    assert (
        found["RSLADLoss"] == "RSLAD: the teacher's clean prediction replaces the label everywhere, in the search too."
    )


@pytest.mark.parametrize("kind, names", [("adversaries", ADVERSARIES), ("objectives", OBJECTIVES)])
def test_registries(kind, names, capsys):
    assert main(["list", kind]) == 0
    found = columns(capsys.readouterr().out)
    assert list(found) == list(names) and all(found.values())


def test_models_are_those_of_this_package():
    found = KINDS["models"]()
    assert {"small_cnn", "cifar_resnet18", "from_checkpoint", "teacher_pair"} <= found.keys()
    assert "resnet20" not in found  # torchdistill's
    assert all(found.values())


def test_configs_are_paths_that_train_takes(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert main(["list", "configs"]) == 0
    found = columns(capsys.readouterr().out)
    assert set(found) == ALL_CONFIGS
    assert found["configs/digits/kd.yaml"].startswith("Knowledge distillation on scikit-learn's handwritten digits")
    monkeypatch.chdir(tmp_path)
    assert main(["list", "configs"]) == 0
    assert all(Path(name).is_absolute() and Path(name).is_file() for name in columns(capsys.readouterr().out))


def test_every_description_is_a_sentence():
    """One that is cut short, or has marks of the docstring, was not read rightly."""
    for kind in ("losses", "adversaries", "objectives", "models"):
        for name, text in KINDS[kind]().items():
            assert text.endswith(".") and not re.search(r"``|\*\*|:\w+:`|\bEq\.$", text), (name, text)


def test_without_an_argument_all_kinds_have_a_heading(capsys):
    assert main(["list"]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [f"{kind}:" for kind in KINDS]
    assert blocks[0].removeprefix("losses:\n") == listing(["losses"])


@pytest.mark.parametrize("width", [20, 60, 100])
def test_descriptions_are_cut_to_the_width_and_names_are_not(width):
    whole, cut = (listing(["losses"], limit).splitlines() for limit in (None, width))
    longest = max(map(len, KINDS["losses"]()))
    for line, short in zip(whole, cut, strict=True):
        name = line.split()[0]
        assert short.startswith(name) and len(short) <= max(width, longest)
        assert short == line or (len(line) > width and (short == name or short.endswith("…")))
        assert line.startswith(short.removesuffix("…"))


@pytest.mark.parametrize(
    "docstring, sentence",
    [
        ("One. Two.", "One."),
        ("One line\nand its end. Two.", "One line and its end."),
        ("As Eq. 3 of the paper. Two.", "As Eq. 3 of the paper."),
        ("A :class:`~a.b.Thing` and ``x = 1``, **our reading**.\n\nMore.", "A Thing and x = 1, our reading."),
        ("", ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_unknown_kind(capsys):
    with pytest.raises(SystemExit) as error:
        main(["list", "attacks"])
    assert error.value.code == 2 and "adversaries" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0 and capsys.readouterr().out == f"torchdistill-adv {torchdistill_adv.__version__}\n"


# what pip installs


def test_a_wheel_has_every_config_in_its_folder():
    """setuptools copies the files of each line of setup.cfg into the folder of that line."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    installed = {}
    for target, patterns in parser["options.data_files"].items():
        for pattern in patterns.split():
            installed |= {path.relative_to(ROOT).as_posix(): f"{target}/{path.name}" for path in ROOT.glob(pattern)}
    assert {name for name in installed if name.endswith(".yaml")} == ALL_CONFIGS
    assert all(target == f"share/torchdistill-adv/{name}" for name, target in installed.items())
    assert catalogue.INSTALLED == "share/torchdistill-adv/configs/"


def test_configs_of_an_installed_package_are_found(tmp_path):
    """In the layout that pip gives a wheel: the package, its records, and share/ elsewhere."""
    site, share = tmp_path / "lib/site-packages", tmp_path / "share/torchdistill-adv/configs/digits"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(torchdistill_adv.__file__).parent, site / "torchdistill_adv", ignore=ignored)
    share.mkdir(parents=True)
    (share / "kd.yaml").write_text("# KD.\ntrain:\n")
    info = site / f"torchdistill_adv-{torchdistill_adv.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchdistill-adv\nVersion: {torchdistill_adv.__version__}\n"
    )
    (info / "RECORD").write_text(
        "torchdistill_adv/__init__.py,,\n../../share/torchdistill-adv/configs/digits/kd.yaml,,\n"
        "../../share/torchdistill-adv/configs/README.md,,\n"
    )
    # a folder of that name beside the package is another's
    (site / "configs").mkdir()
    (site / "configs/other.yaml").write_text("# Other.\n")
    found = subprocess.run(
        [sys.executable, "-m", "torchdistill_adv", "list", "configs"],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "share/torchdistill-adv/configs/digits/kd.yaml  KD.\n"


# completion


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The file that a bash user sources."""
    file = tmp_path_factory.mktemp("completion") / "torchdistill-adv"
    written = subprocess.run(
        [sys.executable, "-m", "torchdistill_adv", "completion", "bash"], capture_output=True, text=True, check=True
    )
    file.write_text(written.stdout)
    return file


def complete(script: Path, *words: str, cwd: Path = ROOT) -> set[str]:
    """What bash offers for the last of the words, as its Tab key asks the script."""
    ask = f"""
source {script}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${{#COMP_LINE}}
function=$(complete -p torchdistill-adv | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    found = subprocess.run(
        ["bash", "-c", ask, "bash", "torchdistill-adv", *words], capture_output=True, text=True, check=True, cwd=cwd
    )
    assert not found.stderr
    return set(found.stdout.split())


def test_bash_accepts_the_script(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True).stderr == ""


def test_bash_completes_commands_options_and_choices(script):
    assert {"train", "evaluate", "metrics", "report", "check", "list", "completion"} <= complete(script, "")
    assert complete(script, "che") == {"check"}
    assert complete(script, "list", "") == set(KINDS)
    assert complete(script, "list", "ob") == {"objectives"}
    assert complete(script, "train", "--conf") == {"--config"}
    assert complete(script, "evaluate", "--norm", "") == {"linf", "l2"}
    assert complete(script, "add", "TAL") == {"TALDLoss"}
    assert complete(script, "add", "KD") == set()  # torchdistill's, which see no adversarial examples


def test_bash_completes_files_and_folders(script, tmp_path):
    (tmp_path / "one.yaml").touch()
    (tmp_path / "other").mkdir()
    assert complete(script, "train", "--config", "o", cwd=tmp_path) == {"one.yaml", "other"}
    assert complete(script, "check", "one", cwd=tmp_path) == {"one.yaml"}
    assert complete(script, "report", "o", cwd=tmp_path) == {"other"}


def test_zsh_script_is_for_this_command(capsys):
    assert main(["completion", "zsh"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#compdef torchdistill-adv") and "adversaries" in out


def test_without_shtab_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'torchdistill-adv[completion]'" in capsys.readouterr().err
