"""Many trainings of one model at once: parameters stacked along a leading axis, one set of kernels for all.

The models are independent, so the gradient of the *sum* of their losses with respect to the stacked parameters is
every model's own gradient: one backward pass outside vmap serves all, without the cost of differentiating inside it.
The optimizers that finfluence knows work elementwise; one torch optimizer over the stacked tensors is M optimizers.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from finfluence.errors import InputError, OracleError
from finfluence.gradients import evaluating
from finfluence.runs.data import batch_length, model_device, take
from finfluence.runs.oracle.executors._batches import BatchOrders, StepBatches
from finfluence.runs.oracle.executors._cross_entropy import FewClassCrossEntropy
from finfluence.runs.oracle.executors.base import Tick
from finfluence.runs.oracle.problem import Job, Problem, diverged
from finfluence.runs.tasks import measurement

Randomness = Literal["error", "different"]
_TICK_STEPS = 25
_WINDOW = 256  # steps between looks at the losses, so that the device is not waited for at every step
_RANDOM_STATE = threading.Lock()


class StackedData:
    """A dataset as tensors, from which the batches of many models are gathered in one call.

    Args:
        problem: its dataset is collated once, whole.
        device: where the tensors are kept.

    Raises:
        OracleError: the dataset's batch holds something other than tensors, or changes from one access to the next.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        whole = take(problem.dataset, np.arange(problem.n), collate=problem.collate, device=device)
        self.leaves, self.spec = pytree.tree_flatten(whole)
        for leaf in self.leaves:
            if leaf is not None and not (isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == problem.n):
                shape = f" of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else ""
                raise OracleError(
                    f"executor 'ensemble' needs batches of tensors with one row a sample, got "
                    f"{type(leaf).__name__}{shape}; change the collate function or use executor='processes'"
                )
        first = pytree.tree_leaves(take(problem.dataset, np.arange(1), collate=problem.collate, device=device))
        for leaf, again in zip(self.leaves, first, strict=True):
            # a shape may differ where samples are padded to the longest of a batch
            same_shape = isinstance(leaf, Tensor) and leaf.shape[1:] == again.shape[1:]
            if same_shape and not torch.equal(torch.nan_to_num(leaf[:1]), torch.nan_to_num(again)):
                raise OracleError(
                    "the dataset gives a sample differently each time (random augmentation?), and executor 'ensemble' "
                    "reads it only once; use executor='processes'"
                )

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return sum(leaf[:1].numel() * leaf.element_size() for leaf in self.leaves if leaf is not None)

    def gather(self, rows: Tensor) -> list[Tensor | None]:
        """Leaves (M, w, ...) of the given rows, (M, w)."""
        flat = rows.reshape(-1)
        return [
            None if leaf is None else leaf.index_select(0, flat).view(*rows.shape, *leaf.shape[1:])
            for leaf in self.leaves
        ]


class StackedTraining:
    """M trainings that step together; all have the same number of steps and the same checkpoints.

    Args:
        problem: what is trained and measured.
        jobs: the M trainings.
        data: the problem's dataset.
        queries: batches on the data's device, by name.
        template: the model of fixed runs, and the structure of all.
        randomness: "different" where the model draws random numbers (dropout), else "error".
    """

    def __init__(
        self,
        problem: Problem,
        jobs: Sequence[Job],
        *,
        data: StackedData,
        queries: dict[str, Any],
        template: nn.Module,
        randomness: Randomness,
    ) -> None:
        self.problem, self.jobs, self.data, self.queries = problem, list(jobs), data, queries
        self.randomness: Randomness = randomness
        self.module = copy.deepcopy(template)  # functional_call swaps its parameters, so every thread needs its own
        self.device = model_device(self.module)
        stacked = self._start()
        trained = [name for name, p in self.module.named_parameters() if p.requires_grad]
        if not trained:
            raise InputError("the model has no trainable parameter; set requires_grad on what should be trained")
        self.rest = {name: tensor for name, tensor in stacked.items() if name not in trained}
        self.storage = {name: stacked[name] for name in trained}
        self.axes = {name: tuple(range(tensor.dim())) for name, tensor in self.storage.items()}
        self.views = {name: tensor.requires_grad_() for name, tensor in self.storage.items()}
        self.optimizer: torch.optim.Optimizer | None = None

    def _start(self) -> dict[str, Tensor]:
        """Initial state of the M models, stacked; frozen parameters are shared where all runs start from one model."""
        count, problem = len(self.jobs), self.problem
        if problem.initialisation == "fixed":
            state = {n: p for n, p in self.module.named_parameters() if p.requires_grad} | dict(
                self.module.named_buffers()
            )
            return {n: t.detach().unsqueeze(0).repeat(count, *[1] * t.dim()) for n, t in state.items()}
        with _RANDOM_STATE:
            models = [problem.build_model(job) for job in self.jobs]
        states = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
        return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything stacked that the model is called with."""
        return self.views | self.rest

    def _vmapped(
        self, function: Callable[..., Tensor], in_dims: Any, chunk_size: int | None = None
    ) -> Callable[..., Tensor]:
        return vmap(function, in_dims=in_dims, randomness=self.randomness, chunk_size=chunk_size)

    def _call(self, state: dict[str, Tensor]) -> Callable[..., Any]:
        return lambda *args, **kwargs: functional_call(self.module, state, args, kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """The plan's precision as a context."""
        if self.problem.plan.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def losses(self, batches: StepBatches) -> Tensor:
        """(M,) weighted sums of the losses of one step's batches."""
        rows = torch.from_numpy(batches.rows).to(self.device)
        weights = torch.from_numpy(batches.weights).to(self.device)

        def weighted(state: dict[str, Tensor], leaves: list[Any], weights: Tensor) -> Tensor:
            batch = pytree.tree_unflatten(leaves, self.data.spec)
            losses = self.problem.task.losses(self._call(state), batch)
            if losses.shape != weights.shape:
                raise InputError(
                    f"Task.losses must return one loss a sample, shape {tuple(weights.shape)}, "
                    f'got {tuple(losses.shape)}; use reduction="none"'
                )
            return (losses * weights).sum()

        leaves = self.data.gather(rows)
        dims = (0, [None if leaf is None else 0 for leaf in leaves], 0)
        with self.autocast(), FewClassCrossEntropy():
            return self._vmapped(weighted, dims)(self.state, leaves, weights)

    def gradients(self, losses: Tensor) -> dict[str, Tensor]:
        """Every model's gradient, stacked, clipped as the plan says."""
        found = torch.autograd.grad(losses.sum(), list(self.views.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(view) if gradient is None else gradient
            for (name, view), gradient in zip(self.views.items(), found, strict=True)
        }
        if (limit := self.problem.plan.clip_norm) is not None:
            squares = [g.square().sum(dim=tuple(range(1, g.dim()))) for g in gradients.values()]
            norms = torch.stack(squares).sum(0).sqrt()
            # as torch.nn.utils.clip_grad_norm_
            factors = torch.clamp(limit / (norms + 1e-6), max=1.0)
            gradients = {n: g * factors.view(-1, *[1] * (g.dim() - 1)) for n, g in gradients.items()}
        return gradients

    def _begin(self, gradients: dict[str, Tensor]) -> None:
        """Lays the parameters out in memory as their gradients come, which saves a transposed copy at every step."""
        for name, gradient in gradients.items():
            order = sorted(range(1, gradient.dim()), key=lambda d: -gradient.stride(d))
            self.axes[name] = (0, *order)
            stored = self.storage[name].detach().permute(self.axes[name]).contiguous()
            self.storage[name] = stored
            self.views[name] = stored.permute(tuple(np.argsort(self.axes[name]).tolist())).requires_grad_()
        self.optimizer = self.problem.plan.optimizer.build(list(self.storage.values()))
        if all(t.dtype in (torch.float32, torch.float64) for t in self.storage.values()):
            for group in self.optimizer.param_groups:
                group["fused"] = True  # one pass over memory; the configurations offer no such option of their own

    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        """One optimizer step of all models."""
        if self.optimizer is None:
            self._begin(gradients)
        assert self.optimizer is not None
        for name, tensor in self.storage.items():
            tensor.grad = gradients[name].permute(self.axes[name]).contiguous()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def measure(self, sample_bytes: int) -> np.ndarray:
        """(M, queries) measurements of all models.

        Args:
            sample_bytes: what a model's forward pass takes for one sample; bounds how many models are measured at once.
        """
        columns = []
        state = {name: tensor.detach() for name, tensor in self.state.items()}
        for query in self.queries.values():

            def measured(state: dict[str, Tensor], query: Any = query) -> Tensor:
                return measurement(self.problem.task, self._call(state), query)

            at_once = max(1, _MEASURE_BYTES // max(1, sample_bytes * (batch_length(query) or 1)))
            with torch.no_grad(), evaluating(self.module), self.autocast(), FewClassCrossEntropy():
                values = self._vmapped(measured, 0, at_once if at_once < len(self.jobs) else None)(state)
            if values.shape != (len(self.jobs),):
                raise InputError(f"Task.measure must return a scalar, got shape {tuple(values.shape[1:])}")
            columns.append(values.double().cpu().numpy())
        return np.stack(columns, axis=1)

    def train(self, sample_bytes: int, *, tick: Tick, stop: threading.Event) -> tuple[np.ndarray, list[str | None]]:
        """Trains all models to the end.

        Args:
            sample_bytes: see `measure`.
            tick: told how many model steps were done.
            stop: ends the training early when set.

        Returns:
            (M, checkpoints, queries) measurements, and for each model what went wrong in it, if anything.

        Raises:
            InterruptedError: `stop` was set.
        """
        checkpoints = self.problem.checkpoints(self.jobs[0].arm)
        total = checkpoints[-1]
        plan, watch = self.problem.plan, _LossWatch(len(self.jobs))
        values = np.full((len(self.jobs), len(checkpoints), len(self.queries)), np.nan)
        for step, batches in enumerate(self._orders().steps(total)):
            if stop.is_set():
                raise InterruptedError
            losses = self.losses(batches)
            watch.add(losses.detach())
            rate = plan.optimizer.lr * plan.schedule.factor(step, total)
            self.step(self.gradients(losses), rate)
            if step + 1 in checkpoints:
                values[:, checkpoints.index(step + 1)] = self.measure(sample_bytes)
            if (step + 1) % _TICK_STEPS == 0:
                tick(len(self.jobs) * _TICK_STEPS)
        return values, watch.errors()

    def _orders(self) -> BatchOrders:
        double = next(iter(self.storage.values())).dtype == torch.float64
        return BatchOrders(self.problem, self.jobs, dtype=np.float64 if double else np.float32)

    def first_batches(self) -> StepBatches:
        """The batches of the first step."""
        return next(self._orders().steps(1))


_MEASURE_BYTES = 64 << 20


class _LossWatch:
    """Finds the first step at which a model's loss was not finite."""

    def __init__(self, count: int) -> None:
        self.steps = 0
        self.found: list[str | None] = [None] * count
        self.window: list[Tensor] = []

    def add(self, losses: Tensor) -> None:
        self.window.append(losses)
        if len(self.window) == _WINDOW:
            self._look()

    def _look(self) -> None:
        if self.window:
            seen = torch.stack(self.window).float().cpu().numpy()
            for m in np.flatnonzero(~np.isfinite(seen).all(axis=0)):
                step = int(np.flatnonzero(~np.isfinite(seen[:, m]))[0])
                self.found[m] = self.found[m] or diverged(float(seen[step, m]), self.steps + step)
            self.steps += len(self.window)
            self.window = []

    def errors(self) -> list[str | None]:
        self._look()
        return self.found


@contextlib.contextmanager
def one_thread_each(workers: int) -> Iterator[None]:
    """With several workers, every one computes on one thread; afterwards torch's setting is as before."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
