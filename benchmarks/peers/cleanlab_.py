"""cleanlab: label quality (self-confidence) and label issues from out-of-sample probabilities of cross-validation."""

from __future__ import annotations

from cleanlab.filter import find_label_issues  # pyright: ignore[reportMissingImports]
from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

from benchmarks.peers.common import Found, Problem, run_adapter


def quality(problem: Problem) -> Found:
    labels, probabilities = problem.train.tensors[1].numpy(), problem.extra["probabilities"]
    return Found(
        "5-fold cross-validated probabilities, self_confidence; issues by prune_by_noise_rate",
        own=-get_label_quality_scores(labels, probabilities),
        flagged=find_label_issues(labels, probabilities, n_jobs=1),
    )


if __name__ == "__main__":
    run_adapter("cleanlab", {"quality": quality})
