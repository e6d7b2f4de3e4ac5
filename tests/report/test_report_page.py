"""The report's page in a real headless browser: it loads, sorts, filters, moves, escapes, folds and fits."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from report_runs import VERIFIED, png, prose, synthetic_run
from scipy.special import ndtr, ndtri

import finfluence as fi
from finfluence.workflows.report import write_report

Show = Callable[..., Any]
HOSTILE = {
    3: "<script>window.hacked = 1</script> needle",
    4: "</script><img src=x onerror='window.hacked = 2'>",
    5: "\"quotes\" & 'apostrophes' </td></table> \u2028 {{ 7 * 7 }}",
    6: "x y " * 25_000,
}
QUERY = "<img src=x onerror='window.hacked = 3'> \"val\""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fi.Run:
    n = 120
    texts = prose(n, seed=0)
    for row, text in HOSTILE.items():
        texts[row] = text
    samples = pl.DataFrame(
        {
            "sample": np.arange(n),
            "text": texts,
            "source": ["<b>web</b>" if i % 3 else "forum" for i in range(n)],
            "label": [i % 5 for i in range(n)],
        }
    )
    directory = tmp_path_factory.mktemp("page") / "<i>run"
    run = synthetic_run(directory, samples, queries=("a", QUERY), batch=20, epochs=4)
    entry = VERIFIED | {"query": "a", "name": "<u>cut</u>", "runs": 8}
    (Path(run.directory) / "verified.json").write_text(json.dumps([entry]))
    return run


@pytest.fixture(scope="module")
def page(run: fi.Run) -> Path:
    return write_report(run)


def rows(browser: Any) -> list[list[str]]:
    """The visible cells of the ranked table, with plain minus signs."""
    script = """return [...document.querySelectorAll('#table-body tr')].map(
        row => [...row.cells].map(cell => cell.innerText.replaceAll('\u2212', '-').trim()))"""
    return browser.execute_script(script)


def sample_ids(browser: Any) -> list[int]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#table-body .chooser')].map(one => Number(one.textContent))"
    )


def choose(browser: Any, identifier: str, value: str) -> None:
    """Picks an option, or types into the search, as a person's choice would."""
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true}));",
        identifier,
        value,
    )
    time.sleep(0.3)  # typing is waited for


def problems(browser: Any) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_it_loads_without_complaint_and_without_network(show: Show, page: Path) -> None:
    browser = show(page)
    time.sleep(0.7)  # charts draw after the page is ready
    assert problems(browser) == []
    assert not browser.find_element("id", "failure").is_displayed()
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"}
    assert {url.split(":", 1)[0] for url in urls} <= {"file", "data"}
    for chart in ("visits", "tradeoff", "removal", "verified", "loss", "residual"):
        drawn = browser.find_elements("css selector", f"#{chart}-chart svg [aria-roledescription]")
        assert drawn, f"{chart} was not drawn"
    # live signals alone: nothing to compare, and no link to an empty section
    assert not browser.find_element("id", "agreement").is_displayed()


def test_numbers_equal_those_of_score(show: Show, page: Path, run: fi.Run) -> None:
    browser = show(page)
    frame = run.influence("a").sort("mu")
    expected = [
        [f"{r['mu']:+.2f}\n{r['ci_low']:+.2f} to {r['ci_high']:+.2f}", f"{r['q_value']:.3f}"]
        for r in frame.iter_rows(named=True)
    ]
    ids: list[int] = []
    shown: list[list[str]] = []
    for _ in range(6):
        ids += sample_ids(browser)
        shown += [[cells[3], cells[5]] for cells in rows(browser)]
        browser.execute_script("document.getElementById('next').click()")
    assert ids == frame["sample"].to_list()
    assert shown == expected
    assert not browser.find_element("id", "next").is_enabled()


def test_headers_sort_both_ways_and_say_so(show: Show, page: Path, run: fi.Run) -> None:
    browser = show(page)
    frame = run.influence("a")
    heads = {"mu": frame.sort("mu"), "q": frame.sort("q_value", maintain_order=True), "id": frame}
    for key, ascending in heads.items():
        button = f'#table-head [data-key="{key}"]'
        if key != "mu":  # the order that the page starts with
            browser.find_element("css selector", button).click()
        cell = f"{button}"
        state = "return document.querySelector(arguments[0]).closest('th').getAttribute('aria-sort')"
        assert browser.execute_script(state, cell) == "ascending"
        assert sample_ids(browser) == ascending["sample"].head(20).to_list()
        browser.find_element("css selector", button).click()
        assert browser.execute_script(state, cell) == "descending"
        assert browser.execute_script("return document.activeElement.dataset.key") == key
    assert sample_ids(browser) == list(range(119, 99, -1))


def test_filters_narrow_the_table(show: Show, page: Path, run: fi.Run) -> None:
    browser = show(page)
    frame = run.influence("a").join(run.samples(), on="sample")

    def count() -> str:
        return browser.find_element("id", "count").text

    harmful = frame.filter((pl.col("q_value") <= 0.05) & (pl.col("mu") < 0)).height
    assert harmful > 0
    choose(browser, "significance", "harmful")
    assert f"of {harmful} " in count()
    assert harmful == int(browser.find_element("id", "tally-harm").text)
    choose(browser, "significance", "all")
    option = browser.execute_script(
        "return [...document.querySelectorAll('#filters select')[1].options].find(o => o.text === 'forum').value"
    )
    choose(browser, "filter-0", option)
    assert "of 40 (120 samples)" in count()
    choose(browser, "search", "NEEDLE")
    assert sample_ids(browser) == [3]
    choose(browser, "filter-0", "")
    choose(browser, "search", "no such words")
    assert count() == "None of 120 samples"
    assert browser.find_element("css selector", "#table-body .nothing").is_displayed()


def test_normal_distribution_equals_scipy(show: Show, page: Path) -> None:
    browser = show(page)
    x = np.linspace(-9, 9, 721)
    p = np.concatenate([np.geomspace(1e-12, 0.5, 200), 1 - np.geomspace(1e-9, 0.5, 100)])
    found = browser.execute_script(
        "const r = window.finfluenceReport; return [arguments[0].map(r.cdf), arguments[1].map(r.quantile)]",
        x.tolist(),
        p.tolist(),
    )
    np.testing.assert_allclose(found[0], ndtr(x), rtol=2e-13, atol=0)
    np.testing.assert_allclose(found[1], ndtri(p), rtol=1e-12, atol=1e-14)
    for mu in (0.0, 0.3, -2.5, 7.0):
        g = fi.GaussianInfluence(mu)
        for alpha in (0.001, 0.05, 0.31):
            power, beta = browser.execute_script(
                "const r = window.finfluenceReport;"
                "return [r.power(arguments[0], arguments[1]), r.typeTwoError(arguments[0], arguments[1])]",
                alpha,
                mu,
            )
            assert power == pytest.approx(g.power(alpha), rel=1e-11)
            assert beta == pytest.approx(float(g.tradeoff(alpha)), rel=1e-11)
        if mu:
            wanted = g.retrainings()
            assert browser.execute_script("return window.finfluenceReport.retrainings(arguments[0])", mu) == wanted


def test_slider_moves_the_power_to_the_exact_value(show: Show, page: Path, run: fi.Run) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = show(page)
    worst = run.influence("a").sort("mu").row(0, named=True)
    slider, power = browser.find_element("id", "alpha"), browser.find_element("id", "power")
    for step in range(3):
        alpha = 0.05 + 0.001 * step
        expected = fi.GaussianInfluence(worst["mu"]).power(alpha)
        assert power.text == f"{expected:.3f}"
        # μ is stored in single precision
        assert float(power.get_attribute("data-exact")) == pytest.approx(expected, abs=1e-7)
        assert f"power {expected:.3f}" in slider.get_attribute("aria-valuetext")
        slider.send_keys(Keys.ARROW_RIGHT)
    slider.send_keys(Keys.END)
    assert browser.find_element("id", "alpha-value").text == "0.500"
    assert power.text == f"{fi.GaussianInfluence(worst['mu']).power(0.5):.3f}"
    # a group is chosen in the same way
    group = run.influence("a", groups="label").sort("mu").row(0, named=True)
    browser.find_element("css selector", '#groups [aria-label^="Show group label"]').click()
    assert browser.find_element("id", "chosen-title").text == f"Group label = {group['group']}"
    assert power.text == f"{fi.GaussianInfluence(group['mu']).power(0.5):.3f}"
    assert not browser.find_element("id", "visits-figure").is_displayed()


def test_markup_is_shown_and_never_run(show: Show, page: Path) -> None:
    browser = show(page)
    for query in (0, 1):
        choose(browser, "query", str(query))
        choose(browser, "search", "")
        for row in (3, 4, 5):
            choose(browser, "search", str(row))
            browser.find_element("css selector", f'#table-body [data-code="{row}"] .chooser').click()
            shown = browser.find_element("id", "chosen-body").get_attribute("textContent")
            assert HOSTILE[row].replace("\u2028", "") in shown.replace("\u2028", "")
    assert QUERY in browser.find_element("css selector", ".lead").text
    assert "<b>web</b>" in browser.find_element("id", "groups").text
    assert browser.title == "Influence report: <i>run"
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements("css selector", "main img, main b, main i, main u, td table") == []
    assert problems(browser) == []


def test_long_texts_are_folded(show: Show, page: Path) -> None:
    browser = show(page)
    choose(browser, "search", "6")
    browser.find_element("css selector", '#table-body [data-code="6"] .chooser').click()
    body = browser.find_element("id", "chosen-body")
    assert len(body.text) < 1000
    assert "8,000 of 100,000 characters are in this page" in body.text
    browser.find_element("css selector", "#chosen-body summary").click()
    assert 7900 < len(body.text) < 9000
    cell = browser.find_element("css selector", '#table-body [data-code="6"] .text')
    assert cell.size["height"] < 60


def test_everything_is_reached_by_keyboard(show: Show, page: Path, run: fi.Run) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = show(page)

    def press(key: str) -> dict[str, str]:
        ActionChains(browser).send_keys(key).perform()
        return browser.execute_script(
            "const e = document.activeElement;"
            "return {id: e.id, name: e.className, key: e.dataset.key ?? '', code: e.dataset.code ?? '',"
            " ring: getComputedStyle(e).outlineStyle, href: e.getAttribute('href') ?? ''}"
        )

    assert press(Keys.TAB)["name"] == "skip"
    seen = [press(Keys.TAB) for _ in range(24)]
    assert {"theme", "query", "search", "significance", "filter-0"} <= {one["id"] for one in seen}
    assert {"id", "mu", "q"} <= {one["key"] for one in seen}
    assert all(one["ring"] not in ("none", "") for one in seen)
    browser.execute_script("document.querySelector('#table-body .chooser').focus()")
    order = run.influence("a").sort("mu")["sample"].to_list()
    assert press(Keys.ARROW_DOWN)["code"] == str(order[1])
    press(Keys.ENTER)
    assert browser.find_element("id", "chosen-title").text == f"Sample {order[1]}"
    assert press(Keys.ARROW_UP)["code"] == str(order[0])
    browser.execute_script("document.querySelector('#table-head [data-key=q]').focus()")
    assert press(Keys.SPACE)["key"] == "q"
    assert browser.execute_script("return document.activeElement.closest('th').ariaSort") == "ascending"


def test_tables_and_charts_speak(show: Show, page: Path) -> None:
    browser = show(page)
    time.sleep(0.5)
    unnamed = browser.execute_script(
        """const own = e => e.getAttribute('aria-label') || e.textContent || e.labels?.[0]?.textContent || '';
        return [...document.querySelectorAll('button, select, input, a')]
            .filter(e => !own(e).trim()).map(e => e.outerHTML)"""
    )
    assert unnamed == []
    for table in browser.find_elements("css selector", "main table"):
        assert table.find_elements("css selector", "caption")
        assert table.find_elements("css selector", 'th[scope="col"]')
        assert table.find_elements("css selector", 'th[scope="row"]')
    for svg in browser.find_elements("css selector", ".chart svg"):
        assert svg.find_elements("xpath", "./ancestor-or-self::*[@aria-label]|.//*[@aria-label]")
    assert browser.execute_script("return document.documentElement.lang") == "en"


def test_queries_are_switched(show: Show, page: Path, run: fi.Run) -> None:
    browser = show(page)
    choose(browser, "query", "1")
    assert sample_ids(browser) == run.influence(QUERY).sort("mu")["sample"].head(20).to_list()
    assert not browser.find_element("id", "verified").is_displayed()
    choose(browser, "query", "0")
    assert browser.find_element("id", "verified").is_displayed()
    time.sleep(0.5)
    assert problems(browser) == []


def luminance(browser: Any, selector: str, what: str) -> float:
    colour = browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, what
    )
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_follow_the_system_and_have_contrast(show: Show, page: Path, theme: str) -> None:
    browser = show(page, theme=theme)
    assert (luminance(browser, "body", "backgroundColor") < 0.1) == (theme == "dark")
    for selector in ("body", ".note", "td.harm", "td.support", "nav a", "figcaption"):
        if not browser.find_elements("css selector", selector):
            continue
        pair = luminance(browser, "body", "backgroundColor"), luminance(browser, selector, "color")
        # WCAG 2.2, 1.4.3
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5, selector
    browser.find_element("id", "theme").click()
    assert (luminance(browser, "body", "backgroundColor") < 0.1) == (theme == "light")
    time.sleep(0.4)
    ink = "return document.querySelector('#loss-chart svg text').getAttribute('fill')"
    assert browser.execute_script(ink) == ("#a0a9b2" if theme == "light" else "#5b6470")
    assert problems(browser) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone(show: Show, page: Path, theme: str) -> None:
    browser = show(page, width=390, height=844, theme=theme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.find_element("css selector", "#table-body .chooser").click()
    top = browser.execute_script("return document.getElementById('chosen').getBoundingClientRect().top")
    assert 0 <= top < 400
    wide = browser.execute_script(
        "return [...document.querySelectorAll('main .chart svg')]"
        ".filter(e => e.getBoundingClientRect().right > 391).length"
    )
    assert wide == 0


def test_thumbnails_are_drawn(show: Show, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).random((40, 8, 8))
    run = synthetic_run(tmp_path / "pixels", pl.DataFrame({"sample": np.arange(40)}), batch=20)
    browser = show(write_report(run, images=pictures))
    found = browser.execute_script(
        """return [...document.querySelectorAll('#table-body canvas')].map(e => [e.getAttribute('aria-label'),
            ...e.getContext('2d').getImageData(0, 0, 8, 1).data.filter((_, i) => i % 4 === 0)])"""
    )
    assert len(found) == 20
    code = int(found[0][0].removeprefix("Image of sample "))
    assert code == run.influence("validation").sort("mu")["sample"][0]
    assert found[0][1:] == np.rint(pictures[code, 0] * 255).tolist()
    encoded = pl.DataFrame({"sample": np.arange(40), "image": [png(i) for i in range(40)]})
    run = synthetic_run(tmp_path / "files", encoded, batch=20)
    browser = show(write_report(run))
    time.sleep(0.3)
    widths = browser.execute_script("return [...document.querySelectorAll('#table-body img')].map(e => e.naturalWidth)")
    assert widths == [4] * 20
    assert problems(browser) == []


def test_fifty_thousand_samples_stay_small_and_quick(show: Show, tmp_path: Path) -> None:
    n = 50_000
    generator = np.random.default_rng(0)
    samples = pl.DataFrame(
        {
            "sample": np.arange(n),
            "text": prose(n, seed=1, longest=40),
            "source": generator.choice(["web", "forum", "books"], n),
            "label": generator.integers(0, 30, n),
            "quality": generator.random(n),
        }
    )
    run = synthetic_run(tmp_path / "large", samples, batch=500)
    path = write_report(run)
    assert path.stat().st_size < 5e6
    began = time.perf_counter()
    browser = show(path)
    # about one second on an idle machine; the bound leaves room for a loaded one
    assert time.perf_counter() - began < 15
    assert len(rows(browser)) == 20
    frame = run.influence("validation")
    spent = browser.execute_script(
        "const t = performance.now(); document.querySelector('#table-head [data-key=mu]').click();"
        "return performance.now() - t"
    )
    assert spent < 3000
    assert sample_ids(browser) == frame.sort("mu", descending=True)["sample"].head(20).to_list()
    assert problems(browser) == []
