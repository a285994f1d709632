"""Memory of training: kept between steps, and what to write where it runs out."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchdistill_adv.binding import find_terms
from torchdistill_adv.boxes import Box, sides, stage_path
from torchdistill_adv.errors import ConfigError
from torchdistill_adv.evaluation.passes import is_out_of_memory
from torchdistill_adv.losses import DARWINLoss
from torchdistill_adv.losses.base import AdversarialTerm, Search
from torchdistill_adv.step import Step

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, in all of this process.

    It hands the end of its heap back to the system, which clears every page that is asked for again: depending on how
    blocks happen to lie, up to a third of a step on a CPU. Elsewhere than with glibc nothing is changed.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks are of the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: no end of it is handed back


@dataclass(frozen=True)
class Examples:
    """The examples of one search.

    Args:
        path: YAML path of the adversary's options.
        rows: examples of a batch.
        num_rows: examples of an image.
        chunk_size: how many go through the networks at once; None is all.
        takes_chunks: whether ``chunk_size`` may be written.
    """

    path: str
    rows: int
    num_rows: int = 1
    chunk_size: int | None = None
    takes_chunks: bool = True

    @property
    def at_once(self) -> int:
        return min(self.rows, self.chunk_size or self.rows)


@dataclass(frozen=True)
class Facts:
    """What is known where memory ran out.

    Args:
        batch_size: images of a batch in this process.
        amp: as on the command line.
        grad_accum_step: batches of a step of the optimizer.
        examples: of every search.
        in_search: whether it was in a search.
        has_path: whether the examples of a whole path are distilled.
        wanted: bytes that could not be had; None where the error does not tell.
        peak: bytes that were in use at most; None where the system does not tell.
        total: bytes that there are, likewise.
    """

    batch_size: int
    amp: str | None = None
    grad_accum_step: int = 1
    examples: tuple[Examples, ...] = ()
    in_search: bool = False
    has_path: bool = False
    wanted: int | None = None
    peak: int | None = None
    total: int | None = None


def advice(facts: Facts) -> str:
    """What was found, and what to write instead: first what keeps the examples and the gradient as they are."""
    place = "in a search" if facts.in_search else "in a pass that keeps its graph, or in its gradient"
    amounts = [("more were wanted", facts.wanted), ("the peak", facts.peak), ("in all", facts.total)]
    sizes = [f"{as_text(size)} {what}" for what, size in amounts if size is not None]
    rows = [f"{facts.batch_size} in the host's passes"]
    rows += [f"{e.at_once} in the search of {e.rows} of {e.path}" for e in facts.examples]
    ways = "; ".join(f"({i}) {way}" for i, way in enumerate(_ways(facts), 1)) or "a smaller model"
    known = (
        " DARWINLoss takes its gradient step by step along the path, so a shorter path would not help."
        if facts.has_path
        else ""
    )
    return (
        f"found {facts.batch_size} images a batch, with which memory ran out {place} "
        f"({', '.join(sizes) or 'how much is not known'}); images at once: {', '.join(rows)}. Write, in this order: "
        f"{ways}.{known}"
    )


def _ways(facts: Facts) -> Iterator[str]:
    most = max((e.at_once for e in facts.examples if e.takes_chunks), default=1)
    if facts.in_search and most > 1:
        size = min(facts.batch_size, most // 2)
        for e in facts.examples:
            if e.takes_chunks and e.at_once > size:
                yield f"{e.path}.chunk_size: {size}, with the same examples"
    if facts.amp is None:
        yield "--amp bf16, which halves what the networks keep"
    if facts.batch_size > 1:
        size, count = facts.batch_size // 2, 2 * facts.grad_accum_step
        yield f"batch_size: {size} and --grad_accum_step {count}, with the same gradient but for batch normalisation"
    for e in facts.examples:
        if e.num_rows > 1:
            fewer = e.num_rows // 2
            yield f"{e.path}.num_particles: {fewer}, another method, for the student keeps the graphs of all {e.rows}"


def as_text(size: int) -> str:
    """Bytes, in the largest unit that they fill."""
    unit = next(unit for unit in reversed(UNITS) if size >= UNITS[unit] or unit == "bytes")
    return f"{size / UNITS[unit]:.3g} {unit}"


def wanted_bytes(message: str) -> int | None:
    """What could not be allocated, from the message of PyTorch's allocators: of a GPU, or of the host."""
    found = re.search(r"tried to allocate (\d+(?:\.\d+)?) (\w+)", message, re.IGNORECASE)
    return None if found is None else int(float(found[1]) * UNITS.get(found[2], 1))


def peak_memory(device: torch.device) -> int | None:
    """In bytes: of the tensors on a GPU since its peak was reset, else of the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total_memory(device: torch.device) -> int | None:
    """In bytes: of the GPU, else of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None


@contextmanager
def memory_advice(box: Box, amp: str | None = None) -> Iterator[None]:
    """Say what to write where memory runs out inside.

    Args:
        box: what is trained.
        amp: as on the command line.

    Raises:
        ConfigError: in the place of PyTorch's own error; with the path of the batch size.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        path = f"{stage_path(box)}.train_data_loader.kwargs.batch_size"
        raise ConfigError(advice(collect_facts(box, amp, error)), path) from error


def collect_facts(box: Box, amp: str | None, error: RuntimeError) -> Facts:
    """What is known of a box in whose step ``error`` was raised."""
    images, views = getattr(box.train_data_loader, "batch_size", None) or 1, sides(box)[0].num_views
    terms = [term for _, term, _ in find_terms(box) if term.evaluated]
    # two terms that want equal examples have one search
    searches = {search: term for term in terms for search in term.searches}
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return Facts(
        images,
        amp,
        box.grad_accum_step,
        tuple(_examples(search, term, images, views) for search, term in searches.items()),
        in_search=Step.search_all.__code__ in frames,
        has_path=any(isinstance(term, DARWINLoss) for term in terms),
        wanted=wanted_bytes(str(error)),
        peak=peak_memory(box.device),
        total=total_memory(box.device),
    )


def _examples(search: Search, term: AdversarialTerm, images: int, views: int) -> Examples:
    rows_are_apart = term.teacher_mode == "eval" and search.student_bn == "eval"
    return Examples(
        f"{term.path}.adversary.kwargs",
        search.num_rows(images, views),
        search.adversary.num_rows,
        search.chunk_size,
        takes_chunks=rows_are_apart and hasattr(search.adversary, "chunk_size"),
    )
