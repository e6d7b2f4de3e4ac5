"""dattri: TracIn, the influence function, TRAK and EK-FAC."""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm import (  # pyright: ignore[reportMissingImports]
    IFAttributorCG,
    IFAttributorEKFAC,
    IFAttributorExplicit,
    TracInAttributor,
    TRAKAttributor,
)
from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.peers.common import Found, Problem, run_adapter, sample_loss


def _loaders(problem: Problem) -> tuple[Any, Any]:
    return (
        DataLoader(problem.train, batch_size=len(problem.train), shuffle=False),
        DataLoader(problem.queries, batch_size=len(problem.queries), shuffle=False),
    )


def _task(problem: Problem, checkpoints: Any) -> AttributionTask:
    model = problem.model
    return AttributionTask(lambda p, d: sample_loss(model, p, d), model, checkpoints)


def tracin(problem: Problem) -> Found:
    task = _task(problem, problem.checkpoints)
    method = TracInAttributor(task, weight_list=torch.tensor(problem.rates), normalized_grad=False)
    train, queries = _loaders(problem)
    with torch.no_grad():
        scores = method.attribute(train, queries).T
        own = method.self_attribute(train)
    return Found(f"{len(problem.checkpoints)} checkpoints, weighted by the learning rate", scores, own)


def influence(problem: Problem) -> Found:
    """Exact inverse Hessian where the network is small, conjugate gradients elsewhere."""
    model = problem.model

    def mean_loss(parameters: Any, batch: Any) -> Tensor:
        x, y = batch
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    def single(parameters: Any, batch: Any) -> Tensor:
        x, y = batch
        if x.ndim == 1:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        return mean_loss(parameters, (x, y))

    task = AttributionTask(single, model, problem.checkpoints[-1])
    train, queries = _loaders(problem)
    if problem.parameters <= 5000:
        method, how = IFAttributorExplicit(task, regularization=1e-2), "explicit Hessian"
    else:
        method, how = IFAttributorCG(task, max_iter=10, regularization=1e-2), "conjugate gradients, 10 iterations"
    method.cache(train)
    scores = method.attribute(train, queries).T
    return Found(f"last checkpoint, {how}, regularization 0.01", scores)


def trak(problem: Problem) -> Found:
    model = problem.model
    dimension = min(2048, len(problem.train) // 2)

    def log_odds(parameters: Any, sample: Any) -> Tensor:
        p = torch.exp(-sample_loss(model, parameters, sample))
        return torch.log(p / (1 - p + 1e-6))

    def probability(parameters: Any, sample: Any) -> Tensor:
        return torch.exp(-sample_loss(model, parameters, sample))

    states = problem.ensemble or problem.checkpoints[-1:]
    task = AttributionTask(log_odds, model, states)
    method = TRAKAttributor(
        task, probability, projector_kwargs={"proj_dim": dimension, "device": "cpu"}, regularization=1e-6
    )
    train, queries = _loaders(problem)
    with torch.no_grad():
        method.cache(train)
        scores = method.attribute(queries).T
    return Found(f"{len(states)} models, projection to {dimension} dimensions", scores)


def ekfac(problem: Problem) -> Found:
    model = problem.model

    def mean_loss(parameters: Any, batch: Any) -> Tensor:
        x, y = batch
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    task = AttributionTask(mean_loss, model, problem.checkpoints[-1])
    method = IFAttributorEKFAC(task, damping=1e-2)
    batches = [DataLoader(data, batch_size=250, shuffle=False) for data in (problem.train, problem.queries)]
    method.cache(batches[0])
    scores = method.attribute(*batches).T
    return Found("last checkpoint, linear layers, damping 0.01", scores)


if __name__ == "__main__":
    run_adapter("dattri", {"tracin": tracin, "influence": influence, "trak": trak, "ekfac": ekfac})
