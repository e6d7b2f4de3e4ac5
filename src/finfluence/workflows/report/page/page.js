// The page: which query is shown, its sections, and the theme.

function setTheme(shade) {
  document.documentElement.dataset.shade = shade;
  byId("theme").textContent = shade === "dark" ? "Light theme" : "Dark theme";
  redrawCharts();
}

function startTheme() {
  const preference = window.matchMedia("(prefers-color-scheme: dark)");
  let own = null;
  // storage may be forbidden for files
  try { own = localStorage.getItem("finfluence-theme"); } catch { own = null; }
  setTheme(own ?? (preference.matches ? "dark" : "light"));
  preference.addEventListener("change", () => { if (!own) setTheme(preference.matches ? "dark" : "light"); });
  byId("theme").addEventListener("click", () => {
    own = document.documentElement.dataset.shade === "dark" ? "light" : "dark";
    try { localStorage.setItem("finfluence-theme", own); } catch { /* this visit only */ }
    setTheme(own);
  });
}

function simpleTable(caption, titles, rows) {
  const head = make("tr", {}, ...titles.map((title, place) => make("th", { scope: "col", class: place ? "number" : null }, title)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, place) =>
    place ? make("td", { class: "number" }, cell) : make("th", { scope: "row" }, cell))));
  return make("table", { class: "plain" }, make("caption", { class: "unseen" }, caption), make("thead", {}, head), make("tbody", {}, ...body));
}

function start(read) {
  const about = read("about");
  const charts = read("charts");
  const samples = sampleTable(read);
  const panel = chosenPanel(samples, charts);
  let scores = null;
  const ranked = rankedTable(samples, {
    choose: (code) => panel.showSample(code, scores),
  });

  function scoresOf(place) {
    const query = read(`query:${place}`);
    const low = read(`low:${place}`);
    const high = read(`high:${place}`);
    const mu = read(`mu:${place}`);
    const unit = 10 ** query.decimals;
    // the two smallest numbers stand for "none" and for what prints as -0
    const end = (ends) => (code) => (ends[code] > -2147483647 ? ends[code] / unit : ends[code] === -2147483647 ? -0 : NaN);
    const rows = read(`visit-rows:${place}`);
    const starts = read(`visit-starts:${place}`);
    const steps = read(`visit-steps:${place}`);
    const values = read(`visit-values:${place}`);
    const places = new Map(Array.from(rows, (code, at) => [code, at]));
    // of several runs, what each says of the samples at both ends
    const each = query.runs && new Map(Array.from(read(`each-rows:${place}`), (code, at) => [code, at]));
    const eachMu = each && read(`each-mu:${place}`);
    const eachCertain = each && read(`each-certain:${place}`);
    const runs = each && each.size ? eachMu.length / each.size : 0;
    let span = 0;
    for (let code = 0; code < mu.length; code += 1) {
      const most = Math.max(Math.abs(end(low)(code)) || 0, Math.abs(end(high)(code)) || 0, Math.abs(mu[code]) || 0);
      if (most > span) span = most;
    }
    return {
      ...query, mu, low: end(low), high: end(high), q: read(`q:${place}`), span: span || 1, steps: about.steps,
      eachOf(code) {
        const at = each ? each.get(code) : undefined;
        return at === undefined ? null : { mu: Array.from(eachMu.subarray(at * runs, (at + 1) * runs)), certain: eachCertain[at], runs };
      },
      visitsOf(code) {
        const at = places.get(code);
        if (at === undefined || starts[at] === starts[at + 1]) return null;
        return Array.from(steps.subarray(starts[at], starts[at + 1]), (step, i) => ({ step, value: values[starts[at] + i] }));
      },
    };
  }

  function chooseGroup(group) {
    ranked.forget();
    panel.showGroup(group, scores);
    byId("chosen").scrollIntoView({ block: "nearest" });
    byId("chosen-title").focus({ preventScroll: true });
  }

  // What retraining measured, where it did, stands below the sum of the samples' μ.
  function groupCell(row, mu, low, high) {
    const cell = muCell(mu, low, high, 2);
    if (row.retrained) {
      const [measured, from, to] = row.retrained.map((value) => value ?? NaN);
      cell.append(make("span", { class: `retrained ${measured < 0 ? "harm" : "support"}` }, `retrained ${signed(measured, 2)}`),
        make("span", { class: "ends" }, `${signed(from, 2)} to ${signed(to, 2)}`));
    }
    return cell;
  }

  function groupTable({ column, rows }) {
    const span = Math.max(...rows.map((row) => Math.max(Math.abs(row.low ?? 0), Math.abs(row.high ?? 0), Math.abs(row.mu ?? 0)))) || 1;
    const body = rows.map((row) => {
      const low = row.low ?? NaN;
      const high = row.high ?? NaN;
      const mu = row.mu ?? NaN;
      const title = `${column.replaceAll("_", " ")} = ${row.group}`;
      const button = make("button", { type: "button", class: "chooser", "aria-label": `Show group ${title}`, onclick: () => chooseGroup({ ...row, mu, low, high, title: `Group ${title}` }) }, row.group);
      return make("tr", {},
        make("th", { scope: "row" }, button),
        make("td", { class: "number wide" }, whole(row.size)),
        groupCell(row, mu, low, high),
        make("td", { class: "spread" }, intervalDrawing(mu, low, high, span)),
        make("td", { class: "number" }, plain(row.q ?? NaN, 3)));
    });
    const titles = [[column.replaceAll("_", " "), ""], ["samples", "number wide"], ["μ", "number"], [spreadTitle(scores.level), "spread"], ["q", "number"]];
    const head = make("tr", {}, ...titles.map(([title, className]) => make("th", { scope: "col", class: className }, title)));
    const caption = make("caption", {}, `By ${column.replaceAll("_", " ")}`);
    return make("div", { class: "scroll" }, make("table", { class: "groups" }, caption, make("thead", {}, head), make("tbody", {}, ...body)));
  }

  // A section with one chart, its sentence and its numbers; hidden where there is nothing.
  function section(name, found) {
    byId(name).hidden = !found;
    document.querySelectorAll(`nav a[href="#${name}"]`).forEach((link) => { link.parentElement.hidden = !found; });
    forgetChart(`${name}-chart`);
    byId(`${name}-chart`).replaceChildren();
    if (!found) return;
    byId(`${name}-text`).textContent = found.text;
    byId(`${name}-chart`).hidden = !found.chart;
    byId(`${name}-numbers`).replaceChildren(found.table ? simpleTable(found.caption, found.titles, found.table) : "");
    byId(`${name}-fold`).hidden = !found.table;
    if (found.chart) drawChart(`${name}-chart`, found.chart);
  }

  function showQuery(place) {
    scores = scoresOf(place);
    document.querySelectorAll("[data-query-name]").forEach((element) => { element.textContent = scores.name; });
    byId("tally-harm").textContent = whole(scores.harmful);
    byId("tally-support").textContent = whole(scores.supporting);
    byId("tally-none").textContent = whole(samples.count - scores.harmful - scores.supporting);
    byId("estimate").textContent = scores.estimate;
    byId("groups").hidden = !scores.groups.length;
    document.querySelectorAll('nav a[href="#groups"]').forEach((link) => { link.parentElement.hidden = !scores.groups.length; });
    byId("groups-tables").replaceChildren(...scores.groups.map(groupTable));
    byId("groups-note").textContent = scores.groupsNote;
    section("removal", scores.removal);
    const cut = scores.removal?.cut;
    byId("removal-choose").hidden = !cut;
    byId("removal-choose").onclick = () => chooseGroup(cut);
    section("verified", scores.verified);
    section("runs", scores.runs);
    section("agreement", scores.agreement);
    ranked.show(scores);
  }

  const choice = byId("query");
  if (choice) choice.addEventListener("change", () => showQuery(Number(choice.value)));
  for (const name of ["loss", "residual", "adjoint"]) if (charts[name]) drawChart(`${name}-chart`, charts[name]);
  showQuery(0);
}

async function main() {
  startTheme();
  try {
    if (!("DecompressionStream" in window)) throw new Error("this browser is too old to unpack the page (it lacks DecompressionStream)");
    start(await readPayload());
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    byId("failure").hidden = false;
    byId("failure").textContent = `This page could not be shown: ${error.message}.`;
    console.error(error);
  }
}

window.finfluenceReport = { cdf, quantile, power, typeTwoError, superiority, retrainings };
main();
