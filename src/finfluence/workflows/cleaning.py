"""`clean`: which rows to leave out, what that is predicted to do, and the file without them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from finfluence.errors import InputError
from finfluence.influence import Correction, attach, metadata, null_errors
from finfluence.runs.pooling import Recorded
from finfluence.tradeoff import GaussianInfluence, error_budget
from finfluence.workflows._cut_files import CONTENT, write_cut
from finfluence.workflows.removal import (
    LARGE_CUT,
    SCALE_ERROR,
    Effect,
    Selection,
    caveats,
    chance_text,
    large_cut_note,
    large_groups_note,
)
from finfluence.workflows.shrinkage import shrink

_CORRECTIONS = {"bh": "Benjamini–Hochberg", "by": "Benjamini–Yekutieli"}
_NOTHING = (
    "One run often cannot tell single rows apart: pool several runs (give clean more than one), test whole groups "
    '(--group COLUMN), or record full signals (train(..., signals="full")).'
)


@dataclass(frozen=True)
class Rule:
    """Which rows to drop; one of three ways, false discoveries at 5 % where none is given.

    Attributes:
        fdr: largest q-value, in (0, 1): the expected share of rows among the dropped that do not work in the asked
            direction.
        top: number of rows (or groups) with the strongest estimates, significant or not; "recommended" for the
            recommended cut of the removal curve (see `RemovalCurve`), of rows only.
        budget: (type-I error α, type-II error β) of the test between one training with and one without the row. A row
            is dropped where that test, at type-I error α, has a type-II error of at most β even if the row's |μ| is
            only its one-sided lower confidence bound: G_{bound}(α) ≤ β (arXiv 2510.10510, Def. 2.4).
        correction: of the q-values: "bh", or "by" under any dependence.
        level: of the intervals, and of the budget's one-sided bound.
        relative: with a number of rows as `top`: the strongest by their relative influence (see `Run.influence`), which
            are about the query, rather than by μ, by which rows that weigh much in everything come first, too.
    """

    fdr: float | None = None
    top: int | Literal["recommended"] | None = None
    budget: tuple[float, float] | None = None
    correction: Correction = "bh"
    level: float = 0.95
    relative: bool = False

    def __post_init__(self) -> None:
        if self.relative and not isinstance(self.top, int):
            raise InputError("relative influence ranks and has no error rate; give a number of rows, top=K, with it")
        given = [name for name in ("fdr", "top", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"give one rule for what to drop, not {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "fdr", 0.05)
        if self.fdr is not None and not 0.0 < self.fdr < 1.0:
            raise InputError(f"the false-discovery rate must lie in (0, 1), got {self.fdr}")
        if isinstance(self.top, str) and self.top != "recommended":
            raise InputError(f"unknown number of rows to drop {self.top!r}; give a number, or recommended")
        if isinstance(self.top, int) and self.top < 1:
            raise InputError(f"the number of rows to drop must be at least 1, got {self.top}")
        if self.budget is not None and not error_budget(*self.budget) > 0:
            raise InputError(
                f"errors {self.budget[0]:g} and {self.budget[1]:g} add up to 1 or more, which tossing a coin achieves; "
                "give smaller ones, for example 0.05 and 0.5"
            )
        if self.budget is not None and not 0.5 < self.level < 1.0:
            raise InputError(f"the bound of an error budget needs a level in (0.5, 1), got {self.level:g}")
        if self.correction not in _CORRECTIONS:
            raise InputError(f"unknown correction {self.correction!r}; choose bh or by")

    def headline(self, effect: Effect, query: str, *, size: str) -> str:
        """What is dropped and by what rule, one sentence.

        Args:
            effect: "harmful" or "supporting".
            query: name of the query.
            size: of the cut in words, for example "52 of 1000 rows (5.2%)".
        """
        if self.top == "recommended":
            return f"The most {effect} rows for {query!r} that stand out (recommended cut): {size}."
        if self.top is not None:
            by = "relative influence" if self.relative else "their estimates"
            return f"The most {effect} for {query!r} by {by}, significant or not: {size}."
        return f"{effect.capitalize()} for {query!r} {self._threshold}: {size}."

    @property
    def _threshold(self) -> str:
        if self.budget is not None:
            alpha, beta = self.budget
            return (
                f"beyond the error budget (type-I error {alpha:g}, type-II error at most {beta:g}: "
                f"|μ| ≥ {error_budget(alpha, beta):.2f} at its one-sided {self.level:.0%} bound)"
            )
        return f"at a false-discovery rate of {100 * (self.fdr or 0):.3g} % ({_CORRECTIONS[self.correction]})"

    def chosen(
        self, frame: pl.DataFrame, *, sign: int, bound: np.ndarray | None = None, recommended: int | None = None
    ) -> np.ndarray:
        """Positions of the rows of an influence frame that the rule drops, the strongest first.

        Args:
            frame: with one-sided p-values in the asked direction.
            sign: -1 for harmful, +1 for supporting.
            bound: one-sided lower confidence bound of each row's strength, where the rule is a budget.
            recommended: size of the recommended cut, where that is the rule.
        """
        strength = sign * frame["relative" if self.relative else "mu"].to_numpy()
        known = np.flatnonzero(np.isfinite(strength))
        order = known[np.argsort(-strength[known], kind="stable")]
        if self.top is not None:
            return order[: recommended if self.top == "recommended" else self.top]
        if self.budget is not None:
            assert bound is not None
            return order[bound[order] >= error_budget(*self.budget)]
        q = frame["q_value"].to_numpy()
        # a one-sided q-value is small on one side only, but a q-value of 1 with a rate near 1 says nothing of the side
        return order[(q[order] <= self.fdr) & (strength[order] > 0)]

    def reason(self, row: dict[str, Any]) -> str:
        """Why one row or group is dropped."""
        if self.budget is not None:
            return f"|mu| above the error budget {self.budget[0]:g}/{self.budget[1]:g}"
        if self.top is not None:
            strongest = f"one of the strongest {self.top}{' by relative influence' if self.relative else ''}"
            return "recommended cut" if self.top == "recommended" else strongest
        return f"q = {row['q_value']:.2g} <= {self.fdr:.3g}"


@dataclass(frozen=True, eq=False)
class Cleaning:
    """What to leave out, and what that is predicted to do.

    Attributes:
        run: the recorded run, or several as one.
        query: name of the query.
        effect: "harmful" or "supporting".
        rule: what was dropped by.
        group: column whose groups were tested as a whole; None for single rows.
        dropped: one row a dropped sample, strongest first: sample, (group,) mu, ci_low, ci_high, q_value, reason and
            the columns of the sample table. With a group, the figures are the group's.
        kept: ids of the kept samples, in the order of the sample table.
        predicted: influence of the whole cut, corrected for having chosen it by the same estimates; None where nothing
            is dropped.
        data: file to cut; None for the run's own source, or its sample table.
        id_column: of that file; None for the run's own.
        notes: what else to know, one sentence each.
    """

    run: Recorded
    query: str
    effect: Effect
    rule: Rule
    group: str | None
    dropped: pl.DataFrame
    kept: pl.Series
    predicted: GaussianInfluence | None
    data: str | None = None
    id_column: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Dropped samples over all."""
        return self.dropped.height / (self.dropped.height + len(self.kept))

    def write(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Writes the kept rows, and beside them the dropped ones with their figures.

        Args:
            path: new file. Rows of the source file stay as they are there, in its order and format; a run without a
                source file gives its sample table, in the format of the suffix.

        Returns:
            The file and `NAME.dropped.SUFFIX`; nothing where nothing is dropped.

        Raises:
            InputError: a file exists, has another format than the source, or the source's rows are not those of the
                run: changed, missing, or named by ids that match no row.
        """
        if self.dropped.is_empty():
            return ()
        return write_cut(
            self.run, Path(path), dropped=self.dropped, kept=self.kept, data=self.data, id_column=self.id_column
        )

    def __str__(self) -> str:
        if self.predicted is None:
            unit = "no row" if self.group is None else f"no group by {self.group!r}"
            lines = [self.rule.headline(self.effect, self.query, size=f"{unit}. Nothing to drop"), f"  {_NOTHING}"]
            return "\n".join(lines + [f"  {note}" for note in self.notes])
        n = self.dropped.height + len(self.kept)
        size = f"{self.dropped.height} of {n} rows ({100 * self.share:.1f} %)"
        if self.group is not None:
            groups = self.dropped["group"].unique(maintain_order=True).to_list()
            size += f" in {len(groups)} {'group' if len(groups) == 1 else 'groups'} by {self.group!r}: "
            size += ", ".join(map(str, groups[:8])) + (", …" if len(groups) > 8 else "")
        low, high = self.predicted.interval(self.rule.level)
        lines = [
            self.rule.headline(self.effect, self.query, size=size),
            f"  predicted influence of the cut as a whole: μ = {self.predicted.mu:+.2f} "
            f"({100 * self.rule.level:.3g} % {low:+.2f} to {high:+.2f})",
        ]
        words = f"  {in_words(self.predicted, size=self.dropped.height, query=self.query)}"
        if self.group is not None:
            sizes = self.dropped.group_by("group", maintain_order=True).agg(size=pl.len())
            note = large_groups_note(sizes, n)
            lines.append(f"  {note}" if note else words)  # of whole kinds no probability is worth its name
        else:
            lines += [words, f"  {large_cut_note(self.share)}"] if self.share > LARGE_CUT else [words]
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        from finfluence.workflows.notebook import frame_html, text_html

        return text_html(str(self)) + ("" if self.dropped.is_empty() else frame_html(self.dropped))


def clean(
    run: Recorded,
    query: str,
    *,
    effect: Effect = "harmful",
    fdr: float | None = None,
    top: int | Literal["recommended"] | None = None,
    budget: tuple[float, float] | None = None,
    group: str | None = None,
    correction: Correction = "bh",
    level: float = 0.95,
    data: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    relative: bool = False,
) -> Cleaning:
    """Chooses the rows to leave out, and predicts what leaving them out together does.

    Args:
        run: a recorded run, or several as one (`PooledRuns`).
        query: one of its queries.
        effect: drop "harmful" rows (removing them lowers the measurement) or "supporting" ones.
        fdr: see `Rule`; 0.05 where no rule is given.
        top: see `Rule`.
        budget: see `Rule`.
        group: column of the sample table whose groups are tested and dropped as a whole; rows without a group stay.
        correction: see `Rule`.
        level: of intervals and of the budget's bound.
        data: file to cut instead of the one that the run was trained on.
        id_column: column of that file that names samples.
        relative: see `Rule`; of a run with self-influence.

    Raises:
        InputError: an unknown query, effect or column, a rule that cannot be used, or one that leaves no rows.
    """
    rule = Rule(fdr=fdr, top=top, budget=budget, correction=correction, level=level, relative=relative)
    if relative and group is not None:
        raise InputError("relative influence is one of single rows; leave out the group")
    if group is not None and rule.top == "recommended":
        raise InputError("the recommended cut is one of single rows; give a number of groups, or an error rate")
    selection = Selection.of(run, query, effect=effect, correction=correction, level=level, relative=relative)
    samples = run.samples()
    about = samples.drop([c for c in (CONTENT, "mu", "ci_low", "ci_high", "q_value", "reason") if c in samples.columns])
    notes: tuple[str, ...] = ()
    if group is None:
        frame = selection.frame
        wanted = selection.recommended if rule.top == "recommended" else None
        bound = _one_sided_bound(run, query, rule, sign=selection.sign)
        positions = rule.chosen(frame, sign=selection.sign, bound=bound, recommended=wanted)
        found = _figures(frame[positions], rule).join(about, on="sample", how="left", maintain_order="left")
        predicted = selection.influence_of(positions) if 0 < len(positions) < samples.height else None
        if rule.fdr is not None and len(positions) > max(1.5 * selection.recommended, samples.height * LARGE_CUT):
            outstanding = f"Only {selection.recommended}" if selection.recommended else "None"
            notes = (
                f"{outstanding} of them can be told to stand out; the others are significant but bring little each, "
                "and other data than this query's may not gain from losing them (--top recommended stops there).",
            )
    else:
        frame = run.influence(query, groups=group, alternative=effect, correction=correction, level=level)
        bound = _one_sided_bound(run, query, rule, sign=selection.sign, groups=group)
        chosen = rule.chosen(frame, sign=selection.sign, bound=bound)
        members = samples.select("sample", pl.col(group).alias("group")).with_row_index("position").drop_nulls("group")
        found = _figures(frame[chosen], rule).join(members, on="group", how="inner", maintain_order="left")
        positions = found["position"].to_numpy()
        figures = [c for c in found.columns if c not in ("sample", "position", "group")]
        found = found.select("sample", "group", *figures)
        found = found.join(about.drop("group", strict=False), on="sample", how="left", maintain_order="left")
        predicted = _predict_groups(run, query, frame, chosen=chosen, ids=found["sample"]) if len(positions) else None
        if blank := samples.height - members.height:
            notes = (f"{blank} rows have no {group!r} and stay.",)
    if len(positions) >= samples.height:
        raise InputError(f"the rule drops all {samples.height} rows; leave some to train on")
    kept = samples["sample"].filter(~pl.Series(np.isin(np.arange(samples.height), positions)))
    return Cleaning(
        run=run,
        query=query,
        effect=effect,
        rule=rule,
        group=group,
        dropped=attach(found, **metadata(frame)),
        kept=kept,
        predicted=predicted,
        data=None if data is None else str(data),
        id_column=id_column,
        notes=(*notes, *(selection.caveats if group is None else ()), *caveats(run)),
    )


def in_words(influence: GaussianInfluence, *, size: int, query: str) -> str:
    """What the predicted influence of a cut means for one retraining, with the 95 % interval of the probability."""
    lowers = influence.mu < 0
    chances = [
        GaussianInfluence(mu).superiority if not lowers else 1 - GaussianInfluence(mu).superiority
        for mu in (influence.mu, *influence.interval(0.95))
    ]
    low, high = sorted(chances[1:])
    rows = "this row" if size == 1 else f"these {size} rows"
    verb = "lowers" if lowers else "raises"
    chance, least, most = chance_text(chances[0]), chance_text(low), chance_text(high)
    band = "" if least == most else f" (95 % {least} to {most})"
    return f"Retraining without {rows} {verb} the measured loss of {query!r} with probability {chance}{band}."


def _one_sided_bound(
    run: Recorded, query: str, rule: Rule, *, sign: int, groups: str | None = None
) -> np.ndarray | None:
    """Lower bound of every row's strength at the rule's level; None where the rule needs none."""
    if rule.budget is None:
        return None
    # the ends of the two-sided interval at level 1 − 2(1 − L) are the one-sided bounds at level L
    frame = run.influence(query, groups=groups, level=2 * rule.level - 1)
    return (frame["ci_low"] if sign > 0 else -frame["ci_high"]).to_numpy()


def _figures(frame: pl.DataFrame, rule: Rule) -> pl.DataFrame:
    """The key and figures of an influence frame's rows, with the reason why they go."""
    reasons = [rule.reason(row) for row in frame.iter_rows(named=True)]
    key = frame.columns[0]
    return frame.select(key, "mu", "ci_low", "ci_high", "q_value").with_columns(
        pl.Series("reason", reasons, dtype=pl.String)
    )


def _predict_groups(
    run: Recorded, query: str, frame: pl.DataFrame, *, chosen: np.ndarray, ids: pl.Series
) -> GaussianInfluence | None:
    """Predicted influence of several whole groups that were chosen by their estimates.

    Groups differ in size, so what they have in common is taken to be the influence a row: the rates μ_g/s_g are shrunk
    (see `shrink`) and multiplied by the sizes again.
    """
    if len(ids) >= run.samples().height:
        return None
    union = run.influence(query, subsets={"cut": ids})
    naive, naive_se = float(union["mu"][0]), float(union["se"][0])
    mu, size = (frame[c].to_numpy().astype(np.float64) for c in ("mu", "size"))
    se = null_errors(frame)
    known = np.flatnonzero(np.isfinite(mu) & (se > 0))
    total = float(mu[chosen].sum())
    if len(known) < 3 or not np.isin(chosen, known).all() or not total:
        return GaussianInfluence(naive, naive_se)
    shrunk = shrink(mu[known] / size[known], se[known] / size[known])
    place = np.searchsorted(known, chosen)
    factor = naive / total
    mean = factor * float((shrunk.mean[place] * size[chosen]).sum())
    scaled = shrunk.folds[:, place] @ size[chosen]
    prior = (len(scaled) - 1) / len(scaled) * float(((scaled - scaled.mean()) ** 2).sum())
    error = factor**2 * (float((shrunk.variance[place] * size[chosen] ** 2).sum()) + prior)
    own = factor**2 * float((se[chosen] ** 2).sum())
    common = max(naive_se**2 - own, 0.0) * (mean / naive) ** 2
    return GaussianInfluence(mean, float(np.sqrt(error + common + (SCALE_ERROR * mean) ** 2)))


__all__ = ["Cleaning", "Rule", "clean", "in_words"]
