"""In every host configuration, adversarial passes that count for nothing change nothing, bit for bit."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support import CONFIGS, adversarial_terms, load_config, make_box, stages, train
from torch.nn import functional as F

import torchdistill_adv.binding
from torchdistill_adv.adversaries import Examples
from torchdistill_adv.losses.base import AdversarialTerm
from torchdistill_adv.threat import ThreatModel

HOSTS = sorted(path.stem for path in (CONFIGS / "digits" / "hosts").glob("*.yaml"))


def without_plugin(config):
    for stage in stages(config).values():
        for name in adversarial_terms(stage):
            del stage["criterion"]["kwargs"]["sub_terms"][name]
        stage.pop("pre_epoch_process", None)
    return config


def with_weight_zero(config):
    for stage in stages(config).values():
        for name in adversarial_terms(stage):
            block = stage["criterion"]["kwargs"]["sub_terms"][name]
            block["weight"] = 0.0
            block["criterion"]["kwargs"] |= {"teacher_mode": "keep", "student_bn": "batch"}
    return config


def evaluate_at_weight_zero(monkeypatch):
    find = torchdistill_adv.binding.find_terms
    monkeypatch.setattr(
        torchdistill_adv.binding, "find_terms", lambda box: [(path, term, 1.0) for path, term, _ in find(box)]
    )
    evaluations = []
    forward = AdversarialTerm.forward

    def spy(self, *args, **kwargs):
        evaluations.append(forward(self, *args, **kwargs).detach())
        return evaluations[-1]

    monkeypatch.setattr(AdversarialTerm, "forward", spy)
    return evaluations


def run(config, tmp_path, monkeypatch):
    """Everything that training leaves behind."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    box = make_box(config)
    # a student with dropout draws from the global stream at every pass
    box.org_student_model.bn1.register_forward_hook(lambda m, i, out: F.dropout(out, 0.1, m.training))
    torch.manual_seed(1)
    losses, optimizers = [], []
    for loss in train(box, max_steps=2):
        losses.append(loss)
        optimizers.append(copy.deepcopy(box.optimizer.state_dict()["state"]))
        hooks = [{path: dict(inner) for path, inner in d.items()} for d in (box.student_io_dict, box.teacher_io_dict)]
    modules = [box.org_student_model, box.org_teacher_model, box.student_model, box.teacher_model]
    return {
        "losses": losses,
        "optimizers": [[v for state in o.values() for v in state.values()] for o in optimizers],
        "weights": [v for m in modules for v in m.state_dict().values()],
        "modes": [m.training for module in modules for m in module.modules()],
        "hooks": hooks,
        "streams": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]],
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_neutral(path, change, tmp_path, monkeypatch):
    """Train with and without what ``change`` adds to a configuration; the values of its terms."""
    folders = [tmp_path / name for name in ("plain", "plugin")]
    for folder in folders:
        folder.mkdir()
    plain = run(without_plugin(load_config(path)), folders[0], monkeypatch)
    evaluations = evaluate_at_weight_zero(monkeypatch)
    plugin = run(change(load_config(path)), folders[1], monkeypatch)
    for what in plain:
        assert equal(plain[what], plugin[what]), what
    return evaluations


@pytest.mark.parametrize("host", HOSTS)
def test_training_is_bit_for_bit_that_without_the_plugin(host, tmp_path, monkeypatch):
    path = Path("digits") / "hosts" / f"{host}.yaml"
    evaluations = assert_neutral(path, with_weight_zero, tmp_path, monkeypatch)
    steps = 2 * sum(bool(adversarial_terms(stage)) for stage in stages(load_config(path)).values())
    assert len(evaluations) == steps > 0 and all(value > 0 for value in evaluations)


def with_wrapped_terms_of_weight_zero(config):
    for stage in stages(without_plugin(config)).values():
        sub_terms = stage["criterion"]["kwargs"]["sub_terms"]
        for name, block in list(sub_terms.items()):
            options = {"adversary": {"key": "PGD", "kwargs": {"num_steps": 1}}, "teacher_mode": "keep"}
            sub_terms[f"{name}_adv"] = {**wrapped(block, **options), "weight": 0.0}
        stage["pre_epoch_process"] = "bind_adversarial_losses"
    return config


# building CRD's loss draws its memory bank from the global stream, so one more of it changes what follows
@pytest.mark.parametrize("host", [host for host in HOSTS if host != "crd"])
def test_gathering_features_changes_nothing_either(host, tmp_path, monkeypatch):
    """Auxiliary modules have normalisation layers of their own."""
    path = Path("digits") / "hosts" / f"{host}.yaml"
    assert assert_neutral(path, with_wrapped_terms_of_weight_zero, tmp_path, monkeypatch)


class Nothing:
    """An adversary that changes nothing."""

    targeted, num_rows, num_gradients = False, 1, 0

    def __call__(self, objective, x, threat, noise):
        return Examples(x.clone(), torch.arange(len(x)))


def wrapped(block, **options):
    """A sub-term's block, inside OnAdversarialExamples."""
    kwargs = {
        "adversary": Nothing(),
        "objective": "kl_teacher_student",
        "threat": ThreatModel(eps=0.1, space="input", bounds="none"),
        "teacher_mode": "keep",
        **options,
    }
    if "criterion_wrapper" in block:
        kwargs["criterion_wrapper"] = block["criterion_wrapper"]
    wrapper = {"key": "OnAdversarialExamples", "kwargs": kwargs}
    return {**copy.deepcopy(block), "criterion_wrapper": wrapper}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("sides", [("adversarial", "adversarial"), ("clean", "adversarial"), ("adversarial", "clean")])
def test_any_loss_on_unchanged_examples_is_the_clean_loss(host, sides, tmp_path, monkeypatch):
    """Every term of every stage of every host, exactly."""
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("digits") / "hosts" / f"{host}.yaml")
    for stage in stages(without_plugin(config)).values():
        sub_terms = stage["criterion"]["kwargs"]["sub_terms"]
        for name in list(sub_terms):
            sub_terms[f"{name}_adv"] = wrapped(sub_terms[name])
            options = sub_terms[f"{name}_adv"]["criterion_wrapper"]["kwargs"]
            options["student_on"], options["teacher_on"] = sides
        stage["pre_epoch_process"] = "bind_adversarial_losses"
    box = make_box(config)
    values = {}
    bound = set()

    def watch():
        for name, (criterion, _) in box.criterion.term_dict.items():
            if (box.criterion, name) not in bound:
                bound.add((box.criterion, name))
                criterion.register_forward_hook(
                    lambda m, i, out, name=name: values.__setitem__(name, out.detach().clone())
                )
                if name.endswith("_adv"):
                    # a loss may keep a memory bank: both start from the same
                    clean = box.criterion.term_dict[name.removesuffix("_adv")][0]
                    criterion.wrapped.load_state_dict(clean.state_dict())

    pre_epoch_process = type(box).pre_epoch_process
    compared = 0
    for epoch in range(box.num_epochs):
        watch()
        pre_epoch_process(box, epoch=epoch)
        sample_batch, targets, supp_dict = next(iter(box.train_data_loader))
        loss = box.forward_process(sample_batch, targets, supp_dict)
        for name in values:
            if name.endswith("_adv"):
                clean = values[name.removesuffix("_adv")]
                assert torch.equal(values[name].flatten(), clean.flatten()), name
                compared += 1
        assert torch.isfinite(loss).all()
        values.clear()
        box.post_epoch_process()
    assert compared >= len(stages(config))
