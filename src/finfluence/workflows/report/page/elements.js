// Elements and numbers. Text goes into the page as text nodes alone, never as markup.

const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const space = ["svg", "line", "circle", "rect"].includes(tag) ? "http://www.w3.org/2000/svg" : null;
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const whole = (value) => value.toLocaleString("en-US");
const minus = (text) => text.replace("-", "−");
const isNegative = (value) => value < 0 || Object.is(value, -0);
const signed = (value, decimals) =>
  Number.isFinite(value) ? `${isNegative(value) ? "−" : "+"}${Math.abs(value).toFixed(decimals)}` : "–";
// An interval without 0; its ends are rounded but keep their sign.
const isSure = (low, high) => Number.isFinite(low) && Number.isFinite(high) && isNegative(low) === isNegative(high);
const plain = (value, decimals) => (Number.isFinite(value) ? minus(value.toFixed(decimals)) : "–");
const percent = (value) => {
  const share = value * 100;
  return `${share >= 10 ? share.toFixed(0) : Number(share.toPrecision(2))} %`;
};

const chance = (value) => (value > 0.995 ? ">\u00a00.99" : value.toFixed(2));

// An interval and its point on a common scale from -span to span.
function intervalDrawing(mu, low, high, span) {
  const width = 132;
  const height = 18;
  const place = (value) => width / 2 + (Math.max(-span, Math.min(span, value)) / span) * (width / 2 - 4);
  const side = mu < 0 ? "harm" : "support";
  const sure = isSure(low, high) ? "" : " unsure";
  const drawing = make("svg", { class: `interval ${side}${sure}`, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  drawing.append(make("line", { class: "zero", x1: width / 2, x2: width / 2, y1: 0, y2: height }));
  if (Number.isFinite(low) && Number.isFinite(high)) {
    drawing.append(make("line", { class: "span", x1: place(low), x2: place(high), y1: height / 2, y2: height / 2 }));
  }
  if (Number.isFinite(mu)) drawing.append(make("circle", { cx: place(mu), cy: height / 2, r: 3.5 }));
  return drawing;
}

// μ with its interval below it.
function muCell(mu, low, high, decimals) {
  return make("td", { class: `number mu ${isSure(low, high) ? (mu < 0 ? "harm" : "support") : ""}` },
    make("span", { class: "value" }, signed(mu, decimals)),
    make("span", { class: "ends" }, `${signed(low, decimals)} to ${signed(high, decimals)}`));
}

// What the two sides of an interval's drawing mean.
const spreadTitle = (level) =>
  make("span", { class: "sides" },
    make("span", { class: "unseen" }, `${Math.round(level * 100)} % interval, drawn`),
    make("span", { class: "harm", "aria-hidden": "true" }, "against"),
    make("span", { class: "support", "aria-hidden": "true" }, "supports"));
