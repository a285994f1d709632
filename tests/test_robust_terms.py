"""The robust-distillation losses beside each other and under wrong settings: shared work, costs, refusals."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from robust import PARTICLES, TWO_STEPS, WHOLE, WIDE, batch, block, box_of
from tiny import KD, bound, images, network, tald, term

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.losses.base import Cost


def passes(*modules):
    """Rows of every forward pass of the modules from now on, in their order."""
    seen = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


# several terms, and the cost of each


@pytest.mark.parametrize("share, student, teacher", [(True, 1 + 2 + 2, 1 + 2), (False, 1 + 2 * 2 + 3, 1 + 2)])
def test_shared_passes_are_not_made_again(searches, share, student, teacher):
    """The host's pass, the steps of each search, the examples of each and IGDM's mirrored ones."""
    igdm = block("IGDMLoss", **WIDE, objective="kl_clean_teacher_student", share=share)
    box = box_of(block("RSLADLoss", **WIDE), igdm)
    box.forward_process(*batch())
    assert len(searches) == (1 if share else 2)
    by_student, by_teacher = passes(box.org_student_model), passes(box.org_teacher_model)
    box.forward_process(*batch())
    assert (by_student, by_teacher) == ([6] * student, [6] * teacher)


DARWIN = block("DARWINLoss", **WIDE)
BESIDE = {**WIDE, "objective": "ce_student"}


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_a_search_that_needs_no_path_is_the_one_that_has_it(searches, order):
    terms = [DARWIN, block("IGDMLoss", **BESIDE)][::order]
    options = {"student_bn": "batch"}
    for term_block in terms:
        term_block["criterion"]["kwargs"].update(options)
    alone = [box_of(term_block) for term_block in terms]
    values = [box.forward_process(*batch()).item() for box in alone]
    found = {search.without_path: examples.rows for search, examples in searches}
    assert len(searches) == 3 and len(found) == 2
    searches.clear()
    box = box_of(*terms)
    assert abs(box.forward_process(*batch()).item() - sum(values)) < 1e-10
    # DARWIN's two
    assert [search.adversary.return_path for search, _ in searches] == [True, True]
    assert all(torch.equal(found[search.without_path], examples.rows) for search, examples in searches)
    costs = [box.adversarial_binding.cost(6) for box in (*alone, box)]
    once = term(alone[terms.index(DARWIN)], "term0").searches[0].cost(6)
    assert functools.reduce(Cost.plus, costs[:2]) == costs[2].plus(once)


@pytest.mark.parametrize(
    "options", [{"share": False}, {"objective": "kl_teacher_student"}, {"search_bn": "batch"}, {"adversary": PARTICLES}]
)
def test_other_searches_stay_apart_from_one_with_a_path(searches, options):
    box_of(DARWIN, block("IGDMLoss", **{**BESIDE, **options})).forward_process(*batch())
    assert len(searches) == 3 and searches[2][1].path is None


def test_adaad_and_tald_each_search_for_themselves(searches):
    blocks = block("AdaADLoss", **WIDE, student_bn="batch"), tald(1.0)
    alone = [box_of(term_block).forward_process(*batch()) for term_block in blocks]
    together = box_of(*blocks).forward_process(*batch())
    assert [search.objective.key for search, _ in searches] == ["kl_teacher_student", "kl_teacher_clean_teacher"] * 2
    assert torch.allclose(together, sum(alone), rtol=1e-12)


@pytest.mark.parametrize("adversary", [TWO_STEPS, PARTICLES], ids=["PGD", "SVGD"])
@pytest.mark.parametrize(
    "key, options",
    [*WHOLE.values(), ("AKD2Loss", {"standard_weight": 0}), ("TRADESLoss", {"objective": "kl_clean_teacher_student"})],
)
def test_announced_cost_is_the_measured_one(key, options, adversary):
    box = box_of(KD, block(key, **options, adversary=adversary))
    x, y = batch()
    box.forward_process(x, y)  # the first step also tries the networks on one image
    counts = Counter()

    def count(name, module, inputs, output):
        counts[f"{name}_forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update({f"{name}_backward": len(gradient)}))

    teacher = box.org_teacher_model
    for name, net in [("student", box.org_student_model), ("teacher", teacher.robust), ("teacher", teacher.standard)]:
        net[0].register_forward_hook(functools.partial(count, name))
    box.forward_process(x, y).backward()
    bound_term = term(box, "term1")
    declared = [search.cost(6) for search in bound_term.searches] + list(bound_term.outer_cost(6).values())
    host = Cost(teacher_forward=6, student_forward=6, student_backward=6)
    assert Cost(**counts) == functools.reduce(Cost.plus, declared, host)


def test_chunks_bound_the_teacher_and_change_nothing():
    values = []
    for chunk_size, most in [(None, 6), (4, 4)]:
        adversary = {"key": "PGD", "kwargs": {"num_steps": 2, "chunk_size": chunk_size}}
        box = box_of(block("IGDMLoss", adversary=adversary, student_bn="eval"))
        values.append(box.forward_process(*batch()))
        seen = passes(box.org_teacher_model)
        box.forward_process(*batch())
        assert seen[0] == 6 and max(seen[1:]) == most
    assert torch.allclose(*values, rtol=1e-12)


# bad input

TERM = "train.criterion.kwargs.sub_terms.term0.criterion.kwargs"


@pytest.mark.parametrize(
    "key, options, path, found",
    [
        ("PGDATLoss", {"beta": 1}, "beta", "objective"),
        ("PGDATLoss", {"threat": {"eps": "8/255"}}, "threat.mean", "normalize_kwargs"),
        ("PGDATLoss", {"objective": "ce_studnet"}, "objective.key", "did you mean 'ce_student'"),
        ("PGDATLoss", {"search_bn": "frozen"}, "search_bn", "train"),
        ("TRADESLoss", {"beta": -1}, "beta", ">= 0"),
        ("ARDLoss", {"alpha": 1.5}, "alpha", "1.5.*<= 1"),
        ("ARDLoss", {"temperature": 0}, "temperature", "> 0"),
        ("RSLADLoss", {"alpha": -0.1}, "alpha", ">= 0"),
        ("RSLADLoss", {"alhpa": 0.5}, "alhpa", "did you mean 'alpha'"),
        ("AdaADLoss", {"alpha": "half"}, "alpha", "half"),
        ("AdaADLoss", {"temperature": 0}, "temperature", "> 0"),
        ("AdaIADLoss", {"temperature": 0}, "temperature", "> 0"),
        ("AdaIADLoss", {"beta": -0.1}, "beta", ">= 0"),
        ("AdaIADLoss", {}, "begin_epoch", "found 60.*4 epochs"),
        ("AdaIADLoss", {"begin_epoch": 4}, "begin_epoch", "below 4"),
        ("AdaIADLoss", {"begin_epoch": -1}, "begin_epoch", ">= 0"),
        ("AdaIADLoss", {"weigh_teacher": 1}, "weigh_teacher", "true or false"),
        ("IADLoss", {}, "begin_epoch", "found 60"),
        ("IADLoss", {"variant": "II"}, "begin_epoch", "found 40"),
        ("IADLoss", {"variant": "III"}, "variant", "Known: I, II"),
        ("IADLoss", {"temperature": 0}, "temperature", "> 0"),
        ("IADLoss", {"beta": "x"}, "beta", ">= 0"),
        ("AKDLoss", {"teacher_share": 1.1}, "teacher_share", "<= 1"),
        ("AKD2Loss", {"standard_weight": 0.5}, "standard_weight", "at most 0.4"),
        ("AKD2Loss", {"robust_weight": 1.2}, "robust_weight", "<= 1"),
        ("AKD2Loss", {"temperature": 0}, "temperature", "> 0"),
        ("IGDMLoss", {"ramp": "yes"}, "ramp", "true or false"),
        ("DGADLoss", {"beta": -1}, "beta", ">= 0"),
        ("GACDLoss", {"temperature": 0}, "temperature", "> 0"),
        ("GACDLoss", {"ce_weight": -1}, "ce_weight", ">= 0"),
        ("CRDNDLoss", {"temperature": 0}, "temperature", "> 0"),
        ("CRDNDLoss", {"relation_weight": -1}, "relation_weight", ">= 0"),
    ],
)
def test_bad_options_name_their_yaml_path(key, options, path, found):
    with pytest.raises(ConfigError, match=found) as error:
        box_of(block(key, **options))
    assert error.value.path == f"{TERM}.{path}"


@pytest.mark.parametrize("share, found", [(1.5, "<= 1"), ("half", "half")])
def test_bad_share_of_a_mixed_objective_names_its_yaml_path(share, found):
    objective = {"key": "ce_student_mixed", "kwargs": {"teacher_share": share}}
    with pytest.raises(ConfigError, match=found) as error:
        box_of(block("AKDLoss", objective=objective))
    assert error.value.path == f"{TERM}.objective.kwargs.teacher_share"


def test_fractions_are_shares_of_a_mixed_objective():
    objective = {"key": "ce_student_mixed", "kwargs": {"teacher_share": "1/4"}}
    shares = [block("AKDLoss", objective=objective, teacher_share=0.25), block("AKDLoss", teacher_share="1/4")]
    assert torch.equal(*(box_of(share).forward_process(*batch()) for share in shares))


@pytest.mark.parametrize("search_bn", ["train", "batch"])
def test_chunks_and_a_student_in_train_mode_are_refused(search_bn):
    adversary = {"key": "PGD", "kwargs": {"chunk_size": 3}}
    with pytest.raises(ConfigError, match="write search_bn: 'eval'") as error:
        box_of(block("AdaADLoss", adversary=adversary, search_bn=search_bn))
    assert error.value.path == f"{TERM}.adversary.kwargs.chunk_size"


@pytest.mark.parametrize("key, options", [("IADLoss", {"variant": "II", "begin_epoch": 0}), ("AKD2Loss", {})])
def test_missing_standard_teacher_is_refused_before_the_first_step(key, options):
    student = network(2)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ConfigError, match="found 'standard'; the teacher has no such part") as error:
        bound({"term0": block(key, **options)}, student=student).forward_process(*images())
    assert error.value.path == f"{TERM}.standard_teacher"
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    "key, options",
    [case for name, case in WHOLE.items() if name not in ("PGDATLoss", "TRADESLoss")],
)
def test_training_without_the_teacher_is_refused(key, options):
    with pytest.raises(ConfigError, match="needs a teacher") as error:
        box_of(block(key, **options), teacher=None)
    assert error.value.path in (TERM, f"{TERM}.objective")


LABEL_FREE = [
    ("RSLADLoss", {}),
    ("AdaADLoss", {}),
    ("IGDMLoss", {}),
    ("ARDLoss", {"objective": "kl_clean_teacher_student"}),
]


@pytest.mark.parametrize("key, options", LABEL_FREE)
def test_labels_are_not_needed(key, options):
    x, y = batch()
    values = [box_of(block(key, **options)).forward_process(x, labels) for labels in (y, None)]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    "key, options",
    [
        *(case for case in WHOLE.values() if case[0] not in dict(LABEL_FREE)),
        ("ARDLoss", {}),
        ("ARDLoss", {"objective": "kl_clean_teacher_student", "alpha": 0.5}),
        *((key, {"objective": "ce_student"}) for key in ("RSLADLoss", "AdaADLoss", "IGDMLoss")),
    ],
)
def test_missing_labels_are_refused(key, options):
    box = box_of(block(key, **options))
    with pytest.raises(ConfigError, match=f"found labels NoneType; {TERM} needs") as error:
        box.forward_process(batch()[0], None)
    assert error.value.path == "train.train_data_loader"
