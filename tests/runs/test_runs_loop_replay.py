"""A loop of one's own, recorded for a replay: its steps are taken again, and μ is that of the reference loop."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from runs_problems import N, data, model, parameters, queries
from torch import Tensor, nn
from torch.nn import functional

import finfluence as fi
from finfluence.errors import FinfluenceWarning, InputError, RecordingError, ReplayError, StoreError
from finfluence.runs.loop_record import read_steps
from finfluence.sensitivity import SGDRule
from finfluence.signals import open_folder

TASK = fi.ClassificationTask()
PANEL = fi.NoisePanel(6, 2)


def measures(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    asked = {name: q.tensors if hasattr(q, "tensors") else q for name, q in queries(dtype).items()}
    return {name: (lambda net, x=x, y=y: functional.cross_entropy(net(x), y)) for name, (x, y) in asked.items()}


def recorder(net: nn.Module, optimizer: Any, directory: Path, **changes: Any) -> fi.Recorder:
    settings: dict[str, Any] = {"sensitivity": "both", "checkpoint_every": 4, "panel": PANEL} | changes
    asked = measures(next(net.parameters()).dtype)
    return fi.Recorder(net, optimizer, queries=asked, directory=directory, **settings)


def epochs(count: int = 3, *, batch: int = 6, seed: int = 0) -> list[Tensor]:
    """Rows of the batches of some epochs, each a permutation of all rows."""
    generator = torch.Generator().manual_seed(seed)
    return list(
        itertools.chain.from_iterable(torch.randperm(N, generator=generator).split(batch) for _ in range(count))
    )


def loop(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: fi.Recorder,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: bool = False,
    dtype: torch.dtype = torch.float64,
    batches: Any = None,
    names: Any = None,
    whole: bool = True,
) -> None:
    """A loop as users write them: a schedule, accumulation, clipping, random numbers of its own between the steps."""
    x, y = data(dtype=dtype).tensors
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=15)
    batches = epochs() if batches is None else batches
    for number, ids in enumerate(batches, 1):
        torch.rand(3)
        with record.batch(ids if names is None else [names[i] for i in ids], denominator=len(ids) * accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = functional.cross_entropy(net(x[ids]), y[ids])
            (value / accumulate).backward()
        within = (number - 1) % 7 + 1 if whole else number
        if within % accumulate == 0 or (whole and within == 7) or number == len(batches):
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Two param groups with learning rates of their own."""
    first, *rest = net.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.05}, {"params": rest}], lr=0.1, momentum=0.9, **options)


def adamw(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01, **options)


def replayed(directory: Path, net: nn.Module, task: Any = TASK, **changes: Any) -> fi.Run:
    settings: dict[str, Any] = {"dataset": data(), "queries": queries(), "show_progress": "never"} | changes
    return fi.replay(directory, task, net, **settings)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "SGD, two rates": (sgd, {}, {}),
    "AdamW, accumulated, clipped": (adamw, {"accumulate": 2, "clip": 0.3}, {"clip_norm": 0.3}),
    "the last step has fewer micro-batches": (sgd, {"accumulate": 3}, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_loop_is_taken_again_exactly(tmp_path: Path, case: str) -> None:
    make, how, told = CASES[case]
    net = model(3, dropout=0.3)
    torch.manual_seed(1)
    optimizer = make(net)
    with recorder(net, optimizer, tmp_path / "run", **told) as record:
        loop(net, optimizer, record, **how)
    end = parameters(net).clone()
    with pytest.raises(InputError, match=r"is not finished; finish it with .* finfluence\.replay"):
        fi.open_run(tmp_path / "run").influence("first")
    state = torch.get_rng_state()
    # nothing of the model's values is needed: they are those of the recording
    run = replayed(tmp_path / "run", model(8, dropout=0.3))
    assert torch.equal(torch.get_rng_state(), state)
    assert run.manifest["replay"]["largest_mismatch"] == 0.0
    assert run.manifest["replay"]["largest_residual"] < 1e-12
    assert run.influence("first")["mu"].is_finite().all()
    assert run.influence("first", sensitivity="live")["mu"].is_finite().all()
    assert torch.equal(parameters(net), end)
    # every row was seen once an epoch, and signals stand where their samples were
    steps, signals = run.steps(), run.signals().collect()
    assert signals.height == 3 * N
    assert signals.group_by("step").len().sort("step")["len"].to_list() == steps["batch_size"].to_list()


def test_signals_are_those_of_the_reference_loop(tmp_path: Path) -> None:
    """The same training through `fi.train`, which brute force confirms elsewhere, and as a loop with its batches."""
    settings: dict[str, Any] = {"optimizer": fi.AdamW(lr=0.02, weight_decay=0.1), "epochs": 3, "batch_size": 6}
    reference = fi.train(
        TASK,
        model(3),
        data(),
        queries=queries(),
        directory=tmp_path / "reference",
        sensitivity="both",
        seed=5,
        panel=PANEL,
        signals="full",
        show_progress="never",
        **settings,
    )
    order = reference.signals(table="live").collect().group_by("step", maintain_order=True).agg("sample")
    net = model(3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    x, y = data().tensors
    with recorder(net, optimizer, tmp_path / "run", seed=5, signals="full") as record:
        for rows in order["sample"].to_list():
            ids = torch.tensor(rows)
            with record.batch(ids):
                functional.cross_entropy(net(x[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    run = replayed(tmp_path / "run", net)
    for table in ("signals", "panel"):
        frames = [r.store.signals(table) if table == "signals" else r.store.panel() for r in (run, reference)]
        mine, theirs = (f.collect().sort("step", "sample") for f in frames)
        assert mine.select("step", "sample").equals(theirs.select("step", "sample"))
        np.testing.assert_allclose(mine["first"].to_numpy(), theirs["first"].to_numpy(), rtol=2e-5, atol=1e-9)
    for subsets in (None, {"a": [1, 2, 3]}):
        mine, theirs = (r.influence("second", subsets=subsets) for r in (run, reference))
        for column in ("mu", "se"):
            np.testing.assert_allclose(mine[column].to_numpy(), theirs[column].to_numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("named", [False, True])
def test_a_loop_recorded_for_a_replay_alone(tmp_path: Path, named: bool) -> None:
    """Without live signals: nothing is on the model, no query is evaluated, and the replay gives the same."""
    names = [f"row {i}" for i in range(N)] if named else None
    samples = None if names is None else pl.DataFrame({"sample": names})
    asked = []

    def measure(net: nn.Module) -> Tensor:
        asked.append(1)
        x, y = data(6, seed=4).tensors
        return functional.cross_entropy(net(x), y)

    found = []
    for sensitivity in ("both", "replay"):
        net = model(3, dropout=0.3)
        optimizer = adamw(net)
        torch.manual_seed(4)
        settings: dict[str, Any] = {"sensitivity": sensitivity, "panel": PANEL, "checkpoint_every": 4}
        record = fi.Recorder(
            net, optimizer, queries={"first": measure}, directory=tmp_path / sensitivity, samples=samples, **settings
        )
        with record:
            asked.clear()
            assert bool([m for m in net.modules() if m._forward_hooks]) == (sensitivity == "both")
            loop(net, optimizer, record, accumulate=2, names=names)
            assert bool(asked) == (sensitivity == "both")
        run = replayed(tmp_path / sensitivity, net, queries={"first": measure})
        assert run.sensitivity == sensitivity
        assert run.steps()["residual"].null_count() == (12 if sensitivity == "replay" else 0)
        found.append(run.influence("first"))
    assert found[0].equals(found[1])
    with pytest.raises(InputError, match="live"):
        run.influence("first", sensitivity="live")


def test_names_stand_for_the_rows_of_the_sample_table(tmp_path: Path) -> None:
    names = [f"row {i}" for i in range(N)][::-1]
    results = []
    for given in (None, names):
        net = model(3)
        optimizer = sgd(net)
        samples = None if given is None else pl.DataFrame({"sample": given})
        with recorder(net, optimizer, tmp_path / f"{given is None}", samples=samples) as record:
            loop(net, optimizer, record, names=given)
        run = replayed(tmp_path / f"{given is None}", net)
        assert run.samples()["sample"].to_list() == (given or list(range(N)))
        results.append(run.influence("first")["mu"].to_numpy())
    np.testing.assert_array_equal(results[0], results[1])


def test_a_replayed_loop_is_a_run_like_any_other(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    with recorder(net, optimizer, tmp_path / "run", signals="full") as record:
        loop(net, optimizer, record)
    run = replayed(tmp_path / "run", net)
    cut = run.clean("first", top=3)
    assert cut.dropped.height == 3
    assert "<html" in Path(run.report()).read_text(encoding="utf-8")[:200]
    assert run.influence("first", subsets={"cut": cut.dropped["sample"]})["mu"][0] < 0
    with pytest.raises(InputError, match=r"a loop of your own.*finfluence\.retrain"):
        run.verify(cut)


def test_a_loop_is_taken_again_without_some_of_its_rows(tmp_path: Path) -> None:
    """Against a plain loop over the same micro-batches, whose steps are means over the rows that are left."""
    net, removed = model(3), [0, 7, 20, 21]
    optimizer = sgd(net)
    with recorder(net, optimizer, tmp_path / "run", clip_norm=0.4) as record:
        loop(net, optimizer, record, accumulate=2, clip=0.4)
    replayed(tmp_path / "run", net)
    asked = measures()
    frame = fi.leave_out(
        tmp_path / "run",
        TASK,
        model(8),
        dataset=data(dtype=torch.float64),
        queries=asked,
        subsets={"some": removed},
        show_progress="never",
    )
    again = model(3)
    optimizer = sgd(again)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=15)
    x, y = data(dtype=torch.float64).tensors
    batches = epochs()
    # an epoch has seven micro-batches, two to a step and the last one alone
    for start in range(0, len(batches), 7):
        for first in range(start, start + 7, 2):
            step = batches[first : min(first + 2, start + 7)]
            share = sum(int(i) not in removed for part in step for i in part) / sum(map(len, step))
            for part in step:
                kept = [int(i) for i in part if int(i) not in removed]
                value = functional.cross_entropy(again(x[kept]), y[kept], reduction="sum") / (2 * len(part) * share)
                value.backward()
            nn.utils.clip_grad_norm_(again.parameters(), 0.4)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        for row in frame.iter_rows(named=True):
            assert row["measured_with"] == pytest.approx(float(asked[row["query"]](net)), rel=1e-12)
            assert row["measured_without"] == pytest.approx(float(asked[row["query"]](again)), rel=1e-11)
    with pytest.raises(InputError, match=r"a loop of your own.*finfluence\.leave_out"):
        fi.open_run(tmp_path / "run").leave_out(subsets={"some": removed})


@pytest.mark.parametrize("clip", [None, 0.3])
def test_self_influence_can_be_added_later(tmp_path: Path, clip: float | None) -> None:
    """It is what the reference loop records on the way, and a replay that is there stays."""
    settings: dict[str, Any] = {
        "queries": queries(),
        "optimizer": fi.AdamW(lr=0.02),
        "epochs": 3,
        "batch_size": 6,
        "sensitivity": "replay",
        "panel": PANEL,
        "clip_norm": clip,
        "show_progress": "never",
    }
    truth = fi.train(TASK, model(3), data(), directory=tmp_path / "all", self_influence="all", **settings)
    run = fi.train(TASK, model(3), data(), directory=tmp_path / "none", **settings)
    with pytest.raises(InputError, match=r"add it by replay\(..., self_influence"):
        run.influence("first", relative=True)
    before = run.signals().collect()
    net = model(3)
    run = replayed(tmp_path / "none", net, self_influence="all")
    assert before.equals(run.signals().collect())
    found, expected = (r.influence("first", relative=True) for r in (run, truth))
    np.testing.assert_allclose(found["relative"].to_numpy(), expected["relative"].to_numpy(), rtol=1e-6)
    assert replayed(tmp_path / "none", net, self_influence="all").influence("first", relative=True).equals(found)
    fi.train(TASK, model(3), data(), directory=tmp_path / "record", self_influence="record", **settings)
    with pytest.raises(InputError, match="has the self-influence that samples had in their batches"):
        replayed(tmp_path / "record", net, self_influence="all")
    with pytest.raises(InputError, match="unknown self_influence 'record'"):
        replayed(tmp_path / "none", net, self_influence="record")


def test_sixteen_bits_are_taken_again_if_told(tmp_path: Path) -> None:
    def one(directory: Path, **told: Any) -> nn.Module:
        net = model(3, dtype=torch.float32)
        optimizer = adamw(net)
        with recorder(net, optimizer, directory, **told) as record:
            loop(net, optimizer, record, autocast=True, dtype=torch.float32)
        return net

    with pytest.raises(RecordingError, match="precision='bfloat16-autocast'"):
        one(tmp_path / "untold")
    net = one(tmp_path / "run", precision="bfloat16-autocast")
    x, y = data(dtype=torch.float32).tensors
    asked = queries(torch.float32)
    run = replayed(tmp_path / "run", net, dataset=torch.utils.data.TensorDataset(x, y), queries=asked)
    assert run.manifest["replay"]["largest_mismatch"] < 1e-6
    assert run.influence("first")["mu"].is_finite().all()


def test_measuring_on_the_way_follows_the_loops_own_epochs(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    with recorder(net, optimizer, tmp_path / "run") as record:
        loop(net, optimizer, record)
    options = fi.ReplayOptions(measure_epochs="second-half")
    run = replayed(tmp_path / "run", net, options=options)
    assert run.measured_epochs == (1, 2, 3)
    assert run.influence("first")["mu"].is_finite().all()
    with pytest.raises(InputError, match="too few to measure after"):
        replayed(tmp_path / "run", net, options=fi.ReplayOptions(measure_epochs=(0.01, 3)))


@pytest.mark.parametrize("sensitivity", ["both", "replay"])
def test_a_resumed_loop_is_that_without_the_interruption(tmp_path: Path, sensitivity: str) -> None:
    """The loop stops after a checkpoint of its own in the middle of a segment, and goes on from it."""
    batches = epochs()
    results: list[pl.DataFrame] = []
    saved: list[Any] = []
    for stops in (False, True):
        net = model(3)
        optimizer = adamw(net)
        directory = tmp_path / f"{stops}"
        if stops:
            record = recorder(net, optimizer, directory, sensitivity=sensitivity)
            with pytest.raises(KeyboardInterrupt), record:  # noqa: PT012
                _steps(net, optimizer, record, batches[:10])
                record.flush()
                saved.append(copy.deepcopy((net.state_dict(), optimizer.state_dict())))
                _steps(net, optimizer, record, batches[10:13])
                raise KeyboardInterrupt
            net = model(9)
            optimizer = adamw(net)
            net.load_state_dict(saved[0][0])
            optimizer.load_state_dict(saved[0][1])
        start = 10 if stops else 0
        with recorder(net, optimizer, directory, exist="resume", start=start, sensitivity=sensitivity) as record:
            _steps(net, optimizer, record, batches[start:], first=start)
        run = replayed(directory, net)
        assert run.manifest["total_steps"] == 21
        results.append(run.influence("first").select("sample", "mu", "se"))
    assert results[0]["sample"].equals(results[1]["sample"])
    # parameters are cut at other steps, which differ by rounding at most
    np.testing.assert_allclose(results[1]["mu"].to_numpy(), results[0]["mu"].to_numpy(), rtol=1e-6)


def _steps(net: nn.Module, optimizer: Any, record: fi.Recorder, batches: Any, *, first: int = 0) -> None:
    x, y = data().tensors
    for number, ids in enumerate(batches, first):
        with record.batch(ids, epoch=number // 7):
            functional.cross_entropy(net(x[ids]), y[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loop_resumed_before_it_saw_every_row(tmp_path: Path) -> None:
    """Epochs and positions go on where they were, and rows that come later join the sample table."""
    net = model(3)
    optimizer = sgd(net)
    with pytest.raises(KeyboardInterrupt), recorder(net, optimizer, tmp_path / "run", sensitivity="live") as record:  # noqa: PT012
        loop(net, optimizer, record, batches=epochs()[:5])
        raise KeyboardInterrupt
    assert fi.open_run(tmp_path / "run", partial=True).samples().height == 30
    resumed = {"sensitivity": "live", "exist": "resume", "start": 5}
    with recorder(net, optimizer, tmp_path / "run", **resumed) as record:
        loop(net, optimizer, record, batches=epochs()[5:])
    run = fi.open_run(tmp_path / "run")
    assert run.samples()["sample"].to_list() == list(range(N))
    steps = run.steps()
    assert steps["epoch"].to_list() == [0] * 7 + [1] * 7 + [2] * 7
    assert steps["position"].to_list() == list(range(7)) * 3


def test_resuming_needs_a_state_and_forgets_the_replay(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    with recorder(net, optimizer, tmp_path / "run") as record:
        _steps(net, optimizer, record, epochs())
    replayed(tmp_path / "run", net)
    with (
        pytest.raises(StoreError, match=r"no state from before step 10.*recorder.flush"),
        recorder(net, optimizer, tmp_path / "run", exist="resume", start=10),
    ):
        pass
    with (
        pytest.raises(StoreError, match="started with sensitivity 'both', not 'live'"),
        recorder(net, optimizer, tmp_path / "run", exist="resume", start=12, sensitivity="live"),
    ):
        pass
    with recorder(net, optimizer, tmp_path / "run", exist="resume", start=12) as record:
        _steps(net, optimizer, record, epochs()[12:], first=12)
    run = fi.open_run(tmp_path / "run")
    assert run.manifest["replay"] == {}
    assert run.signals().collect().is_empty()
    with pytest.raises(ReplayError, match="differ"):  # the parameters were those of the end
        replayed(tmp_path / "run", net)


def test_random_numbers_are_kept_where_the_loop_drew_some(tmp_path: Path) -> None:
    for dropout in (0.0, 0.3):
        net = model(3, dropout=dropout)
        optimizer = sgd(net)
        with recorder(net, optimizer, tmp_path / f"{dropout}") as record:
            loop(net, optimizer, record)
        folder = open_folder(tmp_path / f"{dropout}")
        parts = [part for cut in (4, 8, 21) for step in read_steps(folder, cut) for part in step.parts]
        assert len(parts) == 9
        assert all((part.random is not None) == (dropout > 0) for part in parts)


def test_what_a_replay_could_not_repeat_is_refused_while_recording(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    with (
        pytest.raises(RecordingError, match=r"step 0 was multiplied by 0\.\d+ .* give clip_norm="),
        recorder(net, optimizer, tmp_path / "clip") as record,
    ):
        loop(net, optimizer, record, clip=1e-3)
    with (  # noqa: PT012
        pytest.raises(RecordingError, match="thrown away or is zero"),
        recorder(net, optimizer, tmp_path / "skip") as record,
    ):
        for ids in epochs()[:2]:
            with record.batch(ids):
                functional.cross_entropy(net(data().tensors[0][ids]), data().tensors[1][ids]).backward()
            optimizer.zero_grad()
    with pytest.raises(InputError, match="which row of the dataset an id names"):
        recorder(net, optimizer, tmp_path / "names", id_dtype="str")
    mine = type("Mine", (torch.optim.SGD,), {})(net.parameters(), lr=0.1)
    with pytest.raises(RecordingError, match="takes the steps of Mine again, which finfluence cannot build"):
        recorder(net, mine, tmp_path / "optimizer", update_rule=SGDRule())
    for name, value in {"signals": "all", "precision": "half", "checkpoint_every": 0, "clip_norm": -1.0}.items():
        with pytest.raises(InputError, match=name):
            recorder(net, optimizer, tmp_path / "settings", **{name: value})
    with pytest.raises(InputError, match="unknown sensitivity 'all'"):
        recorder(net, optimizer, tmp_path / "settings", sensitivity="all")


def test_another_loss_or_denominator_is_found_out(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    with recorder(net, optimizer, tmp_path / "run") as record:
        loop(net, optimizer, record)
    for wrong in (fi.ClassificationTask(label_smoothing=0.1), _Doubled()):
        with pytest.raises(ReplayError, match="a task or denominators that are not the loop's"):
            replayed(tmp_path / "run", net, wrong)
    assert replayed(tmp_path / "run", net).influence("first").height == N
    with pytest.raises(InputError, match="recorded on 42 samples, the dataset has 40"):
        replayed(tmp_path / "run", net, dataset=data(40))
    other = nn.Sequential(nn.Linear(5, 3)).double()
    with pytest.raises((StoreError, ReplayError), match="on one side only"):
        replayed(tmp_path / "run", other)


class _Doubled(fi.ClassificationTask):
    def losses(self, model: Any, batch: Any) -> Tensor:
        return 2 * super().losses(model, batch)


def test_an_unfinished_loop_is_not_replayed(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    with pytest.raises(ValueError, match="stop"), recorder(net, optimizer, tmp_path / "run") as record:  # noqa: PT012
        _steps(net, optimizer, record, epochs()[:9])
        raise ValueError("stop")
    with pytest.raises(ReplayError, match="has not finished"):
        replayed(tmp_path / "run", net)
    with fi.Recorder(net, sgd(net), queries=measures(), directory=tmp_path / "live") as record:
        _steps(net, record.optimizer, record, epochs()[:9])
    with pytest.raises(ReplayError, match="record it with sensitivity='replay'"):
        replayed(tmp_path / "live", net)


def test_irregular_batches_and_unfinished_epochs_are_said(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    rows = torch.arange(N)
    sizes = [rows[:4], rows[4:20], rows[20:30], rows[30:]] * 2
    with (
        pytest.warns(FinfluenceWarning, match="differs from step to step"),
        recorder(net, optimizer, tmp_path / "irregular", signals="full") as record,
    ):
        loop(net, optimizer, record, batches=sizes)
    run = replayed(tmp_path / "irregular", net)
    assert run.manifest["signals"] == "batch"
    assert run.influence("first")["se"].is_finite().all()
    net = model(3)
    optimizer = sgd(net)
    with (
        pytest.warns(FinfluenceWarning, match="have 7, 7, 3 steps, and which rows an unfinished one"),
        recorder(net, optimizer, tmp_path / "unfinished") as record,
    ):
        loop(net, optimizer, record, batches=epochs()[:17])
    run = replayed(tmp_path / "unfinished", net)
    assert run.manifest["total_steps"] == 17
    assert run.influence("first")["mu"].is_finite().all()


def test_steps_that_straddle_two_epochs(tmp_path: Path) -> None:
    net = model(3)
    optimizer = sgd(net)
    with (
        pytest.warns(FinfluenceWarning, match="have 4, 3, 4 steps"),
        recorder(net, optimizer, tmp_path / "run") as record,
    ):
        loop(net, optimizer, record, accumulate=2, whole=False)
    run = replayed(tmp_path / "run", net)
    assert run.manifest["replay"]["largest_mismatch"] == 0.0
    assert run.signals().collect().height == 3 * N


def test_a_loop_that_draws_with_replacement(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(0, N, (6,), generator=generator) for _ in range(30)]
    net = model(3)
    optimizer = sgd(net)
    samples = pl.DataFrame({"sample": list(range(N))})
    sampler = fi.runs.Sampler("with-replacement")
    with recorder(net, optimizer, tmp_path / "run", sampler=sampler, samples=samples) as record:
        loop(net, optimizer, record, batches=batches)
    run = replayed(tmp_path / "run", net)
    assert run.manifest["replay"]["largest_mismatch"] == 0.0
    assert run.influence("first").height == N
