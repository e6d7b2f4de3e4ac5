"""What the demonstration measures about a run whose wrong labels are known."""

from __future__ import annotations

import numpy as np
import torch

from finfluence.influence import Detection, detection
from finfluence.runs.engine import Engine, isolated_rng
from finfluence.runs.run import Run
from finfluence.workflows.recipes import Recipe


def detection_scores(run: Run, query: str) -> dict[str, Detection]:
    """How well low μ finds the planted samples, by live and by replayed signals.

    Args:
        run: a run whose sample table has a boolean column "planted".
        query: name of the query.

    Returns:
        AUROC and average precision under "live" and, where the run was replayed, "replay".
    """
    planted = run.samples()["planted"].to_numpy()
    kinds = {"live": "live", "replay": "run"} if run.sensitivity == "both" else {run.sensitivity: "run"}
    scores: dict[str, Detection] = {}
    for name, sensitivity in kinds.items():
        mu = run.influence(query, sensitivity=sensitivity)["mu"].to_numpy()  # pyright: ignore[reportArgumentType]
        scores[name] = detection(-mu, planted)
    return scores


def held_out_accuracy(recipe: Recipe, removed: np.ndarray, *, runs: int = 16) -> np.ndarray:
    """Accuracy on the recipe's held-out data of models that were trained without some samples.

    Args:
        recipe: a classification, with held-out data that are one pair of tensors.
        removed: (k,) rows of its data set to leave out; may be empty.
        runs: trainings, each with its own batch order and the recorded run's initial parameters.

    Returns:
        (runs,) accuracies.
    """
    n = len(recipe.dataset)
    kept = np.setdiff1d(np.arange(n), removed)
    inputs, labels = recipe.held_out.tensors
    found = np.empty(runs)
    with isolated_rng(torch.device("cpu")):
        for i in range(runs):
            model = recipe.make_model(recipe.plan.seed)
            # batches are cut for all n samples, so that both arms take the same number of steps
            engine = Engine(
                recipe.task,
                model,
                dataset=recipe.dataset,
                plan=recipe.plan.with_seed(recipe.plan.seed + 1 + i),
                subset=kept,
                population=n,
            )
            for batch in engine.batches():
                engine.step(batch)
            with torch.no_grad():
                found[i] = float((model(inputs).argmax(dim=1) == labels).double().mean())
    return found
