"""One training step as adversarial terms see it: images, networks, searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchdistill.common.constant import SELF_MODULE_PATH
from torchdistill.core.interfaces import forward_proc

from torchdistill_adv.adversaries import Examples
from torchdistill_adv.attribution import Layout, recorded_features
from torchdistill_adv.boxes import IODict, Side
from torchdistill_adv.checks import check_logits
from torchdistill_adv.errors import ConfigError, NonFiniteError, inside
from torchdistill_adv.guards import eval_mode, is_compiled, on_cloned_buffers
from torchdistill_adv.inputs import check_batch, check_labels, check_networks
from torchdistill_adv.objectives import Network, View, Who
from torchdistill_adv.sources import Chosen, Source
from torchdistill_adv.statistics import search_statistics

if TYPE_CHECKING:
    from torchdistill_adv.binding import Binding
    from torchdistill_adv.losses.base import AdversarialTerm, Search


class Step:
    """One training step as the adversarial terms see it.

    Attributes:
        all_images: every image of the batch, (V N, C, H, W) for V views of N images; V is 1 but for SSKD.
        images: the labelled images, (N, C, H, W).
        labels: their classes, (N,).
        host_hooks: what is hooked in the host's own passes, until the first search begins.
    """

    def __init__(
        self, binding: Binding, sample_batch: Any, targets: Any, supp_dict: Any, kwargs: Mapping[str, Any]
    ) -> None:
        check_batch(sample_batch, binding.stage)
        self.binding = binding
        self.batch_shape = sample_batch.shape
        self.supp_dict = supp_dict
        self.targets = targets
        self.kwargs = kwargs
        self.student_io_dict: IODict = {}
        self.teacher_io_dict: IODict = {}
        self._chosen: dict[Source, Chosen] = {}
        self._found: dict[Search, Examples] = {}
        self._logits: dict[object, Tensor] = {}
        self._teacher_clean: Tensor | None = None
        self.host_hooks = ExitStack()
        self._recorded: dict[tuple[Who, Layout], list[Tensor]] = {}
        self._records: dict[AdversarialTerm, dict[str, Tensor]] = {}
        views = max(side.num_views for side in (binding.student, binding.teacher) if side is not None)
        multi_view = views > 1 and sample_batch.dim() == 5
        self.num_views = sample_batch.shape[1] if multi_view else 1
        self.all_images = (sample_batch.flatten(0, 1) if multi_view else sample_batch).detach()
        self.images = self.all_images[:: self.num_views]
        if not binding.num_classes:
            binding.num_classes = check_networks(binding, self.all_images)
        for term in binding.evaluated:
            if term.needs_labels:
                check_labels(targets, len(self.images), binding.num_classes, binding.stage, term.path)
                break

    @property
    def labels(self) -> Tensor:
        return self.targets

    def classes(self, label_free: bool) -> Tensor:
        """The labels, or the teacher's predictions in their place, (N,)."""
        return self.teacher_clean().argmax(1) if label_free else self.labels

    @property
    def epoch(self) -> int:
        """The epoch within the stage, from 0."""
        return max(self.binding.epoch - self.binding.epochs.start, 0)

    @property
    def progress(self) -> float:
        """The share of the stage's epochs that are over at the end of this one: 1 in the last."""
        return (self.epoch + 1) / max(len(self.binding.epochs), self.epoch + 1)

    # networks

    def side(self, who: Who) -> Side:
        side = self.binding.student if who == "student" else self.binding.teacher
        assert side is not None, "binding refuses terms that need a teacher where there is none"
        return side

    def student(self, rows: Tensor, student_bn: str) -> Tensor:
        """The student's logits on ``rows``, with a graph to its parameters."""
        with self.student_mode(student_bn):
            return check_logits(self.binding.student.network(rows), "student")

    def student_mode(self, student_bn: str) -> ExitStack:
        """The student as ``student_bn`` wants it, while the context lasts."""
        stack = ExitStack()
        if student_bn == "eval":
            stack.enter_context(eval_mode(self.binding.student.network))
        if student_bn != "train":
            stack.enter_context(on_cloned_buffers(self.binding.student.outermost, self.binding.student.network))
        return stack

    def teacher(self, rows: Tensor, chunk_size: int | None = None, part: str = "") -> Tensor:
        """The teacher's logits on ``rows``, without a graph; ``chunk_size`` bounds how many it sees at once.

        ``part`` is as in :meth:`teacher_on`.
        """
        teacher = self.binding.teacher
        assert teacher is not None
        network = teacher.network.get_submodule(part)
        if teacher.in_train_mode:
            chunk_size = None  # rows of one batch see each other in train mode
        with torch.no_grad(), on_cloned_buffers(teacher.network, read_only_in_eval=True):
            return torch.cat([network(some) for some in rows.split(chunk_size or len(rows))])

    def student_on(self, search: Search, student_bn: str) -> Tensor:
        """The student's logits on the examples of ``search``, with a graph; one pass for all terms that ask for it."""
        return self.once(("student", search, student_bn), lambda: self.student(self.examples(search).rows, student_bn))

    def teacher_on(self, search: Search, part: str = "") -> Tensor:
        """The teacher's logits on the examples of ``search``, without a graph; one pass for all terms.

        ``part`` is the path of a submodule of the teacher that is a network of its own, such as a second teacher.
        """
        rows = self.examples(search).rows
        return self.once(("teacher", search, part), lambda: self.teacher(rows, search.chunk_size, part))

    def once(self, key: object, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gives, computed once a step for each ``key``."""
        if key not in self._logits:
            self._logits[key] = compute()
        return self._logits[key]

    def student_clean(self) -> Tensor:
        """The student's logits on :attr:`images` from the host's own pass, (N, num_classes), with its graph.

        Raises:
            ConfigError: the box calls the student in a way of the user's own, or gets no logits.
        """
        logits = self._student_host_logits()
        if logits is None:
            raise ConfigError(
                "needs the student's logits on the clean images, which the forward process of this box does not give; "
                "write forward_proc: 'forward_batch_only' (or, in TALDLoss, forward: 'joint')"
            )
        return logits

    def teacher_clean(self) -> Tensor:
        """The teacher's logits on :attr:`images`, (N, num_classes), without a graph.

        Taken from the host's own pass where the teacher is in eval mode and they are fresh logits, which is checked
        once against a pass of our own; else computed.
        """
        if self._teacher_clean is None:
            logits = self._teacher_host_logits()
            self._teacher_clean = self.teacher(self.images) if logits is None else logits.detach()
        return self._teacher_clean

    def listen(self) -> None:
        """Let the terms of this step hook the host's own passes, which come next."""
        for term in filter(self.binding.is_due, self.binding.evaluated):
            with inside(term.path):
                term.before_host(self)

    def record_features(self, who: Who, layout: Layout) -> None:
        """Keep the feature map of ``layout`` from the host's own pass, for :meth:`host_features`."""
        side = self.side(who)
        if (who, layout) not in self._recorded and not is_compiled(side.outermost):
            self._recorded[who, layout] = self.host_hooks.enter_context(recorded_features(side.network, layout))

    def host_features(self, who: Who, layout: Layout) -> Tensor | None:
        """What the feature module of ``layout`` returned for :attr:`images` in the host's own pass, with its graph.

        None where clean logits are not from that pass, where the network is compiled, and where the module was not
        called exactly once, such as on several devices or in both networks.
        """
        logits = self._student_host_logits() if who == "student" else self._teacher_host_logits()
        recorded = self._recorded.get((who, layout), [])
        if logits is None or [len(features) for features in recorded] != [len(self.all_images)]:
            return None
        return recorded[0][:: self.num_views]

    def _student_host_logits(self) -> Tensor | None:
        # a forward process of a user's own may return anything of the same shape, such as probabilities
        if self.binding.student.forward_proc.__module__ != forward_proc.__name__:
            return None
        return self._host_logits(self.student_io_dict)

    def _teacher_host_logits(self) -> Tensor | None:
        binding, teacher = self.binding, self.side("teacher")
        logits = self._host_logits(self.teacher_io_dict)
        cached = isinstance(self.supp_dict, Mapping) and "cached_data" in self.supp_dict
        if logits is None or cached or teacher.in_train_mode:
            return None
        if binding.reuses_teacher_logits is None:
            own = self.teacher(self.images[:1])
            binding.reuses_teacher_logits = torch.allclose(own, logits[:1].to(own.dtype), rtol=1e-2, atol=1e-2)
        return logits if binding.reuses_teacher_logits else None

    def _host_logits(self, io_dict: IODict) -> Tensor | None:
        logits = io_dict.get(SELF_MODULE_PATH, {}).get("output")
        if not isinstance(logits, Tensor) or logits.shape != (len(self.all_images), self.binding.num_classes):
            return None
        return logits[:: self.num_views]

    # searches

    def examples(self, search: Search) -> Examples:
        return self._found[search]

    def choose(self, source: Source) -> Chosen:
        """The images of ``source``, the same all through the step."""
        if source not in self._chosen:
            self._chosen[source] = source.choose(self)
        return self._chosen[source]

    def search_all(self) -> None:
        """Run every search of the step, before the first outer pass can move what another one reads."""
        self.host_hooks.close()
        watch = self.binding.watch
        for term in filter(self.binding.is_due, self.binding.evaluated):
            for search in term.searches:
                if search not in self._found:
                    with inside(term.path), nullcontext() if watch is None else watch.timing("search"):
                        self._found[search] = self._run(search, term)

    def _run(self, search: Search, term: AdversarialTerm) -> Examples:
        binding = self.binding
        student = binding.student.network
        with binding.no_trace(search.identity), ExitStack() as modes:
            images, which = self.choose(search.source)
            if not len(images):
                return Examples(images, torch.arange(0, device=images.device))
            labels = search.source.classes(self) if search.objective.needs_labels else None
            known = self.teacher_clean()[which] if "teacher" in search.objective.clean and which is not None else None
            if "student" in search.objective.needs and search.student_bn == "eval":
                modes.enter_context(eval_mode(student))
            networks = [] if search.student_bn == "train" else [student]
            networks += [] if binding.teacher is None else [binding.teacher.network]
            modes.enter_context(on_cloned_buffers(*networks, read_only_in_eval=True))
            passed = self._networks(search, images, modes)
            view = View(images, labels, *passed, binding.noise_for(search, images), known)
            with inside("objective.kwargs" if "objective" in term.options else ""):
                objective = search.objective.bind(view)
            examples = search.adversary_at(self.progress)(objective, images, search.threat, view.noise)
            if binding.watch is not None:
                attacked = {who: view.network(who) for who in search.objective.entry.attacks}
                # in train mode the student's passes move its running statistics
                with binding.watch.timing("statistics"), on_cloned_buffers(student, read_only_in_eval=True):
                    binding.watch.searches[binding.search_names()[search]] = search_statistics(
                        objective, attacked, images, examples, search.threat, search.chunk_size
                    )
        if not bool(torch.isfinite(examples.rows).all()):
            raise NonFiniteError(
                f"{term.path}: the search found NaN or infinite examples at {binding.when()}; "
                f"{summary({'examples': examples.rows, 'clean images': images})}"
            )
        return Examples(examples.rows.detach(), examples.index, examples.path)

    def _networks(self, search: Search, images: Tensor, stack: ExitStack) -> tuple[Network, Network | None]:
        """Student and teacher as ``search`` passes them: their twins where it can, in its precision."""
        binding = self.binding
        found: dict[str, Any] = {"student": binding.student.network}
        found["teacher"] = None if binding.teacher is None else binding.teacher.network
        how = search.passes.pick(images.device, search.objective.entry.compares_itself)
        attacked = {who: network for who, network in found.items() if who in search.objective.entry.attacks}
        kept = frozenset(v for name, v in search.objective.options if name.endswith("_module") and v)
        twins = {
            who: binding.twins.of(network, who, how, images, kept) if how.changes(network) else network
            for who, network in attacked.items()
        }
        if None not in twins.values() or search.passes.precision != "auto":
            stack.enter_context(how.autocast(images.device))
            found |= {who: twin for who, twin in twins.items() if twin is not None}
        return found["student"], found["teacher"]

    # what a wrapped loss reads

    def collect_student(self, rows: Tensor, student_bn: str) -> IODict:
        """The student's outputs and hooked features on ``rows``, as the box gathers them."""
        with self.student_mode(student_bn):
            return self._collect(self.binding.student, rows)

    def collect_teacher(self, rows: Tensor) -> IODict:
        """The teacher's outputs and hooked features on ``rows``, as the box gathers them."""
        teacher = self.binding.teacher
        assert teacher is not None
        with on_cloned_buffers(teacher.outermost):
            return self._collect(teacher, rows)

    def _collect(self, side: Side, rows: Tensor) -> IODict:
        supp_dict = self.supp_dict
        if isinstance(supp_dict, Mapping):
            supp_dict = {k: v for k, v in supp_dict.items() if k not in ("cached_data", "cache_file_path")}
        batch = rows.reshape(self.batch_shape)
        return side.collect(batch, self.targets, supp_dict, self.kwargs, self.binding.device)

    # statistics

    def record(self, term: AdversarialTerm, **values: Tensor) -> None:
        """Keep values of ``term``, for the message if it is not finite."""
        self._records[term] = {name: value.detach() for name, value in values.items()}

    def statistics(self, term: AdversarialTerm) -> str:
        moved = []
        for search in term.searches:
            examples = self.examples(search)
            moved.append(search.threat.distance(examples.rows, self.choose(search.source).images[examples.index]))
        return summary({**self._records.get(term, {}), "displacement": torch.cat(moved)})


def summary(values: Mapping[str, Tensor]) -> str:
    """Range and finite share of each tensor, for an error."""
    finite = {name: float(torch.isfinite(v).float().mean()) for name, v in values.items()}
    return ", ".join(
        f"{name} from {float(v.min()):.4g} to {float(v.max()):.4g} ({finite[name]:.0%} finite)"
        for name, v in values.items()
        if v.numel()
    )
