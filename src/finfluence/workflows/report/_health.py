"""Whether a recording can be trusted: what was checked while it ran, in words and with a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl

from finfluence.runs.run import Run

Verdict = Literal["fine", "look", "unknown"]
# Above this relative residual the signals do not add up to the step (float32).
_RESIDUAL = 1e-3
_GROWTH = 1e3
_WORSE: tuple[Verdict, ...] = ("fine", "unknown", "look")


@dataclass(frozen=True)
class Check:
    """One line of the health table: what was checked, the value seen, and what it means."""

    name: str
    value: str
    verdict: Verdict
    meaning: str


def health_checks(run: Run, steps: pl.DataFrame, adjoints: pl.DataFrame) -> list[Check]:
    """Everything that the recording and its replay checked about themselves.

    Args:
        run: the run.
        steps: its step table.
        adjoints: its adjoint table; empty without a replay.
    """
    replay: dict[str, Any] = run.manifest.get("replay") or {}
    found = [_status(run, steps), _residual("Signal identity", _largest(steps, "residual"))]
    if replay:
        found.append(_residual("Signal identity in the replay", replay.get("largest_residual")))
        found.append(_mismatch(replay))
        found += _adjoint_growth(adjoints, replay)
    nonfinite = int(steps["nonfinite"].fill_null(value=False).sum())
    found.append(
        Check(
            "Steps with non-finite signals",
            f"{nonfinite:,}",
            "look" if nonfinite else "fine",
            "Their samples have no trustworthy μ." if nonfinite else "All signals are finite numbers.",
        )
    )
    skipped = int(steps["skipped"].fill_null(value=False).sum())
    found.append(
        Check(
            "Skipped steps",
            f"{skipped:,}",
            "fine" if skipped <= 0.01 * steps.height else "look",
            "Steps that the loss scaler left out; they moved nothing." if skipped else "Every step updated the model.",
        )
    )
    scale = steps["scale"].drop_nulls()
    if scale.len() and float(np.ptp(scale.to_numpy())) > 1e-9:
        low, high = float(scale.min()), float(scale.max())  # pyright: ignore[reportArgumentType]
        found.append(
            Check("Gradient scale", f"{low:.3g} to {high:.3g}", "fine", "Clipping or loss scaling, found and applied.")
        )
    found.append(_precision(run))
    return found


def combined_checks(checks: Mapping[str, list[Check]]) -> list[Check]:
    """One line a check for several runs: what each found, and the worst verdict with what it means.

    Args:
        checks: of every run, by its name.
    """
    names = list(dict.fromkeys(check.name for own in checks.values() for check in own))
    found: list[Check] = []
    for name in names:
        own = {run: check for run, those in checks.items() for check in those if check.name == name}
        worst = max(own.values(), key=lambda check: _WORSE.index(check.verdict))
        values = {check.value for check in own.values()}
        value = worst.value if len(values) == 1 else "; ".join(f"{run}: {check.value}" for run, check in own.items())
        found.append(replace(worst, value=value))
    return found


def _status(run: Run, steps: pl.DataFrame) -> Check:
    status, planned = run.store.status, run.manifest.get("total_steps")
    whole = status == "finished"
    done = f"{steps.height:,} steps" if not planned else f"{steps.height:,} of {planned:,} steps"
    meaning = "The recording is complete." if whole else "The run did not finish; figures cover what was recorded."
    return Check("Recording", f"{status}, {done}", "fine" if whole else "look", meaning)


def _residual(name: str, largest: float | None) -> Check:
    if largest is None:
        return Check(name, "not checked", "unknown", "No step recorded its residual.")
    good = largest <= _RESIDUAL
    meaning = (
        "The samples' signals add up to what the optimizer saw, at every step."
        if good
        else "The signals do not add up to what the optimizer saw: a parameter or part of the loss was not covered."
    )
    return Check(name, f"largest residual {largest:.1e}", "fine" if good else "look", meaning)


def _mismatch(replay: dict[str, Any]) -> Check:
    mismatch = replay.get("largest_mismatch")
    if mismatch is None:
        return Check("Replayed parameters", "not compared", "unknown", "The replay compared no stored state.")
    meaning = "equal bit for bit" if mismatch == 0 else f"largest difference {mismatch:.1e}"
    return Check(
        "Replayed parameters",
        meaning,
        "fine" if mismatch < 1e-3 else "look",
        "The replay came back to the states that training had stored.",
    )


def _adjoint_growth(adjoints: pl.DataFrame, replay: dict[str, Any]) -> list[Check]:
    diverged = replay.get("diverged") or {}
    found = [Check(f"Adjoint of “{name}”", "diverged", "look", str(why)) for name, why in diverged.items()]
    for (query,), part in adjoints.group_by(["query"], maintain_order=True):
        norms = part["norm"].to_numpy()
        positive = norms[norms > 0]
        if query in diverged or not positive.size:
            continue
        growth = float(positive.max() / positive[-1])
        good = growth < _GROWTH
        found.append(
            Check(
                f"Adjoint of “{query}”",
                f"largest norm {growth:.3g} × the last",
                "fine" if good else "look",
                "The derivative of the run stayed bounded on its way back."
                if good
                else "The derivative grew a lot on its way back; first-order predictions may be poor.",
            )
        )
    return found


def _precision(run: Run) -> Check:
    precision = (run.manifest.get("plan") or {}).get("precision") or run.manifest.get("precision")
    if precision is None:
        return Check("Precision", "as the loop had it", "unknown", "The run does not say.")
    full = precision == "float32"
    return Check(
        "Precision",
        str(precision),
        "fine",
        "Signals are as exact as the training." if full else "Signals carry the rounding of a low-precision forward.",
    )


def _largest(steps: pl.DataFrame, column: str) -> float | None:
    known = steps[column].drop_nulls().drop_nans()
    return float(known.max()) if known.len() else None  # pyright: ignore[reportArgumentType]
