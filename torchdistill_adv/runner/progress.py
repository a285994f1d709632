"""What is seen of a training epoch while it runs: the terms of the loss, a bar or log lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchdistill.common.main_util import is_main_process
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)


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
def progress_bar(loader: Iterable[Any], title: str) -> Iterator[tqdm[Any]]:
    """A bar around ``loader``; none where the standard error is no terminal, or in a process that is not the first."""
    with (
        logging_redirect_tqdm(),
        tqdm(loader, desc=title, disable=not (sys.stderr.isatty() and is_main_process()), dynamic_ncols=True) as bar,
    ):
        yield bar


def show(bar: tqdm[Any], title: str, step: int, log_freq: int, values: Mapping[str, float]) -> None:
    """The values of a step on the bar or, where there is none, in a log line every ``log_freq`` steps."""
    if not bar.disable:
        bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
    elif step % log_freq == 0:
        logger.info("%s [%d/%s] %s", title, step, bar.total, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
