// What is chosen, a sample or a group: its numbers, its visits over training, and what a test on one retraining sees.

function chosenPanel(samples, charts) {
  let current = null;

  function facts(rows) {
    byId("chosen-facts").replaceChildren(
      ...rows.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]),
    );
  }

  // μ in words, one line of arithmetic each.
  function words({ mu, low, high, decimals, level }, what) {
    const direction = !isSure(low, high) ? "direction not certain" : mu < 0 ? "works against the measured behaviour" : "supports the measured behaviour";
    const side = mu < 0 ? "lower" : "higher";
    const needed = retrainings(mu);
    byId("chosen-mu").replaceChildren(
      make("span", { class: `big ${mu < 0 ? "harm" : "support"}` }, `μ ${signed(mu, decimals)}`),
      make("span", { class: "ends" }, `${Math.round(level * 100)} %: ${signed(low, decimals)} to ${signed(high, decimals)}`),
      make("span", { class: "direction" }, direction),
    );
    byId("chosen-words").textContent = Number.isFinite(mu)
      ? `Retraining without ${what} measures ${side} with probability ${chance(superiority(Math.abs(mu)))}; `
        + (Number.isFinite(needed) ? `seeing that takes ${whole(needed)} ${needed === 1 ? "retraining" : "retrainings"} an arm (5 % level, 80 % power).` : "no number of retrainings shows it.")
      : "There is no estimate: no batch held it.";
  }

  function folded({ name, text, total }) {
    const first = 600;
    const block = make("div", { class: "prose" }, make("h4", {}, name));
    if (text.length <= first) block.append(make("p", {}, text));
    else {
      block.append(make("p", {}, `${text.slice(0, first)} …`),
        make("details", {}, make("summary", {}, `more (${whole(text.length - first)} characters)`), make("p", {}, text.slice(first))));
    }
    if (total > text.length) {
      block.append(make("p", { class: "note" }, `${whole(text.length)} of ${whole(total)} characters are in this page.`));
    }
    return block;
  }

  function showSample(code, scores) {
    const id = samples.idOf(code);
    byId("chosen-title").textContent = `Sample ${id}`;
    byId("chosen-image").replaceChildren(samples.picture(code, 96) ?? "");
    byId("chosen-body").replaceChildren(...samples.texts(code).map(folded));
    current = { mu: scores.mu[code], low: scores.low(code), high: scores.high(code), q: scores.q[code], decimals: scores.decimals, level: scores.level };
    const each = scores.eachOf(code);
    facts([
      ...(each ? [["μ in each run", each.mu.map((mu) => signed(mu, 2)).join(", ")], ["certain in", `${each.certain} of ${each.runs} runs`]] : []),
      ...samples.categories.map((column) => [column.name.replaceAll("_", " "), samples.categoryOf(column, code) || "–"]),
      ...samples.numbers.map((column) => [column.name.replaceAll("_", " "), plain(column.values[code], 3)]),
      ["q-value", plain(current.q, 3)],
      ["share of training visits", percent(samples.visits[code])],
    ]);
    words(current, "it");
    showVisits(scores.visitsOf(code), scores);
    showPower();
  }

  function showGroup(group, scores) {
    byId("chosen-title").textContent = group.title;
    byId("chosen-image").replaceChildren();
    byId("chosen-body").replaceChildren();
    current = { mu: group.mu, low: group.low, high: group.high, q: group.q, decimals: 2, level: scores.level };
    facts([["samples", whole(group.size)], ...(group.q === null ? [] : [["q-value", plain(group.q, 3)]])]);
    words(current, "them");
    byId("visits-part").hidden = true;
    showPower();
  }

  function showVisits(visits, scores) {
    byId("visits-part").hidden = false;
    byId("visits-figure").hidden = !visits;
    byId("visits-missing").hidden = Boolean(visits);
    if (!visits) {
      byId("visits-missing").textContent = scores.visitsNote;
      return;
    }
    let sum = 0;
    const rows = visits.map(({ step, value }) => ({ step, value, zero: 0, sum: (sum += value) }));
    const ends = [{ step: scores.steps[1], sum }];
    byId("visits-text").textContent =
      `${whole(rows.length)} visits; their contributions add up to ${signed(sum, scores.decimals)}. ${scores.visitsText}`;
    showData("visits-chart", charts.signal, { visits: rows, ends: [{ step: scores.steps[0], sum: 0 }, ...rows, ...ends] });
  }

  function showPower() {
    const alpha = Number(byId("alpha").value);
    const { mu, low, high } = current;
    const found = power(alpha, mu);
    byId("alpha-value").textContent = alpha.toFixed(3);
    const output = byId("power");
    output.textContent = found.toFixed(3);
    output.dataset.exact = String(found);
    byId("alpha").setAttribute("aria-valuetext", `type-I error ${alpha.toFixed(3)}, power ${found.toFixed(3)}`);
    byId("power-text").textContent =
      `Seeing one retrained model, the best test with ${percent(alpha)} false alarms notices the removal with probability `
      + `${found.toFixed(3)}; guessing would with ${alpha.toFixed(3)}. The band is the interval of μ.`;
    // the band: the weakest and the strongest |mu| that the interval holds
    const ends = [Math.abs(low), Math.abs(high)].filter(Number.isFinite);
    const weakest = !isSure(low, high) ? 0 : Math.min(...ends, Math.abs(mu));
    const strongest = Math.max(...ends, Math.abs(mu));
    const curve = [];
    for (let i = 0; i <= 100; i += 1) {
      // closer together near 0, where the curve bends
      const a = (i / 100) ** 2;
      curve.push({ alpha: a, beta: typeTwoError(a, mu), low: typeTwoError(a, strongest), high: typeTwoError(a, weakest) });
    }
    const point = [{ alpha, beta: 1 - found, one: 1 }];
    showData("tradeoff-chart", charts.tradeoff, { curve, point });
  }

  byId("alpha").addEventListener("input", () => current && showPower());
  return { showSample, showGroup };
}
