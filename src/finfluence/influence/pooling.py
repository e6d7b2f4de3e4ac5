"""Pooling the influence frames of several runs (seeds) of the same training."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats
from finfluence.influence.metadata import attach, metadata
from finfluence.influence.table import Reporting, report

_KEYS = ("sample", "subset", "group")


def pool_estimates(
    mu: ArrayLike, se: ArrayLike, *, shared: ArrayLike | None = None, apart: ArrayLike | None = None
) -> tuple[Floats, Floats, Floats]:
    """Average estimates over runs, with the variance between runs in the standard error.

    Let s² be the mean over runs of what their errors share, w that of the rest of se², and B the variance of μ between
    runs (R − 1). The spread of the runs contains their own errors, so the variance between runs proper is max(B − w, 0)
    (DerSimonian and Laird 1986), and

        se² = (w + max(B − w, 0))/R + s².

    Where runs differ by more than their errors, B is what is used and a t-distribution with R − 1 degrees of freedom
    applies, more where s² has a part in it (Satterthwaite 1946); otherwise the runs' own errors decide and the normal
    does. Simulated coverage of the 95 % interval: 93 % or more from three runs on; with two runs that really differ,
    87 %.

    Args:
        mu: (R, k) estimates, NaN where missing.
        se: (R, k) standard errors; NaN: unknown, then B alone is used.
        shared: (R, k) the part of each that is the same in all runs; none by default.
        apart: (R, k) errors beside se by which runs differ, too, and which the result is to be without: their mean
            square is taken from B. None by default.

    Returns:
        (mu (k,), se (k,), degrees of freedom (k,)); entries that miss a run are NaN.

    Raises:
        InputError: fewer than two runs, or shapes that differ.
    """
    mus, errors = np.asarray(mu, dtype=np.float64), np.asarray(se, dtype=np.float64)
    if mus.shape != errors.shape or mus.ndim != 2:
        raise InputError(f"mu and se have shapes {mus.shape} and {errors.shape}; give (runs, k) for both")
    runs = len(mus)
    if runs < 2:
        raise InputError(f"there is {runs} run to pool; give two or more")
    common, other = (
        np.zeros(mus.shape[1]) if part is None else (np.asarray(part, dtype=np.float64) ** 2).mean(axis=0)
        for part in (shared, apart)
    )
    within = np.maximum(np.nan_to_num((errors**2).mean(axis=0), nan=0.0) - common, 0.0)
    seen = np.maximum(mus.var(axis=0, ddof=1) - other, 0.0)
    own = np.maximum(seen, within) / runs
    with np.errstate(invalid="ignore"):
        dof = np.where(seen > within, (runs - 1.0) * ((own + common) / np.where(own > 0, own, 1.0)) ** 2, np.inf)
    return mus.mean(axis=0), np.sqrt(own + common), dof


def aligned(frames: Sequence[pl.DataFrame], *columns: str, on: str) -> tuple[Floats, ...]:
    """Columns of influence frames with the same rows, in the order of the first frame's rows.

    Args:
        frames: of R runs.
        *columns: numeric columns of all of them.
        on: the column that names the rows.

    Returns:
        One (R, rows) array a column; NaN where a value is missing.
    """
    rows = frames[0].select(on)
    ordered = [rows.join(frame, on=on, how="left", maintain_order="left", nulls_equal=True) for frame in frames]
    return tuple(
        np.array([frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for frame in ordered]) for name in columns
    )


def pool(frames: Sequence[pl.DataFrame], *, reporting: Reporting | None = None) -> pl.DataFrame:
    """Pool influence frames of several runs into one with the same columns.

    A single run's μ is conditional on its initialisation. The pooled μ is the average over the runs' initialisations,
    and its standard error holds what they differ by and what they err by together: their column `se_shared`, or
    the error relative to μ that their metadata name (see `pool_estimates`). The unit stays each run's own noise.

    Args:
        frames: of R ≥ 2 runs, with the same rows (any order) in their first column sample, subset or group.
        reporting: level, alternative and correction.

    Raises:
        InputError: fewer than two frames, different columns, different or repeated rows.
    """
    if len(frames) < 2:
        raise InputError(f"there is {len(frames)} run to pool; give two or more")
    first = frames[0]
    key = next((name for name in _KEYS if name in first.columns), None)
    if key is None or not {"mu", "se"} <= set(first.columns):
        raise InputError(
            f"the columns {', '.join(first.columns)} are not an influence frame's; pass what influence() returned"
        )
    for number, frame in enumerate(frames):
        if frame.columns != first.columns:
            raise InputError(
                f"run {number} has the columns {', '.join(frame.columns)}, run 0 others; pool one kind of frame"
            )
        if frame[key].dtype != first[key].dtype or frame[key].n_unique() != len(frame):
            raise InputError(
                f"run {number} repeats {key}s or has them in another type than run 0; pool the same {key}s"
            )
        if set(frame[key].to_list()) != set(first[key].to_list()):
            raise InputError(f"run {number} has other {key}s than run 0; pool frames with the same {key}s")
        if "size" in first.columns and np.ptp(aligned([first, frame], "size", on=key)[0], axis=0).any():
            raise InputError(f"run {number} has {key}s of other sizes than run 0; pool the same {key}s")
    mus, errors = aligned(frames, "mu", "se", on=key)
    whole, alike = (
        np.array([[float(metadata(frame).get(name, 0.0))] for frame in frames])
        for name in ("relative_error", "shared_relative_error")
    )
    relative = whole * np.abs(mus)
    shared = aligned(frames, "se_shared", on=key)[0] if "se_shared" in first.columns else alike * np.abs(mus)
    mu, se, dof = pool_estimates(mus, errors, shared=shared)
    # what is relative to μ is no error where μ is 0, and no difference between runs
    own, common = (np.sqrt(np.maximum(part**2 - relative**2, 0.0)) for part in (errors, shared))
    scale = np.sqrt(np.maximum((errors**2 - shared**2) - (own**2 - common**2), 0.0))
    _, null, null_dof = pool_estimates(mus, own, shared=common, apart=scale)
    keys = [name for name in first.columns if name in (key, "size")]
    columns = report(mu, se, reporting=reporting, dof=dof, null=null, null_dof=null_dof)
    frame = pl.DataFrame({**{name: first[name] for name in keys}, **columns})
    known = {name: value for name, value in metadata(first).items() if name not in ("sign", "sigma", "noise_note")}
    known |= {"runs": len(frames), "condition": f"averaged over {len(frames)} runs"}
    if whole.any():
        left = (alike**2).mean() + (whole**2 - alike**2).mean() / len(frames)
        known |= {"relative_error": float(np.sqrt(left)), "shared_relative_error": float(np.sqrt((alike**2).mean()))}
    chosen = reporting or Reporting()
    known |= {"level": chosen.level, "alternative": chosen.alternative, "correction": chosen.correction}
    return attach(frame, **known)
