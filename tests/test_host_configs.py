"""The host methods on CIFAR-100: every pair of configs/README.md in every file, and several processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import support
from support import CONFIGS, adversarial_terms, as_if_trained, load_config, make_box, read_config, stages, train
from test_distributed import in_two_processes
from torchdistill.common.main_util import import_dependencies
from torchdistill.models.registry import get_model

from torchdistill_adv.boxes import stage_path
from torchdistill_adv.runner.building import build_box, build_model, wrap_student
from torchdistill_adv.runner.plain import PlainLoader
from torchdistill_adv.runner.processes import place

PAIR = "resnet20_from_resnet56"
HOSTS = ("kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ab", "ft", "nst", "crd", "sskd", "hsakd", "bss")
# those of TALD's paper and of RepDistiller
PAIRS = (
    "wrn_16_2_from_wrn_40_2",
    "wrn_40_1_from_wrn_40_2",
    "resnet20_from_resnet56",
    "resnet20_from_resnet110",
    "resnet32_from_resnet110",
    "resnet8x4_from_resnet32x4",
    "vgg8_from_vgg13",
    "mobilenetv2_from_vgg13",
    "mobilenetv2_from_resnet50",
    "vgg8_from_resnet50",
    "shufflenetv1_from_resnet32x4",
    "shufflenetv2_from_resnet32x4",
    "shufflenetv1_from_wrn_40_2",
)
NETWORKS = {
    "wrn_16_2": ("cifar_wide_resnet", {"depth": 16, "widen_factor": 2}),
    "wrn_40_1": ("cifar_wide_resnet", {"depth": 40, "widen_factor": 1}),
    "wrn_40_2": ("cifar_wide_resnet", {"depth": 40, "widen_factor": 2}),
    **{f"resnet{depth}": (f"resnet{depth}", {"pretrained": False}) for depth in (20, 32, 56, 110)},
    **{f"resnet{name}": (f"cifar_resnet{name}", {}) for name in ("8x4", "32x4", "50")},
    **{f"vgg{depth}": (f"cifar_vgg{depth}", {}) for depth in (8, 13)},
    "mobilenetv2": ("cifar_mobilenet_v2_half", {}),
    "shufflenetv1": ("cifar_shufflenet_v1", {}),
    "shufflenetv2": ("cifar_shufflenet_v2", {}),
}
CIFAR = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob(f"cifar100/*-{PAIR}.yaml"))
IMAGENET = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("imagenet/*.yaml"))
TEACHER = "cifar100/ce-resnet56.yaml"


def blocks():
    """The block of every pair in the README, by the pair's name."""
    found = re.findall(r"```yaml\n(pair:.*?)```", (CONFIGS / "README.md").read_text(), re.DOTALL)
    return {re.search(r"&pair '(\w+)'", block)[1]: block for block in found}


BLOCKS = blocks()


# the files


def test_make_would_write_what_is_there():
    command = [sys.executable, str(CONFIGS / "make_hosts.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_host_is_there_with_and_without_tald():
    assert {f"cifar100/{host}-{PAIR}.yaml" for host in HOSTS} <= set(CIFAR)
    assert {f"cifar100/{host}_tald-{PAIR}.yaml" for host in HOSTS if host != "kd"} <= set(CIFAR)
    forms = ("paper", "paper_linf", "median", "code_exact", "fast")
    assert {f"cifar100/kd_tald_{form}-{PAIR}.yaml" for form in forms} <= set(CIFAR)


@pytest.mark.parametrize("path", [*CIFAR, TEACHER])
def test_the_pair_of_a_file_is_that_of_the_readme(path):
    """So that any other block of the README fits in its place."""
    ours, whole = read_config(path)["pair"], yaml.load(BLOCKS[PAIR], PlainLoader)["pair"]
    assert {"name", "lr", "teacher", "student"} <= ours.keys()
    assert ours == {name: whole[name] for name in ours}
    assert re.search(r"^pair:.*\n(  .*\n)+\ndatasets:$", (CONFIGS / path).read_text(), re.MULTILINE)


def test_the_readme_has_the_pairs_of_the_paper():
    assert tuple(BLOCKS) == PAIRS
    for name, block in BLOCKS.items():
        pair = yaml.load(block, PlainLoader)["pair"]
        student, teacher = name.split("_from_")
        for side, network in (("student", student), ("teacher", teacher)):
            key, kwargs = NETWORKS[network]
            assert (pair[side]["key"], pair[side]["kwargs"]) == (key, {**kwargs, "num_classes": 100})
        assert pair["teacher"]["src_ckpt"] == f"./resource/ckpt/cifar100/ce-{teacher}.pt"
        assert pair["lr"] == (0.01 if student.startswith(("mobile", "shuffle")) else 0.05)
        assert pair.keys() == yaml.load(BLOCKS[PAIR], PlainLoader)["pair"].keys()


# of the maps that RepDistiller compares, for images of 32 x 32: channels and side length
SHAPES = {
    "wrn_16_2": [(32, 32), (64, 16), (128, 8)],
    "wrn_40_1": [(16, 32), (32, 16), (64, 8)],
    "wrn_40_2": [(32, 32), (64, 16), (128, 8)],
    **{f"resnet{depth}": [(16, 32), (32, 16), (64, 8)] for depth in (20, 32, 56, 110)},
    **{f"resnet{name}": [(64, 32), (128, 16), (256, 8)] for name in ("8x4", "32x4")},
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    **{f"vgg{depth}": [(128, 16), (256, 8), (512, 4), (512, 4)] for depth in (8, 13)},
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
}


def inputs_and_outputs(network):
    """The network's modules' inputs and outputs for an image, of their last call, not overwritten in place."""
    key, kwargs = NETWORKS[network]
    torch.manual_seed(0)
    model = get_model(key, num_classes=100, **kwargs).eval()
    inputs, outputs = {}, {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].clone()}))
        module.register_forward_hook(lambda _, args, output, name=name: outputs.update({name: output.clone()}))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    return inputs, outputs


@pytest.mark.parametrize("name", PAIRS[:3] + PAIRS[4:])  # every network is in one of them
def test_the_modules_of_a_pair_are_those_of_repdistiller(name):
    pair = yaml.load(BLOCKS[name], PlainLoader)["pair"]
    for side, network in zip(("student", "teacher"), name.split("_from_"), strict=True):
        inputs, outputs = inputs_and_outputs(network)
        paths = pair[f"{side}_maps"]
        maps = [outputs[path] for path in paths]
        assert [tuple(x.shape[1:3]) for x in maps] == SHAPES[network]
        assert [pair["maps"][f"stage{i + 1}"][side]["path"] for i in range(len(paths))] == paths
        assert (pair[f"{side}_map"], pair[f"{side}_channels"]) == (paths[-1], maps[-1].shape[1])
        # after the last ReLU, but for sums of Wide ResNets and linear bottlenecks
        is_linear = network.startswith(("wrn", "mobilenet"))
        assert all((x < 0).any() if is_linear else (x >= 0).all() for x in maps)
        vector = outputs[pair[f"{side}_pool"]].flatten(1)
        assert torch.equal(vector, inputs[pair[f"{side}_linear"]]) and vector.shape[1] == pair[f"{side}_width"]
        if side == "teacher":
            # AB's: what is positive before the ReLU
            for path, x in zip(pair["signs"], maps, strict=True):
                assert torch.equal(inputs[path] if network.startswith("wrn") else outputs[path], x)
            continue
        for i, x in enumerate(maps):
            connector, regressor = pair["connectors"][f"stage{i + 1}"], pair["regressors"][f"stage{i + 1}"]
            assert regressor["path"] == f"student_model.{paths[i]}"
            path = connector["path"].removeprefix("model.")
            before = (inputs if connector["io"] == "input" else outputs)[path]
            if network.startswith("wrn"):
                assert torch.equal(inputs[path], x)
            elif network in ("mobilenetv2", "shufflenetv2"):
                assert torch.equal(before, x)
            else:
                assert (before < 0).any() and torch.equal(before.relu(), x)
    weights = [block["weight"] for block in pair["connector_pairs"].values()]
    assert weights == [0.000375, 0.00075, 0.0015, 0.003][-len(weights) :]
    assert pair["factor_channels"] == pair["teacher_channels"] // 2
    assert (pair["hint"], pair["regressor"]["path"]) == (pair["teacher_maps"][1], f"model.{pair['student_maps'][1]}")


def with_pair(path, name, folder):
    """The file with the pair's block of the README in place of its own."""
    text, count = re.subn(
        r"^pair:.*?(?=^datasets:)", lambda _: BLOCKS[name] + "\n", (CONFIGS / path).read_text(), flags=re.M | re.S
    )
    assert count == 1
    file = folder / Path(path).name
    file.write_text(text)
    return file


# Every method with a pair of the same style, those that read modules with one of different styles, and every pair at
# least once; `python tests/test_host_configs.py` tries all of them.
MAP_METHODS = ("fitnet", "at", "vid", "ab", "ft", "nst", "hsakd")
VECTOR_METHODS = ("rkd", "pkt", "crd", "cc", "sskd")
SAME, OTHER = PAIRS[:7], PAIRS[7:]
SAMPLE = [(host, SAME[(i + 3) % len(SAME)]) for i, host in enumerate(HOSTS)]
SAMPLE += [(host, OTHER[(i + 5) % len(OTHER)]) for i, host in enumerate((*MAP_METHODS, *VECTOR_METHODS))]


def check_pair(path, name, folder):
    config = load_config(with_pair(path, name, folder))
    student, teacher = name.split("_from_")
    models = config["models"]
    assert models["student_model"]["key"] == NETWORKS[student][0]
    assert models["teacher_model"]["key"] == NETWORKS[teacher][0]
    assert models["student_model"]["dst_ckpt"].endswith(f"-{name}.pt")
    box = make_box(config)
    before = [parameter.detach().clone() for parameter in box.org_student_model.parameters()]
    losses = list(train(box, max_steps=1))
    assert len(losses) == len(stages(config)) and all(torch.isfinite(loss) for loss in losses)
    assert any(not torch.equal(old, new) for old, new in zip(before, box.org_student_model.parameters(), strict=True))


@pytest.fixture
def whole_networks(tmp_path, monkeypatch):
    """Networks as they are, for the widths of a pair's modules are those of its networks."""
    monkeypatch.setattr(support, "small_model", lambda block: block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_sample_has_every_method_and_every_pair():
    hosts, pairs = zip(*SAMPLE, strict=True)
    assert set(hosts) == set(HOSTS) and set(pairs) == set(PAIRS)


@pytest.mark.parametrize(("host", "name"), SAMPLE)
def test_another_pair_trains(host, name, whole_networks):
    check_pair(f"cifar100/{host}-{PAIR}.yaml", name, whole_networks)


def test_the_teacher_of_another_pair_trains(whole_networks):
    config = load_config(with_pair(TEACHER, "mobilenetv2_from_vgg13", whole_networks))
    model = config["models"]["model"]
    assert (model["key"], model["dst_ckpt"]) == ("cifar_vgg13", "./resource/ckpt/cifar100/ce-vgg13.pt")
    assert all(torch.isfinite(loss) for loss in train(make_box(config)))


# what RepDistiller, SSKD and HSAKD have beside the weights


def wrapper_of(host, side, stage="train"):
    block = stages(read_config(f"cifar100/{host}-{PAIR}.yaml"))[stage][side]
    return block["auxiliary_model_wrapper"]["kwargs"]


def test_auxiliary_modules_are_the_published_ones():
    for host in ("cc", "crd"):
        for side in ("teacher", "student"):
            assert wrapper_of(host, side)["linear_kwargs"] == {"in_features": 64, "out_features": 128, "bias": True}
            assert wrapper_of(host, side).get("power") == (2 if host == "crd" else None)
    paraphraser = wrapper_of("ft", "teacher", "train.stage1")["paraphraser_kwargs"]
    assert (paraphraser["k"], paraphraser["num_input_channels"], paraphraser["uses_bn"]) == (0.5, 64, False)
    assert wrapper_of("ft", "teacher", "train.stage2")["paraphraser_kwargs"] == paraphraser
    translator = wrapper_of("ft", "student", "train.stage2")["translator_kwargs"]
    assert (translator["num_input_channels"], translator["num_output_channels"]) == (64, 32)
    assert translator["uses_bn"] is True
    for stage in ("train.stage1", "train.stage2"):
        heads = wrapper_of("hsakd", "teacher", stage)
        assert [(block["channels"], block["num_blocks"]) for block in heads["stages"]] == [(16, 9), (32, 9), (64, 9)]
    assert wrapper_of("vid", "student")["regressors"]["stage1"]["kwargs"]["init_pred_var"] == 5.0
    for host, option in (("sskd", "freezes_ss_module"), ("hsakd", "freezes_heads")):
        frozen = [wrapper_of(host, "teacher", f"train.stage{i}").get(option, False) for i in (1, 2)]
        assert frozen == [False, True]


@pytest.mark.parametrize("host", HOSTS)
def test_training_images_are_the_published_ones(host):
    config = read_config(f"cifar100/{host}-{PAIR}.yaml")
    [stage, *_] = stages(config).values()
    block = stage["train_data_loader"].get("dataset_wrapper", {})
    wrapper = block.get("key")
    if host == "crd":
        # negatives are all images of other classes, the positive is the image itself
        assert block["kwargs"] == {"num_negative_samples": 16384, "mode": "exact", "ratio": 1.0}
    expected = {"crd": "CRDDatasetWrapper", "sskd": "SSKDRotations", "hsakd": "FourRotations"}
    assert wrapper == expected.get(host)
    text = str(config["datasets"]["cifar100/train"])
    # SSKD flips before it turns, and crops after that: the flip is in its wrapper
    assert "RandomCrop" in text and ("RandomHorizontalFlip" in text) is (host != "sskd")
    assert "Random" not in str(config["datasets"]["cifar100/test"])


# the teacher's mode


@pytest.mark.parametrize("path", [*CIFAR])
def test_every_stage_puts_the_teacher_in_eval_mode(path):
    for stage in stages(read_config(path)).values():
        searches = adversarial_terms(stage)
        assert stage["pre_epoch_process"] == ("bind_adversarial_losses" if searches else "eval_teacher")


@pytest.mark.parametrize("host, module", [("cc", "linear"), ("hsakd", "heads"), ("crd_tald", "normalizer")])
def test_the_teacher_is_in_eval_mode_and_its_modules_are_trained(host, module, tmp_path, monkeypatch):
    """As the papers' teachers, which torchdistill has in train mode."""
    monkeypatch.chdir(tmp_path)
    box = make_box(load_config(f"cifar100/{host}-{PAIR}.yaml"))
    network, beside = box.org_teacher_model, getattr(box.teacher_model, module)
    network.train()
    running = [buffer.clone() for buffer in network.buffers()]
    before = [parameter.detach().clone() for parameter in beside.parameters()]
    next(train(box))
    assert not any(part.training for part in network.modules())
    assert all(torch.equal(old, new) for old, new in zip(running, network.buffers(), strict=True))
    assert beside.training and box.student_model.training
    assert not any(torch.equal(old, new) for old, new in zip(before, beside.parameters(), strict=True))


# X, and X with KD


@pytest.mark.parametrize("path", [path for path in CIFAR if re.search(r"^ +kd:$", (CONFIGS / path).read_text(), re.M)])
def test_kd_is_without_weight_and_16_makes_it_that_of_repdistiller(path):
    [*_, stage] = stages(read_config(path)).values()
    term = stage["criterion"]["kwargs"]["sub_terms"]["kd"]
    options = term["criterion"]["kwargs"]
    host = Path(path).name.split("-")[0].split("_")[0]
    assert (options["temperature"], options["alpha"], term["weight"]) == (
        (4.0, 0.1, 1.0) if host == "kd" else (4.0, 0.0, 0.0)
    )


@pytest.mark.parametrize("host", ["pkt", "cc", "fitnet"])
def test_the_term_kd_is_the_divergence(host, whole_networks):
    values, logits = {}, {}
    for weight in (0.0, 16.0):
        box = make_box(load_config(f"cifar100/{host}-{PAIR}.yaml", **{"kd.weight": weight}))
        hooks = {"student": box.org_student_model, "teacher": box.org_teacher_model}
        for side, network in hooks.items():
            network.register_forward_hook(lambda _, inputs, output, side=side: logits.update({side: output.detach()}))
        torch.manual_seed(0)
        values[weight] = next(train(box)).double()
    student, teacher = ((logits[side].double() / 4).softmax(1) for side in ("student", "teacher"))
    expected = 16 * (teacher * (teacher / student).log()).sum(1).mean()
    assert expected > 1e-3
    assert torch.allclose(values[16.0] - values[0.0], expected, rtol=1e-3)


# several processes


def trained(box):
    """The parameters that the stage trains, by side and by their module below the outermost one."""
    found = {}
    for side in ("teacher", "student"):
        network = getattr(box, f"{side}_model", None) if hasattr(box, "org_student_model") else None
        network = getattr(box, "model", None) if network is None and side == "student" else network
        for name, parameter in () if network is None else network.named_parameters():
            if parameter.requires_grad:
                first = next(part for part in name.split(".") if part != "module")
                module = first if hasattr(unwrapped(network), "secondary_forward") else "network"
                found.setdefault(f"{side} {module}", []).append(parameter)
    return found


def unwrapped(network):
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def flat(parameters):
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def train_in_one_of_two(path, where):
    """Two steps a stage: what was trained, and whether it has changed and is the same in both processes."""
    torch.manual_seed(0)
    # shallower teachers, whose maps are those of the deep ones
    shallow = {"resnet56": "resnet20", "resnet34": "resnet18"}
    fewer = {"num_particles": 2} if "_tald" in path else {}
    fewer |= {"num_blocks": 1} if "hsakd" in path else {}
    config = load_config(path, images=8, batch_size=2, **fewer)
    for block in config["models"].values():
        block["key"] = shallow.get(block["key"], block["key"])
    import_dependencies(config.get("dependencies"))
    models = config["models"]
    teacher = build_model(models["teacher_model"], "teacher_model", where) if "teacher_model" in models else None
    name = "student_model" if "student_model" in models else "model"
    if teacher is not None:
        as_if_trained(teacher, config)
    box = build_box(teacher, build_model(models[name], name, where), config, where, 1)
    found = {}
    for epoch in range(box.num_epochs):
        stage = stage_path(box)
        before = {part: flat(parameters) for part, parameters in trained(box).items()}
        box.pre_epoch_process(epoch=epoch)
        losses = []
        for images, targets, supp_dict in box.train_data_loader:
            loss = box.forward_process(images, targets, supp_dict)
            box.post_forward_process(loss=loss)
            losses.append(loss.item())
        after = {part: flat(parameters) for part, parameters in trained(box).items()}
        for part, values in after.items():
            both = [torch.empty_like(values) for _ in range(2)]
            dist.all_gather(both, values)
            found[f"{stage} {part}"] = {"equal": torch.equal(*both), "changed": not torch.equal(values, before[part])}
        found[f"{stage} losses"] = losses
        box.post_epoch_process()
        if stage_path(box) != stage:
            wrap_student(box, where)
    return found


def work(rank, folder, paths):
    torch.set_num_threads(1)
    support.MAX_SIZE = 32
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    with place("cpu", dist_url=f"file://{folder}/init") as where:
        for path in paths:
            try:
                found = train_in_one_of_two(path, where)
            except Exception as error:  # of one file, and of both processes
                found = {"error": f"{type(error).__name__}: {error}"}
            Path(folder, f"{path.replace('/', '-')}-{rank}.json").write_text(json.dumps(found))
            dist.barrier()


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """What :func:`train_in_one_of_two` finds in each process, from one pair of processes for all files."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        in_two_processes(work, folder, DISTRIBUTED, seconds=400)
    return lambda path, rank: json.loads((folder / f"{path.replace('/', '-')}-{rank}.json").read_text())


DISTRIBUTED = [TEACHER, *CIFAR, *IMAGENET]


@pytest.mark.parametrize("path", DISTRIBUTED)
def test_two_processes_train_the_same_network(path, in_two):
    config = read_config(path)
    first, second = (in_two(path, rank) for rank in range(2))
    for found in (first, second):
        assert "error" not in found, found["error"]
        parts = {key: value for key, value in found.items() if not key.endswith("losses")}
        assert all(part == {"equal": True, "changed": True} for part in parts.values()), parts
        for stage_name, stage in stages(config).items():
            assert len(found[f"{stage_name} losses"]) == 2
            mine = {key.removeprefix(f"{stage_name} ") for key in parts if key.startswith(stage_name)}
            assert mine == expected_parts(stage), mine
    # they see different images
    assert first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first if key.endswith("losses"))


MODULES = {
    "Linear4CCKD": ("model", "linear"),
    "Linear4CRD": ("model", "normalizer"),
    "SSWrapper4SSKD": ("model", "ss_module"),
    "HSAKDWrapper": ("model", "heads"),
    "VariationalDistributor4VID": ("student_model", "regressor_dict"),
    "Teacher4FactorTransfer": ("teacher_model", "paraphraser"),
    "Student4FactorTransfer": ("student_model", "translator"),
    "Adapters": ("model", "adapters"),
}


def expected_parts(stage):
    """The modules that a stage trains, from its YAML."""
    expected = set()
    for side in ("teacher", "student"):
        block = stage.get(side) or (stage["model"] if side == "student" else {"requires_grad": False})
        if not block["requires_grad"]:
            continue
        wrapper = block.get("auxiliary_model_wrapper")
        names = ("network",) if wrapper is None else MODULES[wrapper["key"]]
        if wrapper is not None and wrapper["key"] == "Adapters":
            names = names if any(map(has_parameters, wrapper["kwargs"]["adapters"].values())) else names[:1]
        expected |= {f"{side} {name}" for name in names if name not in block.get("frozen_modules", ())}
    return expected


def has_parameters(adapter):
    """AB's connectors between maps of one shape have none."""
    kwargs = adapter["kwargs"]
    same = all(kwargs[f"in_{what}"] == kwargs[f"out_{what}"] for what in ("channels", "size"))
    return adapter["key"] != "ABConnector" or not same


if __name__ == "__main__":
    import tempfile

    support.small_model = lambda block: block
    for each in (path for path in CIFAR if path not in sys.argv):
        for pair in PAIRS:
            with tempfile.TemporaryDirectory() as directory:
                check_pair(each, pair, Path(directory))
                print(each, pair, flush=True)
