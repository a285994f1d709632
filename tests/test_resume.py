"""A run that was killed at any moment goes on to the very weights of one that was not."""

from __future__ import annotations

import json
import logging
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from support import CONFIGS, read_config
from test_runner import PLAIN, ROBUST_STAGED, command, write
from tiny import KD, network, tiny_box
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler
from torchdistill.optim.registry import SCHEDULER_DICT

from torchdistill_adv.checkpoints import read_checkpoint, write_checkpoint
from torchdistill_adv.cli import main
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner import experiment, run
from torchdistill_adv.runner.experiment import tell_found_modules
from torchdistill_adv.runner.plain import normal_form
from torchdistill_adv.runner.precision import Passes
from torchdistill_adv.runner.processes import Place, place
from torchdistill_adv.runner.progress import Meter
from torchdistill_adv.runner.records import as_yaml
from torchdistill_adv.runner.resume import (
    Keeper,
    Position,
    batches,
    capture,
    check_same_state,
    only_run,
    random_streams,
    restore,
    set_random_streams,
)

# images are cropped at random, and half of the features are dropped
RANDOM = PLAIN.replace(
    "transform: &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}",
    "transform: &to_tensor !import_call {key: 'torchvision.transforms.Compose', init: {kwargs: {transforms: ["
    "!import_call {key: 'torchvision.transforms.RandomCrop', init: {kwargs: {size: 8, padding: 1}}}, !import_call "
    "{key: 'torchvision.transforms.ToTensor'}]}}}",
).replace("width: 2, depth: 2}", "width: 2, depth: 2, dropout: 0.5}")
assert "RandomCrop" in RANDOM and "dropout" in RANDOM


@pytest.fixture(scope="module")
def server():
    """Starts processes that have everything imported already."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torchdistill_adv.cli"])
    return context


def train(config, folder, resume, options, kill_at=None, kill_after=None, environment=()):
    """In a process of its own: train in ``folder``.

    The process is killed at the ``kill_at``-th write to the disk, or ``kill_after`` seconds after training began.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    logging.basicConfig(filename="log", level=logging.INFO)
    if kill_at is not None:
        count = 0

        def counted(function):
            def replaced(*args):
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)

            return replaced

        # before a file is on the disk, and before it has its name
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    if kill_after is not None:
        signal.setitimer(signal.ITIMER_REAL, kill_after)  # nothing handles the signal, so it ends the process
    begun = time.monotonic()
    run(config, device="cpu", resume=resume, **options)
    Path("duration").write_text(str(time.monotonic() - begun))


def finish(process) -> None:
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail("the run hangs")


def undisturbed(server, config, folder, options) -> float:
    """Train without interruption; the seconds that it took."""
    process = server.Process(target=train, args=(config, folder, False, options))
    process.start()
    finish(process)
    assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
    return float((folder / "duration").read_text())


def differences(first, second, path=""):
    """Where two checkpoints differ, in anything but times."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        return [d for key in first if key != "seconds" for d in differences(first[key], second[key], f"{path}.{key}")]
    if isinstance(first, (list, tuple)):
        return [d for i, pair in enumerate(zip(first, second, strict=True)) for d in differences(*pair, f"{path}.{i}")]
    return [] if first == second else [f"{path}: {first!r} {second!r}"]


def assert_same_runs(first: Path, second: Path) -> None:
    """The same checkpoints and records."""
    files = [file.relative_to(first) for file in first.rglob("*.pt") if file.name != "previous.pt"]
    assert any(file.name == "last.pt" for file in files) and len(files) > 1
    for file in files:
        assert not differences(read_checkpoint(first / file), read_checkpoint(second / file)), file
    assert not list(second.rglob("*.part"))
    records = []
    for folder in (first, second):
        [file] = folder.rglob("metrics.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        timed = ("seconds", "images_per_second", "time", "eta_seconds")
        records.append([{key: value for key, value in line.items() if key not in timed} for line in lines])
    assert records[0] == records[1] and "test" in records[0][-1]


def kill_and_compare(server, config, tmp_path, options, seed, kills=3):
    """Kill a run ``kills`` times at random moments, let it finish, and compare it with an undisturbed one."""
    seconds = undisturbed(server, config, tmp_path / "a", options)
    generator = random.Random(seed)
    killed = 0
    # the last one, early, is for a machine that has become faster meanwhile
    moments = [*(generator.uniform(0.2, 0.7) * seconds for _ in range(kills)), None, 0.1 * seconds, None]
    for after in moments:
        kwargs = {"kill_after": after}
        process = server.Process(target=train, args=(config, tmp_path / "b", True, options), kwargs=kwargs)
        process.start()
        finish(process)
        killed += process.exitcode == -signal.SIGALRM
        assert process.exitcode in (0, -signal.SIGALRM), (tmp_path / "b" / "log").read_text()[-3000:]
        if process.exitcode == 0 and killed:
            break
        if process.exitcode == 0:
            shutil.rmtree(tmp_path / "b")
    assert killed
    assert_same_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name", ["random", "robust"])
def test_killed_at_random_moments(server, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / write({"random": RANDOM, "robust": ROBUST_STAGED}[name])
    kill_and_compare(server, config, tmp_path, {"seed": 5, "save_steps": 1}, seed=name)


def test_killed_between_stages(server, tmp_path):
    """A stage that writes modules for the next one."""
    overrides = {
        "train.stage1.train_data_loader.sampler.kwargs": {"num_samples": 64},
        "train.stage1.val_data_loader": {},
    }
    options = {"seed": 5, "save_steps": 1, "student_only": True, "overrides": overrides}
    kill_and_compare(server, CONFIGS / "digits/hosts/ft.yaml", tmp_path, options, "ft", kills=2)


HOSTS = sorted(path.stem for path in (CONFIGS / "digits/hosts").glob("*.yaml"))
LOSSES = ("rslad", "bss", "darwin", "smaraad_pp")


@pytest.mark.parametrize("name", [*(f"hosts/{host}" for host in HOSTS), *(f"robust/{loss}" for loss in LOSSES)])
def test_every_state_leads_to_the_same_end(tmp_path, monkeypatch, name):
    """Also where a loss has a memory, an auxiliary module is trained, or a stage ends: no state is forgotten."""
    monkeypatch.chdir(tmp_path)
    config = CONFIGS / f"digits/{name}.yaml"
    stages = read_config(config)["train"]
    first = "train.stage1" if "stage1" in stages else "train"
    overrides = {f"{first}.train_data_loader.sampler.kwargs": {"num_samples": 64}, f"{first}.val_data_loader": {}}
    overrides |= {f"train.{stage}.num_epochs": 1 for stage in stages if stage.startswith("stage")}
    if name.startswith("robust"):
        overrides |= {"train.num_epochs": 1, "models.teacher_model.src_ckpt": None, "train.robust_validation": {}}
        overrides["train.train_data_loader.kwargs.batch_size"] = 32
    moments = []
    save = Keeper.save

    def save_and_copy(self, box, *args, **kwargs):
        save(self, box, *args, **kwargs)
        moments.append(tmp_path / f"moment{len(moments)}")
        # with the auxiliary modules that there are by then
        shutil.copytree(tmp_path / "resource", moments[-1] / "resource")

    options = {"device": "cpu", "save_steps": 1, "student_only": True, "overrides": overrides}
    monkeypatch.setattr(experiment, "_test", lambda *_: {})  # takes longer than training, and no part in it
    monkeypatch.setattr(Keeper, "save", save_and_copy)
    run(config, seed=3, **options)
    monkeypatch.setattr(Keeper, "save", save)
    *earlier, end = moments
    [file] = (path.relative_to(end) for path in end.rglob("last.pt"))
    expected = read_checkpoint(end / file)
    assert expected["finished"] and len(earlier) > 2
    # the first steps of the first and of the last stage
    for moment in {earlier[1], earlier[-2]}:
        monkeypatch.chdir(moment)
        run(config, resume=True, **options)
        assert not differences(expected, read_checkpoint(file))


def test_everything_that_counts_steps(tmp_path, monkeypatch):
    """A schedule by steps, Adam's moments, gradients of four batches, and the scale of the loss."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    by_epochs = "scheduler: {key: 'MultiStepLR', kwargs: {milestones: [1, 2], gamma: 0.1}}"
    by_steps = "scheduler: {key: 'OneCycleLR', kwargs: {max_lr: 0.02, total_steps: 30}, scheduling_step: 1}"
    config = Path(
        write(RANDOM, (by_epochs, by_steps), ("'SGD', kwargs: {lr: 0.2, momentum: 0.9}", "'AdamW', kwargs: {lr: 0.01}"))
    ).resolve()
    options = {"device": "cpu", "amp": "fp16", "grad_accum_step": 4, "save_steps": 1, "student_only": True}
    save = Keeper.save

    def save_and_copy(self, box, position, **rest):
        save(self, box, position, **rest)
        if (position.epoch, position.meter.steps) == (1, 3):
            shutil.copytree(tmp_path / "a", tmp_path / "b")

    monkeypatch.setattr(Keeper, "save", save_and_copy)
    run(config, seed=3, **options)
    monkeypatch.setattr(Keeper, "save", save)
    before = read_checkpoint(tmp_path / "b/student/last.pt")
    assert before["gradients"] and before["passes"] and before["lr"] != before["optimizer"]["param_groups"][0]["lr"]
    monkeypatch.chdir(tmp_path / "b")
    run(config, resume=True, **options)
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_killed_while_it_writes(server, tmp_path, monkeypatch):
    """At every kind of write to the disk, one after another."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / write(ROBUST_STAGED)
    options = {"seed": 2, "save_steps": 2}
    undisturbed(server, config, tmp_path / "a", options)
    generator = random.Random(0)
    for attempt in range(60):
        kill_at = generator.randint(1, 9)
        process = server.Process(target=train, args=(config, tmp_path / "b", attempt > 0, options, kill_at))
        process.start()
        finish(process)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "b" / "log").read_text()[-3000:]
    assert attempt > 5
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_killed_processes(server, tmp_path, monkeypatch):
    """Two processes, both killed, each with random streams of its own."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / write(RANDOM)
    options = {"seed": 4, "save_steps": 1}

    def start(folder, resume, port):
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        both = []
        for rank in ("0", "1"):
            environment = {**common, "RANK": rank, "LOCAL_RANK": rank}
            args = (config, folder, resume, options)
            both.append(server.Process(target=train, args=args, kwargs={"environment": environment}))
            both[-1].start()
        return both

    port = random.Random(os.getpid()).randint(20000, 40000)
    first = start(tmp_path / "a", False, port)
    for process in first:
        finish(process)
        assert process.exitcode == 0, (tmp_path / "a" / "log").read_text()[-3000:]
    second = start(tmp_path / "b", False, port + 1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "b/student/previous.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in second:
        process.kill()
        process.join()
    state = read_checkpoint(tmp_path / "b/student/previous.pt")
    assert not state["finished"] and len(state["processes"]) == 2
    for process in start(tmp_path / "b", True, port + 2):
        finish(process)
        assert process.exitcode == 0, (tmp_path / "b" / "log").read_text()[-3000:]
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_command(tmp_path, monkeypatch):
    """As a user has it: the terminal is closed, the command is given again."""
    monkeypatch.chdir(tmp_path)
    write(PLAIN, ("num_epochs: 2", "num_epochs: 8"))
    args = command("train", "--config", "config.yaml", "--device", "cpu", "--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not Path("student/previous.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = read_checkpoint("student/last.pt" if Path("student/last.pt").exists() else "student/previous.pt")
    assert before["epoch"] < 8
    # --seed is drawn where it is not given, and the run that goes on has the same
    done = subprocess.run([*args, "--run_log", "log"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"going on from 'student/last.pt': epoch {before['epoch']}, step 0" in done.stderr or before["epoch"] == 0
    after = read_checkpoint("student/last.pt")
    assert after["finished"] and after["identity"]["seed"] == before["identity"]["seed"]
    assert json.loads(Path("student/run.json").read_text())["seed"] == before["identity"]["seed"]
    epochs = [json.loads(line).get("epoch") for line in Path("student/metrics.jsonl").read_text().splitlines()]
    assert epochs == [*range(8), None]


# what is refused, and what is used instead


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run that ended after two of the six batches of its second epoch."""
    monkeypatch.chdir(tmp_path)
    write(PLAIN, ("tald:\n", "tald: # after some steps\n"))
    with monkeypatch.context() as patch:
        steps = []

        def stop(*args, **kwargs):
            steps.append(1)
            if len(steps) == 9:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        from torchdistill_adv.losses import TALDLoss

        original = TALDLoss.loss
        patch.setattr(TALDLoss, "loss", stop)
        assert main(["train", "--config", "config.yaml", "--device", "cpu", "--seed", "1", "--save_steps", "1"]) == 130
    return Path("student")


def resume(*args: str) -> int:
    return main(["train", "--config", "config.yaml", "--device", "cpu", "--resume", *args])


def test_damaged_file(interrupted, caplog):
    caplog.set_level(logging.INFO)
    file = interrupted / "last.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert resume() == 0
    assert "found 'student/last.pt', which cannot be read as tensors" in caplog.text
    assert "going on from 'student/previous.pt': epoch 1, step 1" in caplog.text


class Program:
    pass


@pytest.mark.parametrize("content", ["text", "object", "weights", "another version"])
def test_foreign_files(interrupted, capsys, content):
    for name in ("last.pt", "previous.pt"):
        if content == "another version":
            write_checkpoint({**read_checkpoint(interrupted / name), "format": 0}, interrupted / name)
        elif content == "text":
            (interrupted / name).write_text("not a checkpoint")
        else:
            torch.save({"model": Program() if content == "object" else {}}, interrupted / name)
    before = (interrupted / "last.pt").read_bytes()
    assert resume() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume: found 'student/last.pt', which " in error
    assert "found 'student/previous.pt', which " in error and "Remove it to begin anew" in error
    assert (interrupted / "last.pt").read_bytes() == before


def test_other_run(interrupted, capsys):
    def refused(*args: str) -> str:
        assert resume(*args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "error: --resume: found the state of a run with another " in error
        return error

    assert "another seed: 1 instead of 2" in refused("--seed", "2")
    assert "another adjust_lr: False instead of True" in refused("-adjust_lr")
    text = Path("config.yaml").read_text()
    Path("config.yaml").write_text(text.replace("lr: 0.2", "lr: 0.3"))
    assert "another config: 'lr: 0.2' instead of 'lr: 0.3'" in refused()
    Path("config.yaml").write_text(f"{text}\nnote: 1\n")
    assert "another config: 'nothing' instead of 'note: 1'" in refused()
    Path("config.yaml").write_text(text)
    assert "another --set: '[]' instead of " in (error := refused("--set", "train.log_freq=7"))
    assert "('train.log_freq', 7)" in error
    assert "another channels_last: False instead of True" in refused("--channels_last")
    # comments and layout are the user's
    layout = "optimizer: {key: 'SGD', kwargs: {lr: 0.2, momentum: 0.9}}"
    other = 'optimizer:\n    key: SGD\n    kwargs:\n      # the rate\n      "lr": 0.2\n      momentum: 0.9'
    assert layout in text
    Path("config.yaml").write_text("# a new comment\n" + text.replace(layout, other))
    assert resume() == 0


def test_nothing_that_was_saved_is_lost(interrupted, capsys):
    """Beginning anew over a run that could go on is refused; over a finished one it is not."""
    files = {file: file.read_bytes() for file in (*interrupted.iterdir(), Path("student.pt"))}
    again = ["train", "--config", "config.yaml", "--device", "cpu"]
    assert main(again) == 2
    error = capsys.readouterr().err
    assert "error: student: found a run that was interrupted at epoch 1, step 2; write --resume" in error
    assert {file: file.read_bytes() for file in files} == files
    assert main([*again, "--resume", "--start_epoch", "1"]) == 2
    assert resume() == 0
    assert main(again) == 0


def test_finished_run_is_only_tested(interrupted, caplog):
    assert resume() == 0
    assert not (interrupted / "previous.pt").exists()
    before = Path("student.pt").stat().st_mtime_ns
    result = run("config.yaml", device="cpu", resume=True)
    assert Path("student.pt").stat().st_mtime_ns == before
    assert [record["epoch"] for record in result["epochs"]] == [0, 1] and result["test"]


def test_resume_without_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(PLAIN, ("num_epochs: 2", "num_epochs: 1"))
    assert resume() == 0 and Path("student.pt").exists()


@pytest.mark.parametrize("name", ["run.lock", "config.yaml", "metrics.jsonl.part"])
def test_directory_that_cannot_be_written(interrupted, capsys, name):
    """Each of the files that are written before training goes on; the state stays."""
    (interrupted / name).unlink(missing_ok=True)
    (interrupted / name).mkdir()
    assert resume() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "models.student_model.dst_ckpt: found 'student.pt', where nothing can be written: Is a directory" in error
    (interrupted / name).rmdir()
    assert resume() == 0


def test_finished_run_without_its_student(interrupted, capsys):
    """Else the test would be of new weights."""
    assert resume() == 0
    Path("student.pt").rename("moved.pt")
    assert resume() == 2
    assert "error: --resume: found a finished run, and no student of it at 'student.pt'" in capsys.readouterr().err
    Path("moved.pt").rename("student.pt")
    assert resume() == 0


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_save_steps_of_nothing(tmp_path, capsys, steps):
    assert main(["train", "--config", str(tmp_path / "none.yaml"), "--save_steps", steps]) == 2
    assert f"error: --save_steps: found {steps}; write 1 or more" in capsys.readouterr().err


def test_data_set_that_became_smaller():
    loader = DataLoader(torch.arange(8), 4)
    position = Position(0, Meter(steps=3))
    with pytest.raises(ConfigError, match="after 3 steps of an epoch, and 2 batches in it now"):
        list(batches(loader, position, torch.device("cpu")))


def test_configuration_that_came_as_a_dictionary():
    """Its objects are at other addresses in the next process, wherever a line of text ends."""
    for length in range(90):
        texts = [as_yaml({"x": {"collate_fn": type("F" * length, (), {})(), "y": [object()]}}) for _ in range(3)]
        assert len({normal_form(text) for text in texts}) == 1


def go_on_alone(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with place("cpu") as where:
        state = {"epoch": 2, "processes": [{"meter": {"steps": 3}}]}
        check_same_state(state, where)
        try:
            check_same_state(state if rank == 0 else None, where)
        except ConfigError as error:
            expected = "different states in the processes (epoch 2, step 3; none); write a dst_ckpt in a folder that"
            sys.exit(7 if expected in str(error) else 1)


def test_machines_that_share_no_folder(server):
    """The second one would begin, and the first one go on."""
    port = random.Random(os.getpid()).randint(40000, 50000)
    both = [server.Process(target=go_on_alone, args=(rank, port)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        finish(process)
    assert [process.exitcode for process in both] == [7, 7]


def test_workers_outlive_a_run_that_was_killed(tmp_path):
    """They hold its lock for a while, with the older versions of filelock."""
    with only_run(tmp_path):
        pass
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "run.lock")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with only_run(tmp_path):
        assert child.wait() == 0


HOLD_LOCK = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(2)
"""


def test_two_runs_in_one_directory(interrupted, capsys, monkeypatch):
    monkeypatch.setattr("torchdistill_adv.runner.resume.PATIENCE", 0)
    with FileLock(interrupted / "run.lock"):
        assert resume() == 2
    assert "error: student: found another run that is being trained here" in capsys.readouterr().err
    assert resume() == 0


def write_on_full_disk(folder) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write_checkpoint({"x": torch.zeros(100_000)}, "file.pt", "before.pt")
    except OSError:
        sys.exit(7)


def test_full_disk_leaves_what_was_there(server, tmp_path):
    write_checkpoint({"x": torch.ones(2)}, tmp_path / "file.pt")
    process = server.Process(target=write_on_full_disk, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert [file.name for file in tmp_path.iterdir()] == ["file.pt"]
    assert read_checkpoint(tmp_path / "file.pt")["x"].sum() == 2


def train_on_full_disk(folder) -> None:
    os.chdir(folder)
    logging.basicConfig(filename="log", level=logging.INFO)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)
    shutil.copytree("student", "kept")
    # enough for the log and the student, not for the state of the run
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path("student.pt").stat().st_size + 15_000,) * 2)
    run("config.yaml", device="cpu", resume=True, save_steps=1)


def test_full_disk_does_not_end_training(server, interrupted):
    process = server.Process(target=train_on_full_disk, args=(Path.cwd(),))
    process.start()
    finish(process)
    assert process.exitcode == 0, Path("log").read_text()[-3000:]
    assert "'student/last.pt' was not saved, and training goes on" in Path("log").read_text()
    for name in ("last.pt", "previous.pt"):
        assert (interrupted / name).read_bytes() == (Path("kept") / name).read_bytes()
    assert resume() == 0


def test_buffers_that_no_state_dict_has_go_on():
    """Such as a memory that a network keeps for itself."""

    def box_with(value: float):
        student = network(1)
        student.register_buffer("memory", torch.full((2,), value), persistent=False)
        return tiny_box({"kd": KD}, student=student), student

    where = Place(torch.device("cpu"))
    passes = Passes(where, None, False, False)
    state = capture(box_with(3.0)[0], Position(0), passes, where)
    box, student = box_with(0.0)
    restore(box, state, passes, where)
    assert student.memory.tolist() == [3.0, 3.0]


# random streams and batches


class Noisy(Dataset):
    """Images whose augmentation draws from every global stream."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.tensor([index, float(torch.rand(())), random.random(), np.random.rand()])


LOADERS = {
    "in this process": lambda data: DataLoader(data, 4, shuffle=True),
    "workers": lambda data: DataLoader(data, 4, shuffle=True, num_workers=2),
    "persistent workers": lambda data: DataLoader(data, 4, shuffle=True, num_workers=2, persistent_workers=True),
    "a generator": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, generator=torch.Generator())),
    "a loader's generator": lambda data: DataLoader(data, 4, shuffle=True, generator=torch.Generator()),
    "weights": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler(torch.arange(1.0, 24), 23)),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("step", [0, 1, 4])
def test_batches_of_the_rest_of_an_epoch(name, step):
    cpu = torch.device("cpu")

    def epochs(loader, position, count):
        found = []
        for _ in range(count):
            for batch in batches(loader, position, cpu):
                position.meter.steps += 1
                found.append((batch, torch.rand(3)))  # training draws, too
            position = Position(position.epoch + 1)
        return found

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    loader = LOADERS[name](Noisy())
    epochs(loader, Position(0), 1)
    begin = random_streams(cpu, loader)
    iterator = batches(loader, Position(1), cpu)
    seen = [(next(iterator), torch.rand(3)) for _ in range(step)]
    now = random_streams(cpu, loader)
    seen += [(batch, torch.rand(3)) for batch in iterator]
    seen += epochs(loader, Position(2), 1)

    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    loader = LOADERS[name](Noisy())
    position = Position(1, Meter(steps=step), streams=begin, streams_now=now if step else None)
    set_random_streams(begin, cpu, loader)
    again = epochs(loader, position, 2)
    assert len(again) == 12 - step
    for (batch, noise), (other, other_noise) in zip(seen[step:], again, strict=True):
        assert torch.equal(batch, other) and torch.equal(noise, other_noise)


def test_random_streams_can_be_read_back(tmp_path):
    cpu = torch.device("cpu")
    random.gauss(0, 1), np.random.randn()  # both keep a second number for the next call
    torch.randn(3)
    write_checkpoint(random_streams(cpu), tmp_path / "streams.pt")

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), *torch.randn(3).tolist()

    expected = draw()
    draw()
    set_random_streams(read_checkpoint(tmp_path / "streams.pt"), cpu)
    assert draw() == expected
    seed = torch.initial_seed()
    torch.manual_seed(seed + 1)
    set_random_streams(read_checkpoint(tmp_path / "streams.pt"), cpu)
    assert torch.initial_seed() == seed  # the noise of the adversarial terms is derived from it


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 2, 3]},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
    "ReduceLROnPlateau": {"patience": 1},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "PolynomialLR": {"total_iters": 4},
    "LinearLR": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_can_be_read_back(tmp_path, name):
    def make():
        optimizer = SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
        return optimizer, getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name])

    def step(optimizer, scheduler):
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        return optimizer.param_groups[0]["lr"]

    optimizer, scheduler = make()
    for _ in range(3):
        step(optimizer, scheduler)
    write_checkpoint([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    other, other_scheduler = make()
    saved, saved_scheduler = read_checkpoint(tmp_path / "state.pt")
    other.load_state_dict(saved)
    other_scheduler.load_state_dict(saved_scheduler)
    assert [step(other, other_scheduler) for _ in range(4)] == [step(optimizer, scheduler) for _ in range(4)]


def test_gradients_between_steps_of_the_optimizer(server, tmp_path, monkeypatch):
    """Six batches an epoch and a step every four: gradients are kept over the end of an epoch."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / write(
        PLAIN, ("  num_epochs: 2", "  num_epochs: 3"), ("{key: 'SGD', ", "{key: 'SGD', grad_accum_step: 4, ")
    )
    options = {"seed": 5, "save_steps": 1}
    undisturbed(server, config, tmp_path / "a", options)
    gradients = 0
    for _ in range(10):
        process = server.Process(target=train, args=(config, tmp_path / "b", True, options, 12))
        process.start()
        finish(process)
        gradients += bool(read_checkpoint(tmp_path / "b/student/last.pt")["gradients"])
        if process.exitcode == 0:
            break
    assert gradients > 1
    assert_same_runs(tmp_path / "a", tmp_path / "b")


class Unreadable(lr_scheduler.StepLR):
    """Keeps something that only code can read back."""

    def state_dict(self):
        return {**super().state_dict(), "program": Program()}


def test_a_state_that_cannot_be_read_back_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SCHEDULER_DICT, "Unreadable", Unreadable)
    write(PLAIN, ("'MultiStepLR', kwargs: {milestones: [1, 2], ", "'Unreadable', kwargs: {step_size: 1, "))
    with pytest.raises(ConfigError, match=r"found 'student/last\.pt', which cannot be read as tensors") as error:
        run("config.yaml", device="cpu")
    assert error.value.path == "train" and not Path("student.pt").exists()


def test_modules_of_an_earlier_run_are_told(tmp_path, caplog):
    (tmp_path / "old.pt").write_text("")
    wrapper = {"key": "SSWrapper4SSKD", "kwargs": {"ss_module_ckpt": str(tmp_path / "old.pt"), "other_ckpt": "no.pt"}}
    tell_found_modules({"stage1": {"teacher": {"auxiliary_model_wrapper": wrapper}, "student": {}}})
    [warning] = [record.getMessage() for record in caplog.records]
    path = "train.stage1.teacher.auxiliary_model_wrapper.kwargs.ss_module_ckpt"
    assert warning.startswith(f"{path}: '{tmp_path / 'old.pt'}' is there already")


def test_other_networks_are_refused(interrupted):
    state = read_checkpoint(interrupted / "last.pt")
    for name, module in state["modules"].items():
        state["modules"][name] = {f"other.{key}": value for key, value in module.items()}
    write_checkpoint(state, interrupted / "last.pt")
    with pytest.raises(ConfigError, match="found the state of other networks"):
        run("config.yaml", device="cpu", resume=True)
