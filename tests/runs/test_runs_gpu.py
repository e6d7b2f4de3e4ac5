"""On a CUDA GPU: signals, replays and panels equal those on the CPU, and recording still changes nothing.

Everything is float64 where two devices are compared, so that only a wrong device, generator or copy can tell them
apart. Where there is no GPU these tests say that they were skipped.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import replay_problems
import runs_problems
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import finfluence as fi
from finfluence.errors import FinfluenceWarning
from finfluence.runs import ReplayOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

OPTIMIZERS = {"momentum": fi.SGD(lr=0.3, momentum=0.9), "adamw": fi.AdamW(lr=0.02)}


def columns(run: fi.Run, table: Any) -> np.ndarray:
    return run.signals(table=table).sort("step", "sample").select(run.queries).collect().to_numpy()


def assert_close(found: fi.Run, expected: fi.Run, *tables: str) -> None:
    """To float32 rounding, in which signals are stored."""
    for table in tables:
        a, b = columns(found, table), columns(expected, table)
        assert np.abs(b).max() > 0, table
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max(), table


@pytest.mark.parametrize("signals", ["batch", "full"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("hessian", ["exact", "one-sided"])
def test_replay_and_live_signals_equal_those_of_the_cpu(
    tmp_path: Path, optimizer: str, hessian: Any, signals: Any
) -> None:
    runs = [
        replay_problems.train(
            tmp_path / device,
            model=replay_problems.mlp().to(device),
            optimizer=OPTIMIZERS[optimizer],
            sensitivity="both",
            signals=signals,
            replay_options=ReplayOptions(hessian=hessian, memory_bytes=memory),
        )
        for device, memory in (("cuda", None), ("cpu", None))
    ]
    assert_close(*runs, "signals", "live", "panel")
    assert runs[0].manifest["environment"]["device"] == torch.cuda.get_device_name()
    a, b = (run.influence("several")["mu"].to_numpy() for run in runs)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_spilled_segment_gives_the_same(tmp_path: Path) -> None:
    """States that do not fit the budget go through a file and come back to the GPU."""
    runs = [
        replay_problems.train(
            tmp_path / str(memory),
            model=replay_problems.mlp().to("cuda"),
            optimizer=fi.AdamW(lr=0.02),
            replay_options=ReplayOptions(hessian="exact", memory_bytes=memory),
        )
        for memory in (None, 0)
    ]
    for table in ("signals", "panel"):
        np.testing.assert_array_equal(columns(runs[0], table), columns(runs[1], table))


def convolutions() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = [nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 3, 3), nn.Flatten()]
        return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *inner, nn.Linear(12, 3)).double()


def test_convolutions_and_group_norm(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(replay_problems.N, 16, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(inputs, torch.randint(0, 3, (len(inputs),), generator=generator))
    asked = {"several": tuple(t[:3] for t in data.tensors), "one": tuple(t[5:6] for t in data.tensors)}
    runs = [
        replay_problems.train(
            tmp_path / device, model=convolutions().to(device), data=data, queries=asked, sensitivity="both"
        )
        for device in ("cuda", "cpu")
    ]
    assert_close(*runs, "signals", "live", "panel")


class Text(Dataset):
    """Rows of tokens, on the CPU as a user's are."""

    tokens = torch.randint(0, 11, (replay_problems.N, 5), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index]}


class Attention(nn.Module):
    """An embedding, fused attention and a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.norm = nn.Embedding(11, 8), nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        query, key, value = self.mix(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return functional.linear(x + mixed.transpose(1, 2).flatten(2), self.embedding.weight)


def test_attention_in_float32(tmp_path: Path) -> None:
    """CausalLMTask computes in float32; the GPU's fused kernels round as they like."""
    asked = {"several": {"input_ids": Text.tokens[:3].roll(1, 1)}, "one": {"input_ids": Text.tokens[4:5].roll(2, 1)}}
    runs = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        settings: dict[str, Any] = {"task": fi.CausalLMTask(), "data": Text(), "queries": asked, "sensitivity": "both"}
        options = ReplayOptions(hessian="one-sided")
        runs.append(
            replay_problems.train(tmp_path / device, model=Attention().to(device), **settings, replay_options=options)
        )
    for table in ("signals", "live"):
        a, b = (columns(run, table) for run in runs)
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()
    assert runs[0].manifest["replay"]["largest_residual"] < 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16-autocast"])
def test_recording_changes_nothing(tmp_path: Path, precision: Any) -> None:
    """Parameters and the GPU's random state after a recorded run are those after the bare one, dropout and all."""
    plan = fi.Plan(
        optimizer=fi.AdamW(lr=0.02), epochs=3, batch_size=8, accumulation=2, clip_norm=0.3, precision=precision
    )
    plain, recorded = (runs_problems.model(1, dropout=0.3, dtype=torch.float32).to("cuda") for _ in range(2))
    engine = fi.runs.engine.Engine(
        fi.ClassificationTask(), plain, dataset=runs_problems.data(dtype=torch.float32), plan=plan
    )
    for batch in engine.batches():
        engine.step(batch)
    before = torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FinfluenceWarning)  # bfloat16's residual on a network this small
        run = runs_problems.record(
            tmp_path / "run",
            recorded,
            sensitivity="both",
            refresh=2,
            self_influence="record",
            optimizer=plan.optimizer,
            accumulation=2,
            clip_norm=0.3,
            precision=precision,
        )
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(runs_problems.parameters(recorded), runs_problems.parameters(plain))
    assert run.manifest["replay"]["largest_residual"] < (1e-4 if precision == "float32" else 5e-2)


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    class Interrupted(fi.ClassificationTask):
        left = 9

        def losses(self, model: Any, batch: Any) -> torch.Tensor:
            if model.training and torch.is_grad_enabled():
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
            return super().losses(model, batch)

    settings = {"optimizer": fi.AdamW(lr=0.02), "checkpoint_every": 4, "sensitivity": "both"}

    def net() -> nn.Module:
        return replay_problems.mlp(dropout=0.2).to("cuda")

    whole = replay_problems.train(tmp_path / "whole", model=net(), **settings)
    with pytest.raises(KeyboardInterrupt):
        replay_problems.train(tmp_path / "part", model=net(), task=Interrupted(), **settings)
    resumed = replay_problems.train(tmp_path / "part", model=net(), exist="resume", **settings)
    for table in ("signals", "live", "panel"):
        np.testing.assert_array_equal(columns(resumed, table), columns(whole, table))


def test_a_users_loop_with_loss_scaling(tmp_path: Path) -> None:
    """float16 autocast and GradScaler, as they are meant to be used: bit for bit, with the identity holding."""
    nets = [runs_problems.model(3, dtype=torch.float32).to("cuda") for _ in range(2)]

    def loop(net: nn.Module, optimizer: Any, recorder: Any) -> None:
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for ids, x, y in runs_problems.batches(dtype=torch.float32):
            with recorder.batch(ids):
                with torch.autocast("cuda", dtype=torch.float16):
                    loss = functional.cross_entropy(net(x.cuda()), y.cuda())
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True) for net in nets]
    loop(nets[0], optimizers[0], runs_problems.NoRecorder())
    x, y = (t.cuda() for t in runs_problems.data(6, seed=4, dtype=torch.float32).tensors)
    asked = {"first": lambda net: functional.cross_entropy(net(x), y)}
    with fi.Recorder(nets[1], optimizers[1], queries=asked, directory=tmp_path / "run") as recorder:
        loop(nets[1], optimizers[1], recorder)
    assert torch.equal(runs_problems.parameters(nets[0]), runs_problems.parameters(nets[1]))
    steps = fi.open_run(tmp_path / "run").steps()
    assert steps.filter(pl.col("residual") > 2e-2).is_empty()
    assert not steps["skipped"].any()
