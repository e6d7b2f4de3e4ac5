"""`replay`: the derivative of the whole recorded run, by walking it backwards.

λ_T = ∇m(θ_T); then, step by step, (λ_θ, λ_s, q_t) is the vjp of the optimizer's update and λ_t = λ_θ + H_t q_t, with
H_t q_t the Hessian-vector product of the batch's loss (reverse mode through training, as in MAGIC, arXiv 2504.16430).
The signals x_{i,t} = ⟨q_t, w_i ∇ℓ_i(θ_t)⟩ then say what sample i's share of step t did to the *final* measurement.
Memory is O(√T) states: each segment between stored states is re-executed forwards before it is walked back.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finfluence.errors import FinfluenceError, FinfluenceWarning, ReplayError
from finfluence.gradients import check_model, query_gradient
from finfluence.runs._manifest import check_choice
from finfluence.runs._progress import ShowProgress, progress
from finfluence.runs._recording import Recording
from finfluence.runs._replay_self import write_self_influence
from finfluence.runs._replay_store import ReplayStore, query_norms
from finfluence.runs._segment import SegmentWalker, StepSignals
from finfluence.runs.data import Collate, query_batches
from finfluence.runs.engine import isolated_rng
from finfluence.runs.replay_plan import ReplayOptions, ReplayPlan
from finfluence.runs.run import Run, open_run
from finfluence.runs.sampling import Batch
from finfluence.runs.states import restore_training_state
from finfluence.runs.tasks import Task, measurement
from finfluence.sensitivity import AdjointMonitor, FlatUpdate, States
from finfluence.signals import Folder, SignalStore, SignalWriter, open_folder

# Segments of a small model take milliseconds, and making one durable takes as long.
COMMIT_SECONDS = 1.0
_COMMIT_ROWS = 1 << 20


def replay(
    directory: str | os.PathLike[str],
    task: Task,
    model: nn.Module,
    *,
    dataset: Any,
    queries: Mapping[str, Any],
    collate: Collate | None = None,
    options: ReplayOptions | None = None,
    self_influence: Literal["none", "all"] = "none",
    writer: SignalWriter | None = None,
    show_progress: ShowProgress = "auto",
) -> Run:
    """Walks a recorded run backwards and writes calibrated signals for every query.

    A replay that was killed goes on at the last finished segment; one that has finished is not repeated. Other options
    or other queries than those of the replay that is there start it anew.

    Args:
        directory: a run recorded by `train` with sensitivity "replay" or "both", or by a `Recorder` with the same.
        task: as at recording; of a loop of one's own, the task whose losses it summed up and divided.
        model: a model of the same architecture, in the mode (train or eval) of the recording; its parameters end up as
            those of the finished training.
        dataset: as at recording.
        queries: data of each recorded query by name.
        collate: as at recording.
        options: damping, Hessian-vector products, memory.
        self_influence: "all" also takes every sample's signal on its own loss at three steps of the run, for
            run.influence(query, relative=True), if it was not recorded; also of a run that was replayed without.
        writer: the run's open store, where the caller has one.
        show_progress: "auto" prints the plan and shows a bar on a terminal's standard error; "never" is silent.

    Returns:
        The run, with its signals. A query whose adjoint diverged has NaN for signals, and `Run.influence` refuses it.

    Raises:
        ReplayError: re-execution differs from the recorded run, the adjoint of every query diverges, or the run has no
            states.
        InputError: other queries or another number of samples than recorded.
        StoreError: the directory is not a run, or cannot be written.
    """
    check_choice("self_influence", self_influence, ("none", "all"))
    options = options or ReplayOptions()
    folder = open_folder(directory)
    owned = writer is None
    writer = writer or SignalWriter.resume(directory)
    try:
        job = _Replay(
            folder, writer, task=task, model=model, dataset=dataset, queries=queries, collate=collate, options=options
        )
        if show_progress == "auto" and sys.stderr.isatty():
            print(job.plan, file=sys.stderr)
        with isolated_rng(job.engine.device):
            if self_influence == "all":
                write_self_influence(job.recording, job.engine, writer, show=show_progress)
            job.run(show_progress)
        job.engine.optimizer.zero_grad(set_to_none=True)  # a loop that goes on would add to what is left there
    except BaseException:
        if owned:
            with contextlib.suppress(FinfluenceError):
                writer.close("failed")
        raise
    if owned:
        writer.close("finished")
        return open_run(directory)
    return open_run(directory, partial=True)


def plan_replay(
    directory: str | os.PathLike[str], model: nn.Module, *, options: ReplayOptions | None = None
) -> ReplayPlan:
    """What a replay of a recorded run will need, without doing it.

    Args:
        directory: a run recorded by `train` with sensitivity "replay" or "both", its training finished.
        model: a model of the same architecture.
        options: of the replay.

    Returns:
        Time, memory and disk.

    Raises:
        ReplayError: the run has no states, or its training has not finished.
        StoreError: the directory is not a run.
    """
    recording = Recording(open_folder(directory), SignalStore.open(directory, partial=True).manifest)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    update = FlatUpdate(parameters, recording.rules(parameters))
    return recording.estimate(update, model, options or ReplayOptions())


class _Replay:
    def __init__(
        self,
        folder: Folder,
        writer: SignalWriter,
        *,
        task: Task,
        model: nn.Module,
        dataset: Any,
        queries: Mapping[str, Any],
        collate: Collate | None,
        options: ReplayOptions,
    ) -> None:
        self.recording = recording = Recording(folder, writer.manifest)
        self.task = task
        recording.check_data(dataset, queries)
        check_model(model)
        self.engine = recording.engine(task, model, dataset=dataset, collate=collate)
        self.update = FlatUpdate(self.engine.parameters, self.engine.rules)
        self.options = options = options.resolved(adaptive=self.update.adaptive)
        self.batches = query_batches(queries, collate=collate, device=self.engine.device)
        self.measured = self._measuring_steps()
        self.store = ReplayStore(folder, writer, queries=recording.queries)
        self.plan = recording.estimate(self.update, model, options)

    def run(self, show: ShowProgress) -> None:
        """Walks all segments that are not finished, last first."""
        self._restore(self.recording.cuts[-1])
        end_gradients, state = self._gradients(), None
        settled = None
        if self.options.second_moment == "settled":
            settled = self.update.settled(*self.update.read_state(self.engine.optimizer, self.engine.parameters))
        norms = query_norms(end_gradients)
        adjoint = end_gradients * self.measured.pop(self.engine.total_steps)
        self.store.begin(self.options.as_dict(), norms)
        if self.options.measure_epochs is not None:
            self.store.update(measured_epochs=list(self.options.measured(self.engine.plan.epochs)))
        entry = self.store.entry
        if entry["finished"]:
            return
        self.mismatch, self.residual = float(entry["largest_mismatch"]), float(entry["largest_residual"])
        end = self.store.committed()
        if end is not None:
            adjoint, state = self.store.load(end, self.update, like=adjoint)
        names = self.recording.queries
        monitor = AdjointMonitor(
            factor=self.options.divergence,
            caution=self.options.caution,
            queries=names,
            first=norms if end is None else entry.get("reference") or norms,
        )
        walker = SegmentWalker(
            self.engine,
            self.update,
            options=self.options,
            panel=self.recording.panel,
            monitor=monitor,
            diverged=dict(entry["diverged"]),
            settled=settled,
            longest=max((b - a for a, b in itertools.pairwise(self.recording.cuts)), default=0),
            measured=self.measured,
            gradients=self._gradients,
        )
        try:
            self._sweep(walker, self.engine.total_steps if end is None else end, adjoint, state=state, show=show)
        except ReplayError:
            if len(walker.diverged) == len(names):
                self.store.forget()
            raise
        finally:
            walker.close()
        self._restore(self.recording.cuts[-1])
        self.store.finish()
        for query, message in walker.diverged.items():
            warnings.warn(
                f"{message}; {query!r} has no scores, the other queries have", FinfluenceWarning, stacklevel=3
            )

    def _measuring_steps(self) -> dict[int, float]:
        """Weight of each step's beginning, and of the end, in what is measured."""
        plan = self.engine.plan
        epochs = self.options.measured(plan.epochs)
        return dict.fromkeys(self.engine.measured_steps(epochs), 1.0 / len(epochs))

    def _restore(self, step: int) -> None:
        restore_training_state(self.engine.model, self.engine.optimizer, self.recording.states.load(step))

    def _gradients(self) -> Tensor:
        """(n_queries, size) ∇m at the end of the training, where the model is."""
        zeros = {name: torch.zeros_like(p) for name, p in self.engine.parameters.items()}
        rows = [
            query_gradient(self.engine.model, self.engine.parameters, functools.partial(self._measure, batch)).tensors
            for batch in self.batches.values()
        ]
        return torch.stack([self.update.layout.flatten(zeros | dict(row)) for row in rows])

    def _measure(self, batch: Any, model: nn.Module) -> Tensor:
        with self.engine.autocast():
            return measurement(self.task, model, batch)

    def _sweep(
        self, walker: SegmentWalker, end: int, adjoint: Tensor, *, state: States | None, show: ShowProgress
    ) -> None:
        """Walks from step `end` to the beginning."""
        cuts = [cut for cut in self.recording.cuts if cut <= end]
        total = 2 * self.engine.total_steps
        found: list[StepSignals] = []
        members = None if self.recording.panel is None else walker.members
        began, rows = time.monotonic(), 0
        with progress("replaying", total=total, done=total - 2 * end, show=show) as advance:
            for first, last in zip(cuts[-2::-1], cuts[:0:-1], strict=True):
                adjoint, state, own = self._segment(walker, first, last, adjoint=adjoint, state=state, advance=advance)
                found = own + found
                rows += sum(len(s.values) + (0 if s.panel is None else len(s.panel)) for s in own)
                if first and time.monotonic() - began < COMMIT_SECONDS and rows < _COMMIT_ROWS:
                    continue
                self._check_residuals(found, walker)
                fields = {
                    "diverged": walker.diverged,
                    "reference": walker.monitor.reference,
                    "largest_mismatch": self.mismatch,
                    "largest_residual": self.residual,
                }
                self.store.commit(first, end, found=found, members=members, adjoint=adjoint, state=state, fields=fields)
                end, found, rows, began = first, [], 0, time.monotonic()

    def _segment(
        self, walker: SegmentWalker, first: int, last: int, *, adjoint: Tensor, state: States | None, advance: Any
    ) -> tuple[Tensor, States, list[StepSignals]]:
        """Re-executes and walks back the steps first … last − 1."""
        engine = self.engine
        self._restore(first)
        batches = list(itertools.islice(engine.batches(first), last - first))
        losses = walker.forwards(batches, advance=advance)
        self._compare(walker.flat_parameters(), last, batches, losses)
        return walker.backwards(batches, losses, adjoint=adjoint, adjoint_state=state, advance=advance)

    def _compare(self, theta: Tensor, step: int, batches: Sequence[Batch], losses: Sequence[float]) -> None:
        difference = self.recording.apart(self.update.layout.unflatten(theta), step)
        limit = self.options.tolerance or self.recording.tolerance(theta.dtype)
        self.mismatch = max(self.mismatch, difference)
        if difference <= limit:
            return
        recorded = self.recording.losses([b.step for b in batches])
        wrong = (
            b.step
            for b, loss in zip(batches, losses, strict=True)
            if (known := recorded.get(b.step)) is not None and abs(loss - known) > 1e-6 * (1 + abs(known))
        )
        found = next(wrong, None)
        where = f"found at the state before step {step}" if found is None else f"losses differ from step {found} on"
        then, now = self.recording.manifest.get("environment", {}).get("threads"), torch.get_num_threads()
        threads = "" if then in (None, now) else f" (recorded with {then} threads, now {now})"
        loops = ", a task or denominators that are not the loop's" if self.recording.loop is not None else ""
        raise ReplayError(
            f"the re-executed parameters differ from the recorded ones by {difference:.1e} (limit {limit:.0e}); "
            f"{where}. Usual causes: the data changed or are transformed at random, the model is built differently or "
            f"is in another mode (train, eval), another machine or number of threads{threads}, non-deterministic "
            f"kernels{loops}; if the size is harmless, raise ReplayOptions.tolerance"
        )

    def _check_residuals(self, found: Sequence[StepSignals], walker: SegmentWalker) -> None:
        names = self.recording.queries
        residual, step, query = max(
            (r, s.batch.step, q) for s in found for r, q in zip(s.residuals, names, strict=True)
        )
        if residual > walker.limit >= self.residual:
            uncovered = "a parameter is used outside its module, where hooks do not see it, or "
            warnings.warn(
                f"the signal identity of query {query!r} is off by {residual:.1e} at step {step} "
                f"(limit {walker.limit:.0e}): {uncovered}the precision is too low "
                f"({self._precision()}); the signals miss that part of the gradient",
                FinfluenceWarning,
                stacklevel=6,
            )
        self.residual = max(self.residual, residual)

    def _precision(self) -> str:
        if self.recording.plan.precision == "bfloat16-autocast":
            return "bfloat16 autocast; train in float32"
        dtype = next(iter(self.engine.parameters.values())).dtype
        return f"{str(dtype).removeprefix('torch.')}; train in float64" if dtype == torch.float32 else str(dtype)
