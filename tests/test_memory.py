"""Where memory runs out: what is said, and that it is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import LOSSES, PGD_2
from tiny import CE, KD, bound, images, matching, network, on_adversarial, tald, with_side
from torch import nn

from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner.memory import (
    Examples,
    Facts,
    advice,
    as_text,
    collect_facts,
    memory_advice,
    peak_memory,
    total_memory,
    wanted_bytes,
)

GIB = 2**30
KWARGS = "train.criterion.kwargs.sub_terms.tald.criterion.kwargs.adversary.kwargs"
PARTICLES = Examples(KWARGS, rows=512, num_rows=4)
PGD = Examples("pgd", rows=128)


def ways(**facts):
    """What is advised, without the numbers of the list."""
    found = advice(Facts(**{"batch_size": 128, **facts}))
    return re.split(r"; \(\d\) ", re.search(r"in this order: (?:\(1\) )?(.*?)\.(?= DARWIN|$)", found)[1])


def heads(**facts):
    return [way.split(", ")[0] for way in ways(**facts)]


def test_in_a_search_of_particles_chunks_come_first():
    assert heads(examples=(PARTICLES,), in_search=True) == [
        f"{KWARGS}.chunk_size: 128",
        "--amp bf16",
        "batch_size: 64 and --grad_accum_step 2",
        f"{KWARGS}.num_particles: 2",
    ]


def test_chunks_do_not_bound_the_pass_that_keeps_its_graph():
    assert heads(examples=(PARTICLES,)) == [
        "--amp bf16",
        "batch_size: 64 and --grad_accum_step 2",
        f"{KWARGS}.num_particles: 2",
    ]


@pytest.mark.parametrize(("before", "after"), [(None, 64), (64, 32), (3, 1), (200, 64)])
def test_chunks_become_smaller(before, after):
    examples = Examples("pgd", 128, chunk_size=before)
    assert heads(examples=(examples,), in_search=True)[0] == f"pgd.chunk_size: {after}"


@pytest.mark.parametrize("examples", [Examples("pgd", 128, takes_chunks=False), Examples("pgd", 128, chunk_size=1)])
def test_no_chunks_where_there_are_none_to_be_had(examples):
    assert heads(examples=(examples,), in_search=True) == ["--amp bf16", "batch_size: 64 and --grad_accum_step 2"]


def test_only_searches_of_more_rows_than_that_are_told():
    small = Examples("bss", 64)
    assert heads(examples=(PARTICLES, small), in_search=True)[:2] == [f"{KWARGS}.chunk_size: 128", "--amp bf16"]


def test_what_is_written_already_is_not_advised():
    assert heads(amp="fp16", grad_accum_step=4) == ["batch_size: 64 and --grad_accum_step 8"]
    assert ways(batch_size=1, amp="bf16") == ["a smaller model"]
    assert heads(batch_size=1, examples=(Examples("pgd", 1),), in_search=True) == ["--amp bf16"]


def test_numbers_are_those_of_the_error():
    text = advice(Facts(128, examples=(PARTICLES,), wanted=2 * GIB, peak=75 * GIB, total=80 * GIB))
    assert "2 GiB more were wanted, 75 GiB the peak, 80 GiB in all" in text
    assert f"128 in the host's passes, 512 in the search of 512 of {KWARGS}" in text
    assert "is not known" in advice(Facts(8)) and "wanted" not in advice(Facts(8))


def test_a_long_path_is_no_reason():
    assert "shorter path would not help" in advice(Facts(8, has_path=True))
    assert "path" not in advice(Facts(8))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB", 2 * GIB),
        ("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 79.10 GiB total capacity)", 20 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("MPS backend out of memory", None),
    ],
)
def test_what_was_wanted_is_read_from_the_message(message, expected):
    assert wanted_bytes(message) == expected


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1.02e+03 bytes"), (1536, "1.5 KiB"), (GIB, "1 GiB")]
)
def test_sizes(size, text):
    assert as_text(size) == text


def test_memory_of_the_machine():
    # PyTorch alone takes more than 32 MiB
    assert 2**25 < peak_memory(torch.device("cpu")) < total_memory(torch.device("cpu"))


class Full(nn.Module):
    """A network with no memory for more than so many rows."""

    def __init__(self, rows):
        super().__init__()
        self.network, self.rows = network(1), rows

    def forward(self, x):
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.network(x)


def failing(sub_terms, student=None, **options):
    box = bound(sub_terms, student=student, **options)
    with pytest.raises(ConfigError) as error, memory_advice(box):
        box.forward_process(*images())
    assert isinstance(error.value.__cause__, RuntimeError)
    return error.value


def test_in_the_search_of_a_box():
    error = failing({"kd": KD, "tald": tald()}, teacher=Full(6))
    assert error.path == "train.train_data_loader.kwargs.batch_size"
    assert f"(1) {KWARGS}.chunk_size: 6" in error.message and "2 GiB more were wanted" in error.message
    box = bound({"kd": KD, "tald": tald(adversary={"key": "SVGD", "kwargs": {"chunk_size": 6}})}, teacher=Full(6))
    assert torch.isfinite(box.forward_process(*images()))


def test_outside_of_searches():
    error = failing({"kd": KD, "tald": tald()}, student=Full(6))
    assert "chunk_size" not in error.message and "(1) --amp bf16" in error.message
    error = failing({"kd": KD}, student=Full(5), optimizer={"key": "SGD", "kwargs": {"lr": 1}, "grad_accum_step": 3})
    assert "batch_size: 3 and --grad_accum_step 6" in error.message and "search of" not in error.message
    assert failing({"ce": CE}, student=Full(5), teacher=None).path.startswith("train.")


def test_searches_that_are_shared_are_told_once():
    sub_terms = {"a": LOSSES["RSLADLoss"], "b": LOSSES["RSLADLoss"], "c": LOSSES["DARWINLoss-batch"]}
    box = bound(sub_terms)
    facts = collect_facts(box, "bf16", RuntimeError("out of memory"))
    assert [e.path.split(".")[4] for e in facts.examples] == ["b", "c", "c"] and facts.has_path
    assert not facts.in_search and facts.amp == "bf16" and facts.wanted is None


def test_terms_that_do_not_count_have_no_examples():
    facts = collect_facts(bound({"kd": KD, "tald": tald(0.0)}), None, RuntimeError("out of memory"))
    assert facts.examples == () and not facts.has_path


def test_every_view_of_an_image_has_examples():
    views = {"forward_proc": "forward_batch4sskd"}
    box = with_side({"adv": on_adversarial(matching("."))}, teacher=views, student=views)
    (examples,) = collect_facts(box, None, RuntimeError("out of memory")).examples
    assert examples.rows == 4 * box.train_data_loader.batch_size


@pytest.mark.parametrize("option", [{"search_bn": "train"}, {"teacher_mode": "keep"}])
def test_rows_that_see_each_other_take_no_chunks(option):
    term = {"criterion": {"key": "AdaADLoss", "kwargs": {**LOSSES["AdaADLoss"]["criterion"]["kwargs"], **option}}}
    box = bound({"adaad": {**term, "weight": 1.0}})
    (examples,) = collect_facts(box, None, RuntimeError("out of memory")).examples
    assert not examples.takes_chunks and examples.rows == 6 and PGD_2["key"] == "PGD"


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shape") as error, memory_advice(bound({"kd": KD})):
        raise RuntimeError("shape mismatch")
    assert not isinstance(error.value, ConfigError)


SCRIPT = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from tiny import KD, bound
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.runner.memory import memory_advice

torch.set_num_threads(1)
box = bound({{"kd": KD}})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    with memory_advice(box):
        box.forward_process(torch.rand(64, 2, 512, 512), torch.zeros(64, dtype=torch.int64))
except ConfigError as error:
    print(error, error.__cause__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_the_allocator_of_the_host():
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    found = re.search(r"batch_size: found 6 images.*\((.*) more were wanted, .* in all\)", done.stdout)
    own = re.search(r"you tried to allocate (\d+) bytes", done.stdout)
    assert found and own, done.stdout + done.stderr
    # more than what was left; 64 images of 2 channels are 128 MiB
    assert found[1] == as_text(int(own[1])) and int(own[1]) >= 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told")
def test_freed_memory_is_kept_for_the_next_step():
    """Page faults of blocks that are taken and given back again and again, in processes of their own."""
    program = """
import resource, sys, torch
from torchdistill_adv.runner.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    return [torch.ones(size, 2**18) for size in (1, 40, 7, 90)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(
            subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("kept", "as it is")
    }
    assert 4 * faults["kept"] < faults["as it is"]
