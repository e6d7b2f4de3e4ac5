"""The removal curve: what leaving out the k most harmful (or most supporting) rows together is predicted to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import polars as pl

from finfluence.errors import InputError
from finfluence.influence import Correction, attach, null_errors
from finfluence.runs.pooling import Recorded
from finfluence.runs.run import Run
from finfluence.signals import open_folder
from finfluence.tradeoff import GaussianInfluence
from finfluence.workflows.shrinkage import Shrunk, shrink

Effect = Literal["harmful", "supporting"]
VERIFIED_FILE = "verified.json"

# Share of the data above which removing rows is no small change, and a first-order prediction only a direction.
LARGE_CUT = 0.05
_NAMED = 6  # groups that a note names
# Estimates below which it cannot be told how large they are beside their errors.
LEAST_ROWS = 30
# The least share of the recommended cut's rows that is expected to work in the asked direction.
SURE = 0.95
# How many times the average row's influence a row must have to stand out.
STANDING_OUT = 2.0

# Relative standard error of a cut's prediction, beside that of its rows and of any subset (`DerivativeError`): chosen
# rows are alike, and what is more than a small change is more so for them. Set by hand on `python -m benchmarks cuts`,
# where retraining measured 0.8 to 1.5 times as much as was predicted, and less (0.7) where a tenth of clean data was
# cut.
SCALE_ERROR = 0.17
_MEASURED = {"k": pl.Int64, "mu": pl.Float64, "se": pl.Float64, "ci_low": pl.Float64, "ci_high": pl.Float64}


@dataclass(frozen=True, eq=False)
class Selection:
    """Estimates for one query, ready to promise what a cut chosen by them will do.

    Attributes:
        run: the recorded run, or several as one.
        query: its query.
        effect: which rows are looked for.
        frame: `Run.influence` with one-sided p-values, one row a sample in the order of the sample table.
    """

    run: Recorded
    query: str
    effect: Effect
    frame: pl.DataFrame

    @classmethod
    def of(
        cls,
        run: Recorded,
        query: str,
        *,
        effect: Effect,
        correction: Correction = "bh",
        level: float = 0.95,
        relative: bool = False,
    ) -> Selection:
        """Asks the run, for relative influence too if told so.

        Raises:
            InputError: an unknown query or effect.
        """
        if effect not in ("harmful", "supporting"):
            raise InputError(f"unknown effect {effect!r}; choose harmful or supporting")
        frame = run.influence(query, alternative=effect, correction=correction, level=level, relative=relative)
        return cls(run, query, effect, frame)

    @property
    def sign(self) -> int:
        """-1 for harmful, +1 for supporting rows."""
        return -1 if self.effect == "harmful" else 1

    @cached_property
    def order(self) -> np.ndarray:
        """(n_known,) positions of the samples with an estimate, the strongest in the asked direction first."""
        mu = self.frame["mu"].to_numpy()
        known = np.flatnonzero(np.isfinite(mu))
        return known[np.argsort(-self.sign * mu[known], kind="stable")]

    @cached_property
    def shrunk(self) -> Shrunk:
        """True influences given the estimates of all rows."""
        mu, se = self.frame["mu"].to_numpy(), null_errors(self.frame)
        positive = se[np.isfinite(se) & (se > 0)]
        if not len(positive):
            raise InputError(f"no influence on {self.query!r} has a standard error, so no cut can be predicted")
        return shrink(mu, np.where(se > 0, se, np.where(np.isfinite(se), positive.min(), np.nan)))

    @cached_property
    def probability(self) -> np.ndarray:
        """(n,) posterior probability that a row works in the asked direction."""
        return self.shrunk.below if self.effect == "harmful" else self.shrunk.above

    @property
    def caveats(self) -> tuple[str, ...]:
        """What to know of the estimates, one sentence each."""
        mu, se = self.frame["mu"].to_numpy(), null_errors(self.frame)
        known = np.isfinite(mu) & (se > 0)
        size = float(np.sqrt(np.mean((mu[known] / se[known]) ** 2))) if known.sum() >= LEAST_ROWS else 1.0
        if size >= 1.0:
            return ()
        return (
            f"The rows' estimates are smaller than their errors (μ/se has a root mean square of {size:.2f}): by itself "
            "no row can be told from one without influence, and the prediction for a cut is near 0 whatever it holds. "
            "Look at groups, ask several runs as one, or verify.",
        )

    def predict(self, cuts: list[np.ndarray]) -> pl.DataFrame:
        """Predicted influence of cuts that were chosen by this run's own estimates.

        With m_i the posterior mean of row i's influence given its estimate and c the factor that `Run.influence` puts
        on a sum of |S| rows (the places of S fall to the remaining rows, and smaller batches are noisier),
        μ_S = c·Σ_{i∈S} m_i. Its error has the rows' posterior variances, the error of the fitted prior, and the error
        of the noise σ itself, which all rows share, and `SCALE_ERROR`: what the derivative of one path gets wrong in
        the scale of every cut.

        Args:
            cuts: positions of each cut's samples, none empty, none of all samples.

        Returns:
            Columns mu, se and naive (the plain, too extreme estimate), one row a cut.
        """
        ids = self.frame["sample"]
        plain = self.run.influence(self.query, subsets=[ids.gather(cut) for cut in cuts])
        mu, se = self.frame["mu"].to_numpy(), null_errors(self.frame)
        n = self.frame.height
        rows: list[dict[str, float]] = []
        for cut, naive, naive_se in zip(cuts, plain["mu"].to_list(), plain["se"].to_list(), strict=True):
            known = cut[np.isfinite(mu[cut])]
            total = float(mu[known].sum())
            factor = naive / total if abs(total) > 1e-12 * float(np.abs(mu[known]).sum()) else 1.0
            mean = factor * float(self.shrunk.mean[known].sum())
            # what the plain estimate's error has beyond the rows' own goes with μ: the derivative's, and that of σ
            own = factor**2 * (1 - len(cut) / n) * float((se[known] ** 2).sum())
            common = max(naive_se**2 - own, 0.0) * (mean / naive) ** 2 if naive else 0.0
            error = np.sqrt(factor**2 * self.shrunk.sum_error(known) ** 2 + common + (SCALE_ERROR * mean) ** 2)
            rows.append({"mu": mean, "se": float(error), "naive": naive})
        return pl.DataFrame(rows, schema={"mu": pl.Float64, "se": pl.Float64, "naive": pl.Float64})

    def influence_of(self, positions: np.ndarray) -> GaussianInfluence:
        """Predicted influence of one cut, see `predict`."""
        found = self.predict([positions])
        return GaussianInfluence(float(found["mu"][0]), float(found["se"][0]))

    @cached_property
    def recommended(self) -> int:
        """Rows of the recommended cut: see `RemovalCurve`."""
        means = self.shrunk.mean[self.order]
        ordinary = float(np.abs(means).mean())
        depth = np.concatenate([[0.0], np.cumsum(self.sign * means - STANDING_OUT * ordinary)])
        outstanding = int(np.argmax(depth))
        share = np.cumsum(self.probability[self.order]) / np.arange(1, len(means) + 1)
        sure = int(np.flatnonzero(share >= SURE).max(initial=-1)) + 1
        return min(outstanding, sure, self.frame.height // 2)


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Predicted influence of removing the k strongest rows together, for growing k.

    Attributes:
        query: name of the query.
        effect: "harmful" (lowest μ first) or "supporting" (highest first).
        frame: columns k, share, mu, se, ci_low, ci_high; k = 0 first.
        recommended: k up to which rows stand out: each brings at least twice the influence that the average row of the
            data has in either direction, and 95 % of them are expected to work in the asked direction (an s-value of
            5 %, Stephens 2017). Rows beyond can be significant: they bring little each, and together they fit the cut
            to this query's examples more than to others. 0: no row stands out.
        expected: share of the recommended cut's rows that is expected to work in the asked direction.
        measured: columns k, mu, se, ci_low, ci_high of cuts that `verify` retrained; may be empty.
        notes: what else to know, one sentence each.
    """

    query: str
    effect: Effect
    frame: pl.DataFrame
    recommended: int
    expected: float
    measured: pl.DataFrame
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        verb = "lower" if self.effect == "harmful" else "raise"
        lines = [f"removal curve of {self.query!r}, most {self.effect} rows first"]
        if not self.recommended:
            lines.append("  recommended: remove nothing; no row stands out. Pool runs, or look at groups.")
            return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
        cut = self.frame.filter(pl.col("k") == self.recommended).row(0, named=True)
        lines += [
            f"  recommended: remove the {self.recommended} rows that stand out; {100 * self.expected:.0f} % of them "
            f"are expected to {verb} the measurement",
            f"  predicted influence of that cut: μ = {cut['mu']:+.2f} ({cut['ci_low']:+.2f} to {cut['ci_high']:+.2f})",
        ]
        if cut["share"] > LARGE_CUT:
            lines.append(f"  {large_cut_note(cut['share'])}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        from finfluence.workflows.notebook import frame_html, text_html

        return text_html(str(self)) + frame_html(self.frame)


def removal_curve(
    run: Recorded, query: str, *, effect: Effect = "harmful", level: float = 0.95, points: int = 60
) -> RemovalCurve:
    """Predicts what removing the k most harmful rows together does to a query, for growing k.

    The rows are ordered by their estimated μ, and the prediction is corrected for that choice (`Selection.predict`);
    the plain sum of the chosen estimates would be too extreme. It is a first-order prediction: beyond about 5 % of the
    data take it as a direction and verify.

    Args:
        run: a recorded run, or several as one.
        query: one of its queries.
        effect: "harmful" or "supporting".
        level: of the band, at each k by itself.
        points: cuts to predict; they grow geometrically from 1 row to half of the data.

    Raises:
        InputError: an unknown query or effect, or fewer than two points.
    """
    if points < 2:
        raise InputError(f"a curve needs at least 2 points, got {points}")
    selection = Selection.of(run, query, effect=effect, level=level)
    n, known = selection.frame.height, len(selection.order)
    recommended = selection.recommended
    most = max(1, min(known, n // 2))
    sizes = {round(size) for size in np.geomspace(1, most, points - 1)} | ({recommended} if recommended else set())
    ks = sorted(k for k in sizes if 0 < k < n)
    found = selection.predict([selection.order[:k] for k in ks])
    rows = [{"k": 0, "share": 0.0, "mu": 0.0, "se": 0.0, "ci_low": 0.0, "ci_high": 0.0}]
    for k, mu, se in zip(ks, found["mu"], found["se"], strict=True):
        low, high = GaussianInfluence(mu, se).interval(level)
        rows.append({"k": k, "share": k / n, "mu": mu, "se": se, "ci_low": low, "ci_high": high})
    frame = attach(pl.DataFrame(rows), query=query, effect=effect, level=level, run=run.directory)
    expected = float(selection.probability[selection.order[:recommended]].mean()) if recommended else 0.0
    measured = measured_points(run, query, effect=effect)
    notes = (*selection.caveats, *caveats(run))
    return RemovalCurve(query, effect, frame, recommended, expected, measured, notes)


def verified(run: Recorded) -> list[dict[str, Any]]:
    """What `verify` found about the predictions of a run, or of several as one, so far; oldest first.

    Raises:
        InputError: the file is not what `verify` writes.
    """
    names = recordings(run)
    return [entry for entry in verified_entries(run.runs[0]) if list(entry.get("recordings", ())) == names]


def verified_entries(run: Run) -> list[dict[str, Any]]:
    """All entries of a run's verified.json; predictions of several runs as one are kept with the first.

    Raises:
        InputError: the file is not what `verify` writes.
    """
    try:
        entries = json.loads(open_folder(run.directory).read(VERIFIED_FILE))
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it is no list of entries")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise InputError(
            f"{run.directory}/{VERIFIED_FILE} cannot be read ({error}); delete it and verify again"
        ) from None
    return entries


def ids_digest(ids: np.ndarray) -> str:
    """What names a set of samples in verified.json."""
    return hashlib.sha256(repr(sorted(ids.tolist())).encode()).hexdigest()[:12]


def recordings(run: Recorded) -> list[str]:
    """Names of the runs that a prediction is of, where these are several; empty for a single run."""
    return [one.name for one in run.runs] if len(run.runs) > 1 else []


def measured_points(run: Recorded, query: str, *, effect: Effect) -> pl.DataFrame:
    """The verified points of a removal curve: columns k, mu, se, ci_low, ci_high, by k."""
    rows = [
        {"k": entry["k"]} | {key: entry["measured"][key] for key in _MEASURED if key != "k"}
        for entry in verified(run)
        if entry.get("query") == query and entry.get("k") is not None and entry.get("effect", "harmful") == effect
    ]
    return pl.DataFrame(rows, schema=_MEASURED).sort("k")


def caveats(run: Recorded) -> tuple[str, ...]:
    """What to say about every prediction of a run, one sentence each."""
    if run.sensitivity != "live":
        return ()
    return (
        "This run has live signals, which rank rows but are not calibrated: the size of a prediction means little "
        '(record with sensitivity="replay", or verify).',
    )


def chance_text(p: float) -> str:
    """A probability in two digits, never 0 or 1."""
    return "> 0.99" if p > 0.995 else "< 0.01" if p < 0.005 else f"{p:.2f}"


def large_cut_note(share: float) -> str:
    """What to say about a prediction for a large share of the data."""
    return (
        f"A cut of {100 * share:.0f} % of the data is large: a first-order prediction holds for a few per cent; "
        "beyond, it gives the direction and tends to promise too much. Verify before relying on its size."
    )


def large_groups_note(frame: pl.DataFrame, n: int) -> str | None:
    """What to say about the large ones among groups or subsets of an influence frame; None where there is none.

    Args:
        frame: of `run.influence(groups=…)` or `subsets=…`.
        n: samples of the run.
    """
    large = frame.filter(pl.col("size") > LARGE_CUT * n)[frame.columns[0]].to_list()
    if not large:
        return None
    names = ", ".join(map(str, large[:_NAMED])) + (f" and {len(large) - _NAMED} more" if len(large) > _NAMED else "")
    each = "" if len(large) == 1 else " each"
    return (
        f"More than {100 * LARGE_CUT:.0f} % of the data{each}: {names}. There μ adds up what leaving out every sample "
        "by itself would do; leaving out a whole kind of them can do far more, or the opposite. Leave them out along "
        "the recorded path (`score --group COLUMN --leave-out`, one training each) or verify (`verify --group COLUMN`)."
    )


__all__ = ["Effect", "RemovalCurve", "Selection", "removal_curve", "verified"]
