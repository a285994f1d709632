"""Other values for entries of a YAML: set before anything is built, at the named place alone."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from torchdistill_adv.cli import main
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.report.records import read_runs
from torchdistill_adv.runner.config import TaggedYAML, load_config, override, parse_overrides, prepare_config
from torchdistill_adv.runner.plain import PlainLoader

# aliases and merge keys, nested, alone and in lists
SHARED = """
base: &base {lr: 0.1, nested: &nested {depth: 1, list: &list [1, {x: 2}, [3, 4]]}}
other: &other {lr: 0.5, nested: {depth: 7, y: 1}}
same: *base
merged: {<<: *base, weight: 3}
overridden:
  <<: *base
  nested: {depth: 5}
both:
  <<: [*other, *base]
twice: [*nested, *nested, *list]
inner: &inner {<<: *other, again: *nested}
outer: {<<: *inner}
one.two: {three.four: 1, three: {four: 2}}
one: {two: {three: 3}}
cifar100/train: {1: 'number', empty: , 'quoted key': 'x'}
"""


def places(value, path=()):
    """Every path below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def unshared():
    """The configuration with nothing in two places."""
    loaded = yaml.safe_load(SHARED)

    def copied(value):
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return [copied(item) for item in value] if isinstance(value, list) else value

    return copied(loaded)


# a key with dots comes before blocks within blocks of the same path
HIDDEN = {("one", "two"), ("one", "two", "three"), ("one.two", "three", "four")}
PLACES = [path for path in places(unshared()) if path not in HIDDEN]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "shared.yaml"
    file.write_text(SHARED)
    return file


@pytest.mark.parametrize("value", [7, None, {"new": [1]}], ids=repr)
@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_one_place_is_changed_and_no_other(shared, path, value):
    expected = unshared()
    block = expected
    for key in path[:-1]:
        block = block[key]
    block[path[-1]] = value
    dotted = ".".join(map(str, path))
    assert load_config(shared, {dotted: value}) == expected
    # and in a configuration that is loaded already
    before = unshared()
    assert prepare_config(before, {dotted: value}) == expected
    assert before == unshared()


def test_order_of_entries_stays(shared):
    loaded = load_config(shared, {"other.lr": 1, "base.new": 2})
    assert list(loaded) == list(yaml.safe_load(SHARED))
    assert list(loaded["other"]) == ["lr", "nested"]
    assert list(loaded["base"]) == ["lr", "nested", "new"]


def test_later_overrides_see_the_earlier_ones(shared):
    overrides = {"same": {"a": {"b": 1}, "c": [1, 2]}, "same.a.b": 2, "same.c.1": 3, "same.a.d": [4]}
    wanted = {"a": {"b": 2, "d": [4]}, "c": [1, 3]}
    assert load_config(shared, overrides)["same"] == wanted
    assert prepare_config(yaml.safe_load(SHARED), overrides)["same"] == wanted


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bass.lr", "found no 'bass'. did you mean 'base'"),
        ("base.nestd.depth", "found no 'nestd'. did you mean 'nested'? Known: lr, nested."),
        ("base.lr.x", "found no 'x'. Known: none."),
        ("merged.nested.dept.x", "found no 'dept'. did you mean 'depth'"),
        ("twice.3", "found no '3'. Known: 0, 1, 2."),
        ("twice.-1", "found no '-1'"),
        ("cifar100/train.empty.x", "found no 'x'"),
    ],
)
def test_refused_with_its_path_and_the_nearest_key(shared, path, message):
    for config in (shared, yaml.safe_load(SHARED)):
        with pytest.raises(ConfigError, match="there is no such block in the YAML") as refused:
            prepare_config(config, {path: 1})
        assert refused.value.path == path
        assert message in str(refused.value)


BUILT = """
datasets:
  &train a/train: !import_call
    key: 'collections.Counter'
    init: {kwargs: &kwargs {x: 1, y: 2}}
  a/test: !import_call {key: 'collections.Counter', init: {kwargs: *kwargs}}
  broken: !import_call {key: 'test_config.fails', init: {kwargs: {wanted: 0}}}
  joined: !join [*train, '-', 'b']
models: {a: [1, 2]}
"""


def fails(wanted):
    """Stands for a data set whose files are elsewhere."""
    if not wanted:
        raise FileNotFoundError("no such folder")
    return wanted


def test_arguments_of_an_object_are_set_before_it_is_made(tmp_path):
    file = tmp_path / "built.yaml"
    file.write_text(BUILT)
    with pytest.raises(ConfigError, match="FileNotFoundError: no such folder"):
        load_config(file)
    items = ["datasets.broken.init.kwargs.wanted=3", "datasets.a/train.init.kwargs.x=5", "datasets.joined.1=+"]
    items += ["models.sampler=!import_get {key: 'collections.Counter'}", "models.a.1=!join ['a', 'b']"]
    config = load_config(file, parse_overrides(items))
    datasets = {"a/train": Counter(x=5, y=2), "a/test": Counter(x=1, y=2), "broken": 3, "joined": "a/train+b"}
    assert config == {"datasets": datasets, "models": {"a": [1, "ab"], "sampler": Counter}}
    assert type(config["datasets"]["a/train"]) is Counter


def test_objects_may_be_given_too(tmp_path):
    file = tmp_path / "built.yaml"
    file.write_text("a: {b: 1}")
    given = Counter(x=1)
    config = load_config(file, {"a.b": given, "a.c": {"d": [given, fails]}})
    assert config["a"]["b"] is given
    assert config["a"]["c"]["d"][0] is given and config["a"]["c"]["d"][1] is fails


def test_tags_in_a_configuration_that_is_loaded_already():
    made = prepare_config({"a": {}}, parse_overrides(["a.b=!import_get {key: 'collections.Counter'}"]))
    assert made["a"]["b"] is Counter
    with pytest.raises(ConfigError, match=r"--set: found .*nowhere"):
        prepare_config({"a": {}}, parse_overrides(["a.b=!import_get {key: 'nowhere.Nothing'}"]))


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("a=2", 2),
        ("a=[1, 2]", [1, 2]),
        ("a=null", None),
        ("a=", None),
        ("a='2'", "2"),
        ("a=b=c", "b=c"),
        ("a=1.0e-3", 0.001),
        ("a={b: {c: True}}", {"b": {"c": True}}),
        ("a=./resource/ckpt/x.pt", "./resource/ckpt/x.pt"),
        ("a=!join ['x', 'y']", TaggedYAML("!join ['x', 'y']")),
        ("a='!join'", "!join"),
    ],
)
def test_values_are_yaml(item, value):
    (found,) = parse_overrides([item]).values()
    assert found == value and type(found) is type(value)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="ascii")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@given(plain_values)
def test_what_yaml_writes_is_read_back(value):
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n")
    assert parse_overrides([f"a.b={text}"]) == {"a.b": value}


def test_the_last_of_two_counts_and_comes_last():
    items = ["a.b=1", "a={c: 2}", "a.b=3"]
    assert list(parse_overrides(items).items()) == [("a", {"c": 2}), ("a.b", 3)]
    assert parse_overrides([]) == {}


@pytest.mark.parametrize("item", ["a", "=1", " =1", "a=[1", "a={b", "a=*nothing", "a=b: c: d"])
def test_texts_that_are_refused(item):
    with pytest.raises(ConfigError) as refused:
        parse_overrides([item])
    assert refused.value.path == "--set" and repr(item) in str(refused.value)


@given(st.integers(0, 2**32))
def test_plain_yaml_is_overridden_as_the_loaded_one(seed):
    """The report sets what ``run.json`` has in plain YAML."""
    draw = random.Random(seed)
    plain = yaml.load(BUILT, PlainLoader)
    path = draw.choice([path for path in places(plain) if not any(isinstance(key, int) for key in path)])
    expected = copy.deepcopy(json.loads(json.dumps(plain)))
    replayed = copy.deepcopy(expected)
    for key in path[:-1]:
        expected = expected[key]
    override(replayed, ".".join(path), "new")
    for key in path[:-1]:
        replayed = replayed[key]
    assert replayed == {**expected, path[-1]: "new"}


def test_set_on_the_command_line_is_recorded_and_replayed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(RUN)
    short = ["--set", "train.num_epochs=1", "--set", "models.model.dst_ckpt=a/student.pt"]
    # the data set of the YAML has no such split
    short += ["--set", "datasets.digits/train.init.kwargs.split=val", "--set", "train.optimizer.kwargs.lr=0.25"]
    assert main(["train", "--config", str(config), "--device", "cpu", *short]) == 0
    recorded = json.loads((tmp_path / "a/student/run.json").read_text())["overrides"]
    assert recorded["datasets.digits/train.init.kwargs.split"] == "val"
    (found,) = read_runs(["a/student"])
    assert found.config["train"]["num_epochs"] == len(found.epochs) == 1
    assert found.config["train"]["optimizer"]["kwargs"]["lr"] == 0.25
    assert main(["evaluate", "--config", str(config), "--device", "cpu", "--attacks", "clean", *short]) == 0
    model = json.loads((tmp_path / "a/student/evaluation.json").read_text())["model"]
    assert model["overrides"] == recorded
    assert main(["evaluate", "--config", str(config), "--set", "train.num_epoch.x=1"]) == 2
    assert "did you mean 'num_epochs'" in capsys.readouterr().err


RUN = """
dependencies:
  - name: 'torchdistill_adv'
datasets:
  digits/train: !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init:
      kwargs: {split: 'nowhere', transform: &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}}
  digits/test: !import_call
    key: 'torchdistill_adv.datasets.Digits'
    init: {kwargs: {split: 'test', transform: *to_tensor}}
models:
  model:
    key: 'small_cnn'
    kwargs: {num_classes: 10, in_channels: 1, width: 2, depth: 2}
    src_ckpt:
    dst_ckpt: 'student.pt'
train:
  num_epochs: 20
  train_data_loader:
    dataset_id: 'digits/train'
    sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
    kwargs: {batch_size: 64}
  model: {forward_proc: 'forward_batch_only'}
  optimizer: {key: 'SGD', kwargs: {lr: 0.1}}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        ce:
          criterion: {key: 'CrossEntropyLoss', kwargs: {reduction: 'mean'}}
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs:
              input: {is_from_teacher: False, module_path: '.', io: 'output'}
              target: {uses_label: True}
          weight: 1.0
test:
  test_data_loader:
    dataset_id: 'digits/test'
    sampler: {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}}
    kwargs: {batch_size: 256}
"""
