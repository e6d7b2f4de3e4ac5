"""pyDVL: the influence function of the last checkpoint, and Data-Banzhaf values of a logistic regression.

Semi-values retrain a model thousands of times, so they are taken of a small model, as its documentation does.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.peers.common import Found, Problem, run_adapter

BANZHAF_SECONDS = 15.0


def influence(problem: Problem) -> Found:
    from pydvl.influence.torch import DirectInfluence, EkfacInfluence  # pyright: ignore[reportMissingImports]

    model = problem.model.eval()
    batches = DataLoader(problem.train, batch_size=250)
    if problem.parameters <= 5000:
        made = DirectInfluence(model, functional.cross_entropy, regularization=1e-2)
        how = "direct, exact Hessian, regularization 0.01"
    else:
        made = EkfacInfluence(model, update_diagonal=True, regularization=1e-2)
        how = "EK-FAC with updated diagonal, regularization 0.01"
    fitted = made.fit(batches)
    x, y = problem.train.tensors
    qx, qy = problem.queries.tensors
    parts = [
        fitted.influences(qx, qy, x[k : k + 250], y[k : k + 250]).detach() for k in range(0, len(problem.train), 250)
    ]
    return Found(f"last checkpoint, {how}", torch.cat(parts, dim=1))


def banzhaf(problem: Problem) -> Found:
    """Maximum-sample-reuse Monte Carlo with as many subsets as fit into a quarter of a minute, 50 to 2,000."""
    import warnings

    from pydvl.valuation import (  # pyright: ignore[reportMissingImports]
        Dataset,
        ModelUtility,
        MSRBanzhafValuation,
        SupervisedScorer,
    )
    from pydvl.valuation.stopping import MaxUpdates  # pyright: ignore[reportMissingImports]
    from sklearn.linear_model import LogisticRegression

    warnings.simplefilter("ignore")
    x, y = (t.numpy() for t in problem.train.tensors)
    qx, qy = (t.numpy() for t in problem.queries.tensors)
    train, test = Dataset(x, y), Dataset(qx, qy)
    began = time.process_time()
    LogisticRegression(max_iter=30).fit(x[::2], y[::2])
    updates = int(np.clip(BANZHAF_SECONDS / (time.process_time() - began), 50, 2000))
    scorer = SupervisedScorer("accuracy", test, default=0.0, range=(0, 1))
    utility = ModelUtility(LogisticRegression(max_iter=30), scorer)
    valuation = MSRBanzhafValuation(utility, is_done=MaxUpdates(updates), seed=0, progress=False)
    valuation.fit(train)
    found = valuation.result
    values = np.empty(len(y))
    values[np.asarray(found.indices)] = np.asarray(found.values)
    return Found(f"logistic regression, accuracy on the queries, MSR sampling, {updates} subsets", values[None, :])


if __name__ == "__main__":
    run_adapter("pyDVL", {"influence": influence, "banzhaf": banzhaf})
