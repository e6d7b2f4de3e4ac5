"""`train`: the reference training loop, recorded."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from torch import Tensor, nn

from finfluence.errors import FinfluenceError, FinfluenceWarning, InputError
from finfluence.gradients import check_model
from finfluence.influence import ShuffledEpochs
from finfluence.runs._content import check_source, with_content
from finfluence.runs._loop import RecordingLoop
from finfluence.runs._manifest import (
    SensitivityKind,
    SignalKind,
    check_choice,
    describe_plan,
    describe_run,
    environment,
)
from finfluence.runs._progress import ShowProgress
from finfluence.runs.data import Collate, dataset_size, query_batches
from finfluence.runs.engine import Engine, isolated_rng
from finfluence.runs.panel import NoisePanel, full_panel
from finfluence.runs.plan import OptimizerConfig, Plan, Precision, Schedule
from finfluence.runs.recorder import Recorder
from finfluence.runs.replay_plan import ReplayOptions
from finfluence.runs.replaying import replay
from finfluence.runs.run import Run, open_run
from finfluence.runs.sampling import Sampler, SamplerKind
from finfluence.runs.self_signals import SelfInfluence, SelfSignals, self_steps
from finfluence.runs.tasks import Task, measurement
from finfluence.runs.watch import Auxiliary, WatchedSubsets
from finfluence.signals import (
    IdDtype,
    SignalStore,
    SignalTable,
    SignalWriter,
    check_same,
    holds_run,
    open_folder,
    read_manifest,
)

# What a resumed run must have in common with the one that it continues.
_FIXED = (
    "plan",
    "n_samples",
    "sensitivity",
    "signals",
    "refresh",
    "panel",
    "checkpoint_every",
    "watch",
    "auxiliary",
    "self_influence",
)
# Share of an epoch's noise that may fall to a smaller last batch before a warning says so.
REMAINDER_SHARE = 0.5


def train(
    task: Task,
    model: nn.Module,
    dataset: Any,
    *,
    queries: Mapping[str, Any],
    optimizer: OptimizerConfig,
    epochs: int,
    batch_size: int,
    directory: str | os.PathLike[str],
    seed: int = 0,
    sensitivity: SensitivityKind = "live",
    signals: SignalKind = "batch",
    sampler: Sampler | SamplerKind = "shuffled",
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    accumulation: int = 1,
    precision: Precision = "float32",
    refresh: int = 1,
    panel: NoisePanel | None = None,
    samples: pl.DataFrame | None = None,
    ids: Any = None,
    watch: Mapping[str, Any] | None = None,
    auxiliary: Auxiliary = "none",
    self_influence: SelfInfluence = "none",
    collate: Collate | None = None,
    checkpoint_every: int | None = None,
    replay_options: ReplayOptions | None = None,
    recipe: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    exist: Literal["error", "resume"] = "error",
    show_progress: ShowProgress = "auto",
) -> Run:
    """Trains a model in place and records the signals of every sample.

    Args:
        task: the losses of a batch and the measurement of a query.
        model: trained in place; parameters after a recorded run equal those of a bare run bit for bit.
        dataset: map-style dataset.
        queries: data of each query by name: map-style datasets, ready batches, a finfluence.runs.Contrast of two, or
            functions of the model that return a scalar.
        optimizer: finfluence.SGD, Adam or AdamW.
        epochs: passes over the data.
        batch_size: samples an optimizer step sees.
        directory: run directory, a local path or an fsspec URL.
        seed: of batch order and dropout.
        sensitivity: "live" (signals recorded on the way), "replay" (states recorded on the way, then a walk backwards
            through the run; calibrated) or "both" (replay, with the live signals beside it).
        signals: "batch" (each sample where it was in the batch) or "full" (every sample at the panel's positions of
            every epoch: better shifts, at n / batch_size times the cost of a position).
        sampler: how batches are drawn.
        schedule: learning-rate schedule; constant by default.
        clip_norm: global gradient norm to clip at.
        accumulation: micro-batches that a batch is cut into.
        precision: "float32" (the model's own dtype) or "bfloat16-autocast".
        refresh: live query gradients are evaluated at every `refresh`-th step.
        panel: samples and positions of the noise panel; NoisePanel(0) for none.
        samples: the sample table, "sample" and any further columns; made of the ids where it is not given.
        ids: (n,) ids of the dataset's rows, int64 or str; from `samples`, else the index.
        watch: ids of subsets by name whose per-step signals with and without them are recorded for f-INE's two-stage
            test; each costs a forward and backward pass over the subset a step. Live sensitivities only.
        auxiliary: "train" also trains a model on the data without each watched subset and records its signals, for the
            differences in differences of that test.
        self_influence: "record" also records each sample's signal on its own loss where batches hold it, for
            run.influence("self"); a pass of per-sample gradients over the batch, about the cost of another training
            step. "all" records that of every sample at three steps of the run instead, for
            run.influence(query, relative=True) after few epochs.
        collate: makes a batch of a list of samples.
        checkpoint_every: steps between stored states; about the square root of the number of steps by default.
        replay_options: damping, Hessian-vector products and memory of the replay.
        recipe: {"function": "module:function", "arguments": {...}} from which the command line can rebuild this run.
        source: {"path", "format", "id_column"} of the file that the dataset was made of (see `runs.sources.Source`), so
            that it can be cleaned; its rows' content hashes are recorded, else those of the dataset's items.
        exist: "resume" goes on from the last state of a killed run.
        show_progress: "auto" shows a bar on a terminal's standard error after two seconds; "never" is silent.

    Returns:
        The recorded run.

    Raises:
        InputError: an argument that cannot be used.
        RecordingError: a model that cannot be recorded, or a loss that is not finite; what was recorded stays readable.
        StoreError: the directory exists, is not a run, or cannot be written.
        ReplayError: the replay's re-execution differs from the training, or its adjoint diverges.
    """
    check_choice("sensitivity", sensitivity, get_args(SensitivityKind))
    check_choice("signals", signals, get_args(SignalKind))
    check_choice("self_influence", self_influence, get_args(SelfInfluence))
    plan = Plan(
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        sampler=sampler if isinstance(sampler, Sampler) else Sampler(sampler),
        schedule=schedule or Schedule(),
        clip_norm=clip_norm,
        accumulation=accumulation,
        precision=precision,
    )
    if watch and sensitivity == "replay":
        raise InputError('watched subsets use live sensitivities; record with sensitivity="live" or "both"')
    if signals == "full" and plan.sampler.kind != "shuffled":
        raise InputError(f'signals="full" is defined for the shuffled sampler, got {plan.sampler.kind!r}; use "batch"')
    n = dataset_size(dataset)
    if sensitivity != "live":
        _warn_of_remainder(plan, n)
    origin = check_source(source)
    table, content = with_content(sample_table(samples, ids=ids, n=n), dataset, source=origin)
    check_model(model)
    engine = Engine(task, model, dataset=dataset, plan=plan, collate=collate)
    batches = query_batches(queries, collate=collate, device=engine.device)
    panel = panel or NoisePanel(samples=min(64, n))
    interval = checkpoint_interval(engine.total_steps, refresh=refresh, every=checkpoint_every)
    names = table["sample"].to_numpy()
    id_dtype: IdDtype = "int64" if table["sample"].dtype.is_integer() else "str"
    measures = {name: functools.partial(_measure, engine, batch) for name, batch in batches.items()}
    watched = WatchedSubsets.build(watch, names, engine=engine, measures=measures, auxiliary=auxiliary)
    live_table: SignalTable = "signals" if sensitivity == "live" else "live"
    recorder = None
    if sensitivity != "replay":
        recorder = Recorder(
            model,
            engine.optimizer,
            queries=measures,
            directory=directory,
            refresh=refresh,
            id_dtype=id_dtype,
            sampler=plan.sampler,
        )
    described = (
        describe_run(engine.optimizer, plan.sampler, seed=seed, sensitivity=sensitivity, signals=signals)
        | describe_plan(plan, n)
        | environment()
        | {
            "refresh": refresh,
            "panel": {"samples": panel.samples, "positions": panel.positions},
            "checkpoint_every": interval,
            "recipe": dict(recipe) if recipe else None,
            "source": origin,
            "content": content,
            "watch": {name: np.asarray(members).tolist() for name, members in (watch or {}).items()},
            "auxiliary": auxiliary,
            "self_influence": self_influence,
        }
    )
    folder = open_folder(directory)
    if exist == "resume" and holds_run(folder):
        check_same(folder, read_manifest(folder), **{field: described[field] for field in _FIXED})
    writer = SignalWriter.create(
        directory, queries=list(batches), id_dtype=id_dtype, manifest=described, samples=table, exist=exist
    )
    live_panel = None
    if sensitivity == "live" and panel.samples:
        live_panel = full_panel(n, panel.positions) if signals == "full" else panel
    try:
        with isolated_rng(engine.device), contextlib.ExitStack() as stack:
            own = None if self_influence == "none" else stack.enter_context(contextlib.closing(SelfSignals(engine)))
            loop = RecordingLoop(
                engine,
                writer,
                directory=folder,
                keep="last" if sensitivity == "live" else "all",
                recorder=recorder,
                panel=live_panel,
                watched=watched,
                own=own,
                own_steps=self_steps(engine.total_steps) if self_influence == "all" else None,
                names=names,
                interval=interval,
            )
            start = loop.resume() if exist == "resume" else 0
            if recorder is not None:
                recorder.attach(writer, table=live_table, step=start)
            began = time.perf_counter()
            loop.run(start, show=show_progress)
        # a replay is planned by what a step takes, without the passes over all samples for their self-influence
        seconds = (
            (time.perf_counter() - began - loop.own_seconds) * engine.total_steps / max(1, engine.total_steps - start)
        )
        writer.update_manifest(
            largest_residual=_largest_residual(directory) if recorder else None,
            training_seconds=seconds if start < engine.total_steps else writer.manifest.get("training_seconds"),
        )
        if sensitivity != "live":
            replay(
                directory,
                task,
                model,
                dataset=dataset,
                queries=batches,
                collate=collate,
                options=replay_options,
                writer=writer,
                show_progress=show_progress,
            )
    except BaseException:
        # the error that ended the run is the one to report
        with contextlib.suppress(FinfluenceError):
            writer.close("failed")
        raise
    writer.close("finished")
    return open_run(directory)


def sample_table(samples: pl.DataFrame | None, *, ids: Any, n: int) -> pl.DataFrame:
    """The sample table of a run.

    Args:
        samples: as given by the caller; None for the ids alone.
        ids: (n,) ids; None for the column "sample", else the index.
        n: number of samples.

    Raises:
        InputError: another number of rows or ids than samples.
    """
    if ids is not None:
        ids = np.asarray(ids)
        if ids.shape != (n,):
            raise InputError(f"ids has shape {ids.shape}, but the dataset has {n} samples; give one id a sample")
        series = pl.Series("sample", ids.tolist())
        samples = pl.DataFrame({"sample": series}) if samples is None else samples.with_columns(series)
    if samples is None:
        return pl.DataFrame({"sample": np.arange(n, dtype=np.int64)})
    if samples.height != n:
        raise InputError(f"the sample table has {samples.height} rows, but the dataset has {n} samples")
    if "sample" not in samples.columns:
        samples = samples.insert_column(0, pl.Series("sample", np.arange(n, dtype=np.int64)))
    return samples


def checkpoint_interval(total_steps: int, *, refresh: int, every: int | None) -> int:
    """Steps between stored states: the square root of the steps, rounded up to a multiple of the refresh interval.

    A state inside a refresh interval could not be resumed from, because the query gradient in use would be missing.

    Raises:
        InputError: a given interval that is not a positive multiple of `refresh`.
    """
    if refresh < 1:
        raise InputError(f"refresh must be at least 1, got {refresh}")
    if every is None:
        return refresh * max(1, math.ceil(math.sqrt(total_steps) / refresh))
    if every < 1 or every % refresh:
        raise InputError(f"checkpoint_every must be a positive multiple of refresh ({refresh}), got {every}")
    return every


def _warn_of_remainder(plan: Plan, n: int) -> None:
    """Says so where the smaller last batch of an epoch is most of the noise: its steps are far from linear."""
    if plan.sampler.kind != "shuffled" or plan.sampler.drop_last or plan.batch_size >= n:
        return
    share = ShuffledEpochs(n, plan.batch_size).remainder_share()
    if share > REMAINDER_SHARE:
        rest = n % plan.batch_size
        warnings.warn(
            f"the last batch of every epoch has {rest} of {plan.batch_size} samples, each of which weighs "
            f"{plan.batch_size / rest:.3g} times as much as elsewhere: about {share:.0%} of the noise is that batch's, "
            "and μ comes out too small; choose a batch size that divides the number of samples, or "
            "Sampler(drop_last=True)",
            FinfluenceWarning,
            stacklevel=3,
        )


def _measure(engine: Engine, batch: Any, model: nn.Module) -> Tensor:
    with engine.autocast():
        return measurement(engine.task, model, batch)


def _largest_residual(directory: str | os.PathLike[str]) -> float | None:
    # of the steps before a resumption, too
    steps = SignalStore.open(directory, partial=True).steps()
    return steps.select(pl.col("residual").max()).collect().item()


__all__ = ["checkpoint_interval", "sample_table", "train"]
