"""What is seen of a training epoch while it runs: the loss and its terms, searches, time; a bar or log lines."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torchdistill.common.main_util import is_main_process
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from torchdistill_adv.binding import Binding
from torchdistill_adv.errors import NonFiniteError
from torchdistill_adv.statistics import Watch

logger = logging.getLogger(__name__)

# called with the number of a step and its values by name
WriteScalars: TypeAlias = Callable[[int, Mapping[str, float]], None]
# the statistics of each search, by its name
Searches: TypeAlias = Mapping[str, Mapping[str, float]]


@dataclass
class Meter:
    """Sums over the steps of an epoch in this process; they are kept with a run, so that they go on with it.

    Args:
        steps: how many there were.
        images: trained on.
        seconds: spent.
        loss: sum of the loss.
        terms: sums of its weighted terms.
        data_seconds: spent waiting for batches.
        search_seconds: spent on searches in the steps that were watched.
        training_seconds: spent on everything else in them but waiting and statistics.
        watched: by name of a search, the steps in which it was watched.
        searches: sums of its statistics, by ``<name>/<statistic>``.
    """

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    data_seconds: float = 0.0
    search_seconds: float = 0.0
    training_seconds: float = 0.0
    watched: dict[str, int] = field(default_factory=dict)
    searches: dict[str, float] = field(default_factory=dict)

    def add(
        self, loss: float, terms: Mapping[str, float], images: int, seconds: float, searches: Searches | None = None
    ) -> None:
        """Count a step, with what its searches did if it was watched."""
        self.steps += 1
        self.images += images
        self.seconds += seconds
        self.loss += loss
        self.terms = {name: self.terms.get(name, 0.0) + value for name, value in terms.items()}
        self.watched = _sums(self.watched, dict.fromkeys(searches or {}, 1))
        self.searches = _sums(self.searches, flat(searches or {}))

    def add_times(self, watch: Watch, seconds: float) -> None:
        """Count the time of a step that was watched, in all and of its searches."""
        search = watch.seconds["search"] - watch.seconds["statistics"]
        self.search_seconds += search
        self.training_seconds += seconds - watch.seconds["statistics"] - search

    def plus(self, other: Meter) -> Meter:
        """The sums over the steps of both."""
        mine, theirs = asdict(self), asdict(other)
        sums: dict[str, Any] = {
            name: _sums(v, theirs[name]) if isinstance(v, dict) else v + theirs[name] for name, v in mine.items()
        }
        return Meter(**sums)

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the time, in [0, 1]: of ``search``, ``training`` and waiting for ``data``.

        The first two divide what is left by the last as they did in the steps that were watched.
        """
        data = self.data_seconds / self.seconds if self.seconds else 0.0
        seen = self.search_seconds + self.training_seconds
        search = (1 - data) * self.search_seconds / seen if seen else 0.0
        return {"search": search, "training": 1 - data - search, "data": data}


def _sums(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


def flat(searches: Searches) -> dict[str, float]:
    """The statistics of searches, by ``<name>/<statistic>``."""
    return {f"{name}/{entry}": value for name, found in searches.items() for entry, value in found.items()}


def epoch_record(meter: Meter) -> dict[str, Any]:
    """Means over the steps of an epoch in all processes; call it in every process.

    ``search`` has the statistics of each search, None for one that is not finite, and ``time`` the shares of the time.
    """
    total = _over_processes(meter)
    search: dict[str, dict[str, float | None]] = {name: {} for name in total.watched}
    for name, value in total.searches.items():
        of, _, entry = name.rpartition("/")
        search[of][entry] = value / total.watched[of] if math.isfinite(value) else None
    return {
        "loss": total.loss / total.steps,
        "terms": {name: value / total.steps for name, value in total.terms.items()},
        "seconds": meter.seconds,
        "images_per_second": total.images / meter.seconds,
        "search": search,
        "time": total.shares,
    }


def _over_processes(meter: Meter) -> Meter:
    """The sums over all processes, which need not have watched the same searches."""
    if not dist.is_initialized():
        return meter
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, asdict(meter))
    return functools.reduce(Meter.plus, (Meter(**state) for state in states))


class Monitor:
    """What is seen of an epoch: a bar or log lines, and the searches of every ``log_freq``-th step.

    Args:
        criterion: of the box, whose terms are seen.
        epoch: its number.
        meter: to count in.
        log_freq: steps from one log line to the next.
        binding: of the box, whose searches are watched.
        steps_left: steps of the run in later epochs.
        write_scalars: called with the number, within the epoch, and the values of every ``log_freq``-th step.
    """

    def __init__(
        self,
        criterion: nn.Module,
        epoch: int,
        meter: Meter,
        log_freq: int,
        *,
        binding: Binding | None = None,
        steps_left: int = 0,
        write_scalars: WriteScalars | None = None,
    ) -> None:
        self.criterion, self.epoch, self.meter, self.log_freq = criterion, epoch, meter, log_freq
        self.binding, self.steps_left, self.write_scalars = binding, steps_left, write_scalars

    @contextmanager
    def watch(self, batches: Iterable[Any], num_batches: int | None) -> Iterator[Iterator[Any]]:
        """The batches, with a bar around them; the terms of the loss are seen while the context lasts."""
        title = f"epoch {self.epoch}"
        steps = self.meter.steps
        with (
            weighted_terms(self.criterion) as self._terms,
            progress_bar(batches, title, initial=steps, total=num_batches) as self._bar,
        ):
            self._clock = time.perf_counter()
            yield self._steps(iter(self._bar))
            self.meter.seconds += time.perf_counter() - self._clock

    def _steps(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; each is one step."""
        end = object()
        start = time.perf_counter()
        while (batch := next(batches, end)) is not end:
            self.meter.data_seconds += time.perf_counter() - start
            is_sampled = self.meter.steps % self.log_freq == 0
            with self._watching() if is_sampled else nullcontext():
                yield batch
            self._show()
            if is_sampled and self.write_scalars is not None:
                self.write_scalars(self.meter.steps - 1, self._scalars())
            start = time.perf_counter()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Watch the searches of a step, and the time that they and the step take."""
        binding = self.binding
        if binding is None:
            yield
            return
        binding.watch = watch = Watch(binding.device)
        try:
            start = watch.now()
            yield
            self.meter.add_times(watch, watch.now() - start)
        finally:
            binding.watch = None

    def end_step(self, loss: Tensor, num_images: int) -> None:
        """Count a step, before its gradient, so that a state that is kept after it has all but its time.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        meter = self.meter
        value, values = float(loss.detach()), {name: float(term) for name, term in self._terms.items()}
        if not math.isfinite(value):
            raise NonFiniteError(
                f"train: the loss is {value} at epoch {self.epoch}, step {meter.steps}; its terms: {values}"
            )
        before, self._clock = self._clock, time.perf_counter()
        watch = None if self.binding is None else self.binding.watch
        self._searches = {} if watch is None else watch.searches
        meter.add(value, values, num_images, self._clock - before, self._searches)
        self._last = value, values

    @property
    def _seconds(self) -> float:
        return self.meter.seconds + time.perf_counter() - self._clock

    def _show(self) -> None:
        """Show the last step."""
        meter, (loss, terms) = self.meter, self._last
        values: dict[str, float | str] = {"loss": loss, **terms, "images/s": meter.images / self._seconds}
        if meter.search_seconds:
            values["search"] = f"{meter.shares['search']:.0%}"
        if self._bar.total is not None:
            left = self.steps_left + self._bar.total - meter.steps
            values["ETA"] = duration(left * self._seconds / meter.steps)
        show(self._bar, f"epoch {self.epoch}", meter.steps - 1, self.log_freq, values)

    def _scalars(self) -> dict[str, float]:
        """The values of the last step; times are of the epoch so far."""
        loss, terms = self._last
        return {
            "loss": loss,
            **{f"terms/{name}": value for name, value in terms.items()},
            **{f"search/{name}": value for name, value in flat(self._searches).items()},
            **{f"time/{name}": value for name, value in self.meter.shares.items()},
            "images_per_second": self.meter.images / self._seconds,
        }


def duration(seconds: float) -> str:
    """As people say it, in the two largest units."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"{hours // 24} d {hours % 24} h"


@contextmanager
def weighted_terms(criterion: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The terms of the last loss that ``criterion`` computed: each times its weight, detached, under its name."""
    values: dict[str, Tensor] = {}

    def keep(name: str, weight: float, module: nn.Module, inputs: Any, output: Any) -> None:
        values[name] = output.detach() * weight

    terms = getattr(criterion, "term_dict", {})
    handles = [term.register_forward_hook(partial(keep, name, weight)) for name, (term, weight) in terms.items()]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def progress_bar(loader: Iterable[Any], title: str, initial: int = 0, total: int | None = None) -> Iterator[tqdm[Any]]:
    """A bar around ``loader``; none where the standard error is no terminal, or in a process that is not the first."""
    hidden = not (sys.stderr.isatty() and is_main_process())
    bar = tqdm(loader, desc=title, disable=hidden, dynamic_ncols=True, initial=initial, total=total)
    with logging_redirect_tqdm(), bar:
        yield bar


def show(bar: tqdm[Any], title: str, step: int, log_freq: int, values: Mapping[str, float | str]) -> None:
    """The values of a step on the bar or, where there is none, in a log line every ``log_freq`` steps."""
    if bar.disable and step % log_freq:
        return
    texts = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in values.items()}
    if not bar.disable:
        bar.set_postfix(texts, refresh=False)
    else:
        logger.info("%s [%d/%s] %s", title, step, bar.total, ", ".join(f"{k} {v}" for k, v in texts.items()))
