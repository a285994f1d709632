"""What a step hands to the terms: modes, clean logits, views, and nothing of its own left behind."""

from __future__ import annotations

import copy
import inspect
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import (
    CE,
    KD,
    L2_THREAT,
    bound,
    images,
    matching,
    on_adversarial,
    step,
    tald,
    term,
    tiny_box,
    with_side,
)
from torch import nn
from torchdistill.core.interfaces.registry import register_forward_proc_func

from torchdistill_adv.adversaries import PGD, Examples
from torchdistill_adv.binding import bind
from torchdistill_adv.errors import ConfigError, NonFiniteError
from torchdistill_adv.guards import own_random_stream
from torchdistill_adv.step import Step


def passes(module):
    """Number of rows and mode of every forward pass of ``module`` from now on."""
    seen = []
    module.register_forward_hook(lambda m, inputs, output: seen.append((len(output), m.training)))
    return seen


# modes


def test_search_runs_the_student_in_eval_and_the_outer_pass_in_train():
    box = bound({"adv": on_adversarial(KD, adversary={"key": "PGD", "kwargs": {"num_steps": 3}})})
    step(box, *images())
    seen = passes(box.org_student_model)
    step(box, *images())
    assert seen == [(6, True), *[(6, False)] * 3, (6, True)]
    assert box.org_student_model.training


def test_teacher_in_train_mode_has_a_clean_pass_of_its_own():
    box = bound({"tald": tald(teacher_mode="keep")})
    step(box, *images())
    seen = passes(box.org_teacher_model)
    step(box, *images())
    # the host's pass, ours on the clean images, the search, the particles
    assert seen == [(6, True), (6, True), (12, True), (12, True)]


def test_chunks_and_a_teacher_in_train_mode_are_refused():
    adversary = {"key": "SVGD", "kwargs": {"chunk_size": 5}}
    box = tiny_box({"tald": tald(teacher_mode="keep", adversary=adversary)})
    with pytest.raises(ConfigError, match="normalises as a whole") as error:
        box.pre_epoch_process(epoch=0)
    assert error.value.path.endswith("tald.criterion.kwargs.adversary.kwargs.chunk_size")


def test_gathering_on_a_teacher_in_train_mode_moves_no_statistics():
    box = bound({"adv": on_adversarial(KD, teacher_mode="keep")})
    reference = copy.deepcopy(box.org_teacher_model)
    x, y = images()
    step(box, x, y)
    reference(x)
    assert torch.equal(reference[1].running_mean, box.org_teacher_model[1].running_mean)


# gradients


def test_search_leaves_no_gradient_on_parameters():
    box = bound({"tald": tald(), "adv": on_adversarial(KD)})
    box.forward_process(*images())
    assert all(p.grad is None for net in (box.org_student_model, box.org_teacher_model) for p in net.parameters())


def test_a_trainable_teacher_gets_no_gradient_from_tald():
    box = with_side({"tald": tald(1.0)}, teacher={"requires_grad": True})
    assert all(p.requires_grad for p in box.org_teacher_model.parameters())
    box.forward_process(*images()).backward()
    assert all(p.grad is None for p in box.org_teacher_model.parameters())


@dataclass(frozen=True)
class WithGraph:
    """An adversary of a user's that forgets to detach."""

    targeted, num_rows, num_gradients = False, 1, 0

    def __call__(self, objective, x, threat, noise):
        rows = x.clone().requires_grad_() * 1
        return Examples(rows, torch.arange(len(x)))


def test_examples_come_without_a_graph():
    box = bound({"adv": on_adversarial(KD, adversary=WithGraph())})
    found = []
    collect = Step.collect_student
    box.adversarial_binding.step = None

    def spy(self, rows, student_bn):
        found.append(rows)
        return collect(self, rows, student_bn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "collect_student", spy)
        box.forward_process(*images())
    assert not found[0].requires_grad


@dataclass(frozen=True)
class Broken(PGD):
    def __call__(self, objective, x, threat, noise):
        return Examples(x * float("nan"), torch.arange(len(x)))


def test_nan_of_a_search_is_told_as_such():
    box = bound({"adv": on_adversarial(KD, adversary=Broken())})
    with pytest.raises(NonFiniteError, match=r"adv.*search found NaN.*epoch 0, step 0.*0% finite"):
        box.forward_process(*images())


# the teacher's clean logits


def clean_passes(box, supp_dict=None):
    """Passes of the teacher beyond the host's, the search's and the particles'."""
    x, y = images()
    box.forward_process(x, y, supp_dict)
    seen = passes(box.org_teacher_model)
    box.forward_process(x, y, supp_dict)
    return [rows for rows, _ in seen if rows in (1, 6)]


def test_fresh_logits_of_the_host_are_reused():
    assert clean_passes(bound({"tald": tald(include_clean=True)})) == [6]


def test_cached_logits_are_not_reused():
    """They may be of another augmentation."""
    x, _ = images()
    box = bound({"tald": tald(include_clean=True)})
    with torch.no_grad():
        outputs = box.org_teacher_model(x)
    cached = {"teacher_outputs": outputs, "extracted_outputs": {".": {"output": outputs}}}
    # newer versions of torchdistill know no cache, and make their own pass
    host = "cached_data" not in inspect.getsource(type(box).get_teacher_output)
    assert clean_passes(box, {"cached_data": cached}) == [6] * (1 + host)


def test_outputs_that_are_no_logits_are_not_reused():
    box = with_side({"tald": tald(include_clean=True)}, teacher={"forward_proc": "probabilities_for_test"})
    assert clean_passes(box) == [6, 6]


SEEN_SUPP_DICTS = []


@register_forward_proc_func
def spying_proc_for_test(model, sample_batch, targets=None, supp_dict=None, **kwargs):
    SEEN_SUPP_DICTS.append(supp_dict)
    return model(sample_batch)


def test_adversarial_passes_see_the_supplementary_data_but_no_cache(tmp_path):
    """torchdistill would overwrite its cache of clean outputs with adversarial ones."""
    box = with_side({"adv": on_adversarial(KD)}, student={"forward_proc": "spying_proc_for_test"})
    SEEN_SUPP_DICTS.clear()
    box.forward_process(*images(), {"pos_idx": 3, "cache_file_path": [str(tmp_path / f"{i}.pt") for i in range(6)]})
    assert [set(d) for d in SEEN_SUPP_DICTS] == [{"pos_idx", "cache_file_path"}, {"pos_idx"}]


# views (SSKD)


def four_views():
    x, y = images(24)
    return x.view(6, 4, *x.shape[1:]), y[:6]


SSKD = {"forward_proc": "forward_batch4sskd"}


def test_labels_of_several_views_belong_to_the_first(searches):
    box = with_side({"tald": tald(1.0, student_bn="eval")}, teacher=SSKD, student=SSKD)
    x, y = four_views()
    loss = box.forward_process(x, y)
    ((_, examples),) = searches
    assert (term(box, "tald").search.threat.distance(examples.rows, x[:, 0][examples.index]) <= 0.3 + 1e-6).all()
    box.org_student_model.eval()
    gaps = [
        nn.functional.cross_entropy(net(examples.rows), y[examples.index], reduction="none")
        for net in (box.org_teacher_model, box.org_student_model)
    ]
    assert torch.allclose(loss, (gaps[0] - gaps[1]).square().mean(), rtol=1e-4)


def test_wrapped_losses_see_every_view_and_searches_the_label_of_its_image(searches):
    threat = {**L2_THREAT, "bounds": "none", "eps": 1e-3}
    options = {"objective": "ce_student", "adversary": "FGSM", "threat": threat, "student_bn": "eval"}
    box = with_side({"adv": on_adversarial(matching("."), **options)}, teacher=SSKD, student=SSKD)
    x, y = four_views()
    box.forward_process(x, y)
    ((_, examples),) = searches
    flat = x.flatten(0, 1).requires_grad_()
    box.org_student_model.eval()
    labels = torch.tensor([int(y[i // 4]) for i in range(24)])
    loss = nn.functional.cross_entropy(box.org_student_model(flat), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, flat)
    move = examples.rows - flat
    assert (torch.cosine_similarity(move.flatten(1), gradient.flatten(1)) > 0.99).all()


# life cycle and random streams


def test_another_model_is_bound_again():
    box = bound({"tald": tald()})
    first = box.adversarial_binding
    box.student_model = nn.Sequential(box.student_model)
    assert bind(box) is not first
    assert torch.isfinite(step(box, *images()))


def test_the_check_of_the_first_batch_leaves_the_hooks_empty():
    box = bound({"kd": KD, "tald": tald()}, hooks={"input": [], "output": ["0"]})
    Step(box.adversarial_binding, *images(), None, {})
    assert not any(box.student_io_dict.values()) and not any(box.teacher_io_dict.values())


def test_noise_follows_the_seed_of_the_run():
    x, _ = images()

    def rows(seed):
        box = tiny_box({"tald": tald()})
        torch.manual_seed(seed)
        box.pre_epoch_process(epoch=0)
        return box.adversarial_binding.noise_for(term(box, "tald").search, x).uniform((8,))

    assert torch.equal(rows(1), rows(1)) and not torch.equal(rows(1), rows(2))


def test_own_random_stream_is_set_and_given_back_in_all_three_libraries():
    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = [draw(), draw()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    found = []
    inside = []
    for _ in range(2):
        with own_random_stream(5, torch.device("cpu")):
            inside.append(draw())
        found.append(draw())
    assert found == expected
    assert inside[0] == inside[1] and inside[0] not in expected


def test_two_terms_that_share_a_search_get_the_same_examples_for_ce_and_kd():
    box = bound({"a": on_adversarial(KD), "b": on_adversarial(CE)})
    assert term(box, "a").search == term(box, "b").search
