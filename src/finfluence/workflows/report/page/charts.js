// Charts: Vega-Lite specifications in the colours of the current theme.

const drawn = new Map();
let turns = 0;

function palette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return Object.fromEntries(["harm", "support", "ink", "muted", "line", "paper"].map((name) => [name, colour(name)]));
}

function themed(value, colours) {
  if (typeof value === "string") return value.startsWith("$") && colours[value.slice(1)] ? colours[value.slice(1)] : value;
  if (Array.isArray(value)) return value.map((one) => themed(one, colours));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, key === "$schema" ? one : themed(one, colours)]));
  }
  return value;
}

function chartConfig(colours) {
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: null,
    font,
    view: { stroke: null },
    axis: {
      labelColor: colours.muted, titleColor: colours.muted, gridColor: colours.line, domainColor: colours.line,
      tickColor: colours.line, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8,
      tickCount: 6, labelFlush: false, labelOverlap: true, labelSeparation: 8,
    },
    text: { fontSize: 12 },
  };
}

// Draws a chart, or draws it again; `data` are the named data sets that the page makes itself.
async function drawChart(id, spec, data = null) {
  turns += 1;
  const turn = turns;
  drawn.get(id)?.view?.finalize();
  drawn.set(id, { spec, data, turn, view: null });
  const colours = palette();
  const filled = data ? { ...spec, datasets: { ...spec.datasets, ...data } } : spec;
  const result = await window.vegaEmbed(byId(id), themed(filled, colours), {
    actions: false, ast: true, renderer: "svg", config: chartConfig(colours), defaultStyle: false,
    tooltip: { theme: document.documentElement.dataset.shade === "dark" ? "dark" : "default" },
  });
  const entry = drawn.get(id);
  // drawn anew, or forgotten, in the meantime
  if (entry?.turn !== turn) {
    result.view.finalize();
    return;
  }
  entry.view = result.view;
  if (entry.data !== data) await renew(entry);
}

async function renew(entry) {
  for (const [name, rows] of Object.entries(entry.data)) entry.view.data(name, rows);
  await entry.view.runAsync();
}

// Draws a chart for the first time, or gives new data to the one that is there.
function showData(id, spec, data) {
  const entry = drawn.get(id);
  if (!entry) return drawChart(id, spec, data);
  entry.data = data;
  return entry.view ? renew(entry) : null;
}

function redrawCharts() {
  for (const [id, entry] of drawn) drawChart(id, entry.spec, entry.data);
}

function forgetChart(id) {
  drawn.get(id)?.view?.finalize();
  drawn.delete(id);
}
