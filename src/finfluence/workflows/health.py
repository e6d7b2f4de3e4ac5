"""What a recorded run says about itself: residuals, steps that were not finite, how its replay went."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from finfluence.errors import InputError
from finfluence.runs.estimates import shuffled_epochs
from finfluence.runs.run import Run
from finfluence.runs.training import REMAINDER_SHARE
from finfluence.workflows.doctor import Check

_LIMIT, _LOW_PRECISION_LIMIT = 1e-3, 2e-2
_ROUNDING_MISMATCH = 1e-5
# Share of the largest learning rate above which the last steps still move a model about.
_RESTLESS = 0.25


def recorded_health(run: Run) -> Iterator[Check]:
    """Judges a run by its tables alone.

    Args:
        run: opened, finished or not.

    Yields:
        The findings.
    """
    manifest, steps = run.manifest, run.steps()
    yield _status(run)
    low = manifest.get("plan", {}).get("precision") == "bfloat16-autocast"
    limit = _LOW_PRECISION_LIMIT if low else _LIMIT
    residuals = steps["residual"].drop_nulls().drop_nans()
    if len(residuals):
        above = int((residuals > limit).sum())
        largest = float(residuals.max())  # pyright: ignore[reportArgumentType]
        yield Check(
            "recorded residual",
            "unsafe" if above else "safe",
            f"largest {largest:.1e}; {above} of {len(residuals)} steps above {limit:.0e}",
            "the signals of those steps miss part of the gradient: record again in float32, or find the parameter that "
            "is used outside its module with finfluence doctor on the configuration"
            if above
            else "",
        )
    bad = steps.filter(pl.col("nonfinite"))
    skipped = int(steps["skipped"].sum())
    yield Check(
        "finite signals",
        "safe" if bad.is_empty() else "unsafe",
        f"{bad.height} of {steps.height} steps not finite"
        + ("" if bad.is_empty() else f", the first is step {bad['step'][0]}")
        + (f"; {skipped} steps skipped by the loss scaler" if skipped else ""),
        ""
        if bad.is_empty()
        else "lower the learning rate, clip the gradient, or record in bfloat16 instead of float16",
    )
    if manifest.get("sampler") == "shuffled":
        share = shuffled_epochs(run.store, run.samples().height).remainder_share()
        yield Check(
            "last batch",
            "caution" if share > REMAINDER_SHARE else "safe",
            f"about {share:.0%} of an epoch's noise",
            "its few samples weigh many times as much, in a step that is far from linear: choose a batch size that "
            "divides the number of samples"
            if share > REMAINDER_SHARE
            else "",
        )
    yield from _rest(run, steps)
    yield from _replay(run)


def _rest(run: Run, steps: pl.DataFrame) -> Iterator[Check]:
    """Whether the training came to rest where the replay measures: else other batch orders end elsewhere."""
    rates = steps.sort("step")["learning_rate"].drop_nulls()
    if run.sensitivity == "live" or len(run.measured_epochs) > 1 or not len(rates) or not rates.max():
        return
    last = float(rates[-1]) / float(rates.max())  # pyright: ignore[reportArgumentType]
    yield Check(
        "end of training",
        "caution" if last > _RESTLESS else "safe",
        f"the last step's learning rate is {last:.0%} of the largest",
        "the end jitters with the batch order, and so do the most harmful rows: let the rate fall to zero, or ask "
        'about the mean of the second half (measure_epochs="second-half")'
        if last > _RESTLESS
        else "",
    )


def _status(run: Run) -> Check:
    status = run.store.status
    if status == "finished":
        return Check("status", "safe", f"finished, {run.store.n_steps} steps")
    total = run.manifest.get("total_steps", "?")
    return Check(
        "status", "unsafe", f"{status} at step {run.store.n_steps} of {total}", "go on with finfluence train --resume"
    )


def _replay(run: Run) -> Iterator[Check]:
    if run.sensitivity == "live":
        yield Check(
            "calibration",
            "caution",
            "live signals",
            "their μ ranks and is not calibrated; record with sensitivity replay for sizes",
        )
        return
    replay = run.manifest.get("replay", {})
    if not replay.get("finished"):
        yield Check("replay", "unsafe", "not finished", "go on with finfluence train --resume, or finfluence.replay")
        return
    mismatch, residual = float(replay["largest_mismatch"]), float(replay["largest_residual"])
    yield Check(
        "replay mismatch",
        "safe" if mismatch == 0 else "caution" if mismatch <= _ROUNDING_MISMATCH else "unsafe",
        f"re-executed and stored parameters differ by {mismatch:.1e}",
        "" if mismatch == 0 else "the replay ran with other kernels or threads than the training",
    )
    limit = _LOW_PRECISION_LIMIT if run.manifest["plan"]["precision"] == "bfloat16-autocast" else _LIMIT
    yield Check(
        "replay residual",
        "safe" if residual <= limit else "unsafe",
        f"largest {residual:.1e} (limit {limit:.0e})",
        "" if residual <= limit else "the signals miss part of the gradient: train in float32",
    )
    diverged = replay.get("diverged", {})
    growth = _growth(run)
    worst = "" if growth is None else f"; the adjoint of {growth[0]!r} grew at most {growth[1]:.1f} times"
    yield Check(
        "adjoint",
        "unsafe" if diverged else "caution" if growth is not None and growth[1] > 5 else "safe",
        (f"{len(diverged)} queries diverged: {', '.join(diverged)}" if diverged else "no query diverged") + worst,
        "raise sensitivity.damping, lower the learning rate, or train longer at a small one"
        if diverged or (growth is not None and growth[1] > 5)
        else "",
    )


def _growth(run: Run) -> tuple[str, float] | None:
    """The query whose adjoint grew most, and how many times its first norm."""
    try:
        norms = run.adjoints()
    except (InputError, FileNotFoundError):
        return None
    first = dict(zip(run.manifest["replay"]["queries"], run.manifest["replay"]["norms"], strict=True))
    largest = norms.group_by("query").agg(pl.col("norm").max()).rows()
    found = [(query, norm / first[query]) for query, norm in largest if first.get(query)]
    return max(found, key=lambda pair: pair[1]) if found else None


__all__ = ["recorded_health"]
