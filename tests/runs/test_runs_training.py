"""`train`: it trains as a plain loop does, and its signals are what their definition says."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from runs_problems import (
    N,
    bare_training,
    data,
    gradients,
    model,
    parameters,
    queries,
    record,
    sample_loss,
    sensitivity,
)
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError, RecordingError, StoreError
from finfluence.influence import ShuffledEpochs

OPTIMIZERS = {
    "sgd": fi.SGD(lr=0.2),
    "momentum": fi.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": fi.SGD(lr=0.05, momentum=0.8, nesterov=True),
    "adamw": fi.AdamW(lr=0.02, weight_decay=0.05),
    "adam": fi.Adam(lr=0.02),
}
SAMPLERS = ["shuffled", "with-replacement", "poisson"]


def plan_of(**changes: Any) -> fi.Plan:
    return fi.Plan(**({"optimizer": fi.SGD(lr=0.2, momentum=0.9), "epochs": 3, "batch_size": 8} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": OPTIMIZERS["adamw"]},
        {"accumulation": 3, "clip_norm": 0.3},
        {"optimizer": OPTIMIZERS["adamw"], "accumulation": 2, "schedule": fi.Schedule("cosine", 3)},
        {"sampler": fi.Sampler("with-replacement"), "seed": 3},
        {"sampler": fi.Sampler("poisson"), "batch_size": 2},
        {"sampler": fi.Sampler(drop_last=True), "batch_size": 9},
    ],
    ids=str,
)
def test_parameters_equal_those_of_a_plain_loop_bit_for_bit(tmp_path: Path, changes: Any, dtype: torch.dtype) -> None:
    plan = plan_of(**changes)
    plain, recorded = model(1, dropout=0.3, dtype=dtype), model(1, dropout=0.3, dtype=dtype)
    bare_training(plain, plan.optimizer.build(list(plain.parameters())), plan, dataset=data(dtype=dtype))
    before = torch.get_rng_state()
    record(tmp_path / "run", recorded, refresh=2, self_influence="record", watch={"few": [1, 5, 7]}, **changes)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(parameters(recorded), parameters(plain))
    assert not torch.equal(parameters(recorded), parameters(model(1, dtype=dtype)))


def test_recording_less_or_more_does_not_change_the_training(tmp_path: Path) -> None:
    nets = [model(dropout=0.3, dtype=torch.float32) for _ in range(3)]
    slow = fi.SGD(lr=0.01, momentum=0.5)
    record(tmp_path / "a", nets[0], optimizer=slow)
    record(tmp_path / "b", nets[1], optimizer=slow, sensitivity="both", panel=fi.NoisePanel(0), checkpoint_every=5)
    record(tmp_path / "c", nets[2], optimizer=slow, sensitivity="replay")
    assert torch.equal(parameters(nets[0]), parameters(nets[1]))
    assert torch.equal(parameters(nets[0]), parameters(nets[2]))


def naive_signals(
    plan: fi.Plan, refresh: int, net: nn.Module
) -> tuple[dict[tuple[int, int], list[float]], dict[tuple[int, int], float]]:
    """Signals by (step, sample) for both queries, and every sample's self-signals, from a loop over samples."""
    dataset = data()
    optimizer = plan.optimizer.build(list(net.parameters()))
    loaded = {"first": data(6, seed=4).tensors, "second": queries()["second"]}
    found: dict[tuple[int, int], list[float]] = {}
    own: dict[tuple[int, int], float] = {}
    held: list[list[torch.Tensor]] = []

    def before_step(step: int, rows: np.ndarray, denominator: float) -> None:
        if step % refresh == 0:
            held[:] = [gradients(net, functional.cross_entropy(net(x), y)) for x, y in loaded.values()]
        directions = [sensitivity(optimizer, net, measure) for measure in held]
        for row in range(N):
            mine = gradients(net, sample_loss(net, dataset, row))
            if row in rows:
                found[step, row] = [
                    sum(float((q * g).sum()) for q, g in zip(direction, mine, strict=True)) / denominator
                    for direction in directions
                ]
            q_own = sensitivity(optimizer, net, mine)
            own[step, row] = sum(float((q * g).sum()) for q, g in zip(q_own, mine, strict=True)) / denominator

    bare_training(net, optimizer, plan, dataset=dataset, before_step=before_step)
    return found, own


@pytest.mark.parametrize("refresh", [1, 4])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_signals_equal_a_naive_loop(tmp_path: Path, name: str, refresh: int) -> None:
    plan = plan_of(optimizer=OPTIMIZERS[name])
    run = record(tmp_path / "run", model(2), optimizer=plan.optimizer, refresh=refresh, self_influence="record")
    found, own = naive_signals(plan, refresh, model(2))
    frame = run.signals().collect()
    assert frame.height == len(found) == 3 * N
    expected = np.array([found[step, sample] for step, sample in frame.select("step", "sample").iter_rows()])
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(frame.select("first", "second").to_numpy(), expected, rtol=1e-6, atol=1e-12)
    selfs = run.signals(table="self").collect()
    expected_own = [own[step, sample] for step, sample in selfs.select("step", "sample").iter_rows()]
    np.testing.assert_allclose(selfs["self"].to_numpy(), expected_own, rtol=1e-6, atol=1e-12)
    assert run.steps()["residual"].max() < 1e-13  # pyright: ignore[reportOperatorIssue]
    assert run.manifest["largest_residual"] == run.steps()["residual"].max()


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_self_influence_of_all_samples_and_the_influence_relative_to_it(tmp_path: Path, name: str) -> None:
    """At the middles of three parts of the run, against a loop; μ is divided by the length that they add up to.

    Each step counts relative to its mean, so that a high learning rate does not make its step the whole of the length.
    """
    plan = plan_of(optimizer=OPTIMIZERS[name])
    net = model(2)
    run = record(tmp_path / "run", net, optimizer=plan.optimizer, self_influence="all")
    plain = model(2)
    _, own = naive_signals(plan, 1, plain)
    assert torch.equal(parameters(net), parameters(plain))
    frame = run.signals(table="self").collect()
    steps = plan.steps(N)
    assert sorted(frame["step"].unique()) == [steps // 6, steps // 2, 5 * steps // 6]
    assert frame.height == 3 * N
    expected = [own[step, sample] for step, sample in frame.select("step", "sample").iter_rows()]
    np.testing.assert_allclose(frame["self"].to_numpy(), expected, rtol=1e-6, atol=1e-12)
    table = run.influence("first", relative=True)
    assert table.drop("relative").equals(run.influence("first"))
    means = {step: np.mean([own[step, row] for row in range(N)]) for step in frame["step"].unique()}
    lengths = np.sqrt([sum(own[step, row] / mean for step, mean in means.items()) for row in range(N)])
    relative = table["mu"].to_numpy() * np.sqrt(np.median(lengths**2)) / lengths
    np.testing.assert_allclose(table["relative"].to_numpy(), relative, rtol=1e-6)
    with pytest.raises(InputError, match="one of single samples"):
        run.influence("first", groups="sample", relative=True)
    with pytest.raises(InputError, match="is not relative"):
        run.influence("self", relative=True)


def test_relative_influence_from_the_self_signals_of_batches(tmp_path: Path) -> None:
    """Every epoch has every sample once, and counts relative to its own mean."""
    plan = plan_of()
    run = record(tmp_path / "run", model(2), optimizer=plan.optimizer, self_influence="record")
    frame = run.signals(table="self").collect().join(run.steps().select("step", "epoch"), on="step")
    means = dict(frame.group_by("epoch").agg(pl.col("self").mean()).iter_rows())
    lengths = np.zeros(N)
    for sample, value, epoch in frame.select("sample", "self", "epoch").iter_rows():
        lengths[sample] += value / means[epoch]
    table = run.influence("first", relative=True)
    expected = table["mu"].to_numpy() * np.sqrt(np.median(lengths) / lengths)
    np.testing.assert_allclose(table["relative"].to_numpy(), expected, rtol=1e-5)


def test_pooled_relative_influence_is_the_mean_in_a_common_unit(tmp_path: Path) -> None:
    runs = [record(tmp_path / str(seed), model(2), seed=seed, self_influence="record") for seed in (1, 2)]
    frames = [run.influence("first", relative=True) for run in runs]
    sigmas = [float(fi.influence.metadata(frame)["sigma"]) for frame in frames]
    common = np.sqrt(np.mean(np.square(sigmas)))
    pooled = fi.pool(runs, "first", relative=True)
    parts = [
        frame.sort("sample")["relative"].to_numpy() * sigma / common
        for frame, sigma in zip(frames, sigmas, strict=True)
    ]
    np.testing.assert_allclose(pooled.sort("sample")["relative"].to_numpy(), np.mean(parts, axis=0), rtol=1e-9)
    assert pooled.drop("relative").equals(fi.pool(runs, "first"))
    assert fi.influence.metadata(pooled)["runs"] == 2


def test_relative_influence_asks_for_self_influence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no self-influence; record it with train"):
        record(tmp_path / "run").influence("first", relative=True)


def test_panel_signals_are_those_of_the_batch_where_both_exist(tmp_path: Path) -> None:
    run = record(tmp_path / "run", signals="full", optimizer=fi.AdamW(lr=0.02))
    both = run.store.panel().collect().join(run.signals().collect(), on=["step", "sample"], suffix="_batch")
    assert both.height > N / 2
    np.testing.assert_allclose(both["first"].to_numpy(), both["first_batch"].to_numpy(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_sampler_records_the_right_steps(tmp_path: Path, sampler: Any, accumulation: int) -> None:
    # Poisson batches of 3 of 42: seed 1 gives at least one empty batch, which the test asserts.
    schedule = fi.Schedule("linear", warmup_steps=4)
    run = record(
        tmp_path / "run",
        sampler=sampler,
        batch_size=3,
        accumulation=accumulation,
        clip_norm=0.2,
        schedule=schedule,
        seed=1,
    )
    steps = run.steps()
    total = 3 * (N // 3)
    batches = list(fi.Sampler(sampler).batches(N, 3, seed=1, steps=total))
    assert steps["step"].to_list() == list(range(total))
    assert steps["epoch"].to_list() == [batch.epoch for batch in batches]
    assert steps["position"].to_list() == [batch.position for batch in batches]
    assert steps["batch_size"].to_list() == [len(batch.indices) for batch in batches]
    rates = [0.2 * schedule.factor(step, total) for step in range(total)]
    np.testing.assert_allclose(steps["learning_rate"].to_numpy(), rates)
    assert steps["residual"].max() < 1e-12  # pyright: ignore[reportOperatorIssue]
    assert steps["scale"].min() < 0.9  # pyright: ignore[reportOperatorIssue]
    assert not steps["skipped"].any()
    frame = run.signals().collect()
    assert frame["sample"].to_list() == [int(i) for batch in batches for i in batch.indices]
    empty = steps.filter(pl.col("batch_size") == 0)
    assert (empty.height > 0) == (sampler == "poisson")
    assert empty["loss"].null_count() == empty.height
    table = run.influence("first")
    assert table["mu"].is_finite().sum() == table["mu"].len() - table["mu"].null_count()


def test_drop_last_leaves_samples_out(tmp_path: Path) -> None:
    run = record(tmp_path / "run", sampler=fi.Sampler(drop_last=True), batch_size=9)
    assert run.steps()["batch_size"].to_list() == [9] * 12
    assert run.manifest["drop_last"] is True
    assert run.influence("first").height == N


def test_clipped_signals_carry_the_factor(tmp_path: Path) -> None:
    free = record(tmp_path / "free", epochs=1, batch_size=N, optimizer=fi.SGD(lr=0.1))
    clipped = record(tmp_path / "clipped", epochs=1, batch_size=N, optimizer=fi.SGD(lr=0.1), clip_norm=0.05)
    factor = clipped.steps()["scale"].item()
    assert 0 < factor < 0.5
    np.testing.assert_allclose(
        clipped.signals().collect()["first"].to_numpy(),
        free.signals().collect()["first"].to_numpy() * factor,
        rtol=1e-5,
    )


def test_string_ids_and_the_sample_table(tmp_path: Path) -> None:
    ids = [f"doc-{i}" for i in range(N)]
    table = pl.DataFrame({"sample": ids, "source": ["web" if i % 2 else "book" for i in range(N)]})
    run = record(tmp_path / "run", samples=table, watch={"w": ["doc-3", "doc-4"]}, self_influence="record")
    assert run.influence("first")["sample"].to_list() == ids
    assert run.influence("first", groups="source")["group"].to_list() == ["book", "web"]
    plain = record(tmp_path / "plain")
    assert run.influence("first")["mu"].equals(plain.influence("first")["mu"])
    assert record(tmp_path / "ids", ids=ids).samples()["sample"].to_list() == ids


class Dictionaries(torch.utils.data.Dataset):
    """A map-style data set whose samples are mappings, with a field that is no tensor."""

    def __init__(self, base: TensorDataset) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.base[index]
        return {"x": x, "y": y, "name": f"sample {index}"}


class DictionaryTask(fi.ClassificationTask):
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return super().losses(model, (batch["x"], batch["y"]))


class Branching(nn.Module):
    """A model whose forward pass branches on its data, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if bool(x.sum() > -1e9) else self.inner(-x)


class Functional(Branching):
    """One weight is also used past its layer, which hooks on layers cannot see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (x @ self.inner[0].weight.mT)[:, :3]


class Layers(Branching):
    """Every layer with a closed form, a shared weight, a frozen bias, and one that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.norm, self.group = nn.Embedding(4, 6, padding_idx=0), nn.LayerNorm(6), nn.GroupNorm(2, 6)
        self.scale, self.shared, self.last = nn.RMSNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.shared.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert bool(x.sum() > -1e9)
        h = self.scale(self.norm(self.table(x.gt(0).long() + x.gt(1).long())))
        h = self.shared(torch.tanh(self.shared(h)))
        return self.last(self.group(h.mean(1)))


@pytest.mark.parametrize("net", [Branching, Layers, Functional])
def test_self_signals_by_hooks_are_those_of_the_loop(tmp_path: Path, net: type[nn.Module], monkeypatch: Any) -> None:
    """Where a weight is used past its layer, hooks are given up and the loop goes on."""
    from finfluence.runs import self_signals

    used = []
    original = self_signals.SelfSignals._hooked_gradients
    how: dict[str, Any] = {"self_influence": "all", "epochs": 1, "optimizer": fi.Adam(lr=0.01)}

    def counted(self: Any, rows: np.ndarray) -> Any:
        found = original(self, rows)
        used.append(len(rows))
        return found

    monkeypatch.setattr(self_signals.SelfSignals, "_hooked_gradients", counted)
    model_ = net()
    hooked = record(tmp_path / "hooked", model_, **how).signals(table="self").collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model_.modules())
    monkeypatch.setattr(self_signals.SelfSignals, "_hooked_gradients", lambda self, rows: refuse())
    looped = record(tmp_path / "looped", net(), **how).signals(table="self").collect()
    assert bool(used) == (net is not Functional)
    assert hooked["self"].abs().max() > 1e-6  # pyright: ignore[reportOperatorIssue]
    np.testing.assert_allclose(hooked["self"].to_numpy(), looped["self"].to_numpy(), rtol=1e-6, atol=1e-15)


def refuse() -> None:
    raise RecordingError("not by hooks")


@pytest.mark.parametrize("chunk", [1, 1 << 28])
def test_self_signals_by_vmap_by_chunks_and_by_the_loop_agree(tmp_path: Path, chunk: int, monkeypatch: Any) -> None:
    from finfluence.runs import self_signals

    monkeypatch.setattr(self_signals.SelfSignals.__init__, "__kwdefaults__", {"chunk_bytes": chunk})
    arguments: dict[str, Any] = {
        "self_influence": "record",
        "epochs": 1,
        "optimizer": fi.Adam(lr=0.01),
        "clip_norm": 0.1,
    }
    whole = record(tmp_path / "whole", model(2), **arguments).signals(table="self").collect()
    looped = record(tmp_path / "looped", Branching(), **arguments).signals(table="self").collect()
    other = fi.train(
        DictionaryTask(),
        model(2),
        Dictionaries(data()),
        queries={"first": Dictionaries(data(6, seed=4))},
        batch_size=8,
        directory=tmp_path / "mapping",
        **arguments,
    )
    assert whole["self"].abs().max() > 1e-6  # pyright: ignore[reportOperatorIssue]
    for frame in (looped, other.signals(table="self").collect()):
        np.testing.assert_allclose(frame["self"].to_numpy(), whole["self"].to_numpy(), rtol=1e-6, atol=1e-15)


def test_self_influence_finds_flipped_labels(tmp_path: Path) -> None:
    # Seeded throughout; the AUROC here is about .98, so that only a real change fails.
    from sklearn.metrics import roc_auc_score

    from finfluence.workflows.digits import digits

    recipe = digits(samples=300)
    run = recipe.train(
        tmp_path / "run",
        panel=fi.NoisePanel(0),
        refresh=50,
        self_influence="record",
        show_progress="never",
    )
    table = run.influence("self")
    assert table.columns == ["sample", "mu", "se", "ci_low", "ci_high", "p_value", "q_value"]
    assert roc_auc_score(run.samples()["planted"].to_numpy(), table["mu"].to_numpy()) > 0.9
    assert run.queries == ("validation",)
    with pytest.raises(InputError, match='query "self" scores single samples'):
        run.influence("self", groups="label")


def test_self_is_a_reserved_query_and_must_have_been_recorded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'self' is a reserved column"):
        record(tmp_path / "run", queries={"self": data(4)})
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r'no self-influence; record it with train.*self_influence="record"'):
        record(tmp_path / "run").influence("self")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensitivity": "forward"}, "unknown sensitivity 'forward'; choose one of live, replay, both"),
        ({"signals": "all"}, "unknown signals 'all'"),
        ({"self_influence": True}, "unknown self_influence True"),
        ({"sampler": "ordered"}, "unknown sampler 'ordered'"),
        ({"batch_size": 43}, r"batch_size must lie between 1 and the number of samples \(42\), got 43"),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"queries": {}}, "queries must be a non-empty mapping"),
        ({"queries": {"q": 3}}, "a query must be a map-style dataset, a ready batch, a Contrast .* got int"),
        ({"optimizer": torch.optim.SGD}, "optimizer must be finfluence.SGD, Adam or AdamW"),
        ({"signals": "full", "sampler": "poisson"}, 'signals="full" is defined for the shuffled sampler'),
        ({"watch": {"s": [1]}, "sensitivity": "replay"}, "watched subsets use live sensitivities"),
        ({"watch": {"s": []}}, "watched subset 's' has 0 of 42 samples"),
        ({"watch": {"s": range(N)}}, "watched subset 's' has 42 of 42 samples"),
        ({"watch": {"s": [99]}}, "watched subset 's' names sample 99, which is not in the data"),
        ({"auxiliary": "train"}, 'auxiliary="train" needs subsets'),
        ({"ids": [1, 2]}, r"ids has shape \(2,\), but the dataset has 42 samples"),
        ({"ids": [1] * N}, "sample identifier 1 stands more than once"),
        ({"samples": pl.DataFrame({"sample": [1]})}, "the sample table has 1 rows, but the dataset has 42"),
        ({"checkpoint_every": 3, "refresh": 2}, r"multiple of refresh \(2\), got 3"),
        ({"refresh": 0}, "refresh must be at least 1, got 0"),
        ({"dataset": data(0)}, "the dataset is empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        record(tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_recorded(tmp_path: Path) -> None:
    coupled = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(RecordingError, match="'1' is a BatchNorm1d in training mode"):
        record(tmp_path / "run", coupled)
    assert not (tmp_path / "run").exists()
    assert record(tmp_path / "run", coupled.eval()).steps()["residual"].max() < 1e-12  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(InputError, match="no trainable parameter"):
        record(tmp_path / "frozen", model().requires_grad_(False))


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    before = run.signals().collect()
    with pytest.raises(StoreError, match="already holds a run"):
        record(tmp_path / "run", seed=1)
    assert fi.open_run(tmp_path / "run").signals().collect().equals(before)


@pytest.mark.parametrize("sensitivity", ["live", "both"])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_recorded(tmp_path: Path, sensitivity: Any) -> None:
    broken = data()
    broken.tensors[0][17] = torch.nan
    met = next(b.step for b in fi.Sampler().batches(N, 8, seed=0, steps=18) if 17 in b.indices)
    with pytest.raises(RecordingError, match=rf"the training loss is nan at step {met} \(epoch 0\)"):
        record(tmp_path / "run", dataset=broken, sensitivity=sensitivity, panel=fi.NoisePanel(0))
    run = fi.open_run(tmp_path / "run")
    assert run.store.status == "failed"
    assert run.steps()["step"].to_list() == list(range(met))
    table = "signals" if sensitivity == "live" else "live"
    assert run.signals(table=table).collect().height == 8 * met
    if sensitivity == "both":
        with pytest.raises(InputError, match=r"replay of .* is not finished"):
            run.influence("first")


def test_a_query_that_is_not_finite_is_named(tmp_path: Path) -> None:
    x, y = data(4).tensors
    with pytest.raises(InputError, match="the query's value is nan"):
        record(tmp_path / "run", queries={"q": (x * torch.nan, y)})


def test_losses_of_another_shape_are_named(tmp_path: Path) -> None:
    class Mean(fi.ClassificationTask):
        def losses(self, model: Any, batch: Any) -> torch.Tensor:
            return super().losses(model, batch).mean()

        def measure(self, model: Any, batch: Any) -> torch.Tensor:
            return self.losses(model, batch)

    arguments: dict[str, Any] = {"optimizer": fi.SGD(lr=0.1), "epochs": 1, "batch_size": 8, "show_progress": "never"}
    with pytest.raises(InputError, match=r'one loss a sample, shape \(\d+,\), got \(\); use reduction="none"'):
        fi.train(Mean(), model(), data(), queries={"q": data(4)}, directory=tmp_path / "run", **arguments)


def test_a_last_batch_of_one_is_warned_of(tmp_path: Path) -> None:
    """Its step weighs its sample b times as much: most of σ² by the formula, and not linear."""
    share = ShuffledEpochs(141, 20).remainder_share()
    assert share == pytest.approx(400 / (400 + 140))
    assert ShuffledEpochs(140, 20).remainder_share() == 0 == ShuffledEpochs(141, 20, drop_last=True).remainder_share()
    few, options = TensorDataset(*(t[:17] for t in data().tensors)), {"epochs": 1, "show_progress": "never"}
    with pytest.warns(FinfluenceWarning, match="last batch of every epoch has 1 of 8 samples"):
        fi.train(
            fi.ClassificationTask(),
            model(1),
            few,
            queries=queries(),
            optimizer=fi.SGD(lr=0.1),
            batch_size=8,
            directory=tmp_path / "warned",
            sensitivity="replay",
            **options,
        )
