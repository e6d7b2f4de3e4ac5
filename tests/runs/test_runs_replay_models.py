"""Replays of other architectures and precisions, against brute force or against a float64 replay.

Protects: what the kernels assume about a model: layers, tied and frozen weights, attention, dropout, autocast.
"""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest
import replay_problems as problems
import torch
from torch import nn
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.errors import FinfluenceWarning
from finfluence.gradients import HookedDerivatives
from finfluence.runs import Engine, Plan, ReplayOptions
from finfluence.runs._batch_terms import DifferenceTerms, ExactTerms
from finfluence.runs.engine import isolated_rng
from finfluence.sensitivity import Layout

LENGTH, VOCABULARY, WIDTH = 5, 11, 8


class _Reshape(nn.Module):
    def forward(self, x):
        return x.unflatten(1, (1, 4, 4))


def cnn(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [_Reshape(), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 3, 3)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 3)).to(dtype)


def images(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(problems.N, 16, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs.to(dtype), torch.randint(0, 3, (problems.N,), generator=generator))


class _Adapter(nn.Module):
    """A frozen Linear with a trainable low-rank update."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class _Transformer(nn.Module):
    """One causal block; frozen but for adapters, the norms and the embedding, which also is the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.norm, self.final = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = _Adapter(nn.Linear(WIDTH, 3 * WIDTH))
        self.out = _Adapter(nn.Linear(WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids):
        x = self.embedding(input_ids) + self.positions
        query, key, value = self.mix(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return nn.functional.linear(self.final(x), self.embedding.weight)


def transformer(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Transformer().to(dtype)


class _Text(torch.utils.data.Dataset):
    tokens = torch.randint(0, VOCABULARY, (problems.N, LENGTH), generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index]}


class _DoubleLM(fi.CausalLMTask):
    """`CausalLMTask` computes in float32; here in the model's dtype."""

    def losses(self, model, batch):
        ids = batch["input_ids"]
        logits = model(input_ids=ids)
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


TEXT = {"several": {"input_ids": _Text.tokens[:3].roll(1, 1)}, "one": {"input_ids": _Text.tokens[4:5].roll(2, 1)}}


@pytest.mark.parametrize("method", ["exact", "central"])
def test_cnn_with_group_norm_and_dropout(tmp_path, method):
    data = images()
    asked = {"several": tuple(t[:3] for t in images().tensors), "one": tuple(t[5:6] for t in images().tensors)}
    options = ReplayOptions(hessian=method)
    run = problems.train(
        tmp_path / "run",
        model=cnn(),
        data=data,
        queries=asked,
        optimizer=fi.SGD(lr=0.1, momentum=0.9),
        replay_options=options,
    )
    problems.check_against_brute_force(
        run, [(0, 1), (6, 2), (14, 0)], tolerance=1e-5, make=cnn, data=data, queries=asked
    )


@pytest.mark.parametrize("method", ["exact", "central"])
def test_transformer_with_adapters_frozen_base_and_tied_weights(tmp_path, method):
    data, task = _Text(), _DoubleLM()
    settings = {"task": task, "data": data, "queries": TEXT, "optimizer": fi.SGD(lr=0.2, momentum=0.8)}
    run = problems.train(
        tmp_path / "run", model=transformer(), **settings, replay_options=ReplayOptions(hessian=method)
    )
    assert run.manifest["replay"]["largest_residual"] < 1e-9
    places = [(0, 1), (6, 2), (14, 0)]
    problems.check_against_brute_force(
        run, places, tolerance=1e-5, make=transformer, data=data, queries=TEXT, task=task
    )


def _table(run, table="signals"):
    return run.signals(table=table).sort("step", "sample").collect()


@pytest.mark.parametrize("method", ["exact", "one-sided"])
@pytest.mark.parametrize("optimizer", [fi.SGD(lr=0.3, momentum=0.9), fi.AdamW(lr=0.02)], ids=["momentum", "adamw"])
def test_float32_agrees_with_float64(tmp_path, method, optimizer):
    """Exact: to 1e-4 of the largest signal; one-sided differences in float32: to 1e-2."""
    runs = {}
    for dtype in (torch.float64, torch.float32):
        runs[dtype] = problems.train(
            tmp_path / str(dtype),
            model=problems.mlp(dtype),
            data=problems.dataset(dtype),
            queries=problems.queries(dtype),
            optimizer=optimizer,
            replay_options=ReplayOptions(hessian=method if dtype == torch.float32 else "exact"),
        )
    expected, found = (_table(runs[d])["one"].to_numpy() for d in (torch.float64, torch.float32))
    assert np.abs(found - expected).max() < (1e-4 if method == "exact" else 1e-2) * np.abs(expected).max()


@pytest.mark.parametrize("method", ["exact", "one-sided"])
def test_bfloat16_autocast_agrees_roughly(tmp_path, method):
    """Correlation with the float32 replay above 0.99, and a slope within 10 %; without autocast in the products."""
    runs = {}
    for precision in ("float32", "bfloat16-autocast"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FinfluenceWarning)
            runs[precision] = problems.train(
                tmp_path / precision,
                model=problems.mlp(torch.float32),
                data=problems.dataset(torch.float32),
                queries=problems.queries(torch.float32),
                optimizer=fi.SGD(lr=0.3),
                precision=precision,
                replay_options=ReplayOptions(hessian=method if precision != "float32" else "exact"),
            )
    expected, found = (_table(runs[p])["several"].to_numpy() for p in ("float32", "bfloat16-autocast"))
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    assert 0.9 < (found @ expected) / (expected @ expected) < 1.1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_differences_under_autocast_are_as_good_as_in_float32(dropout):
    """Hessian products of a bfloat16-autocast training against exact float32 ones; rounded to 8 bits they are noise."""
    model = problems.mlp(torch.float32, dropout=dropout)
    found = {}
    for precision in ("float32", "bfloat16-autocast"):
        plan = Plan(optimizer=fi.SGD(lr=0.1), epochs=1, batch_size=8, precision=precision)
        engine = Engine(problems.TASK, model, dataset=problems.dataset(torch.float32), plan=plan)
        layout = Layout.of(engine.parameters)
        theta = layout.flatten({name: p.detach() for name, p in engine.parameters.items()})
        q = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
        rows, hooks = np.arange(8), HookedDerivatives(model, engine.parameters)
        exact, differences = (
            ExactTerms(engine, layout),
            DifferenceTerms(engine, layout, method="one-sided", hooks=hooks),
        )
        for name, terms in (("exact", exact), ("differences", differences)):
            with isolated_rng(engine.device):
                engine.seed(0)
                found[name, precision] = terms.evaluate(rows, 8.0, theta, q=q)
        hooks.remove()
    exact = found["exact", "float32"].curvature
    error = (found["differences", "bfloat16-autocast"].curvature - exact).norm() / exact.norm()
    assert error < 1e-2
    # signals and loss stay those of the training's own precision
    own, other = (found[name, "bfloat16-autocast"] for name in ("differences", "exact"))
    assert own.loss == pytest.approx(other.loss, rel=1e-6)
    assert own.loss != pytest.approx(found["exact", "float32"].loss, rel=1e-6)
    torch.testing.assert_close(own.values, other.values.to(own.values), rtol=0.05, atol=0.05)


def test_a_residual_above_the_tolerance_is_warned_of(tmp_path, monkeypatch):
    """Rounding in float64, against a tolerance of 1e-18."""
    monkeypatch.setattr("finfluence.runs._identity._LIMITS", {torch.float64: 1e-18})
    with pytest.warns(FinfluenceWarning, match=r"identity of query '\w+' is off by .* at step \d+ .*float64") as caught:
        problems.train(tmp_path / "run")
    assert len(caught) == 1


@pytest.mark.parametrize("method", ["exact", "one-sided"])
def test_no_tensor_is_kept_from_step_to_step(tmp_path, monkeypatch, method):
    """Tensors that exist after a step, with the garbage collector off: what hooks or graphs kept would show up here."""
    from finfluence.runs._segment import SegmentWalker

    counts: list[int] = []
    original = SegmentWalker._batch_terms

    def counting(self, *args, **named):
        found = original(self, *args, **named)
        counts.append(sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects()))
        return found

    monkeypatch.setattr(SegmentWalker, "_batch_terms", counting)
    gc.collect()
    gc.disable()
    try:
        problems.train(
            tmp_path / "run",
            model=cnn(),
            data=images(),
            queries=_image_queries(),
            **_alone(ReplayOptions(hessian=method)),
        )
    finally:
        gc.enable()
    assert len(counts) == 15
    # each step leaves one: the memory behind its signals' array
    assert set(np.diff(counts[2:])) == {1}


def _image_queries():
    return {"several": tuple(t[:3] for t in images().tensors)}


def _alone(options):
    return {"checkpoint_every": 15, "panel": fi.runs.NoisePanel(0), "replay_options": options}
