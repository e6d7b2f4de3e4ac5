"""The figures of docs/evidence.md, drawn from the records alone.

    python -m benchmarks figures                # docs/figures/*.svg
    python -m benchmarks figures --output DIR

A record that is not there yet has no figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks._records import RESULTS

FIGURES = RESULTS.parent.parent / "docs" / "figures"
# finfluence, baselines without a library, peers; colours that colour-blind readers tell apart
COLOURS = {"finfluence": "#0b61a4", "baseline": "#7f7f7f", "peer": "#d95f02"}
CURVES = (
    "finfluence, replay, full signals",
    "finfluence, self-influence (live)",
    "loss, mean over checkpoints",
    "gradient cosine, mean over checkpoints",
    "captum TracInCP",
    "kronfluence EK-FAC",
)


def kind(method: str) -> str:
    """Whose method it is."""
    if method.startswith("finfluence"):
        return "finfluence"
    return "baseline" if method.startswith(("loss", "gradient", "plain")) else "peer"


def _tables(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["tables"] if path.exists() else []


def _colour(alt: Any) -> Any:
    scale = alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    return alt.Color("kind:N", scale=scale, title=None)


def _dots(alt: Any, rows: list[dict[str, Any]], *, value: str, title: str, log: bool = False) -> Any:
    """Methods as rows, a dot and its interval each, best first."""
    data = alt.Data(values=rows)
    order = [row["method"] for row in sorted(rows, key=lambda r: -r[value] if not log else r[value])]
    y = alt.Y("method:N", sort=order, title=None, axis=alt.Axis(labelLimit=330))
    scale = alt.Scale(type="log") if log else alt.Scale(domain=[min(0.0, *(r[value] for r in rows)), 1.0])
    x = alt.X(f"{value}:Q", title=title, scale=scale)
    chart = alt.Chart(data).mark_point(filled=True, size=55, opacity=1).encode(x=x, y=y, color=_colour(alt))
    if "low" in rows[0]:
        bars = alt.Chart(data).mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q", y=y, color=_colour(alt))
        chart = bars + chart
    return chart.properties(width=320, height={"step": 16})


def consistency(alt: Any, tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Jaccard similarity of the top 10 % over reruns with other batch orders; one figure a problem, and one of all."""
    made = {}
    for table in tables:
        if "measured" in table["columns"]:
            made["consistency-measured"] = _measured(alt, table["rows"])
            continue
        problem = table["title"].split(":")[0]
        rows = [
            {"method": f"{r['method']} · {r['use']}", "kind": kind(r["method"]), "value": v, "low": low, "high": high}
            for r in table["rows"]
            if r["randomness"] == "shuffling"
            for v, low, high in [r["jaccard_10"]]
        ]
        stem = problem.lower().replace(", ", "-").replace(",", "").replace(" ", "-")
        title = "Jaccard similarity of the top 10 % over reruns, 95 % interval"
        made[f"consistency-{stem}"] = _dots(alt, rows, value="value", title=title).properties(title=problem)
    return made


def _measured(alt: Any, rows: list[dict[str, Any]]) -> Any:
    """The end of training, the mean of its second half and five runs of each as dots on a line, for each problem."""
    shown = {
        ("the end", "full"): "the end",
        ("second half", "full"): "second half",
        ("the end", "full, 5 runs averaged"): "the end, 5 runs",
        ("second half", "full, 5 runs averaged"): "second half, 5 runs",
    }
    points = [
        {"problem": r["data"], "measured": shown[key], "jaccard": r["jaccard_10"][0]}
        for r in rows
        if (key := (r["measured"], r["signals"])) in shown
    ]
    problems = sorted({p["problem"] for p in points}, key=lambda name: ("rate to 0" in name, "CNN" in name, name))
    y = alt.Y("problem:N", title=None, sort=problems)
    x = alt.X("jaccard:Q", title="Jaccard similarity of the top 10 % over reruns", scale=alt.Scale(domain=[0, 1]))
    colours = [COLOURS["baseline"], "#66b2e8", "#111111", COLOURS["finfluence"]]
    scale = alt.Scale(domain=list(shown.values()), range=colours)
    base = alt.Chart(alt.Data(values=points))
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y, color=alt.Color("measured:N", scale=scale))
    lines = base.mark_line(color="#bbbbbb").encode(x=x, y=y, detail="problem:N")
    return (lines + dots).properties(width=320, height={"step": 20}, title="What is measured (full signals)")


def agreement(alt: Any, tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank agreement with retraining, one panel a setting."""
    panels = []
    for table in tables:
        rows = []
        for r in table["rows"]:
            value, low, high = r["spearman"]
            rows.append({"method": r["method"], "kind": kind(r["method"]), "value": value, "low": low, "high": high})
        title = "rank agreement with retraining"
        panels.append(_dots(alt, rows, value="value", title=title).properties(title=table["title"]))
    return {"agreement": alt.vconcat(*panels)} if panels else {}


def mislabel(alt: Any, tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall against the fraction inspected, one panel a kind of bad row; with the larger query where there is one."""
    panels = []
    larger = [table for table in tables if "validation samples" in table["title"]]
    for table in larger or tables:
        if "measured" in table["columns"]:
            continue
        rows = [
            {"method": r["method"], "inspected": f, "recall": recall}
            for r in table["rows"]
            if r["method"] in CURVES and (r["use"] == "query" or "captum" not in r["method"])
            if r["use"] == "query" or "EK-FAC" not in r["method"]
            for f, recall in [(0.0, 0.0), *zip(r["fractions"], r["curve"], strict=True)]
        ]
        colours = alt.Scale(
            domain=list(CURVES), range=["#0b61a4", "#66b2e8", "#111111", "#7f7f7f", "#d95f02", "#a6761d"]
        )
        panels.append(
            alt.Chart(alt.Data(values=rows), title=table["title"].replace(", 1,000 validation samples", ""))
            .mark_line()
            .encode(
                x=alt.X("inspected:Q", title="rows inspected", axis=alt.Axis(format="%")),
                y=alt.Y("recall:Q", title="bad rows found", axis=alt.Axis(format="%")),
                color=alt.Color("method:N", scale=colours, title=None, legend=alt.Legend(labelLimit=300)),
            )
            .properties(width=210, height=150)
        )
    return {"mislabel": alt.concat(*panels, columns=3)} if panels else {}


def cost(alt: Any, tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Time over plain training, for the same scores."""
    if not tables:
        return {}
    rows = [{"method": r["method"], "kind": kind(r["method"]), "value": r["ratio"]} for r in tables[0]["rows"]]
    title = f"training and scoring, multiples of plain training ({tables[0]['title']})"
    return {"cost": _dots(alt, rows, value="value", title=title, log=True)}


def draw(folder: Path, output: Path) -> list[str]:
    """Writes every figure that the records allow.

    Returns:
        Names of the files.
    """
    import altair as alt
    import vl_convert

    output.mkdir(parents=True, exist_ok=True)
    written = []
    for make in (consistency, agreement, mislabel, cost):
        for name, chart in make(alt, _tables(folder, make.__name__)).items():
            drawn = chart.configure(font="sans-serif", background="white").configure_view(stroke=None)
            svg = vl_convert.vegalite_to_svg(drawn.to_json())
            (output / f"{name}.svg").write_text(svg + "\n", encoding="utf-8")
            written.append(f"{name}.svg")
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FIGURES)
    parser.add_argument("--records", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    print("\n".join(draw(options.records, options.output)) or "no record to draw")


if __name__ == "__main__":
    main()
