"""bergson: EK-FAC influence and TrackStar at the last checkpoint, over the adapters' gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bergson.build import build_query  # pyright: ignore[reportMissingImports]
from bergson.cli.trackstar import trackstar as run_trackstar  # pyright: ignore[reportMissingImports]
from bergson.config.config import (  # pyright: ignore[reportMissingImports]
    DataConfig,
    DistributedConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
)
from bergson.data import load_scores  # pyright: ignore[reportMissingImports]
from bergson.hessians.pipeline import hessian_pipeline  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]

from benchmarks.peers.common import Found, run_adapter
from benchmarks.peers.text import TextProblem, read_text_problem


def _dataset(problem: TextProblem, name: str) -> str:
    """Rows where bergson reads them without a copy in the user's cache."""
    place = problem.path(f"bergson/{name}-rows")
    Dataset.from_list(problem.lines(name)).save_to_disk(place)
    return place


def _index(problem: TextProblem, kind: type, name: str, **more: object) -> IndexConfig:
    """What all its steps are told: where the model and the rows are; the rest as bergson has it."""
    return kind(
        run_path=problem.path(f"bergson/{name}"),
        model=problem.path(problem.checkpoints[-1]),
        tokenizer=problem.path("base"),
        data=DataConfig(dataset=problem.path("bergson/train-rows")),
        distributed=DistributedConfig(nproc_per_node=1),
        loss_reduction=problem.loss,
        # A quarter of its default, for memory: nothing else changes than the labels that EK-FAC samples.
        token_batch_size=512,
        **more,
    )


def _scores(problem: TextProblem, name: str) -> np.ndarray:
    found = load_scores(Path(problem.path(f"bergson/{name}/scores")))
    if not found.is_written():
        raise RuntimeError("bergson left rows without a score")
    return np.array(found[:]).T


def ekfac(problem: TextProblem) -> Found:
    _dataset(problem, "train")
    # The query is a mean per token whatever rows are trained on, so its gradients are built by themselves.
    asked = QuerySetConfig(dataset=_dataset(problem, "query"))
    query = _index(problem, IndexConfig, "query")
    query.loss_reduction = "mean"
    asked.path = build_query(query, asked, PreprocessConfig())
    hessian_pipeline(
        _index(problem, IndexConfig, "ekfac"),
        HessianConfig(method="kfac", ev_correction=True),
        ScoreConfig(),
        PreprocessConfig(),
        HessianPipelineConfig(query=asked),
    )
    return Found("last checkpoint, sampled labels, damping 0.1 of the mean eigenvalue", _scores(problem, "ekfac"))


def trackstar(problem: TextProblem) -> Found:
    _dataset(problem, "train")
    run_trackstar(
        _index(problem, TrackstarIndexConfig, "trackstar", optimizer_state=problem.path(problem.checkpoints[-1])),
        TrackstarConfig(
            query=QuerySetConfig(dataset=_dataset(problem, "query")),
            preprocess_cfg=PreprocessConfig(unit_normalize=True),
        ),
    )
    settings = "last checkpoint, gradients over Adam's root second moments, projection 16, mixed Hessians, unit norm"
    return Found(settings, _scores(problem, "trackstar"))


if __name__ == "__main__":
    run_adapter("bergson", {"ekfac": ekfac, "trackstar": trackstar}, reader=read_text_problem)
