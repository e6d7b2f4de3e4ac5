"""From a recorded run's store to an influence table: which totals and which noise formula belong to the run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from finfluence.errors import InputError
from finfluence.influence import (
    Budget,
    DerivativeError,
    InfluenceTable,
    Noise,
    Panel,
    Reporting,
    SampleIndex,
    SampleTotals,
    ShuffledEpochs,
    kriged,
    poisson_noise,
    shuffled_noise,
    spread,
    successive_noise,
    with_replacement_noise,
)
from finfluence.influence import Estimator as TableEstimator
from finfluence.signals import SignalArrays, SignalStore, SignalTable, arrays, per_sample

# Panels are taken at evenly spaced positions with a random offset.
_POSITIONS = "regular"

# What the derivative along one path gets wrong, by the optimizer: constants set by hand against retraining, see
# "Coverage" in the benchmarks' section on calibration for what they cover and where. Adam's second moments differ from
# path to path, so its sensitivities differ more, and a sample's share of a step is no multiple of its gradient.
SGD_ERROR = DerivativeError(path=1.5, joint=0.1)
ADAM_ERROR = DerivativeError(path=2.0, each=0.4, joint=0.1)
# Epochs after which paths that began together are as far apart as they get. Before, their distance grows like that of
# random walks, in squares with the epochs.
PATH_EPOCHS = 3.0

Shifts = Literal["kriged", "plain"]


def influence_table(
    store: SignalStore,
    query: str,
    *,
    table: SignalTable,
    estimator: TableEstimator,
    budget: Budget | None,
    shifts: Shifts = "kriged",
    derivative_error: float = 1.0,
) -> InfluenceTable:
    """The influence table of one query of a run.

    Args:
        store: the run.
        query: one of its queries.
        table: which signals: "signals", or "live" beside a replay.
        estimator: "gaussian" or "tracin".
        budget: what removal is compared under; None for the sampler's own: "epochs" for Poisson sampling, where nothing
            takes a removed sample's place, "steps" otherwise.
        shifts: "kriged": batch signals of a shuffled run with a panel are completed by prediction, see
            `finfluence.influence.kriged`; "plain": the sums as recorded.
        derivative_error: how many times `usual_error` is counted.

    Raises:
        InputError: no signals, too little recorded for a noise estimate, or an unknown choice.
    """
    if shifts not in get_args(Shifts):
        raise InputError(f"unknown shifts {shifts!r}; choose one of {', '.join(get_args(Shifts))}")
    if not derivative_error >= 0:
        raise InputError(f"derivative_error is {derivative_error}; give a number from 0 on, 1 for what is usual")
    index = SampleIndex(store.samples().select("sample").collect()["sample"])
    panel = read_panel(store, query, index) if table == "signals" else None
    sampler = str(store.manifest.get("sampler", "shuffled"))
    full = store.manifest.get("signals") == "full" and panel is not None
    noise = completed = None
    if estimator == "gaussian" or full:
        signals = arrays(store, query, table=table)
        noise = run_noise(store, query, table=table, signals=signals, n=len(index), panel=panel)
        if panel is not None and shifts == "kriged" and not full and sampler == "shuffled":
            completed = _kriged(store, signals, panel=panel, noise=noise)
    if completed is not None:
        totals, noise = completed
    elif full and panel is not None and sampler == "shuffled":
        totals = SampleTotals.from_panel(
            panel, shuffled_epochs(store, len(index)), centre="others", positions=_POSITIONS
        )
    else:
        totals = batch_totals(store, query, table)
    return InfluenceTable(
        index,
        totals,
        noise,
        estimator=estimator,
        budget=budget or ("epochs" if sampler == "poisson" else "steps"),
        replacement="exact",
        reporting=Reporting(),
        error=usual_error(store, table).times(derivative_error),
        meta=(
            ("query", query),
            ("run", store.directory),
            ("sensitivity", _sensitivity(store, table)),
            ("shifts", "plain" if completed is None else "kriged"),
        ),
    )


def usual_error(store: SignalStore, table: SignalTable) -> DerivativeError:
    """What is counted for other paths and finite changes; nothing for live signals, which are not calibrated anyway."""
    if _sensitivity(store, table) == "live":
        return DerivativeError()
    optimizer = store.manifest.get("optimizer") or {}
    usual = ADAM_ERROR if "adam" in str(optimizer.get("name", "")).lower() else SGD_ERROR
    return replace(usual, path=usual.path * math.sqrt(min(1.0, recorded_epochs(store) / PATH_EPOCHS)))


def _sensitivity(store: SignalStore, table: SignalTable) -> str:
    if table == "live" or store.manifest.get("sensitivity") == "live":
        return "live"
    return "replay"


def batch_totals(store: SignalStore, query: str, table: SignalTable) -> SampleTotals:
    """Totals of the signals that samples had in their batches, in one streaming pass.

    Raises:
        InputError: the run has no signals yet.
    """
    frame = per_sample(store, query, table=table)
    visits = frame["visits"].to_numpy().astype(np.float64)
    if not visits.any():
        raise InputError(
            f"{store.directory} holds no {table} of query {query!r} yet; finish the recording or its replay"
        )
    sizes = store.steps().select("batch_size").filter(pl.col("batch_size") > 0).collect()["batch_size"].to_numpy()
    batch = 1.0 / float(np.mean(1.0 / sizes))
    others = batch / (batch - 1.0) if batch > 1 else 1.0
    return SampleTotals(
        visits=visits,
        total=frame["total"].to_numpy(),
        centred=frame["centred_total"].to_numpy() * others,
        centre="others",
        batch=batch,
    )


def _kriged(
    store: SignalStore, signals: SignalArrays, *, panel: Panel, noise: Noise
) -> tuple[SampleTotals, Noise] | None:
    """Totals and noise with what the batches did not show predicted; None where the run does not allow it."""
    if store.status != "finished":
        return None
    n = store.samples().select(pl.len()).collect().item()
    sampler = shuffled_epochs(store, n)
    places = store.steps().select("step", "epoch", "position").sort("step").collect()
    if places["epoch"].null_count() or places["position"].null_count():
        return None
    at = places["epoch"].to_numpy() * len(sampler.sizes()) + places["position"].to_numpy()
    return kriged(
        at[np.searchsorted(places["step"].to_numpy(), signals.steps)],
        signals.codes,
        value=signals.values,
        panel=panel,
        sampler=sampler,
        noise=noise,
        epochs=recorded_epochs(store),
        positions=_POSITIONS,
    )


def read_panel(store: SignalStore, query: str, index: SampleIndex) -> Panel | None:
    """The noise panel of a query, or None where the run has none."""
    if not store.has("panel"):
        return None
    frame = store.panel().select("epoch", "position", "sample", query).collect()
    if store.status != "finished":
        # the epoch that a killed run was in has only a part of its grid
        frame = frame.filter(pl.col("epoch") < recorded_epochs(store))
    if frame.is_empty():
        return None
    codes = index.codes(frame["sample"].to_numpy())
    return Panel.from_flat(
        frame["epoch"].to_numpy(), frame["position"].to_numpy(), code=codes, value=frame[query].to_numpy()
    )


def recorded_epochs(store: SignalStore) -> int:
    """Number of whole epochs that a run has recorded; those that were planned where it is finished."""
    if store.status == "finished" and (known := store.manifest.get("epochs")):
        return int(known)
    epochs = store.steps().group_by("epoch").len().collect()
    if store.status == "finished" or epochs.is_empty():
        return int(store.manifest.get("epochs") or epochs.height)
    planned = store.manifest.get("total_steps", 0) // max(1, store.manifest.get("epochs", 1))
    return epochs.filter(pl.col("len") >= max(planned, int(epochs["len"].to_numpy().max()))).height


def shuffled_epochs(store: SignalStore, n: int) -> ShuffledEpochs:
    """The sampler of a run that shuffled."""
    size = store.manifest.get("batch_size")
    if size is None:
        size = int(store.steps().select(pl.col("batch_size").max()).collect().item())
    return ShuffledEpochs(n, int(size), bool(store.manifest.get("drop_last", False)))


def run_noise(
    store: SignalStore, query: str, *, table: SignalTable, signals: SignalArrays, n: int, panel: Panel | None
) -> Noise:
    """The noise formula of the sampler that ran, on what was recorded."""
    sampler = store.manifest.get("sampler", "shuffled")
    if not signals.values.size:
        raise InputError(
            f"{store.directory} holds no {table} of query {query!r} yet; finish the recording or its replay"
        )
    flat: dict[str, Any] = {"value": signals.values.astype(np.float64), "n_samples": n}
    if sampler == "with-replacement":
        return with_replacement_noise(signals.steps, signals.codes, **flat)
    if sampler == "poisson":
        sizes = store.steps().select("batch_size").collect()["batch_size"].to_numpy()
        rate = float(store.manifest.get("batch_size", sizes.mean())) / n
        return poisson_noise(signals.steps, signals.codes, rate=rate, **flat)
    successive = successive_noise(signals.steps, signals.codes, **flat)
    if panel is None:
        return successive
    noise = shuffled_noise(panel, shuffled_epochs(store, n), epochs=recorded_epochs(store), positions=_POSITIONS)
    if noise.per_sample is None and successive.per_sample is not None and successive.per_sample.sum() > 0:
        noise = spread(noise, successive)
    return noise
