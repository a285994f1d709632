"""Several processes: what they share, what is each one's own, how they start, and how they end together."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DataParallel
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

sys.path.insert(0, str(Path(__file__).parent))
from contract import LOSSES
from support import CONFIGS, load_config
from test_distributed import in_two_processes
from test_runner import PLAIN
from tiny import KD, images, leave_process_group, network, sharp, tald, tiny_box, train_config

from torchdistill_adv.binding import Binding
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner import run
from torchdistill_adv.runner.building import build_box, wrap_student
from torchdistill_adv.runner.processes import CPUDeviceIds, DistributedRandomSampler, Place, place

try:
    from accelerate import Accelerator

    import torchdistill_adv.accelerate  # noqa: F401
except ImportError:
    Accelerator = None

HOSTS = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in (CONFIGS / "digits" / "hosts").glob("*.yaml"))
TALD = "digits/kd_tald"
NUM_IMAGES = 15
TWO = Place(torch.device("cpu"), CPUDeviceIds(), True, 2)


def as_one_of_two(rank: int, port: int) -> None:
    """What a launcher tells a process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


# whole runs in two processes, one after the other


def trained(box) -> list[torch.Tensor]:
    return [p.detach().clone() for group in box.optimizer.param_groups for p in group["params"]]


def runs(folder: str):
    """What whole runs leave, one after the other in the same two processes."""
    os.chdir(folder)
    found = {}
    clean, forward, noise_for = DistillationBox.clean_modules, DistillationBox.forward_process, Binding.noise_for

    def end_of_stage(box):
        found[name]["trained"].append(trained(box))
        clean(box)

    def step(box, *args, **kwargs):
        found[name]["shares"][box.adversarial_binding.epoch] = list(box.train_data_loader.sampler)
        return forward(box, *args, **kwargs)

    def noise(binding, *args):
        found[name]["noise"].append(noise_for(binding, *args).uniform((4,)))
        return noise_for(binding, *args)

    DistillationBox.clean_modules = end_of_stage
    for name in [*HOSTS, TALD, "again"]:
        found[name] = {"trained": [], "shares": {}, "noise": []}
        options = {"num_epochs": 2} if name not in HOSTS else {}
        config = load_config(f"{TALD if name == 'again' else name}.yaml", images=NUM_IMAGES, **options)
        if name not in HOSTS:
            DistillationBox.forward_process, Binding.noise_for = step, noise
        result = run(config, seed=1, device="cpu", overrides={"models.student_model.dst_ckpt": f"{name}.pt"})
        found[name] |= {"result": result, "after": torch.rand(4)}
    DistillationBox.clean_modules, DistillationBox.forward_process, Binding.noise_for = clean, forward, noise_for
    return found


def accelerated(rank: int):
    """What a student learns with an Accelerator, and without one, on images of the process's own."""
    accelerator = Accelerator(cpu=True)
    weights = []
    for where, common in ((None, (False, 1, accelerator)), (TWO, (True, 1))):
        config = train_config({"kd": KD, "tald": tald(1.0)})
        student = network(2)
        box = get_distillation_box(
            network(1), student, {"data": [images(6)]}, config, accelerator.device, None, *common
        )
        if where is not None:
            wrap_student(box, where)
        torch.manual_seed(rank)
        box.pre_epoch_process(epoch=0)
        for seed in range(2):
            x, y = images(6, seed=10 * rank + seed)
            box.post_forward_process(loss=box.forward_process(x, y, {}))
        weights.append([p.detach().clone() for p in student.parameters()])
    leave_process_group()
    return weights


def work(rank: int, folder: str, port: int) -> None:
    as_one_of_two(rank, port)
    found = steps(rank), runs(folder), accelerated(rank) if Accelerator else None
    torch.save(found, f"{folder}/found-{rank}.pt")


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(work, folder, free_port())
    return folder, [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def found(of_both):
    folder, both = of_both
    return folder, [of_runs for _, of_runs, _ in both]


@pytest.fixture(scope="module")
def steps_of_two(of_both):
    return [of_steps for of_steps, _, _ in of_both[1]]


@pytest.mark.parametrize("name", [*HOSTS, TALD])
def test_all_that_is_trained_is_the_same_in_both_processes(found, name):
    """Of the student, of the teacher's paraphraser and head, of every auxiliary module, at the end of every stage."""
    first, second = (each[name]["trained"] for each in found[1])
    assert len(first) == len(second) == (2 if name.endswith(("ft", "sskd", "pad")) else 1)
    for mine, others in zip(first, second, strict=True):
        assert mine and all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def test_a_run_repeats_bit_for_bit(found):
    for each in found[1]:
        a, b = (each[name]["trained"][0] for name in (TALD, "again"))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_noise_and_random_streams_differ_by_process(found):
    mine, others = (each[TALD] for each in found[1])
    assert len(mine["noise"]) == len(others["noise"]) >= 4
    assert not any(torch.equal(a, b) for a in mine["noise"] for b in others["noise"])
    assert not torch.equal(mine["after"], others["after"])


def test_each_epoch_shares_all_images_anew(found):
    mine, others = (each[TALD]["shares"] for each in found[1])
    for epoch in range(2):
        # an odd number of images: one of them is in both shares
        assert len(mine[epoch]) == len(others[epoch]) == (NUM_IMAGES + 1) // 2
        assert set(mine[epoch]) | set(others[epoch]) == set(range(NUM_IMAGES))
    assert mine[0] != mine[1]


def test_metrics_are_those_of_all_processes(found):
    folder, (mine, others) = found
    assert [r["validation"] for r in mine[TALD]["result"]["epochs"]] == [
        r["validation"] for r in others[TALD]["result"]["epochs"]
    ]
    assert [r["loss"] for r in mine[TALD]["result"]["epochs"]] == [r["loss"] for r in others[TALD]["result"]["epochs"]]
    lines = [json.loads(line) for line in (folder / TALD / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[-1]["test"] == mine[TALD]["result"]["test"]
    # measured by one process alone, each of the odd number of images counted once
    overrides = {"models.student_model.dst_ckpt": str(folder / TALD) + ".pt"}
    config = load_config(f"{TALD}.yaml", images=NUM_IMAGES)
    alone = run(config, test_only=True, seed=1, device="cpu", overrides=overrides)
    assert alone["test"] == mine[TALD]["result"]["test"]


# steps in two processes


class Everybody(torch.autograd.Function):
    """Waits for the other process, forward and backward, as SyncBatchNorm does, which does not run on CPUs."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(torch.zeros(1))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(torch.zeros(1))
        return gradient


class WaitsForOthers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()):
            return x
        self.calls["forward"] += 1
        x.register_hook(lambda gradient: self.calls.update(["backward"]))
        return Everybody.apply(x)


def bss_step(rank: int, with_samples: tuple[bool, bool]):
    """Passes and gradient of a BSS step of a process that has base samples or has none."""
    teacher = sharp(2, bn=False)
    student = nn.Sequential(copy.deepcopy(teacher), WaitsForOthers())
    box = tiny_box({"bss": LOSSES["BSSLoss"]}, student=student, teacher=teacher, num_epochs=4)
    box.pre_epoch_process(epoch=0)
    x, y = images(6, seed=rank)
    y = teacher(x).argmax(1)
    box.forward_process(x, y if with_samples[rank] else (y + 1) % 5, {}).backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
    return dict(student[1].calls), gradient


def darwin_step(rank: int, of_one_class: int, label_free: bool) -> str:
    """The message of a DARWIN step in which one process has a batch of one class."""
    kwargs = {**LOSSES["DARWINLoss"]["criterion"]["kwargs"], "pairing": "batch", "label_free": label_free}
    teacher = sharp(1)
    if label_free and rank == of_one_class:
        with torch.no_grad():
            teacher[-1].bias[0] = 1000
    box = tiny_box({"darwin": {"criterion": {"key": "DARWINLoss", "kwargs": kwargs}, "weight": 1.0}}, teacher=teacher)
    box.pre_epoch_process(epoch=0)
    x, y = images(6, seed=rank)
    try:
        box.forward_process(x, y * 0 if rank == of_one_class else torch.arange(6) % 5, {})
    except ConfigError as error:
        return str(error)
    return ""


def trained_teacher(rank: int, where: Place):
    """All that is trained where both networks are, after two steps on images of the process's own."""
    config = train_config({"kd": KD})
    config["teacher"]["requires_grad"] = True
    box = build_box(network(1), network(2), {"datasets": {"data": [images(6)]}, "train": config}, where, 1)
    before = trained(box)
    for seed in range(2):
        x, y = images(6, seed=10 * rank + seed)
        box.post_forward_process(loss=box.forward_process(x, y, {}))
    return before, trained(box)


def unequal(rank: int, where: Place) -> str:
    """The message where one process has two batches and the other has one."""
    data = {"data": [images(6)] * (1 + 12 * rank)}
    try:
        build_box(network(1), network(2), {"datasets": data, "train": train_config({"kd": KD})}, where, 1)
    except ConfigError as error:
        return str(error)
    return ""


def steps(rank: int):
    with place("cpu") as where:
        result = {
            "unequal": unequal(rank, where),
            "bss": [bss_step(rank, have) for have in ((True, True), (True, False), (False, True), (False, False))],
            "darwin": {(one, free): darwin_step(rank, one, free) for one in (0, 1) for free in (False, True)},
            "teacher": trained_teacher(rank, where),
        }
    with place("cpu"):
        again = torch.ones(1)
        dist.all_reduce(again)
        return {**result, "again": again}


def test_a_process_without_base_samples_makes_the_passes_of_the_others(steps_of_two):
    first, second = ([calls for calls, _ in each["bss"]] for each in steps_of_two)
    assert first == second
    twice, once = {"forward": 2, "backward": 2}, {"forward": 1, "backward": 1}
    assert first == [twice, twice, twice, once]
    # and its own gradient is that of the step without samples
    gradients = [[gradient for _, gradient in each["bss"]] for each in steps_of_two]
    assert torch.allclose(gradients[1][1], gradients[1][3]) and torch.allclose(gradients[0][2], gradients[0][3])
    assert not torch.allclose(gradients[0][0], gradients[0][3])


def test_a_batch_of_one_class_in_one_process_stops_both(steps_of_two):
    for rank, each in enumerate(steps_of_two):
        for (one, label_free), message in each["darwin"].items():
            kind = "that the teacher gives one class" if label_free else "of one class"
            elsewhere = "" if rank == one else " in another process"
            assert f"found a batch of 6 images {kind}{elsewhere}, in which" in message


def test_a_trained_teacher_is_shared_too(steps_of_two):
    (before, mine), (_, others) = (each["teacher"] for each in steps_of_two)
    assert len(mine) == 2 * len(list(network(1).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, mine, strict=True))


def test_an_epoch_of_unequal_lengths_stops_both(steps_of_two):
    """Rather than let one wait for the other's gradients."""
    for each in steps_of_two:
        assert "train.train_data_loader: found 1, 2 batches an epoch in the 2 processes" in each["unequal"]


def test_processes_meet_a_second_time(steps_of_two):
    assert all(each["again"].item() == 2 for each in steps_of_two)


@pytest.mark.skipif(Accelerator is None, reason="needs the extra 'accelerate'")
def test_a_box_with_an_accelerator_and_a_frozen_teacher_trains_as_one_without(of_both):
    (with_one, without), (of_other, _) = (of_accelerated for _, _, of_accelerated in of_both[1])
    for a, b, c, start in zip(with_one, without, of_other, network(2).parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and not torch.equal(a, start)


# what would not be shared


@register_auxiliary_model_wrapper
class KeepsItsHeadForItself(AuxiliaryModelWrapper):
    def __init__(self, student_model, **kwargs) -> None:
        super().__init__()
        self.student_model = student_model
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.student_model(x)


def test_an_auxiliary_module_that_each_process_would_train_for_itself_is_refused():
    config = train_config({"kd": KD})
    config["student"]["auxiliary_model_wrapper"] = {"key": "KeepsItsHeadForItself"}
    box = get_distillation_box(
        network(1), network(2), {"data": [images(6)]}, config, torch.device("cpu"), None, False, 1
    )
    with pytest.raises(ConfigError, match=r"'KeepsItsHeadForItself'.*student_model.0.weight.*wrap_if_dist") as error:
        wrap_student(box, TWO)
    assert error.value.path == "train.student.auxiliary_model_wrapper"


def test_data_parallel_is_refused():
    box = tiny_box({"kd": KD})
    box.student_model = DataParallel(box.student_model)
    with pytest.raises(ConfigError, match=r"'DataParallel'.*write 'DistributedDataParallel'") as error:
        wrap_student(box, TWO)
    assert error.value.path == "train.student.wrapper"


@given(
    length=st.integers(1, 40),
    num_samples=st.none() | st.integers(1, 90),
    replicas=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_num_samples_is_that_of_all_processes(length, num_samples, replicas, shuffle):
    options = {"num_samples": num_samples, "num_replicas": replicas, "shuffle": shuffle}
    samplers = [DistributedRandomSampler(range(length), rank=rank, **options) for rank in range(replicas)]
    shares = [list(sampler) for sampler in samplers]
    each = -(-(num_samples or length) // replicas)
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers] == [each] * replicas
    # none again before all others
    counts = Counter(i for share in shares for i in share)
    assert set(counts) <= set(range(length))
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(length)) <= 1


# how they start


@pytest.fixture
def launched(monkeypatch):
    """A function that sets what a launcher tells a process."""

    def launch(**told):
        for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, **told}.items():
            monkeypatch.setenv(name, str(value))

    return launch


@pytest.mark.parametrize("rank", [0, 1])
def test_fewer_gpus_than_processes_are_refused_in_every_process(launched, rank):
    launched(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=100, LOCAL_WORLD_SIZE=100)
    with pytest.raises(ConfigError, match=r"GPUs for 100 processes.*--nproc_per_node.*'cpu'"), place("cuda"):
        pass
    launched(RANK=99, LOCAL_RANK=99, WORLD_SIZE=100)
    with pytest.raises(ConfigError, match="GPUs for 100 processes"), place("cuda"):
        pass


def test_one_gpu_for_all_processes_is_refused(launched):
    launched(WORLD_SIZE=2)
    with pytest.raises(ConfigError, match=r"'cuda:0' with 2 processes.*write 'cuda'"), place("cuda:0"):
        pass


def test_an_environment_that_tells_half_is_refused(launched):
    launched(WORLD_SIZE=2)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR expected.*start the processes with torchrun"), place("cpu"):
        pass


def test_a_group_that_is_there_is_used_and_left(launched, tmp_path):
    launched()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        with place("cpu") as where:
            assert where.distributed and where.world_size == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_one_process_leaves_the_group_after_an_error(launched, tmp_path):
    launched()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), place("cpu", dist_url=f"file://{tmp_path}/init"):
            assert dist.is_initialized()
            raise ZeroDivisionError
        assert not dist.is_initialized()


def test_ddp_on_cpus_takes_the_ids_and_the_first_can_be_read():
    assert not CPUDeviceIds() and CPUDeviceIds()[0] == 0


# how they end

# a loss that fails in one process, in the second step
FAILS = """
import os, signal
import torch
from torch import distributed as dist, nn
from torchdistill.losses.registry import register_mid_level_loss


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("in the midst of a backward pass")


@register_mid_level_loss
class Fails(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.steps = how, 0

    def forward(self, student_io_dict, teacher_io_dict, targets, *args, **kwargs):
        self.steps += 1
        value = student_io_dict["."]["output"].sum() * 0
        if self.steps == 2 and dist.get_rank() == 1:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return value + float("nan") if self.how == "nan" else FailsInBackward.apply(value)
        return value
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def failing(folder: Path, how: str) -> None:
    folder.mkdir()
    (folder / "fails.py").write_text(FAILS)
    text = PLAIN.replace("  - name: 'torchdistill_adv'\n", "  - name: 'torchdistill_adv'\n  - name: 'fails'\n")
    block = f"        fails: {{criterion: {{key: 'Fails', kwargs: {{how: '{how}'}}}}, weight: 1.0}}\n"
    (folder / "config.yaml").write_text(text.replace("        tald:", f"{block}        tald:", 1))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit codes and standard errors of launchers, or of processes without one, all started at once."""
    base = tmp_path_factory.mktemp("ended")
    train = ("-m", "torchdistill_adv", "train", "--config", "config.yaml", "--device", "cpu")
    started = {}

    def start(name: str, how: str, launcher: tuple[str, ...] = (), **told: object) -> None:
        folder = base / how
        if not folder.exists():
            failing(folder, how)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in told.items()}}
        command = [sys.executable, *launcher, *train]
        options = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "text": True}
        with (base / f"{name}.txt").open("w") as stderr:
            started[name] = subprocess.Popen(command, stderr=stderr, **options)

    for how in ("nan", "kill"):
        start(how, how, TORCHRUN)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    for rank in range(2):
        start(f"alone-{rank}", "backward", **address, RANK=rank, LOCAL_RANK=rank)
    deadline = time.monotonic() + 150
    try:
        for process in started.values():
            process.wait(timeout=max(1, deadline - time.monotonic()))
    finally:
        for process in started.values():
            process.kill()
    return {name: (process.returncode, (base / f"{name}.txt").read_text()) for name, process in started.items()}


@pytest.mark.parametrize(
    "how, message, code",
    [
        ("nan", "rank 1: error: NonFiniteError: train: the loss is nan at epoch 0, step 1", 1),
        ("kill", "Signal 9 (SIGKILL) received", -9),
    ],
)
def test_what_fails_in_one_process_ends_all_with_its_message(ended, how, message, code):
    found, text = ended[how]
    assert found != 0 and message in text
    # torchrun's summary of what failed first has the message as well
    cause = text[text.index("Root Cause") :]
    assert message.rpartition("error: ")[2] in cause
    assert "rank      : 1 " in cause and f"exitcode  : {code} " in cause


def test_without_a_launcher_too(ended):
    """The one that fails does not wait for the other, and the other finds out."""
    (code, text), (other_code, other_text) = ended["alone-1"], ended["alone-0"]
    assert code == 1 and "torchdistill-adv: rank 1: error: RuntimeError: in the midst of a backward pass" in text
    assert other_code == 1 and "rank 0: lost another process, which failed or was killed" in other_text
