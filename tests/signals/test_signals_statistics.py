"""Statistics of signals against naive float64 loops."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from signals_helpers import N_SAMPLES, name_of, record, rows_of, start, step_row

from finfluence.errors import StoreError
from finfluence.signals import SignalStore, SignalWriter, _chunks, arrays, per_sample, step_means


def naive(rows: list[tuple[Any, ...]], ids: list[Any]) -> dict[str, list[Any]]:
    """Per-sample statistics of (step, sample, value) rows, one row at a time in float64."""
    by_step, by_sample = defaultdict(list), defaultdict(list)
    for step, sample, value in rows:
        by_step[step].append(value)
        by_sample[sample].append((step, value))
    means = {step: sum(values) / len(values) for step, values in by_step.items()}
    result: dict[str, list[Any]] = defaultdict(list)
    for sample in ids:
        values = [value for _, value in by_sample[sample]]
        count = len(values)
        mean = sum(values) / count if count else None
        result["sample"].append(sample)
        result["visits"].append(count)
        result["total"].append(sum(values))
        result["mean"].append(mean)
        result["variance"].append(sum((v - mean) ** 2 for v in values) / (count - 1) if count > 1 else None)
        result["centred_total"].append(sum(value - means[step] for step, value in by_sample[sample]))
    return result


def assert_matches(frame: pl.DataFrame, expected: dict[str, list[Any]]) -> None:
    assert frame["sample"].to_list() == expected["sample"]
    assert frame["visits"].to_list() == expected["visits"]
    for column in ("total", "mean", "variance", "centred_total"):
        seen = frame[column].to_list()
        assert [v is None for v in seen] == [v is None for v in expected[column]], column
        pairs = [(a, b) for a, b in zip(seen, expected[column], strict=True) if a is not None]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-9, atol=1e-12, err_msg=column)


def ids_of(kind: str) -> list[Any]:
    if kind == "str":
        return [name_of(i, "str") for i in range(N_SAMPLES)][::-1]
    spread = {"near": 1, "far": 10**15}[kind]
    return [name_of(i, "int64") * spread for i in range(N_SAMPLES)][::-1]


@pytest.mark.parametrize("kind", ["near", "far", "str"])
@pytest.mark.parametrize("layout", ["flushes", "one part", "cut at row groups", "a step in two parts"])
def test_per_sample_equals_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, layout: str) -> None:
    # Seed 3. "near" identifiers are looked up in a table, "far" and "str" ones by hashing.
    if layout != "one part":
        monkeypatch.setattr(_chunks, "_JOIN_ROWS", 30)
    if layout == "cut at row groups":
        monkeypatch.setattr(_chunks, "_CUT_ROWS", 60)
        monkeypatch.setattr("finfluence.signals._parts.ROW_GROUP", 16)
    generator = np.random.default_rng(3)
    ids = ids_of(kind)
    samples = pl.DataFrame({"sample": ids})
    id_dtype = "str" if kind == "str" else "int64"
    rows = []
    with start(tmp_path / "run", id_dtype=id_dtype, samples=samples) as writer:
        for step in range(60):
            batch = [ids[i] for i in generator.integers(0, N_SAMPLES - 3, 7)]  # the last three are never visited
            values = (generator.standard_normal((7, 2)) + 5).astype(np.float32)
            rows += [(step, sample, float(value)) for sample, value in zip(batch, values[:, 1], strict=True)]
            half = 4 if layout == "a step in two parts" else 7
            writer.append_signals(step, batch[:half], values[:half])
            writer.append_steps(**step_row(step))
            if layout in ("flushes", "a step in two parts") and step % 4 == 3:
                writer.flush()
            if half < 7:
                writer.append_signals(step, batch[half:], values[half:])
    store = SignalStore.open(tmp_path / "run")
    chunks = _chunks.Chunks(store, "second", table="signals")
    assert chunks.separate == (layout in ("flushes", "one part"))
    assert_matches(per_sample(store, "second"), naive(rows, ids))

    read = arrays(store, "second")
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    assert read.steps.tolist() == [rows[i][0] for i in order]
    by_position = [(int(s), ids[c], float(v)) for s, c, v in zip(read.steps, read.codes, read.values, strict=True)]
    assert sorted(by_position) == sorted(rows)

    means = step_means(store, "second")
    for step, size, mean in means.rows():
        values = [value for at, _, value in rows if at == step]
        assert size == len(values)
        np.testing.assert_allclose(mean, sum(values) / len(values), rtol=1e-12)
    assert means["step"].to_list() == sorted({step for step, _, _ in rows})


def test_the_panel_and_the_live_table_are_summarised_alike(tmp_path: Path) -> None:
    with start(tmp_path / "run") as writer:
        for step in range(20):
            record(writer, step)
    store = SignalStore.open(tmp_path / "run")
    ids = store.samples().collect()["sample"].to_list()
    for table in ("live", "panel"):
        rows = [(row[0], row[-3], row[-2]) for row in rows_of(store, table)]
        assert_matches(per_sample(store, "first", table=table), naive(rows, ids))


def test_a_small_variance_beside_a_large_mean_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seed 5. Raw sums of squares would lose this variance: the mean is 1e4 and the deviations are some 1e-2.
    monkeypatch.setattr(_chunks, "_JOIN_ROWS", 50)
    generator = np.random.default_rng(5)
    values = (1e4 + 1e-2 * generator.standard_normal((40, 10))).astype(np.float32)
    constant = np.float32(0.1)
    with start(tmp_path / "run", queries=["q"]) as writer:
        for step in range(40):
            writer.append_signals(step, np.arange(11), np.append(values[step], constant))
            writer.append_steps(**step_row(step))
            writer.flush()
    frame = per_sample(SignalStore.open(tmp_path / "run"), "q")
    np.testing.assert_allclose(frame["variance"][:10], values.astype(np.float64).var(axis=0, ddof=1), rtol=1e-9)
    assert frame["variance"][10] < 1e-30


def test_non_finite_signals_show_where_they_are(tmp_path: Path) -> None:
    with start(tmp_path / "run", queries=["q"]) as writer:
        for step, values in enumerate(([1.0, 2.0], [np.nan, 3.0], [1.0, np.inf])):
            writer.append_signals(step, [0, step + 1], values)
            writer.append_steps(**step_row(step))
    frame = per_sample(SignalStore.open(tmp_path / "run"), "q")
    assert frame["total"].is_finite().to_list() == [False, True, True, False]
    assert frame["variance"].is_nan().to_list()[0]
    assert frame["centred_total"].is_finite().to_list() == [False, True, False, False]


def test_a_sample_that_the_table_lacks_is_named(tmp_path: Path) -> None:
    for kind, known, strange in (("int64", [1, 2], 9), ("int64", [1, 2], 10**17), ("str", ["a", "b"], "c")):
        directory = tmp_path / str(strange)
        with start(directory, id_dtype=kind, samples=pl.DataFrame({"sample": known})) as writer:
            writer.append_signals(0, [known[0], strange], np.zeros((2, 2)))
            writer.append_steps(**step_row(0))
        with pytest.raises(StoreError, match=f"signals of sample {strange!r}, which samples.parquet lacks"):
            arrays(SignalStore.open(directory), "first")


def test_resuming_counts_each_signal_once(tmp_path: Path) -> None:
    writer = start(tmp_path / "run")
    for step in range(10):
        record(writer, step)
    writer.flush()
    writer = SignalWriter.resume(tmp_path / "run")
    writer.truncate_from(4)
    for step in range(4, 10):
        record(writer, step)
    writer.close()
    store = SignalStore.open(tmp_path / "run")
    assert int(per_sample(store, "first")["visits"].sum()) == len(rows_of(store, "signals"))
