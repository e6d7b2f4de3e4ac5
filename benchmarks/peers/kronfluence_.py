"""kronfluence: EK-FAC influence of the last checkpoint, damping by its own heuristic (damping_factor=None)."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model  # pyright: ignore[reportMissingImports]
from kronfluence.arguments import FactorArguments, ScoreArguments  # pyright: ignore[reportMissingImports]
from kronfluence.task import Task  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers.common import Found, Problem, run_adapter


class _Classification(Task):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        logits = model(x)
        if sample:
            with torch.no_grad():
                y = torch.multinomial(logits.softmax(-1), num_samples=1).flatten()
        return functional.cross_entropy(logits, y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def ekfac(problem: Problem) -> Found:
    task = _Classification()
    model = prepare_model(problem.model, task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("scores", model, task, cpu=True, disable_tqdm=True, log_level=50, output_dir=folder)
        analyzer.fit_all_factors(
            "factors",
            problem.train,
            per_device_batch_size=256,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
        options = ScoreArguments(damping_factor=None)
        analyzer.compute_pairwise_scores(
            "pairs",
            "factors",
            query_dataset=problem.queries,
            train_dataset=problem.train,
            per_device_query_batch_size=64,
            per_device_train_batch_size=256,
            score_args=options,
            overwrite_output_dir=True,
        )
        scores = analyzer.load_pairwise_scores("pairs")["all_modules"]
        analyzer.compute_self_scores(
            "own",
            "factors",
            train_dataset=problem.train,
            per_device_train_batch_size=256,
            score_args=options,
            overwrite_output_dir=True,
        )
        own = analyzer.load_self_scores("own")["all_modules"]
    return Found("last checkpoint, strategy ekfac, sampled labels, damping_factor=None", scores.clone(), own.clone())


if __name__ == "__main__":
    run_adapter("kronfluence", {"ekfac": ekfac})
