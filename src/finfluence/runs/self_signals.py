"""Self-influence: what each sample's share of a step does to the loss on that very sample.

x_ii = ⟨q_t^(i), w_i ∇ℓ_i⟩ with the live sensitivity of sample i's own loss, q_t^(i) = (∂U_t/∂ḡ_t)ᵀ ∇ℓ_i: under SGD
−lr·w_i·‖∇ℓ_i‖² (TracIn, arXiv 2002.08484, section 3), under Adam the same with every element preconditioned. It needs
the per-sample gradients themselves, unlike every other signal: one forward and backward pass over the batch by vmap,
about the cost of another training step, and memory for a chunk of gradients. Models that vmap cannot follow (fused
attention, masks made of data) are read by hooks, if all their trained layers have closed forms, else row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap

from finfluence.errors import RecordingError
from finfluence.gradients import HookedDerivatives, check_model, evaluating
from finfluence.runs.data import batch_length, take
from finfluence.runs.engine import Engine
from finfluence.runs.sampling import Batch
from finfluence.runs.tasks import FunctionalModel
from finfluence.sensitivity import from_torch, learning_rates, live_directions

# Per-sample gradients that are held at a time; the same again is needed for the activations of the pass.
CHUNK_BYTES = 1 << 28

Gradients = dict[str, Tensor]
SelfInfluence = Literal["none", "record", "all"]

_PARTS = 3


def self_steps(total_steps: int) -> frozenset[int]:
    """The steps at which self_influence="all" looks at every sample: the middles of three equal parts of the run."""
    return frozenset(total_steps * (2 * part + 1) // (2 * _PARTS) for part in range(_PARTS))


class SelfSignals:
    """The signal of every sample of a batch on its own loss.

    Losses and their gradients are taken in evaluation mode: without dropout, so that nothing random enters.

    Args:
        engine: the training.
        chunk_bytes: memory for per-sample gradients; bounds how many samples are differentiated together.
    """

    def __init__(self, engine: Engine, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.engine = engine
        self._rules = from_torch(engine.optimizer, engine.parameters)
        per_sample = sum(p.numel() * p.element_size() for p in engine.parameters.values())
        self._chunk = max(1, chunk_bytes // per_sample)
        self._micro = -(-engine.plan.batch_size // engine.plan.accumulation)
        self._vectorised = True
        self._hooks: HookedDerivatives | None = None
        self._hookable, self._verified = True, False

    def values(self, batch: Batch) -> np.ndarray:
        """The signals of a batch at the parameters and optimizer state before its step, before clipping.

        Args:
            batch: the step's batch.

        Returns:
            (b,) float64, in units of the sample's loss.
        """
        if not len(batch.indices):
            return np.empty(0)
        weights = self._preconditioner()
        with evaluating(self.engine.model):
            check_model(self.engine.model)
            parts = [
                _weighted_squares(gradients, weights)
                for rows in np.array_split(batch.indices, -(-len(batch.indices) // self._chunk))
                for gradients in self._gradients(rows)
            ]
        return torch.cat(parts).double().cpu().numpy() / batch.denominator

    def _preconditioner(self) -> Gradients:
        """Diagonal of ∂U_t/∂ḡ_t by parameter: the optimizers of a Plan are elementwise."""
        optimizer, parameters = self.engine.optimizer, self.engine.parameters
        return live_directions(
            self._rules,
            {name: optimizer.state.get(p, {}) for name, p in parameters.items()},
            {name: torch.ones_like(p) for name, p in parameters.items()},
            rates=learning_rates(optimizer),
            parameters=parameters,
        )

    def _gradients(self, rows: np.ndarray) -> Iterator[Gradients]:
        """Gradients of samples, each tensor with a leading axis: of all rows at once, or row by row."""
        engine = self.engine
        data = take(engine.dataset, rows, collate=engine.collate, device=engine.device)
        if self._vectorised and batch_length(data) == len(rows):
            try:
                yield _vectorised_gradients(engine, data)
                return
            except (RuntimeError, TypeError, ValueError, AttributeError):
                # Control flow that depends on data, or an operation without a batching rule; a true error of the
                # model shows again in the loop.
                self._vectorised = False
        done = 0
        if self._hookable and len(rows) > 1:
            try:
                # in parts as large as training's: what the activations of a chunk take is not known
                for part in np.array_split(rows, -(-len(rows) // self._micro)):
                    yield self._hooked_gradients(part)
                    done += len(part)
            except (RecordingError, NotImplementedError):
                self._hookable = False
                self.close()
        for row in rows[done:]:
            loss = engine.losses(engine.model, np.array([row])).sum()
            found = torch.autograd.grad(
                loss, list(engine.parameters.values()), allow_unused=True, materialize_grads=True
            )
            yield {name: g[None] for name, g in zip(engine.parameters, found, strict=True)}

    def _hooked_gradients(self, rows: np.ndarray) -> Gradients:
        """Gradients of all rows from the layers' inputs and output gradients.

        Raises:
            RecordingError: a trained layer has no closed form, or the gradients of the first rows do not sum to the
                batch's (a parameter that is used outside its layer).
            NotImplementedError: samples do not stand in rows of their own.
        """
        engine = self.engine
        if self._hooks is None:
            self._hooks = HookedDerivatives(engine.model, engine.parameters)
        parameters, whole = list(engine.parameters.values()), None
        with self._hooks.record_gradients(len(rows)) as recording:
            total = engine.losses(engine.model, rows).sum()
            if self._verified:
                self._hooks.backward(total)
            else:
                whole = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        assert recording.gradients is not None
        found = {
            name: recording.gradients[name] if name in recording.gradients else p.new_zeros(len(rows), *p.shape)
            for name, p in engine.parameters.items()
        }
        if whole is not None:
            self._check(found, dict(zip(found, whole, strict=True)))
        return found

    def _check(self, found: Gradients, whole: Gradients) -> None:
        missing = sum(float((g.sum(0) - whole[name]).double().square().sum()) for name, g in found.items())
        size = sum(float(g.double().square().sum()) for g in whole.values())
        low = self._hooks is not None and self._hooks.low_precision
        if not missing <= (1e-2 if low else 1e-5) * size:  # squares: a relative difference of a tenth, or of 0.003
            raise RecordingError("the gradients of single samples do not sum to that of the batch")
        self._verified = True

    def close(self) -> None:
        """Takes what was put on the model off again."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None


def _vectorised_gradients(engine: Engine, data: Any) -> Gradients:
    parameters = {name: p.detach() for name, p in engine.parameters.items()}

    def loss(values: Gradients, sample: Any) -> Tensor:
        one = _mapped(sample, lambda tensor: tensor[None])
        with engine.autocast():
            return engine.task.losses(FunctionalModel(engine.model, values), one).sum()

    axes = _mapped(data, lambda tensor: 0, other=None)
    return vmap(grad(loss), in_dims=(None, axes))(parameters, data)


def _mapped(data: Any, change: Callable[[Tensor], Any], *, other: Any = ...) -> Any:
    """The same nested batch with every tensor changed; anything else stays, or becomes `other`."""
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, Mapping):
        return {key: _mapped(value, change, other=other) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return type(data)(_mapped(value, change, other=other) for value in data)
    return data if other is ... else other


def _weighted_squares(gradients: Gradients, weights: Gradients) -> Tensor:
    total: Tensor | None = None
    for name, g in gradients.items():
        part = (g.square() * weights[name]).flatten(1).sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
        total = part if total is None else total + part
    assert total is not None
    return total
