"""traker: TRAK over independently trained models (their last checkpoints), float32 projections on the CPU."""

from __future__ import annotations

import tempfile

import torch
from trak import TRAKer  # pyright: ignore[reportMissingImports]

from benchmarks.peers.common import Found, Problem, State, run_adapter


def _trak(problem: Problem, states: list[State]) -> Found:
    n, k = len(problem.train), len(problem.queries)
    dimension = min(2048, n // 2)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=problem.model,
            task="image_classification",
            train_set_size=n,
            save_dir=folder,
            device="cpu",
            proj_dim=dimension,
            use_half_precision=False,
            logging_level=50,
        )
        batch = [t.clone() for t in problem.train.tensors]
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for start in range(0, n, 250):
                part = [t[start : start + 250] for t in batch]
                traker.featurize(batch=part, num_samples=len(part[0]))
        traker.finalize_features()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("queries", state, model_id=number, num_targets=k)
            for start in range(0, k, 250):
                part = [t[start : start + 250] for t in problem.queries.tensors]
                traker.score(batch=part, num_samples=len(part[0]))
        scores = traker.finalize_scores("queries")
    settings = f"{len(states)} models, projection to {dimension} dimensions"
    return Found(settings, torch.from_numpy(scores.astype("float32")).T.clone())


def single(problem: Problem) -> Found:
    return _trak(problem, problem.checkpoints[-1:])


def ensemble(problem: Problem) -> Found:
    return _trak(problem, problem.ensemble or problem.checkpoints[-1:])


if __name__ == "__main__":
    run_adapter("traker", {"single": single, "ensemble": ensemble})
