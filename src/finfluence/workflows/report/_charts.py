"""The page's charts as Vega-Lite specifications, built with altair.

Colours are names behind a "$" (`$harm`), which the page replaces by the current theme's, so that one specification
serves light and dark. Every chart says in its description what it shows, for those who cannot see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

HARM, SUPPORT, INK, MUTED = "$harm", "$support", "$ink", "$muted"
_HEIGHT = 260


def removal_chart(predicted: pl.DataFrame, measured: pl.DataFrame, *, recommended: int) -> dict[str, Any]:
    """Predicted μ of removing the k most harmful rows together, with its band, the recommended cut and measured points.

    Args:
        predicted: k, mu, ci_low, ci_high.
        measured: the same columns of cuts that were retrained; may be empty.
        recommended: the recommended k; 0 for none.
    """
    import altair as alt

    x = alt.X("k:Q", title="rows removed, most harmful first", scale=alt.Scale(nice=False))
    base = alt.Chart(_data(predicted.select("k", "mu", "ci_low", "ci_high")))
    scale = alt.Y("ci_low:Q", title="μ of the removal")
    layers: list[Any] = [
        base.mark_area(opacity=0.18, color=HARM).encode(x, scale, alt.Y2("ci_high:Q")),
        alt.Chart(_data([{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y="zero:Q"),
        base.mark_line(color=HARM, strokeWidth=2).encode(
            x, alt.Y("mu:Q"), tooltip=_tooltip(k="rows removed", mu="μ", ci_low="low", ci_high="high")
        ),
    ]
    if recommended:
        cut = alt.Chart(_data([{"k": recommended, "label": f"recommended cut: {recommended:,}"}]))
        layers += [
            cut.mark_rule(color=INK, strokeDash=[4, 3]).encode(x="k:Q"),
            cut.mark_text(align="left", dx=6, baseline="top", color=INK).encode(
                x="k:Q", y=alt.value(4), text="label:N"
            ),
        ]
    if measured.height:
        points = alt.Chart(_data(measured.select("k", "mu", "ci_low", "ci_high")))
        layers += [
            points.mark_rule(color=INK, strokeWidth=1.5).encode(x=x, y="ci_low:Q", y2="ci_high:Q"),
            points.mark_point(color=INK, filled=True, size=60, opacity=1).encode(
                x, alt.Y("mu:Q"), tooltip=_tooltip(k="rows removed", mu="measured μ", ci_low="low", ci_high="high")
            ),
        ]
    return _spec(alt.layer(*layers), "Predicted influence of removing the k most harmful rows together, against k.")


def agreement_chart(live: np.ndarray, replay: np.ndarray) -> dict[str, Any]:
    """μ from live sensitivities against μ from the replay, one point a sample."""
    import altair as alt

    rows = [{"live": float(a), "replay": float(b)} for a, b in zip(live, replay, strict=True)]
    return _spec(
        alt.Chart(_data(rows))
        .mark_circle(size=18, opacity=0.45, color=SUPPORT)
        .encode(
            alt.X("live:Q", title="μ, live (uncalibrated scale)"),
            alt.Y("replay:Q", title="μ, replay"),
            tooltip=_tooltip(live="live", replay="replay"),
        ),
        "Scatter plot of every shown sample's influence by live signals against its influence by replayed signals.",
    )


def runs_chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """μ of some samples in every run, beside what all runs say together.

    Args:
        rows: sample, mu, low, high, and each: μ by name of the run.
    """
    import altair as alt

    points = [{"sample": row["sample"], "run": name, "mu": own} for row in rows for name, own in row["each"].items()]
    together = alt.Chart(_data([{key: row[key] for key in ("sample", "mu", "low", "high")} for row in rows]))
    y = alt.Y("sample:N", title=None, sort=None, axis=alt.Axis(labelLimit=140, labelOverlap=False))
    fill = alt.condition("datum.mu < 0", alt.value(HARM), alt.value(SUPPORT))
    return _spec(
        alt.layer(
            alt.Chart(_data([{"zero": 0}])).mark_rule(color=MUTED).encode(x="zero:Q"),
            together.mark_rule(color=MUTED, strokeWidth=5, opacity=0.45).encode(
                alt.X("low:Q", title="μ"), alt.X2("high:Q"), y
            ),
            alt.Chart(_data(points))
            .mark_circle(size=32, opacity=0.9)
            .encode(alt.X("mu:Q"), y, color=fill, tooltip=_tooltip("sample", "run", mu="μ in this run")),
        ),
        "μ of the samples at both ends of the ranking as each run has it, beside the interval of all runs together.",
        height=60 + 15 * len(rows),
    )


def verified_chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Measured against predicted μ of verified subsets, with both intervals and the diagonal.

    Args:
        rows: name, predicted, predicted_low, predicted_high, measured, measured_low, measured_high.
    """
    import altair as alt

    # an end that no number of retrainings has bounded yet is drawn at the point itself
    rows = [
        dict(row)
        | {
            f"{kind}{end}": row[f"{kind}{end}"] if np.isfinite(row[f"{kind}{end}"]) else row[kind]
            for kind in ("predicted", "measured")
            for end in ("_low", "_high")
        }
        for row in rows
    ]
    ends = [row[f"{kind}{end}"] for row in rows for kind in ("predicted", "measured") for end in ("_low", "_high")]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    base = alt.Chart(_data(rows))
    diagonal = alt.Chart(_data([{"x": low, "y": low}, {"x": high, "y": high}]))
    x, y = alt.X("predicted:Q", title="predicted μ"), alt.Y("measured:Q", title="measured μ (retraining)")
    return _spec(
        alt.layer(
            diagonal.mark_line(color=MUTED, strokeDash=[3, 3]).encode(x="x:Q", y="y:Q"),
            base.mark_rule(color=INK).encode(x=x, y="measured_low:Q", y2="measured_high:Q"),
            base.mark_rule(color=INK).encode(x=alt.X("predicted_low:Q"), x2="predicted_high:Q", y=y),
            base.mark_point(filled=True, size=70, color=SUPPORT, opacity=1).encode(
                x, y, tooltip=_tooltip("name", predicted="predicted μ", measured="measured μ")
            ),
        ),
        "Influence measured by retraining against the influence predicted from the recorded run; the diagonal: equal.",
    )


def line_chart(
    frame: pl.DataFrame, *, y: str, title: str, description: str, log: bool = False, colour: str = SUPPORT
) -> dict[str, Any]:
    """A column of a step table over the steps.

    Args:
        frame: a column step, and `y`.
        y: the column to draw.
        title: of its axis.
        description: what the chart shows, for those who cannot see it.
        log: whether a wide range is drawn on a logarithmic axis; values must be positive.
        colour: of the line.
    """
    import altair as alt

    values = frame[y].to_numpy()
    # on a narrow range a logarithmic axis has no round number to mark
    log = log and bool(values.max() > 30 * values.min())
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    axis = alt.Axis(format="~e", tickCount=4) if log else alt.Axis(tickCount=4)
    return _spec(
        alt.Chart(_data(frame.select("step", y)))
        .mark_line(color=colour, strokeWidth=1.5)
        .encode(
            alt.X("step:Q", title="step"),
            alt.Y(f"{y}:Q", title=title, scale=scale, axis=axis),
            tooltip=[alt.Tooltip("step:Q"), alt.Tooltip(f"{y}:Q", title=title, format=".3~g")],
        ),
        description,
        height=190,
    )


def signal_chart(first: int, last: int) -> dict[str, Any]:
    """Contributions of a chosen sample's visits and their running sum; the page gives the data "visits" and "ends".

    Args:
        first: step at which training began.
        last: its last step.
    """
    import altair as alt

    base, line = alt.Chart(alt.NamedData(name="visits")), alt.Chart(alt.NamedData(name="ends"))
    x = alt.X("step:Q", title="step", scale=alt.Scale(domain=[first, max(last, first + 1)]))
    fill = alt.condition("datum.value < 0", alt.value(HARM), alt.value(SUPPORT))
    chart = alt.layer(
        alt.Chart(_data([{"zero": 0}])).mark_rule(color=MUTED).encode(y="zero:Q"),
        line.mark_line(color=INK, interpolate="step-after", strokeWidth=1.5).encode(x, alt.Y("sum:Q")),
        base.mark_rule(strokeWidth=2, opacity=0.9).encode(
            x, alt.Y("zero:Q", title="contribution to μ"), alt.Y2("value:Q"), color=fill
        ),
        base.mark_circle(size=36, opacity=1).encode(
            x, alt.Y("value:Q"), color=fill, tooltip=_tooltip(step="step", value="this visit", sum="running sum")
        ),
    )
    return _spec(
        chart, "What each visit of the chosen sample contributed to μ, and the running sum, over training.", height=180
    )


def tradeoff_chart() -> dict[str, Any]:
    """The trade-off curve of the chosen μ; the page gives the data "curve" and "point"."""
    import altair as alt

    unit = alt.Scale(domain=[0, 1])
    x = alt.X("alpha:Q", title="type-I error α", scale=unit)
    y = alt.Y("beta:Q", title="type-II error β", scale=unit)
    curve = alt.Chart(alt.NamedData(name="curve"))
    point = alt.Chart(alt.NamedData(name="point"))
    return _spec(
        alt.layer(
            alt.Chart(_data([{"alpha": 0, "beta": 1}, {"alpha": 1, "beta": 0}]))
            .mark_line(color=MUTED, strokeDash=[3, 3])
            .encode(x, y),
            curve.mark_area(opacity=0.16, color=SUPPORT).encode(x, alt.Y("low:Q"), alt.Y2("high:Q")),
            curve.mark_line(color=SUPPORT, strokeWidth=2).encode(x, y),
            point.mark_rule(color=INK, strokeDash=[2, 2]).encode(x, alt.Y("one:Q"), alt.Y2("beta:Q")),
            point.mark_point(color=INK, filled=True, size=70, opacity=1).encode(x, y),
        ),
        "Trade-off curve: the smallest type-II error of a test that tells training with from training without.",
        height=250,
    )


def thin(frame: pl.DataFrame, *, points: int = 600) -> pl.DataFrame:
    """At most about `points` rows, evenly spaced, the last one among them."""
    if frame.height <= points:
        return frame
    rows = np.unique(np.linspace(0, frame.height - 1, points).round().astype(np.int64))
    return frame[rows]


def _spec(chart: Any, description: str, *, height: int = _HEIGHT) -> dict[str, Any]:
    # checking against the schema takes a second a chart; a test does it
    return chart.properties(width="container", height=height, description=description).to_dict(validate=False)


def _data(rows: pl.DataFrame | Sequence[Mapping[str, Any]]) -> Any:
    import altair as alt

    values = rows.to_dicts() if isinstance(rows, pl.DataFrame) else [dict(row) for row in rows]
    return alt.InlineData(values=_rounded(values))


def _rounded(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # six digits are more than a chart shows, and half the bytes
    return [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]


def _tooltip(*plain: str, **titles: str) -> list[Any]:
    import altair as alt

    whole = ("k", "step")
    return [alt.Tooltip(f"{name}:N") for name in plain] + [
        alt.Tooltip(f"{name}:Q", title=title, format="," if name in whole else "+.3~g")
        for name, title in titles.items()
    ]
