"""`Recorder`: a user's own loop stays as it is, bit for bit, and what goes wrong is said in one line."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from runs_problems import (
    CLASSES,
    FEATURES,
    N,
    NoRecorder,
    batches,
    data,
    gradients,
    measures,
    model,
    parameters,
    sample_loss,
)
from torch import nn
from torch.nn import functional

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError, RecordingError, StoreError

criterion = functional.cross_entropy


def optimizer_of(net: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.01)
    groups = [{"params": list(net.parameters())[:2], "lr": 0.05}, {"params": list(net.parameters())[2:]}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def loop(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: Any,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    for number, (ids, x, y) in enumerate(batches(dtype=dtype)):
        with recorder.batch(ids):
            (criterion(net(x), y) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.3)])
def test_training_and_random_state_are_those_of_the_bare_loop(
    tmp_path: Path, kind: str, accumulate: int, clip: float | None, dtype: torch.dtype
) -> None:
    nets = [model(3, dropout=0.4, dtype=dtype) for _ in range(2)]
    optimizers = [optimizer_of(net, kind) for net in nets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        loop(nets[0], optimizers[0], NoRecorder(), accumulate=accumulate, clip=clip, dtype=dtype)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        with fi.Recorder(
            nets[1], optimizers[1], queries=measures(dtype), directory=tmp_path / "run", refresh=3
        ) as recorder:
            loop(nets[1], optimizers[1], recorder, accumulate=accumulate, clip=clip, dtype=dtype)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(parameters(nets[0]), parameters(nets[1]))
    assert all(module.training for module in nets[1].modules())
    assert not [m for m in nets[1].modules() if m._forward_hooks or m._forward_pre_hooks]
    run = fi.open_run(tmp_path / "run")
    steps = run.steps()
    assert steps["step"].to_list() == list(range(14 // accumulate))
    assert steps["batch_size"].to_list() == [6 * accumulate] * (14 // accumulate)
    assert steps["residual"].max() < (1e-4 if dtype == torch.float32 else 1e-12)  # pyright: ignore[reportOperatorIssue]
    assert (steps["scale"] < 0.99).any() == (clip is not None)
    assert steps["epoch"].to_list() == sorted([0, 1] * (7 // accumulate)) or accumulate == 2
    assert run.samples()["sample"].to_list() == list(range(N))
    assert run.influence("first").height == N
    assert run.influence("second")["mu"].is_finite().all()


def test_signals_of_clipped_accumulated_sgd_equal_their_definition(tmp_path: Path) -> None:
    # x_i = −lr · factor · ⟨∇m, ∇ℓ_i⟩ / b, at the parameters before the step
    net, dataset = model(3), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = dataset.tensors
    with fi.Recorder(net, optimizer, queries=measures(), directory=tmp_path / "run") as recorder:
        expected = {}
        direction = gradients(net, measures()["first"](net))
        for rows in (torch.arange(4), torch.arange(4, 8)):
            for row in rows.tolist():
                mine = gradients(net, sample_loss(net, dataset, row))
                expected[row] = -0.1 * sum(float((q * g).sum()) for q, g in zip(direction, mine, strict=True)) / 8
            with recorder.batch(rows) as record:
                loss = criterion(net(x[rows]), y[rows]) / 2
                loss.backward()
                record.loss = loss.detach() * 2
        norm = float(nn.utils.clip_grad_norm_(net.parameters(), 0.1))
        optimizer.step()
    run = fi.open_run(tmp_path / "run")
    assert run.steps()["scale"].item() == pytest.approx(0.1 / norm, rel=1e-5)
    assert run.steps()["loss"].item() == pytest.approx(float(criterion(model(3)(x[:8]), y[:8]).detach()))
    frame = run.signals().collect()
    np.testing.assert_allclose(
        frame["first"].to_numpy(), [expected[row] * 0.1 / norm for row in frame["sample"]], rtol=2e-6
    )


def start(directory: Path, net: nn.Module | None = None, **changes: Any) -> fi.Recorder:
    net = model(3) if net is None else net
    given: dict[str, Any] = {"queries": measures(), "directory": directory}
    optimizer = changes.pop("optimizer", None) or torch.optim.SGD(net.parameters(), lr=0.1)
    return fi.Recorder(net, optimizer, **(given | changes))


def take_step(recorder: fi.Recorder, ids: Any, rows: Any = None, *, loss: Any = criterion, step: bool = True) -> None:
    x, y = data().tensors
    rows = ids if rows is None else torch.as_tensor(list(rows))
    with recorder.batch(ids):
        loss(recorder.model(x[rows]), y[rows]).backward()
    if step:
        recorder.optimizer.step()
        recorder.optimizer.zero_grad()


def test_string_ids(tmp_path: Path) -> None:
    names = np.array([f"doc-{i}" for i in range(N)])
    with start(tmp_path / "run", id_dtype="str") as recorder:
        for ids, _, _ in batches():
            take_step(recorder, names[ids.numpy()], ids)
    run = fi.open_run(tmp_path / "run")
    assert sorted(run.samples()["sample"].to_list()) == sorted(names.tolist())
    assert run.influence("first", subsets={"some": ["doc-3", "doc-5"]})["size"].to_list() == [2]


BAD_BATCHES: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "too few ids": (range(5), range(6), criterion, RecordingError, r"5.*6|6.*5"),
    "too many ids": (range(12), range(6), criterion, RecordingError, r"12.*6|6.*12"),
    "half the ids": (range(3), range(6), criterion, RecordingError, r"3.*6|6.*3"),
    "one id": ([0], range(6), criterion, RecordingError, r"\b1\b.*6|6.*\b1\b"),
    "twice": ([1, 2, 1], [1, 2, 1], criterion, InputError, "sample id 1 stands twice in the batch of step 1"),
    "none": ([], [0], criterion, InputError, r"ids must be a non-empty one-dimensional list, got shape \(0,\)"),
    "two-dimensional": ([[1, 2]], [1, 2], criterion, InputError, r"got shape \(1, 2\)"),
    "strings": (
        ["a", "b"],
        [0, 1],
        criterion,
        InputError,
        "ids are str but the run's ids are int64; pass id_dtype='str'",
    ),
    "floats": ([0.5, 1.0], [0, 1], criterion, InputError, "ids must be integers or strings, got float64"),
    "unknown": (
        [5, 77],
        [5, 6],
        criterion,
        InputError,
        r"sample id 77 in the batch of step 1 is not in the sample table",
    ),
    "nan": (
        [0, 1],
        [0, 1],
        lambda x, y: criterion(x, y) * torch.nan,
        RecordingError,
        "signal of sample 0 at step 1 is nan",
    ),
    "inf": (
        [0, 1],
        [0, 1],
        lambda x, y: criterion(x, y) * torch.inf,
        RecordingError,
        "signal of sample 0 at step 1 is",
    ),
}


@pytest.mark.parametrize("case", list(BAD_BATCHES))
def test_a_bad_batch_is_named_and_what_was_recorded_stays(tmp_path: Path, case: str) -> None:
    ids, rows, loss, kind, message = BAD_BATCHES[case]
    samples = pl.DataFrame({"sample": range(N)})
    last = list(ids) if isinstance(ids, range) else ids

    def train() -> None:
        with start(tmp_path / "run", samples=samples) as recorder:
            take_step(recorder, list(range(10, 16)))
            take_step(recorder, last, list(rows), loss=loss)

    with pytest.raises(kind, match=message) as caught:
        train()
    assert "\n" not in str(caught.value)
    run = fi.open_run(tmp_path / "run")
    assert run.store.status == "failed"
    assert run.steps()["step"].to_list() == [0]
    assert run.signals().collect()["sample"].to_list() == list(range(10, 16))


def test_models_optimizers_and_queries_that_cannot_be_recorded(tmp_path: Path) -> None:
    normed = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()
    with pytest.raises(RecordingError, match="'1' is a BatchNorm1d in training mode"), start(tmp_path / "a", normed):
        pass
    net = model()
    with pytest.raises(RecordingError, match=r"optimizer torch.optim.*Adagrad is not supported"):
        start(tmp_path / "a", net, optimizer=torch.optim.Adagrad(net.parameters()))
    with pytest.raises(InputError, match="queries is empty"):
        start(tmp_path / "a", queries={})
    with pytest.raises(InputError, match="queries must map names to functions of the model"):
        start(tmp_path / "a", queries={"q": 3})
    with pytest.raises(InputError, match="'self' is a reserved column"), start(tmp_path / "a", queries={"self": len}):
        pass
    assert not (tmp_path / "a").exists()
    with (
        pytest.raises(InputError, match=r"a query must return a scalar tensor, got a tensor of shape \(42, 3\)"),
        start(tmp_path / "b", queries={"q": lambda net: net(data().tensors[0])}) as recorder,
    ):
        take_step(recorder, [0, 1])
    assert fi.open_run(tmp_path / "b").store.status == "failed"


def test_batch_norm_that_goes_back_to_training_mode_is_found(tmp_path: Path) -> None:
    normed = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double().eval()

    def train() -> None:
        with start(tmp_path / "a", normed) as recorder:
            take_step(recorder, [0, 1, 2])
            normed.train()
            take_step(recorder, [3, 4])

    with pytest.raises(RecordingError, match="BatchNorm1d in training mode"):
        train()
    assert fi.open_run(tmp_path / "a").steps().height == 1


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    with start(tmp_path / "run") as recorder:
        take_step(recorder, [0, 1, 2])
    with pytest.raises(StoreError, match="already holds a run"), start(tmp_path / "run"):
        pass
    assert fi.open_run(tmp_path / "run").steps().height == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(StoreError, match="is not a run directory"), start(tmp_path / "other"):
        pass


def test_misuse_of_the_blocks(tmp_path: Path) -> None:
    recorder = start(tmp_path / "a")
    with pytest.raises(RecordingError, match="the recorder is not open"), recorder.batch([1]):
        pass
    with pytest.raises(RecordingError, match=r"optimizer.step\(\) at step 0 without a recorded batch"), recorder:
        recorder.optimizer.step()
    with (
        pytest.raises(RecordingError, match="run both the forward and the backward pass"),
        start(tmp_path / "b") as other,
        other.batch([1, 2]),
    ):
        other.model(data().tensors[0][:2])
    third = start(tmp_path / "c").__enter__()
    take_step(third, [1, 2])
    take_step(third, [3, 4], step=False)
    with pytest.warns(FinfluenceWarning, match=r"1 batch\(es\) after step 0 were recorded but no optimizer.step"):
        third.__exit__(None, None, None)
    assert fi.open_run(tmp_path / "c").steps().height == 1


def test_samples_of_several_rows_must_be_announced(tmp_path: Path) -> None:
    with start(tmp_path / "run", rows="several") as recorder:
        take_step(recorder, [7, 8, 9], range(6))
    run = fi.open_run(tmp_path / "run")
    assert run.signals().collect()["sample"].to_list() == [7, 8, 9]
    assert run.steps()["residual"].item() < 1e-12


def test_a_gradient_that_the_signals_do_not_explain_is_warned_of_once(tmp_path: Path) -> None:
    net = model(3)
    x, y = data().tensors
    with start(tmp_path / "a", net) as recorder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ids in ([0, 1, 2], [3, 4, 5]):
            with recorder.batch(ids):
                decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
                (criterion(net(x[ids]), y[ids]) + 0.5 * decay).backward()
            recorder.optimizer.step()
            recorder.optimizer.zero_grad()
    assert [warning.category for warning in caught] == [FinfluenceWarning]
    assert "the signal identity is off by" in str(caught[0].message)
    assert "a regulariser in the loss" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert fi.open_run(tmp_path / "a").manifest["largest_residual"] > 1e-3


def test_a_learning_rate_that_changes_between_batch_and_step_is_warned_of(tmp_path: Path) -> None:
    with start(tmp_path / "a") as recorder:
        take_step(recorder, [0, 1], step=False)
        recorder.optimizer.param_groups[0]["lr"] = 0.2
        with pytest.warns(FinfluenceWarning, match=r"learning rate of step 0 changed from 0.1 to 0.2"):
            recorder.optimizer.step()


def test_a_schedule_of_torch_and_sparse_embeddings(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 4, sparse=True)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(words).mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, words = Words(), torch.randint(0, 20, (N, 5))
    labels = data().tensors[1]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    queries = {"q": lambda m: criterion(m(words[:3]), labels[:3])}
    with fi.Recorder(net, optimizer, queries=queries, directory=tmp_path / "run") as recorder:
        for ids in torch.arange(N).split(14):
            with recorder.batch(ids):
                criterion(net(words[ids]), labels[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    steps = fi.open_run(tmp_path / "run").steps()
    assert steps["learning_rate"].to_list() == pytest.approx([0.1, 0.05, 0.025])
    assert steps["residual"].max() < 1e-4  # pyright: ignore[reportOperatorIssue]


def test_an_interrupted_loop_is_readable(tmp_path: Path) -> None:
    def train() -> None:
        with start(tmp_path / "run") as recorder:
            take_step(recorder, [0, 1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    run = fi.open_run(tmp_path / "run")
    assert (run.store.status, run.steps().height, run.samples().height) == ("failed", 1, 3)


def test_sampling_with_replacement_may_repeat_ids(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with start(tmp_path / "run", sampler=fi.Sampler("with-replacement")) as recorder:
        for _ in range(20):
            take_step(recorder, generator.integers(0, N, 8))
    run = fi.open_run(tmp_path / "run")
    assert run.manifest["sampler"] == "with-replacement"
    assert run.influence("first")["mu"].is_finite().all()
