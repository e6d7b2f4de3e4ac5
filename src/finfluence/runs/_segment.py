"""One segment of a replay: re-executed forwards from a stored state, then walked backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finfluence.errors import ReplayError
from finfluence.gradients import HookedDerivatives
from finfluence.runs._batch_terms import BatchTerms, DifferenceTerms, ExactTerms, directions_of
from finfluence.runs._identity import tolerance
from finfluence.runs._trajectory import Trajectory, kept_vectors
from finfluence.runs.engine import Engine
from finfluence.runs.panel import NoisePanel, panel_signals
from finfluence.runs.replay_plan import ReplayOptions
from finfluence.runs.sampling import Batch
from finfluence.sensitivity import AdjointMonitor, FlatUpdate, HessianMethod, Settled, States, clip_vjp


class StepSignals(NamedTuple):
    """What one step gave.

    Attributes:
        batch: its samples.
        values: (b, n_queries) float64 signals.
        panel: (m, n_queries) float64 signals of the panel; None where the step is not on its grid.
        norms: of each query's adjoint before the step.
        residuals: of the signal identity, relative, of each query.
    """

    batch: Batch
    values: np.ndarray
    panel: np.ndarray | None
    norms: tuple[float, ...]
    residuals: tuple[float, ...]


class SegmentWalker:
    """Walks segments of a run: forwards with the training's own step, backwards with the adjoint.

    A query that diverges goes on as zeros, so that the others are not lost, and is named in `diverged`.

    Args:
        engine: the training.
        update: its update as a function of flat vectors.
        options: of the replay.
        panel: noise panel; None for none.
        monitor: watches the adjoint's norm; knows the queries' names.
        diverged: what was found before, by query.
        settled: of the update at the end of the run; None for none.
        longest: steps of the longest segment.
        measured: weight, in the mean that is asked about, of the measurement before each step that has one.
        gradients: (n_queries, size) ∇m where the model is.
    """

    def __init__(
        self,
        engine: Engine,
        update: FlatUpdate,
        *,
        options: ReplayOptions,
        panel: NoisePanel | None,
        monitor: AdjointMonitor,
        diverged: dict[str, str],
        settled: Settled | None,
        longest: int,
        measured: Mapping[int, float],
        gradients: Callable[[], Tensor],
    ) -> None:
        self.engine, self.update, self.options, self.panel, self.monitor = engine, update, options, panel, monitor
        self.diverged, self.settled = diverged, settled
        self._measured, self._gradients = dict(measured), gradients
        self.hooks = HookedDerivatives(engine.model, engine.parameters)
        self.members = panel.members(engine.n, seed=engine.plan.seed) if panel else np.empty(0, np.int64)
        self.limit = tolerance(engine.parameters)
        clip_exactly = engine.plan.clip_norm is not None and options.clip_derivative == "exact"
        self._path = Trajectory(
            longest,
            update,
            self.flat_parameters(),
            vectors=kept_vectors(update, clip_exactly=clip_exactly),
            budget=options.memory_budget(engine.device),
        )
        if engine.plan.precision == "bfloat16-autocast":
            self.limit = max(self.limit, 2e-2)
        method: HessianMethod = options.method(engine.model)
        if method == "exact":
            self._terms: BatchTerms = ExactTerms(engine, update.layout, kinks=options.smoothing or 0.0)
        else:
            self._terms = DifferenceTerms(
                engine, update.layout, method=method, hooks=self.hooks, kinks=options.smoothing or 0.0
            )

    def flat_parameters(self, *, out: Tensor | None = None) -> Tensor:
        """(size,) the model's trainable parameters now, in `out` if given."""
        return self.update.layout.flatten({name: p.detach() for name, p in self.engine.parameters.items()}, out=out)

    def _set_parameters(self, theta: Tensor) -> None:
        self.engine.place(self.update.layout.unflatten(theta))

    def forwards(self, batches: Sequence[Batch], *, advance: Callable[[], None]) -> list[float]:
        """Re-executes the steps from the state that the engine is in, and keeps what was there before each of them.

        Args:
            batches: the segment's batches.
            advance: called after each step.

        Returns:
            Each step's loss.
        """
        engine, path = self.engine, self._path
        losses: list[float] = []
        for row, batch in enumerate(batches):
            engine.set_learning_rate(batch.step)
            losses.append(engine.backward(batch))
            theta, gradient, state = path.blank(row)
            self.flat_parameters(out=theta)
            if gradient is not None:
                found = {name: p.grad for name, p in engine.parameters.items() if p.grad is not None}
                self.update.layout.flatten(found, out=gradient)
                self.update.read_state(engine.optimizer, engine.parameters, out=state)
            path.keep(row, engine.clip())
            engine.optimizer.step()
            advance()
        return losses

    def backwards(
        self,
        batches: Sequence[Batch],
        losses: Sequence[float],
        *,
        adjoint: Tensor,
        adjoint_state: States | None,
        advance: Callable[[], None],
    ) -> tuple[Tensor, States, list[StepSignals]]:
        """Pulls the adjoint back through the steps that `forwards` has just gone, and reads off the signals.

        Args:
            batches: the segment's batches.
            losses: from `forwards`.
            adjoint: (n_queries, size) ∂m/∂θ after the segment.
            adjoint_state: the same of the optimizer's state; None at the end of the run.
            advance: called after each step.

        Returns:
            Adjoint and state adjoint before the segment, and the signals of each step in the order of steps.

        Raises:
            ReplayError: every query's adjoint has diverged, or a loss is not what it was when the step was re-executed.
        """
        found: list[StepSignals] = []
        path = self._path
        adjoint_options = self.options.adjoint
        for row in range(len(batches) - 1, -1, -1):
            batch, factor = batches[row], float(path.factors[row])
            theta, raw, state = path.point(row)
            # SGD's rule looks at neither gradient nor parameters, and its gradient is not kept.
            gradient = theta if raw is None else raw * factor if factor != 1.0 else raw
            adjoint, adjoint_state, q = self.update.vjp(
                theta,
                state,
                gradient,
                adjoint,
                adjoint_state,
                lr=self.engine.rates(batch.step),
                step=batch.step,
                options=adjoint_options,
                settled=self.settled,
                overwrite=True,
            )
            q = clip_vjp(q, gradient if raw is None else raw, factor=factor, derivative=self.options.clip_derivative)
            self._set_parameters(theta)
            values, curvature, residuals = self._batch_terms(batch, theta, q, gradient=raw, loss=losses[row])
            panel = None
            if self._on_grid(batch):
                self._set_parameters(theta)  # finite differences leave the model elsewhere
                directions = directions_of(self.update.layout, q)
                panel = panel_signals(self.engine, self.members, directions, step=batch.step, hooks=self.hooks)
                panel /= batch.denominator
            adjoint = curvature.add_(adjoint)
            if (weight := self._measured.get(batch.step)) is not None:
                self._set_parameters(theta)
                joining = self._gradients()
                joining[[name in self.diverged for name in self.monitor.queries]] = 0.0
                self.monitor.joined(joining)
                adjoint += weight * joining
            norms, bad = self.monitor.watch(batch.step, adjoint)
            if bad:
                adjoint, adjoint_state = self._drop(bad, adjoint, adjoint_state)
            found.append(StepSignals(batch, values, panel, norms, residuals))
            advance()
        assert adjoint_state is not None
        return adjoint, adjoint_state, found[::-1]

    def _drop(self, bad: dict[int, str], adjoint: Tensor, state: States) -> tuple[Tensor, States]:
        """Goes on without the queries that have diverged."""
        names = self.monitor.queries
        self.diverged.update({names[k]: message for k, message in bad.items() if names[k] not in self.diverged})
        if len(self.diverged) == len(names):
            raise ReplayError(next(iter(bad.values())))
        alive = torch.ones(len(adjoint), 1, dtype=torch.bool, device=adjoint.device)
        alive[list(bad)] = False
        return (
            torch.where(alive, adjoint, 0.0),
            tuple({key: torch.where(alive, value, 0.0) for key, value in own.items()} for own in state),
        )

    def _on_grid(self, batch: Batch) -> bool:
        return self.panel is not None and self.panel.has(batch, self.engine)

    def _batch_terms(
        self, batch: Batch, theta: Tensor, q: Tensor, *, gradient: Tensor | None, loss: float
    ) -> tuple[np.ndarray, Tensor, tuple[float, ...]]:
        """Signals (b, n_queries), Hessian-vector products (n_queries, size) and residuals of the identity."""
        if not len(batch.indices):
            return np.zeros((0, len(q))), torch.zeros_like(q), (0.0,) * len(q)
        parts = self.engine.parts(batch)
        if len(parts) > 1:
            gradient = None  # what is known is the sum over the parts
        terms = []
        for number, (indices, denominator) in enumerate(parts):
            self.engine.seed(batch.step, number)
            terms.append(self._terms.evaluate(indices, denominator, theta, q=q, gradient=gradient))
        mean = sum(t.loss for t in terms) * batch.denominator / len(batch.indices)
        self._check_loss(batch, mean, loss)
        values = torch.cat([t.values for t in terms]).double().cpu()
        expected = torch.stack([q @ t.gradient for t in terms]).double().sum(0).cpu()
        curvature = terms[0].curvature if len(terms) == 1 else torch.stack([t.curvature for t in terms]).sum(0)
        return values.numpy(), curvature, _residuals(values, expected)

    def _check_loss(self, batch: Batch, value: float, before: float) -> None:
        if abs(value - before) <= max(self.limit, 1e-9) * (1.0 + abs(before)):
            return
        raise ReplayError(
            f"the loss of step {batch.step} was {before:.6g} when the step was re-executed and {value:.6g} when it was "
            "walked back: the loss has a random source of its own, or dropout inside fused attention; draw from "
            "torch's global generators, or set hessian='one-sided'"
        )

    def close(self) -> None:
        """Takes the hooks off the model and gives the segment's memory or file back."""
        self.hooks.remove()
        self._path.close()


def _residuals(values: Tensor, expected: Tensor) -> tuple[float, ...]:
    """|Σ_i x_ik − ⟨q_k, ḡ⟩| / max(|⟨q_k, ḡ⟩|, Σ_i |x_ik|) of each query; 0 where both are 0."""
    scale = torch.maximum(expected.abs(), values.abs().sum(0))
    difference = (values.sum(0) - expected).abs()
    return tuple(torch.where(scale > 0, difference / scale, difference).tolist())
