"""``torchdistill-adv add``: a loss put into a YAML of any style, every other byte kept, and then trained.

``TORCHDISTILL_RUNNER`` (see ``test_upstream_runner.py``) adds torchdistill's own configurations.
"""

from __future__ import annotations

import copy
import os
import textwrap
from pathlib import Path

import pytest
import support
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import CONFIGS, make_box, stages, train
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, register_mid_level_loss

from torchdistill_adv.cli import main
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses import AdversarialTerm, OnAdversarialExamples, PGDATLoss
from torchdistill_adv.runner.plain import PlainLoader
from torchdistill_adv.yaml import add_term
from torchdistill_adv.yaml.text import append_item, flow, put_entry, set_value

RUNNER = os.environ.get("TORCHDISTILL_RUNNER")
THEIRS = Path(RUNNER).resolve().parents[2] / "configs" if RUNNER else None
upstream = pytest.mark.skipif(RUNNER is None, reason="TORCHDISTILL_RUNNER does not name torchdistill's example runner")

LOSSES = sorted(
    name
    for name, loss in MIDDLE_LEVEL_LOSS_DICT.items()
    if isinstance(loss, type) and issubclass(loss, AdversarialTerm) and loss.__module__.startswith("torchdistill_adv")
)

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

# KD on CIFAR-10, in torchdistill's own style
HOST = """\
# KD
datasets:
  &train_set cifar10/train: !import_call
    key: 'torchvision.datasets.CIFAR10'
    init:
      kwargs:
        root: &root '~/data'  # where
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call {key: 'torchvision.transforms.ToTensor'}
                - !import_call
                  key: 'torchvision.transforms.Normalize'
                  init:
                    kwargs: &normalize_kwargs
                      mean: [0.49, 0.48, 0.44]
                      std: [0.2, 0.21, 0.22]

models:
  teacher_model:
    key: 'resnet20'
    kwargs: {num_classes: 10, pretrained: False}
  student_model:
    key: 'resnet20'
    kwargs: {num_classes: 10, pretrained: False}
    dst_ckpt: &ckpt "./kd.pt"   # the best

train:
  # once more: *ckpt
  num_epochs: 2
  train_data_loader:
    dataset_id: *train_set
    sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
    kwargs: {batch_size: 64}
  teacher:
    forward_proc: 'forward_batch_only'
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'
  optimizer: {key: 'SGD', kwargs: {lr: 0.1}}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        kd:
          criterion:
            key: 'KDLoss'
            kwargs: {student_module_path: '.', student_module_io: 'output', teacher_module_path: '.',
                     teacher_module_io: 'output', temperature: 4.0, alpha: 0.1}
          weight: 1.0
          # and no more

test: {ckpt: *ckpt}
"""

TERM = """\
        tald:
          criterion:
            key: 'TALDLoss'
            kwargs:
              adversary:
                key: 'SVGD'
                kwargs: {num_particles: 4, num_steps: 1, step_size: 0.1, bandwidth: 0.001}
              threat: {<<: *normalize_kwargs, norm: 'l2', eps: 0.3, space: 'input'}
              objective: 'kl_teacher_clean_teacher'
              student_bn: 'batch'
          weight: 0.01
"""

WANTED = HOST.replace("# KD\n", "# KD\ndependencies:\n  - name: 'torchdistill_adv'\n\n")
WANTED = WANTED.replace("  num_epochs", "  pre_epoch_process: 'bind_adversarial_losses'\n  num_epochs")
WANTED = WANTED.replace("          weight: 1.0\n", "          weight: 1.0\n" + TERM)

PLAIN_TERM = {
    "criterion": {
        "key": "TALDLoss",
        "kwargs": {
            "adversary": {
                "key": "SVGD",
                "kwargs": {"num_particles": 4, "num_steps": 1, "step_size": 0.1, "bandwidth": 0.001},
            },
            "threat": {
                "mean": [0.49, 0.48, 0.44],
                "std": [0.2, 0.21, 0.22],
                "norm": "l2",
                "eps": 0.3,
                "space": "input",
            },
            "objective": "kl_teacher_clean_teacher",
            "student_bn": "batch",
        },
    },
    "weight": 0.01,
}
PACKAGE, AUTOBIND = {"name": "torchdistill_adv"}, {"name": "torchdistill_adv.autobind"}


def plain(text):
    return yaml.load(text, PlainLoader)


def with_term(config, name="tald", term=PLAIN_TERM, dependency=PACKAGE, binds=True):
    """What the new YAML should say."""
    config = copy.deepcopy(config)
    if dependency:
        config["dependencies"] = [*(config.get("dependencies") or []), dependency]
    if binds:
        config["train"]["pre_epoch_process"] = "bind_adversarial_losses"
    criterion = config["train"]["criterion"]
    criterion["kwargs"] = {**(criterion.get("kwargs") or {})}
    criterion["kwargs"]["sub_terms"] = {**(criterion["kwargs"].get("sub_terms") or {}), name: term}
    return config


def kept(old, new):
    """Whether ``new`` is ``old`` with more in it: every piece between what was put in, byte for byte and in order."""
    characters = iter(new)
    return all(character in characters for character in old)


def only_lines_added(old, new):
    """Whether whole lines were put between those of ``old``, and its line endings and its last line are as before."""
    lines = iter(new.splitlines())
    ending = "\r\n" if "\r\n" in old else "\n"
    same = new.count("\n") == new.count(ending) and new.endswith("\n") == old.endswith("\n")
    return same and all(line in lines for line in old.splitlines())


def test_lines_are_put_in_where_a_reader_expects_them():
    added = add_term(HOST, "TALDLoss")
    assert added.text == WANTED
    assert added.path == "train.criterion.kwargs.sub_terms.tald"
    assert plain(added.text) == with_term(plain(HOST))


def swap(*changes, text=HOST):
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def indented(text, width):
    """The text with another width of indentation."""
    return "\n".join(" " * ((len(line) - len(line.lstrip())) // 2 * width) + line.lstrip() for line in text.split("\n"))


KD_TERM = HOST[HOST.index("        kd:") : HOST.index("          # and")]
FLOW_KD = (
    "{kd: {criterion: {key: 'KDLoss', kwargs: {student_module_path: '.', student_module_io: 'output', "
    "teacher_module_path: '.', teacher_module_io: 'output', temperature: 4.0, alpha: 0.1}}, weight: 1.0}}"
)
SUB_TERMS = "\n" + KD_TERM + "          # and no more\n"

LINES = {
    "windows": HOST.replace("\n", "\r\n"),
    "no newline at the end": HOST.rstrip("\n"),
    "terms at the very end": HOST[: HOST.index("\ntest:")].replace("          # and no more\n", "").rstrip("\n"),
    "wide": indented(HOST, 4).replace("    kd:", "    kd:"),
    "one column": indented(HOST, 1),
    "document marks": "%YAML 1.1\n--- # begin\n" + HOST + "...\n",
    "dependencies": "dependencies:\n  - name: 'os'\n  # the last\n" + HOST,
    "dependencies at the margin": HOST + "dependencies:\n- name: 'os'\n-   name: 'sys'",
    "empty dependencies": HOST + "dependencies: # none\n",
    "no terms": swap((SUB_TERMS, "\n")),
    "no kwargs": swap(("    kwargs:\n      sub_terms:" + SUB_TERMS, "")),
    "null kwargs": swap(("    kwargs:\n      sub_terms:" + SUB_TERMS, "    kwargs: # none\n")),
    "comment within": swap(("          weight: 1.0\n", "          weight: 1.0 # all of it\n\n\n     # far out\n")),
    "another term": swap((KD_TERM, KD_TERM + KD_TERM.replace("kd:", "more kd:"))),
}
PIECES = {
    "byte order mark": "\ufeff" + HOST.replace("# KD\n", ""),
    "flow dependencies": "dependencies: [{name: 'os'}, ]\n" + HOST,
    "no flow dependencies": HOST + "dependencies: [ ]",
    "flow terms": swap((SUB_TERMS, f" {FLOW_KD}\n")),
    "flow terms with a comma": swap((SUB_TERMS, f" {FLOW_KD[:-1]}, # more\n         }}\n")),
    "no flow terms": swap((SUB_TERMS, " {}\n")),
    "flow criterion": swap(
        ("\n    key: 'WeightedSumLoss'\n    kwargs:\n      sub_terms:" + SUB_TERMS,
         f"\n    {{key: WeightedSumLoss, kwargs: {{sub_terms: {FLOW_KD}}}}}\n")
    ),
    "flow kwargs without terms": swap(("    kwargs:\n      sub_terms:" + SUB_TERMS, "    kwargs: {func: x}\n")),
    "all flow": yaml.dump(plain(HOST), Dumper=yaml.SafeDumper, default_flow_style=True).replace("\n", "\n  "),
}  # fmt: skip


@pytest.mark.parametrize("text", [*LINES.values(), *PIECES.values()], ids=[*LINES, *PIECES])
def test_every_style(text):
    new = add_term(text, "TALDLoss").text
    assert plain(new) == with_term(plain(text))
    assert kept(text, new)
    if text in LINES.values():
        assert only_lines_added(text, new)


@st.composite
def styles(draw):
    """The host as PyYAML writes it in many ways, with comments and blank lines between its lines."""
    text = yaml.dump(
        plain(HOST),
        Dumper=yaml.SafeDumper,
        indent=draw(st.integers(2, 6)),
        width=draw(st.sampled_from([40, 10_000])),
        default_flow_style=draw(st.sampled_from([False, None])),
        sort_keys=draw(st.booleans()),
        explicit_start=draw(st.booleans()),
        explicit_end=draw(st.booleans()),
        allow_unicode=True,
    )
    lines = text.splitlines()
    more = st.sampled_from(["", "# comment", "         # far: {", "  # - 'q", "   ", "# ümläut \U0001f600"])
    if all(line.count("{") == line.count("}") and line.count("[") == line.count("]") for line in lines):
        for place in draw(st.lists(st.integers(1, len(lines) - 1), max_size=8)):
            lines.insert(place, draw(more))
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines) + draw(st.sampled_from(["", "\n"]))


@settings(deadline=None, max_examples=40)
@given(styles())
def test_any_style(text):
    new = add_term(text, "TALDLoss").text
    assert plain(new) == with_term(plain(text))
    assert kept(text, new)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n    b:\n", "a:\n    b:\n        new:\n            x: {y: 1}\n"),
        ("a:\n   b:\n    c: 1", "a:\n   b:\n    c: 1\n    new:\n     x: {y: 1}"),
        ("a:\n   b:\n    c: {d: 1}\n", "a:\n   b:\n    c: {d: 1}\n    new:\n     x: {y: 1}\n"),
        ("a:\n b:\n  c:\n      d: 1\n", "a:\n b:\n  c:\n      d: 1\n  new:\n      x: {y: 1}\n"),
        ("a: {b: {c: 1,\n  # d\n }}", "a: {b: {c: 1, new: {x: {y: 1}},\n  # d\n }}"),
        ("a:\n  b: &b\n    c: |\n     d\n\n# e", "a:\n  b: &b\n    c: |\n     d\n    new:\n      x: {y: 1}\n\n# e"),
    ],
)  # fmt: skip
def test_an_entry_takes_the_indentation_around_it(text, expected):
    assert put_entry(text, ["a", "b"], "new", {"x": {"y": 1}}) == expected


@given(plain_values)
@example({"?&": None})
def test_flow_style_says_the_same(value):
    assert plain(flow(value)) == value
    assert plain(append_item("a: [1]\nb:\n- {}\n", ["b"], {"c": value, "d": 1}))["b"] == [{}, {"c": value, "d": 1}]


class TestBinding:
    def added(self, *changes, text=HOST, **expected):
        text = swap(*changes, text=text)
        new = add_term(text, "TALDLoss").text
        assert plain(new) == with_term(plain(text), **expected)
        assert only_lines_added(text, new)

    def test_dependency_that_is_there(self):
        self.added(text=f"dependencies:\n  - {PACKAGE}\n" + HOST, dependency=None)

    def test_binding_that_is_there(self):
        self.added(("  num_epochs: 2", "  num_epochs: 2\n  pre_epoch_process: bind_adversarial_losses"))

    def test_autobind_that_is_there(self):
        self.added(text=f"dependencies:\n  - {AUTOBIND}\n" + HOST, dependency=None, binds=False)

    @pytest.mark.parametrize("process", ["'mine'", "default_pre_epoch_process_with_teacher", ""])
    def test_a_process_of_the_stage_stays(self, process):
        change = ("  num_epochs: 2", f"  num_epochs: 2\n  pre_epoch_process: {process}")
        self.added(change, dependency=AUTOBIND, binds=False)
        self.added(change, text=f"dependencies: \n  - {PACKAGE}\n" + HOST, dependency=AUTOBIND, binds=False)


STAGED = (CONFIGS / "imagenet" / "sskd-resnet18_from_resnet34.yaml").read_text()


def test_the_last_stage_or_the_one_that_is_named():
    added = add_term(STAGED, "TALDLoss")
    assert added.path == "train.stage2.criterion.kwargs.sub_terms.tald"
    assert added.notes[0] == "the term is in train.stage2, the last stage; --stage stage1 puts it elsewhere"
    config = plain(added.text)["train"]
    assert config["stage2"]["pre_epoch_process"] == "bind_adversarial_losses"
    assert "pre_epoch_process" not in config["stage1"]
    # a stage without a data loader goes on with that of the stage before
    threat = config["stage2"]["criterion"]["kwargs"]["sub_terms"]["tald"]["criterion"]["kwargs"]["threat"]
    assert threat["mean"] == [0.485, 0.456, 0.406]
    first = STAGED.replace("requires_grad: False", "requires_grad: True")
    assert "stage1" in add_term(first, "TALDLoss", stage="stage1").path
    with pytest.raises(ConfigError, match=r"train\.stage1\.student\.requires_grad: .* no student is trained"):
        add_term(STAGED, "TALDLoss", stage="stage1")
    with pytest.raises(ConfigError, match=r"--stage: found 'stage3'.*did you mean 'stage"):
        add_term(STAGED, "TALDLoss", stage="stage3")
    with pytest.raises(ConfigError, match=r"--stage: found 'stage1'"):
        add_term(HOST, "TALDLoss", stage="stage1")


def test_name_and_weight():
    new = add_term(HOST, "TALDLoss", name="second: 'one'", weight="1/4").text
    assert plain(new) == with_term(plain(HOST), "second: 'one'", {**PLAIN_TERM, "weight": 0.25})
    with pytest.raises(ConfigError, match=r"sub_terms\.kd: is there already"):
        add_term(HOST, "TALDLoss", name="kd")
    with pytest.raises(ConfigError, match=r"sub_terms.tald: is there already; write another name"):
        add_term(WANTED, "TALDLoss")
    twice = add_term(WANTED, "TALDLoss", name="more").text
    assert plain(twice) == with_term(plain(WANTED), "more", dependency=None)
    with pytest.raises(ConfigError, match="--weight"):
        add_term(HOST, "TALDLoss", weight="much")


NORMALIZE = HOST[HOST.index("                - !import_call\n") : HOST.index("\nmodels:")]
INIT = NORMALIZE[NORMALIZE.index("                  init:") :]
NEVER = "no Normalize"


def normalize(init):
    return swap((INIT, textwrap.indent(textwrap.dedent(init).strip("\n"), " " * 18) + "\n"))


PRESET = """\
        transform: !call_method
          obj: !getattr [!import_get {key: 'torchvision.models.ResNet18_Weights'}, 'IMAGENET1K_V1']
          method_name: 'transforms'
"""
TRANSFORM = HOST[HOST.index("        transform:") : HOST.index("\nmodels:")]
WRAPPED = """\
  raw: &raw !import_call
    key: 'torchvision.datasets.CIFAR10'
    init: {kwargs: {transform: !import_call {key: 'torchvision.transforms.Normalize',
                                             init: {kwargs: {mean: [0.1], std: [0.2]}}}}}
  cifar10/train: &train_set !import_call
    key: 'torch.utils.data.Subset'
    init: {kwargs: {dataset: *raw, indices: [1, 2]}}
"""
DATASETS = HOST[HOST.index("datasets:\n") : HOST.index("models:")]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MEAN_AND_STD = {
    "no anchor": (normalize("init: {kwargs: {mean: [0.1], std: [0.2]}}"), {"mean": [0.1], "std": [0.2]}),
    "inplace": (normalize("init: {kwargs: &n {mean: [0.1], std: [0.2], inplace: True}}"), "n"),
    "an argument that a threat model has not": (
        normalize("init: {kwargs: &n {mean: [0.1], std: [0.2], x: 1}}"),
        {"mean": [0.1], "std": [0.2]},
    ),
    "an anchor further out": (
        normalize("init: &n {kwargs: {mean: [0.1], std: [0.2]}}"),
        {"mean": [0.1], "std": [0.2]},
    ),
    "aliases": (normalize("_mean: &m [0.1]\ninit: {kwargs: {mean: *m, std: *m}}"), {"mean": [0.1], "std": [0.1]}),
    "merged": (normalize("_n: &n {mean: [0.1], std: [0.3]}\ninit: {kwargs: {<<: *n, std: [0.2]}}"),
               {"mean": [0.1], "std": [0.2]}),
    "arguments": (normalize("init: {args: [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}"),
                  {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}),
    "data sets below": (HOST[HOST.index("models:") :].replace("*train_set", "cifar10/train") + DATASETS,
                        {"mean": [0.49, 0.48, 0.44], "std": [0.2, 0.21, 0.22]}),
    "wrapped": (swap((DATASETS, "datasets:\n" + WRAPPED), ("dataset_id: *train_set", "dataset_id: cifar10/train")),
                {"mean": [0.1], "std": [0.2]}),
    "torchvision's weights": (swap((TRANSFORM, PRESET)), IMAGENET),
    "none": (swap((NORMALIZE, "")), NEVER),
    "a transform that cannot be made": (swap((TRANSFORM, "        transform: !import_call {key: 'no.X'}\n")), NEVER),
    "of another data set": (
        swap((NORMALIZE, ""), ("\nmodels:", "  other: {key: 'Normalize', kwargs: {mean: [0.1], std: [0.2]}}\nmodels:")),
        NEVER,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MEAN_AND_STD.values(), ids=MEAN_AND_STD)
def test_mean_and_std_of_the_training_set(text, expected):
    added = add_term(text, "TALDLoss")
    threat = plain(added.text)["train"]["criterion"]["kwargs"]["sub_terms"]["tald"]["criterion"]["kwargs"]["threat"]
    found = {name: threat[name] for name in ("mean", "std")}
    notes = [note for note in added.notes if "found no Normalize in data set 'cifar10/train'" in note]
    if expected == NEVER:
        assert len(notes) == 1 and found == {"mean": [0], "std": [1]}
    elif isinstance(expected, str):
        assert f"<<: *{expected}," in added.text
    else:
        assert notes == [] and found == expected
        assert "threat: {<<" not in added.text


def test_two_different_normalize_are_refused():
    text = swap((NORMALIZE, NORMALIZE + NORMALIZE.replace("&normalize_kwargs", "").replace("0.49", "0.5")))
    with pytest.raises(ConfigError, match=r"2 different Normalize in data set 'cifar10/train'.*by hand"):
        add_term(text, "TALDLoss")
    same = swap((NORMALIZE, NORMALIZE + NORMALIZE.replace("&normalize_kwargs", "")))
    assert "<<: *normalize_kwargs" in add_term(same, "TALDLoss").text


CRITERION = HOST[HOST.index("  criterion:\n    key: 'W") : HOST.index("\ntest:")]
REFUSED = {
    "another criterion": (
        swap(("key: 'WeightedSumLoss'", "key: 'MyLoss'")),
        r"train\.criterion\.key: found 'MyLoss'; write key: 'WeightedSumLoss'",
    ),
    "no criterion": (swap((CRITERION, "")), r"train\.criterion: is missing"),
    "criterion elsewhere": (
        swap((CRITERION, "  criterion: *c\n"),
             ("models:", textwrap.dedent(CRITERION).replace(":", ": &c", 1) + "models:")),
        r"train\.criterion\.kwargs: has no text of its own.*by hand \{.*tald: \{criterion: \{key: 'TALDLoss'",
    ),
    "terms by a merge key": (
        swap((CRITERION, "  criterion: {key: WeightedSumLoss, kwargs: {<<: *k}}\n"),
             ("models:", "k: &k {sub_terms: {}}\nmodels:")),
        r"sub_terms: has no text of its own",
    ),
    "terms that others have too": (
        HOST.replace("sub_terms:", "sub_terms: &terms").replace("test: {", "test: {terms: *terms, "),
        "several places.*by hand",
    ),
    "dependencies elsewhere": (
        "d: &d [{name: 'os'}]\ndependencies: *d\n" + HOST,
        r"dependencies: found '\*d', into which no item",
    ),
    "terms with a question mark": (
        swap(("        kd:\n", "        ? kd\n        :\n")), "in a style that no line fits"
    ),
    "no teacher": (swap(("  teacher_model:", "  other:")), r"sub_terms\.tald.*needs a teacher"),
    "no training": (HOST[: HOST.index("train:\n")], "train: is missing"),
    "no mapping": ("[1, 2]", "is no configuration"),
    "empty": ("", "is no configuration"),
    "no YAML": ("a: [1", "is no YAML"),
    "two documents": (HOST + "---\n" + HOST, "is no YAML"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(text, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        add_term(text, "TALDLoss")


def test_wrappers_and_unknown_losses_are_refused():
    with pytest.raises(ConfigError, match=r"put around a loss that is there: write criterion_wrapper: {key: 'OnAdv"):
        add_term(HOST, OnAdversarialExamples.__name__)
    for name in ("KDLoss", "NSTLoss"):
        with pytest.raises(ConfigError, match=rf"LOSS: found {name}, which has no search.* write it under sub_terms"):
            add_term(HOST, name)
    for name in ("TALDLos", "tald"):
        with pytest.raises(ConfigError, match=rf"LOSS: found '{name}', which is no registered.*Known: .*TALDLoss"):
            add_term(HOST, name)


def test_a_users_own_loss_of_the_dependencies(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_for_test.py").write_text(
        "from torchdistill.losses.registry import register_mid_level_loss\n"
        "from torchdistill_adv.losses import PGDATLoss\n\n\n"
        "@register_mid_level_loss\n"
        "class MineForTestLoss(PGDATLoss):\n"
        '    """No example."""\n'
    )
    text = "dependencies:\n  - name: 'mine_for_test'\n" + HOST
    term = plain(add_term(text, "MineForTestLoss").text)["train"]["criterion"]["kwargs"]["sub_terms"]["minefortest"]
    assert term["criterion"]["kwargs"]["adversary"] == PGDATLoss.defaults["adversary"]
    assert term["weight"] == 1.0
    with pytest.raises(ConfigError, match=r"LOSS: found 'OtherForTestLoss'"):
        add_term(text, "OtherForTestLoss")


@register_mid_level_loss
class BeginsForTestLoss(PGDATLoss):
    """Begins late."""

    def check_epochs(self, num_epochs):
        if num_epochs < 3:
            raise ConfigError("begins in epoch 3", "begin_epoch")


def test_what_a_loss_does_not_find_in_the_stage_is_refused():
    with pytest.raises(ConfigError, match=r"sub_terms\.beginsfortest\.criterion\.kwargs\.begin_epoch: begins in"):
        add_term(HOST, "BeginsForTestLoss")
    assert "BeginsForTestLoss" in add_term(HOST.replace("num_epochs: 2", "num_epochs: 3"), "BeginsForTestLoss").text


class TestOverrides:
    @pytest.mark.parametrize(
        ("item", "old", "new"),
        [
            ("train.num_epochs=5", "num_epochs: 2", "num_epochs: 5"),
            ("train.optimizer.kwargs.lr=1.0e-3", "{lr: 0.1}", "{lr: 1.0e-3}"),
            ("train.optimizer.kwargs.momentum=0.9", "{lr: 0.1}", "{lr: 0.1, momentum: 0.9}"),
            ("train.teacher.wrapper=", "requires_grad: False\n", "requires_grad: False\n    wrapper: null\n"),
            ("train.train_data_loader.dataset_id=x", "dataset_id: *train_set", "dataset_id: x"),
            ("train.train_data_loader.kwargs={a: [1]}", "{batch_size: 64}", "{a: [1]}"),
            ("models.student_model.dst_ckpt=./x.pt", '&ckpt "./kd.pt"   #', "&ckpt ./x.pt   #"),
            (
                "datasets.cifar10/train.init.kwargs.transform.init.kwargs.transforms.1.init.kwargs.mean=[0.5]",
                "[0.49, 0.48, 0.44]",
                "[0.5]",
            ),
        ],
    )
    def test_in_the_text(self, item, old, new):
        assert HOST.count(old) == 1
        assert set_value(HOST, *item.split("=", 1)) == HOST.replace(old, new)

    def test_empty_and_block_values(self):
        assert set_value("a:\nb: 1", "a", "2") == "a: 2\nb: 1"
        assert set_value("a: # none\n", "a", "2") == "a: 2 # none\n"
        assert set_value("a:\n  b: 1\n  # c\nd: 1", "a", "{}") == "a:\n  {}\n  # c\nd: 1"
        assert set_value("a: [1, {b: }]", "a.1.b", "2") == "a: [1, {b: 2 }]"
        assert set_value("a:\n- 1\n- 2", "a.0", "3") == "a:\n- 3\n- 2"
        assert set_value("a: &k x\n*k : 1\n", "x", "2") == "a: &k x\n*k : 2\n"

    def test_an_alias_is_replaced_alone_and_an_anchor_takes_its_aliases_along(self):
        text = "a: &x 1\nb: *x\nc: *x\n"
        assert set_value(text, "b", "2") == "a: &x 1\nb: 2\nc: *x\n"
        assert set_value(text, "a", "2") == "a: &x 2\nb: *x\nc: *x\n"

    @pytest.mark.parametrize(
        ("text", "path", "message"),
        [
            ("a: &x {b: 1}\nc: *x", "c.b", r"c: is '\*x', so the block stands elsewhere"),
            ("a: &x {b: {d: 1}}\nc: {<<: *x}", "c.b.d", "found no 'b'"),
            ("a: !join [&x 'b', 'c']\nd: *x", "a", "a: holds &x, which others may refer to"),
            ("a: 1", "b.c", "found no 'b'"),
            ("a: {b: 1}", "a.b", "cannot be set to"),
        ],
    )
    def test_refused(self, text, path, message):
        with pytest.raises(ConfigError, match=message):
            set_value(text, path, "}{" if path == "a.b" else "1")

    def test_with_the_term(self):
        overrides = ["models.student_model.dst_ckpt=new.pt", "train.num_epochs=7"]
        added = add_term(HOST, "TALDLoss", overrides=overrides)
        assert added.text == WANTED.replace('"./kd.pt"', "new.pt").replace("num_epochs: 2", "num_epochs: 7")
        assert added.notes == []

    def test_the_same_checkpoint_is_said(self):
        (note,) = add_term(HOST, "TALDLoss").notes
        assert "'./kd.pt'; --set models.student_model.dst_ckpt=./kd-tald.pt gives" in note


def test_command(tmp_path, capsys):
    source, out = tmp_path / "host.yaml", tmp_path / "new file.yaml"
    source.write_bytes(HOST.replace("\n", "\r\n").encode())
    command = ["add", "TALDLoss", str(source), "-o", str(out)]
    assert main([*command, "--set", "train.num_epochs=7"]) == 0
    assert out.read_bytes() == WANTED.replace("num_epochs: 2", "num_epochs: 7").replace("\n", "\r\n").encode()
    assert source.read_bytes() == HOST.replace("\n", "\r\n").encode()
    shown = capsys.readouterr()
    added = [line[1:] for line in shown.out.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert [line for line in added if line in TERM.splitlines()] == TERM.splitlines()
    assert len(added) == len(TERM.splitlines()) + len(["dependencies", "its item", "blank", "process", "num_epochs"])
    assert f"torchdistill-adv check '{out}'" in shown.out
    assert "saves its student where the old one does" in shown.err
    for target in (out, source):
        before = target.read_bytes()
        assert main([*command[:-1], str(target)]) == 2
        assert "-o: found" in capsys.readouterr().err
        assert target.read_bytes() == before
    assert main([*command[:-1], str(tmp_path / "nowhere" / "x.yaml")]) == 2
    assert main(["add", "TALDLoss", str(tmp_path / "nowhere.yaml"), "-o", str(tmp_path / "x.yaml")]) == 2
    source.write_bytes(b"a: \xff")
    assert main([*command[:-1], str(tmp_path / "x.yaml")]) == 2
    assert "UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


KD = (CONFIGS / "digits" / "kd.yaml").read_text()


@pytest.mark.parametrize("key", [key for key in LOSSES if key != OnAdversarialExamples.__name__])
def test_every_loss_trains(key, tmp_path):
    added = add_term(KD, key)
    assert only_lines_added(KD, added.text)
    file = tmp_path / "added.yaml"
    file.write_text(added.text)
    config = support.load_config(file)
    (name,) = config["train"]["criterion"]["kwargs"]["sub_terms"].keys() - {"kd"}
    kwargs = config["train"]["criterion"]["kwargs"]["sub_terms"][name]["criterion"]["kwargs"]
    assert {"adversary", "threat", "objective"} <= kwargs.keys()
    box = make_box(config)
    losses = list(train(box, max_steps=1))
    assert len(losses) == 1 and losses[0].isfinite()
    assert box.criterion.term_dict[name][0].evaluated


# families of configurations differ in their numbers; PGD-AT is in few of them and needs no teacher
@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml"))[::6], ids=lambda path: path.stem)
def test_configurations_of_this_repository(path):
    text = path.read_text()
    new = add_term(text, "PGDATLoss", name="added").text
    assert only_lines_added(text, new)
    for (_, before), (_, after) in zip(stages(plain(text)).items(), stages(plain(new)).items(), strict=True):
        terms = after["criterion"]["kwargs"]["sub_terms"]
        assert terms.pop("added", None) or after["criterion"] == before["criterion"]


def theirs(*folders):
    return [str(path.relative_to(THEIRS)) for folder in folders for path in sorted((THEIRS / folder).rglob("*.yaml"))]


IMAGES = [f"{kind}/{data}" for kind in ("official", "sample") for data in ("ilsvrc2012", "cifar10", "cifar100")]
HOSTS = ["at", "crd", "ft", "kd", "kr", "pad", "srd", "sskd", "vid"]


@upstream
@pytest.mark.parametrize("path", theirs(*IMAGES) if THEIRS else [])
def test_torchdistills_own(path):
    text = (THEIRS / path).read_bytes().decode()
    key = "TALDLoss" if "teacher_model" in plain(text)["models"] else "PGDATLoss"
    assert only_lines_added(text, add_term(text, key).text)


@upstream
@pytest.mark.parametrize(
    "path", theirs("official/ilsvrc2012", *[f"sample/ilsvrc2012/{host}" for host in HOSTS]) if THEIRS else []
)
def test_torchdistills_own_train(path, tmp_path, monkeypatch):
    text = (THEIRS / path).read_text()
    # VID's sample names the arguments of its regressors as version 0 did
    text = text.replace("regressor_kwargs:", "kwargs:")
    # KR's sizes are those of images of 224 x 224
    if "kr" in path:
        monkeypatch.setattr(support, "MAX_SIZE", 224)
    monkeypatch.chdir(tmp_path)
    Path("added.yaml").write_text(add_term(text, "TALDLoss").text)
    box = make_box(support.load_config(Path("added.yaml").resolve()))
    losses = list(train(box, max_steps=1))
    for _ in range(getattr(box, "num_stages", 1) - 1):
        box.advance_to_next_stage()
        losses += train(box, max_steps=1)
    assert all(loss.isfinite() for loss in losses)
    assert box.criterion.term_dict["tald"][0].evaluated
