"""`Recorder` beside AMP's loss scaling: steps that an overflow skips leave no signals, and the scale is found."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from runs_problems import N, NoRecorder, batches, measures, model, parameters
from torch import nn
from torch.nn import functional

import finfluence as fi

criterion = functional.cross_entropy


def scaled_loop(
    net: nn.Module, optimizer: Any, recorder: Any, *, unscale: bool, to_none: bool, accumulate: int
) -> list[bool]:
    """Float32 training with loss scaling; the scale is raised so far at one step that the gradient overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    taken = []
    for number, (ids, x, y) in enumerate(batches(dtype=torch.float32)):
        if number == 4:
            scaler.update(2.0**126)
        with recorder.batch(ids):
            # scaled twice: the loss itself stays finite, its gradient overflows at the large scale
            scaler.scale(criterion(net(x) * 50, y) * 50 / accumulate).backward()
        if (number + 1) % accumulate:
            continue
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        before = parameters(net).clone()
        scaler.step(optimizer)
        scaler.update(2.0**10 if scaler.get_scale() > 2.0**40 else None)
        optimizer.zero_grad(set_to_none=to_none)
        taken.append(not torch.equal(before, parameters(net)))
    return taken


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_scaling_with_an_overflow(tmp_path: Path, unscale: bool, to_none: bool, accumulate: int) -> None:
    nets = [model(3, dtype=torch.float32) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.5) for net in nets]
    how: dict[str, Any] = {"unscale": unscale, "to_none": to_none, "accumulate": accumulate}
    taken = scaled_loop(nets[0], optimizers[0], NoRecorder(), **how)
    queries = measures(torch.float32)
    with fi.Recorder(nets[1], optimizers[1], queries=queries, directory=tmp_path / "run") as recorder:
        scaled_loop(nets[1], optimizers[1], recorder, **how)
    assert torch.equal(parameters(nets[0]), parameters(nets[1]))
    assert taken.count(False) == 1
    run = fi.open_run(tmp_path / "run")
    steps = run.steps()
    assert steps["skipped"].to_list() == [not t for t in taken]
    assert steps["nonfinite"].to_list() == [not t for t in taken]
    assert run.manifest["skipped_steps"] == 1
    kept = steps.filter(~pl.col("skipped"))
    assert kept["residual"].max() < 1e-4  # pyright: ignore[reportOperatorIssue]
    if not unscale:
        np.testing.assert_allclose(kept["scale"].to_numpy(), 2.0**-10, rtol=1e-5)
    skipped = steps.filter(pl.col("skipped"))["step"].item()
    assert skipped not in run.signals().collect()["step"].to_list()
    assert run.influence("first").height == N
