// The ranked table: sorted, filtered and shown page by page, so that its size does not depend on the number of samples.

const ROWS = 20;
const LEVEL = 0.05;

function rankedTable(samples, { choose }) {
  let scores = null;
  let order = new Uint32Array(0);
  let page = 0;
  let sort = { key: "mu", down: false };
  let chosen = null;
  const lower = [];
  const shownCategories = samples.categories.slice(0, 3);

  const columns = [
    { key: "id", title: samples.short || samples.pictures ? "sample" : "id", className: "sample" },
    ...shownCategories.map((column) => ({ key: `category:${column.name}`, title: column.name.replaceAll("_", " "), className: "category wide", column })),
    { key: "mu", title: "μ", className: "number" },
    { key: null, title: "", className: "spread" },
    { key: "q", title: "q", className: "number" },
    { key: "visits", title: "visits", className: "number wide", note: "share of all training visits" },
  ];

  function header() {
    const row = make("tr");
    for (const column of columns) {
      const cell = make("th", { scope: "col", class: column.className, title: column.note });
      if (column.key) {
        const state = column.key === sort.key ? (sort.down ? "descending" : "ascending") : "none";
        cell.setAttribute("aria-sort", state);
        cell.append(
          make("button", { type: "button", class: "sorter", "data-key": column.key, onclick: () => sortBy(column.key) }, column.title,
            make("span", { "aria-hidden": "true" }, state === "none" ? "" : sort.down ? " ↓" : " ↑")),
        );
      } else cell.append(spreadTitle(scores.level));
      row.append(cell);
    }
    byId("table-head").replaceChildren(row);
  }

  function sortBy(key) {
    sort = { key, down: sort.key === key ? !sort.down : key === "visits" };
    page = 0;
    arrange();
    byId("table-head").querySelector(`[data-key="${CSS.escape(key)}"]`).focus();
  }

  function comparison() {
    const values = { mu: scores.mu, q: scores.q, visits: samples.visits }[sort.key];
    if (values) return (a, b) => values[a] - values[b];
    if (sort.key === "id") {
      const collator = new Intl.Collator("en", { numeric: true });
      const ids = samples.idOf;
      return (a, b) => (typeof ids(a) === "number" ? ids(a) - ids(b) : collator.compare(ids(a), ids(b)));
    }
    const { codes } = samples.categories.find((column) => `category:${column.name}` === sort.key);
    return (a, b) => codes[a] - codes[b];
  }

  function matcher() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = samples.categories
      .map((column, place) => ({ codes: column.codes, value: byId(`filter-${place}`)?.value ?? "" }))
      .filter((one) => one.value !== "")
      .map((one) => ({ codes: one.codes, value: Number(one.value) }));
    const kind = byId("significance").value;
    return (code) => {
      if (kind !== "all") {
        if (!(scores.q[code] <= LEVEL)) return false;
        if (kind === "harmful" && !(scores.mu[code] < 0)) return false;
        if (kind === "supporting" && !(scores.mu[code] > 0)) return false;
      }
      if (wanted.some((one) => one.codes[code] !== one.value)) return false;
      if (!words.length) return true;
      lower[code] ??= samples.searchText(code);
      return words.every((word) => lower[code].includes(word));
    };
  }

  function arrange() {
    const matches = matcher();
    const found = [];
    for (let code = 0; code < samples.count; code += 1) if (matches(code)) found.push(code);
    const compare = comparison();
    const direction = sort.down ? -1 : 1;
    // samples without an estimate come last either way
    const missing = (code) => (Number.isNaN(scores.mu[code]) ? 1 : 0);
    found.sort((a, b) => missing(a) - missing(b) || direction * compare(a, b) || a - b);
    order = found;
    page = Math.max(0, Math.min(page, Math.ceil(order.length / ROWS) - 1));
    show();
  }

  function sampleCell(code) {
    const id = samples.idOf(code);
    const text = samples.short?.(code);
    const button = make("button", { type: "button", class: "chooser", "data-code": code, "aria-label": `Show sample ${id}`, onkeydown: walk }, String(id));
    const cell = make("th", { scope: "row", class: "sample" });
    const line = make("div", { class: "sample-line" }, samples.picture(code, 32), button);
    if (text) line.append(make("span", { class: "text" }, text + (samples.isCut(code) ? " …" : "")));
    cell.append(line);
    return cell;
  }

  function row(code) {
    const { mu, low, high, q, decimals, span } = scores;
    const line = make("tr", { "data-code": code, class: code === chosen ? "chosen" : null });
    line.append(sampleCell(code));
    for (const column of shownCategories) line.append(make("td", { class: "category wide" }, samples.categoryOf(column, code)));
    line.append(
      muCell(mu[code], low(code), high(code), decimals),
      make("td", { class: "spread" }, intervalDrawing(mu[code], low(code), high(code), span)),
      make("td", { class: "number" }, plain(q[code], 3)),
      make("td", { class: "number wide" }, percent(samples.visits[code])),
    );
    line.addEventListener("click", () => {
      pick(code);
      reveal();
    });
    return line;
  }

  function show() {
    header();
    const first = page * ROWS;
    const rows = Array.from(order.slice(first, first + ROWS), row);
    if (!rows.length) rows.push(make("tr", {}, make("td", { colspan: columns.length, class: "nothing" }, "No sample matches.")));
    byId("table-body").replaceChildren(...rows);
    const last = Math.min(first + ROWS, order.length);
    byId("count").textContent = order.length
      ? `Rows ${whole(first + 1)} to ${whole(last)} of ${whole(order.length)}${order.length < samples.count ? ` (${whole(samples.count)} samples)` : ""}`
      : `None of ${whole(samples.count)} samples`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = last >= order.length;
  }

  function turn(by) {
    page += by;
    show();
  }

  function pick(code) {
    chosen = code;
    for (const line of byId("table-body").children) line.classList.toggle("chosen", line.dataset.code === String(code));
    choose(code);
  }

  // Where the panel stands below the table, on narrow screens, go there.
  function reveal() {
    if (!window.matchMedia("(max-width: 1099px)").matches) return;
    byId("chosen").scrollIntoView();
    byId("chosen-title").focus({ preventScroll: true });
  }

  // Arrow keys go from sample to sample.
  function walk(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const buttons = [...byId("table-body").querySelectorAll(".chooser")];
    buttons[buttons.indexOf(event.currentTarget) + by]?.focus();
  }

  function filters() {
    const host = byId("filters");
    samples.categories.slice(0, 6).forEach((column, place) => {
      const choice = make("select", { id: `filter-${place}`, onchange: restart }, make("option", { value: "" }, "all"));
      column.values.forEach((value, code) => choice.append(make("option", { value: code }, value)));
      host.append(make("label", {}, make("span", {}, column.name.replaceAll("_", " ")), choice));
    });
  }

  function restart() {
    page = 0;
    arrange();
  }

  let waiting = 0;
  byId("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(restart, 120);
  });
  byId("significance").addEventListener("change", restart);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  filters();

  return {
    show(found) {
      scores = found;
      page = 0;
      arrange();
      if (order.length) pick(order[0]);
    },
    forget() {
      chosen = null;
      for (const line of byId("table-body").children) line.classList.remove("chosen");
    },
  };
}
