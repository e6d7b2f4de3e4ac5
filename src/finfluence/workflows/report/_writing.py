"""`write_report`: a run, or several as one, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from importlib import metadata as packages
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from finfluence.errors import FinfluenceError, InputError
from finfluence.runs.pooling import Recorded, check_query
from finfluence.runs.run import Run
from finfluence.signals import open_folder, per_sample
from finfluence.tradeoff import SIGN_CONVENTION
from finfluence.workflows.report import _charts as charts
from finfluence.workflows.report._assembly import pack_query
from finfluence.workflows.report._columns import Cuts, SampleColumns, ends, pack_samples, sort_columns
from finfluence.workflows.report._health import combined_checks, health_checks
from finfluence.workflows.report._images import pack_images
from finfluence.workflows.report._packing import Budget, Payload, floats
from finfluence.workflows.report._several import names_of

_TOP = 200  # samples at either end of the ranking that are shown with all that is known of them
_ROW_BYTES = 10  # of one sample and query, deflated
_LARGEST = 4_900_000  # bytes of the page, kept by showing less of everything
_SCALES = (1.0, 0.6, 0.35, 0.2)
_MOST_QUERIES = 24
_SCRIPTS = (
    "normal.js",
    "payload.js",
    "elements.js",
    "charts.js",
    "samples.js",
    "table.js",
    "chosen.js",
    "page.js",
)


def write_report(
    run: Recorded, path: str | os.PathLike[str] | None = None, *, query: str | None = None, images: Any = None
) -> Path:
    """Writes one self-contained HTML page about a run: it works offline, from a file, in light and dark.

    Args:
        run: a recorded run, or several as one (`open_runs`): the page then has what they say together, what each says,
            and how far they agree.
        path: the file to write; by default `report.html` in the run's directory, or in the folder that holds the
            several. A report that is there is replaced.
        query: the query to show; by default all of them, as far as they fit.
        images: thumbnails of the samples: anything that gives an (h, w), (c, h, w) or (h, w, c) array, or a pair of
            one and a label, by position. By default encoded images of the sample table, or the data set of the
            run's recipe.

    Returns:
        The file's path.

    Raises:
        InputError: an unknown query, a path that is no HTML file, or a run without any estimate.
        StoreError: the file cannot be written.
    """
    target = _target(run, path)
    queries = list(run.queries) if query is None else [check_query(run, query)]
    frames, failed = _estimates(run, queries)
    if not frames:
        raise InputError(f"nothing to show of {run.directory}: {'; '.join(why for _, why in failed)}")
    page = b""
    for scale in _SCALES:
        smaller = _page(run, frames, failed, images=images, budget=Budget().scaled(scale)).encode("utf-8", "replace")
        # the estimates of very many samples cannot be left out: showing less of the rest would not help much
        enough = bool(page) and len(smaller) > 0.97 * len(page)
        page = smaller
        if len(page) <= _LARGEST or enough:
            break
    open_folder(target.parent).write(target.name, page)
    return target


def _folder(run: Run) -> Path:
    folder = str(run.directory)
    if "://" in folder and not folder.startswith(("file://", "local://")):
        raise InputError(f"{folder} is not on this machine; say where to write the report")
    return Path(folder.removeprefix("file://").removeprefix("local://")).expanduser()


def _target(run: Recorded, path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        folders = [_folder(one) for one in run.runs]
        if len(folders) > 1:
            folders = [folder.absolute().parent for folder in folders]
        if len(set(folders)) > 1:
            raise InputError(f"the runs {run.directory} lie in different folders; say where to write the report")
        path = folders[0] / "report.html"
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"the report is an HTML page, but the file to write is {target}; give it the ending .html")
    if target.is_dir():
        raise InputError(f"{target} is a directory; give the name of a file")
    return target


def _page(
    run: Recorded, frames: dict[str, pl.DataFrame], failed: list[tuple[str, str]], *, images: Any, budget: Budget
) -> str:
    columns, payload, cuts = sort_columns(run.samples()), Payload(), Cuts()
    n = columns.frame.height
    room = max(1, min(_MOST_QUERIES, budget.queries // (_ROW_BYTES * n)))
    left = list(frames)[room:]
    if left:
        cuts.notes.append(
            f"{room} of {len(frames)} queries are in this page. Not here: {', '.join(left)}; "
            "write a page of one of them with --query."
        )
    shown = {name: frames[name] for name in list(frames)[:room]}
    each = max(10, _TOP // len(shown))
    tops = {name: ends(_mu(frame), each) for name, frame in shown.items()}
    top = _union(list(tops.values()))
    if not top.size:
        raise InputError(f"no sample of {run.directory} has an estimate; record more of the training")
    columns = pack_samples(payload, columns, top=top, id_dtype=run.runs[0].store.id_dtype, budget=budget, cuts=cuts)
    order = _union([top, *(ends(_mu(frame), n) for frame in shown.values()), np.arange(n)])
    has_images = pack_images(payload, run, columns, order=order, images=images, budget=budget, cuts=cuts)
    visits = per_sample(run.runs[0].store, next(iter(shown)))["visits"].to_numpy().astype(np.float64)
    payload.array("visits", visits / max(1.0, visits.sum()), "float32")
    payload.json("top", top.tolist())
    for place, (name, frame) in enumerate(shown.items()):
        own = np.concatenate([tops[name], np.setdiff1d(top, tops[name])])
        pack_query(
            payload,
            run,
            name,
            place=place,
            frame=frame,
            categories=columns.categories,
            top=own,
            visits=budget.visits // len(shown),
        )
    return _render(run, columns, payload, queries=list(shown), failed=failed, cuts=cuts, has_images=has_images)


def _estimates(run: Recorded, wanted: list[str]) -> tuple[dict[str, pl.DataFrame], list[tuple[str, str]]]:
    frames: dict[str, pl.DataFrame] = {}
    failed: list[tuple[str, str]] = []
    for name in wanted:
        try:
            frames[name] = run.influence(name)
        except FinfluenceError as error:
            # a query whose adjoint diverged must not cost the others their page
            failed.append((name, str(error)))
    return frames, failed


def _render(
    run: Recorded,
    columns: SampleColumns,
    payload: Payload,
    *,
    queries: list[str],
    failed: list[tuple[str, str]],
    cuts: Cuts,
    has_images: bool,
) -> str:
    import jinja2
    from markupsafe import Markup

    names = names_of(run)
    read = [(one, one.steps(), one.adjoints()) for one in run.runs]
    first, steps, adjoints = read[0]
    drawn, curves = _run_charts(steps, adjoints, queries[0], of=names[0] if len(names) > 1 else "")
    span = [int(steps["step"].to_numpy().min()), int(steps["step"].to_numpy().max())]
    payload.json("charts", {"signal": charts.signal_chart(*span), "tradeoff": charts.tradeoff_chart()} | drawn)
    payload.json(
        "about",
        {
            "samples": columns.frame.height,
            "categories": columns.categories,
            "numbers": columns.numbers,
            "texts": columns.texts,
            "steps": span,
            "images": has_images,
        },
    )
    script = f"(() => {{\n'use strict';\n{''.join(_resource(name) for name in _SCRIPTS)}}})();\n"
    vega = _vega()
    models = len(first.measured_epochs)
    trained = "model" if len(names) == 1 else f"models of {len(names)} runs"
    checks = {name: health_checks(*tables) for name, tables in zip(names, read, strict=True)}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    # Scripts run by their hash alone: markup that slipped through the escaping would still not be executed.
    return environment.from_string(_resource("page.html.j2")).render(
        title=f"Influence report: {', '.join(names)}",
        script_hashes=Markup(f"{_csp_hash(vega)} {_csp_hash(script)}"),
        css=Markup(_resource("page.css")),
        vega=Markup(vega),
        script=Markup(script),
        payload=payload.encode(),
        n_samples=f"{columns.frame.height:,}",
        sign=SIGN_CONVENTION.replace("mu > 0", "μ\u00a0>\u00a00").replace("mu < 0", "μ\u00a0<\u00a00"),
        measured=f"on the trained {trained}" if models == 1 else f"on average at {models} moments of the training",
        several=len(names),
        queries=queries,
        failed=failed,
        search_hint="words or an id" if columns.texts else "an id",
        checks=combined_checks(checks),
        curves=curves,
        facts=_facts([_facts_of(one, own) for one, own, _ in read]),
        cuts=cuts.notes,
        version=packages.version("finfluence"),
    )


def _run_charts(
    steps: pl.DataFrame, adjoints: pl.DataFrame, query: str, *, of: str
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    drawn: dict[str, Any] = {}
    curves: list[tuple[str, str, str]] = []
    loss = steps.select("step", "loss").drop_nulls().filter(pl.col("loss").is_finite())
    if loss.height > 1:
        # the mean of equal stretches, so that a long run's curve is not its noise
        stretch = max(1, loss.height // 400)
        place = (pl.int_range(pl.len()) // stretch).alias("stretch")
        shown = loss.group_by(place, maintain_order=True).agg(pl.all().mean())
        text = f"Mean training loss of a step: {loss['loss'][0]:.3g} at first, {loss['loss'][-1]:.3g} at the end."
        drawn["loss"] = charts.line_chart(shown, y="loss", title="loss", description=text)
        curves.append(("loss", "Training loss", text + ("" if stretch == 1 else f" Means of {stretch} steps.")))
    finite = pl.col("residual").is_finite() & (pl.col("residual") > 0)
    residual = charts.thin(steps.select("step", "residual").drop_nulls().filter(finite), points=400)
    if residual.height > 1:
        text = "Relative residual of the signal identity at each step; above 1e-3 something was not covered."
        drawn["residual"] = charts.line_chart(
            residual, y="residual", title="residual", description=text, log=True, colour=charts.MUTED
        )
        curves.append(("residual", "Signal identity", text))
    own = charts.thin(adjoints.filter((pl.col("query") == query) & (pl.col("norm") > 0)), points=400)
    if own.height > 1:
        text = f"Norm of the replay’s adjoint of “{query}” before each step; steady growth backwards is a bad sign."
        drawn["adjoint"] = charts.line_chart(
            own, y="norm", title="norm", description=text, log=True, colour=charts.MUTED
        )
        curves.append(("adjoint", "Adjoint of the replay", text))
    return drawn, [(name, title, f"{text} Of {of}." if of else text) for name, title, text in curves]


def _facts(each: list[dict[str, str]]) -> list[tuple[str, str]]:
    """What the runs say of themselves, term by term, without repetition."""
    terms = list(dict.fromkeys(term for facts in each for term in facts))
    found = {term: list(dict.fromkeys(facts[term] for facts in each if term in facts)) for term in terms}
    return [(term, "; ".join(values)) for term, values in found.items()]


def _facts_of(run: Run, steps: pl.DataFrame) -> dict[str, str]:
    known = run.manifest
    optimizer = known.get("optimizer") or {}
    rate, epochs = optimizer.get("lr"), steps["epoch"].n_unique()
    found = {
        "run": run.directory,
        "training": f"{steps.height:,} steps in {epochs:,} epoch{'' if epochs == 1 else 's'}",
        "batch": f"{known['batch_size']:,} samples" if known.get("batch_size") else None,
        "order": known.get("sampler"),
        "optimizer": f"{optimizer.get('name')}, lr {rate:g}" if rate is not None else optimizer.get("name"),
        "seed": known.get("seed"),
        "sensitivity": run.sensitivity,
        "signals": known.get("signals"),
        "measured": _measured(run),
        "device": (known.get("environment") or {}).get("device"),
        "versions": ", ".join(f"{k} {v}" for k, v in (known.get("versions") or {}).items()),
    }
    return {term: str(value) for term, value in found.items() if value not in (None, "")}


def _measured(run: Run) -> str | None:
    epochs = run.measured_epochs
    return None if len(epochs) == 1 else f"the mean after epochs {', '.join(f'{e:.3g}' for e in epochs)}"


def _mu(frame: pl.DataFrame) -> np.ndarray:
    return floats(frame["mu"])


def _union(parts: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(parts).astype(np.int64)
    return joined[np.sort(np.unique(joined, return_index=True)[1])]


def _resource(name: str) -> str:
    return (resources.files("finfluence.workflows.report") / "page" / name).read_text(encoding="utf-8")


@functools.cache
def _vega() -> str:
    """The drawing libraries as one script, from the package that carries them."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    # nothing inside may end the element that holds it
    return bundle.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
