"""On a CUDA GPU: a stacked ensemble gives what single trainings there give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle_problems import experiment, jobs_of, largest_difference, outcomes_of

from finfluence.runs.oracle import Ensemble
from finfluence.sensitivity import AdamW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("changes", [{}, {"optimizer": AdamW(lr=0.03), "clip_norm": 0.3}], ids=["sgd", "adamw"])
def test_equals_single_trainings(tmp_path: Any, changes: dict[str, Any]) -> None:
    problem = experiment(tmp_path, device="cuda", **changes).problem
    jobs = jobs_of(problem, 3)
    assert largest_difference(outcomes_of(Ensemble(), problem, jobs), problem) < 1e-4


def test_influence_agrees_with_the_cpu(tmp_path: Any) -> None:
    """The same seeds give the same batches on both, so the two differ by float32 rounding alone."""
    found = {}
    for device in ("cuda", "cpu"):
        with experiment(tmp_path / device, device=device) as retraining:
            truth = retraining.extend(24)
        found[device] = truth.influence("several")["mu"].to_numpy()
    np.testing.assert_allclose(found["cuda"], found["cpu"], atol=2e-2)
