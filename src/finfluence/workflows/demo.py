"""What the demonstration prints about a run whose wrong labels are known."""

from __future__ import annotations

from finfluence.influence import Detection, detection
from finfluence.runs.run import Run


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
